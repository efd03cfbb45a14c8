"""The same inputs give the same bytes and digits, whoever computes which block, and when."""

import hashlib
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from families import TORCH_DTYPE, assert_same_bits, bits, from_bits, load, save

import skillvec as sv
from skillvec.ops.block import BLOCK_NUMEL
from skillvec.ops.philox import draw_uint16

WORKERS = (1, 2, 5)
WILD = {"allow_nonfinite": True}  # of what is planted below
SIZES = {
    "one": (1,),
    "short": (BLOCK_NUMEL - 1,),
    "exact": (512, 1024),
    "over": (BLOCK_NUMEL + 1,),
    "three": (2 * BLOCK_NUMEL + 77,),
    "empty": (0, 3),
}


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BF16 tensors around the block of 2^20 values, with -0, NaN and infinities at block ends."""
    assert BLOCK_NUMEL == 1 << 20  # part of the file format: exceptions are listed by block
    folder = tmp_path_factory.mktemp("big")
    rng = np.random.default_rng(30)
    sides: dict[str, dict[str, torch.Tensor]] = {"base": {}, "tuned": {}, "target": {}}
    for name, shape in SIZES.items():
        weights = torch.from_numpy(rng.normal(size=shape).astype(np.float32) * 0.02).bfloat16()
        noise = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
        if name in ("short", "three"):  # worth a bitmap
            noise *= torch.from_numpy(rng.random(size=shape) < 0.3)
        sides["base"][name] = weights
        sides["tuned"][name] = (weights.float() + noise * 1e-3).bfloat16()
        sides["target"][name] = (weights.float() + noise.flip(0) * 2e-3).bfloat16()
    for name in ("short", "exact", "over", "three"):
        tuned = bits(sides["tuned"][name]).copy()
        ends = [0, tuned.size - 1]
        ends += [i for i in (BLOCK_NUMEL - 1, BLOCK_NUMEL) if i < tuned.size]
        tuned[ends] = np.resize(np.array([0x8000, 0x7FC1, 0xFF80], np.uint16), len(ends))
        sides["tuned"][name] = from_bits(tuned, "BF16", SIZES[name])
    for side, tensors in sides.items():
        save(folder / side, tensors, shards=2 if side == "target" else 1)
    return folder


def whole_files(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def merged(big: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the difference, taken as it is added, makes of the target: no codec has touched it."""
    out = tmp_path_factory.mktemp("merged") / "out"
    sv.apply(big / "target", None, out, tuned=big / "tuned", base=big / "base", lam=0.7,
             **WILD)  # fmt: skip
    return {file.name: tensor_data(file) for file in sorted(out.glob("*.safetensors"))}


def tensor_data(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


@pytest.mark.parametrize(
    ("codec", "size"), [("dense", "5GB"), ("sparse", "5GB"), ("packed", "5GB"), ("auto", "3MB")]
)
def test_vector_files_are_identical_byte_by_byte(
    codec: str, size: str, big: Path, merged: dict[str, str], tmp_path: Path
) -> None:
    """And so is what they make of a model, whatever the codec."""
    found = []
    for workers in WORKERS:
        path = tmp_path / str(workers) / "v.safetensors"
        path.parent.mkdir()
        options = {"codec": codec, "max_shard_size": size, "workers": workers, **WILD}
        vector = sv.diff(big / "tuned", big / "base", path, **options)
        found.append(whole_files(path))
        assert vector.manifest["exactness"]["claim"] == "bitwise"
        assert vector.manifest["exactness"]["exceptions"] > 1000
    assert found[0] == found[1] == found[2]
    assert (len(found[0]) > 2) == (size != "5GB")
    used = {entry["codec"] for entry in vector.manifest["tensors"].values()}
    assert (codec if codec != "auto" else "packed") in used
    sv.apply(big / "target", vector, tmp_path / "out", lam=0.7, workers=2, **WILD)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert {file.name: tensor_data(file) for file in files} == merged
    sv.apply(big / "base", vector, tmp_path / "back", workers=5, **WILD)
    assert_same_bits(tmp_path / "back", big / "tuned")


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_merged_files_and_reports_are_identical(rounding: str, big: Path, tmp_path: Path) -> None:
    vector = sv.diff(big / "tuned", big / "base", tmp_path / "v.safetensors", **WILD)
    found, reports = [], []
    for workers in WORKERS:
        out = tmp_path / str(workers)
        report = sv.apply(
            big / "target", vector, out, lam=0.7, rounding=rounding, seed=5, workers=workers,
            **WILD,
        )  # fmt: skip
        found.append(whole_files(out))
        reports.append((report.ledger, report.facts["gain"], report.facts["cosine"]))
    assert found[0] == found[1] == found[2]
    assert reports[0] == reports[1] == reports[2]


def test_a_second_run_writes_the_same_bytes_and_a_seed_others(big: Path, tmp_path: Path) -> None:
    vector = sv.diff(big / "tuned", big / "base")
    found = []
    for number, seed in enumerate((1, 1, 2)):
        out = tmp_path / str(number)
        sv.apply(big / "target", vector, out, lam=0.7, rounding="stochastic", seed=seed,
                 **WILD)  # fmt: skip
        found.append(load(out))
    assert_same_bits(found[0], found[1])
    assert not torch.equal(found[0]["three"], found[2]["three"])


def test_orthogonality_gives_the_same_digits(big: Path, tmp_path: Path) -> None:
    stored = sv.diff(big / "tuned", big / "base", tmp_path / "v.safetensors", **WILD)
    pair = f"{big / 'target'}::{big / 'base'}"
    found = [sv.orthogonality(stored, pair, workers=w, **WILD).facts["pairs"] for w in WORKERS]
    assert found[0] == found[1] == found[2]  # == on floats: every digit


def test_what_is_written_does_not_depend_on_shards(big: Path, tmp_path: Path) -> None:
    """The same tensors in one file and in two shards give the same vector values."""
    save(tmp_path / "one", load(big / "target"))
    for name, tuned in (("a", tmp_path / "one"), ("b", big / "target")):
        sv.diff(tuned, big / "base", tmp_path / f"{name}.safetensors")
    assert_same_bits(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


@pytest.mark.parametrize("dtype", ["F16", "F32", "F64"])
def test_blocks_of_every_width_land_in_their_place(dtype: str, tmp_path: Path) -> None:
    """Two blocks of 2, 4 and 8 bytes a value, in a vector and in models of either width."""
    rng = np.random.default_rng(31)
    base = torch.from_numpy(rng.normal(size=BLOCK_NUMEL + 5) * 0.02).to(TORCH_DTYPE[dtype])
    tuned = (base.double() * 1.01).to(base.dtype)
    target = torch.from_numpy(rng.normal(size=base.numel())).to(torch.bfloat16)
    for side, tensor in (("base", base), ("tuned", tuned), ("target", target)):
        save(tmp_path / side, {"w": tensor, "x": tensor[:3].clone()})
    vector = sv.diff(tmp_path / "tuned", tmp_path / "base", tmp_path / "v.safetensors")
    sv.apply(tmp_path / "target", vector, tmp_path / "out", dtype="fp32")
    found, difference = load(tmp_path / "out"), oracle.delta(tuned, base)
    if dtype == "F32":  # stored as the fp32 difference
        difference = oracle.wide(oracle.round_to(difference, "F32"))
    expected = oracle.apply(target, difference, 1.0, "F32")
    assert_same_bits(found, {"w": expected, "x": expected[:3].clone()})


@pytest.mark.parametrize("lam", [1.0, 0.5, -1.3])
def test_realised_gain_and_cosine_are_numpys(lam: float, big: Path, tmp_path: Path) -> None:
    """<w, lam v> / |lam v|^2 and the cosine over every value, tensor by tensor and overall."""
    vector = sv.diff(big / "tuned", big / "base")
    report = sv.apply(big / "target", vector, tmp_path / "out", lam=lam, **WILD)
    out, sides = load(tmp_path / "out"), [load(big / s) for s in ("target", "tuned", "base")]
    lines = {line["name"]: line for line in report.ledger}
    sums = np.zeros(3)
    for name, written in out.items():
        moved = oracle.delta(written, sides[0][name])
        asked = lam * oracle.delta(sides[1][name], sides[2][name])
        own = np.array([moved @ moved, moved @ asked, asked @ asked])
        sums += own
        line = lines[name]
        assert line["changed"] == np.count_nonzero(moved)
        if own[2]:
            assert line["gain"] == pytest.approx(own[1] / own[2], abs=1e-6), name
        if own[0] and own[2]:
            cosine = own[1] / np.sqrt(own[0] * own[2])
            assert line["cosine"] == pytest.approx(cosine, abs=1e-6), name
    assert report.facts["gain"] == pytest.approx(sums[1] / sums[2], abs=1e-6)
    cosine = sums[1] / np.sqrt(sums[0] * sums[2])
    assert report.facts["cosine"] == pytest.approx(cosine, abs=1e-6)
    assert report.facts["changed"] == sum(line["changed"] for line in report.ledger)


def test_gain_is_a_staircase_that_the_report_shows(tmp_path: Path) -> None:
    """Deltas of one step: lam .4 moves nothing, .5 ties to even, .6 moves everything."""
    base = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    tuned = base + 2.0**-7
    save(tmp_path / "base", {"w": base})
    save(tmp_path / "tuned", {"w": tuned})
    vector = sv.diff(tmp_path / "tuned", tmp_path / "base")
    for lam, gain in ((0.4, 0.0), (0.5, 0.0), (0.6, 1 / 0.6), (1.0, 1.0), (1.4, 1 / 1.4)):
        report = sv.apply(tmp_path / "base", vector, tmp_path / f"{lam}", lam=lam)
        assert report.facts["gain"] == pytest.approx(gain, rel=1e-5), lam
        told = any("rounding" in warning for warning in report.warnings)
        assert told == (not 0.9 <= gain <= 1.1)
        assert report.facts["cosine"] == (pytest.approx(1.0) if gain else None)


def test_manifest_norms_are_numpys(big: Path, tmp_path: Path) -> None:
    """Five digits are stored: half of the last, and the 1e-5 of the sums."""
    vector = sv.diff(big / "target", big / "base", tmp_path / "v.safetensors")
    target, base = load(big / "target"), load(big / "base")
    for name, entry in vector.manifest["tensors"].items():
        difference = oracle.delta(target[name], base[name])
        assert entry["norm"] == pytest.approx(np.sqrt(difference @ difference), rel=6e-5)
        assert entry["changed"] == np.count_nonzero(bits(target[name]) != bits(base[name]))


# --------------------------------------------------------------------- addressed randomness


def test_random_bits_continue_from_block_to_block() -> None:
    """Block 1 is what follows block 0 in the one stream of a tensor: no overlap and no gap."""
    from xxhash import xxh3_128_digest

    key = np.frombuffer(xxh3_128_digest(b"7:w"), "<u8")
    stream = np.random.Philox(key=key).random_raw(2 * BLOCK_NUMEL // 4).astype("<u8").view("<u2")
    assert np.array_equal(draw_uint16("7:w", 0, BLOCK_NUMEL), stream[:BLOCK_NUMEL])
    assert np.array_equal(draw_uint16("7:w", BLOCK_NUMEL, BLOCK_NUMEL), stream[BLOCK_NUMEL:])
    for numel in (1, 3, 5, 77):
        assert np.array_equal(draw_uint16("7:w", 0, numel), stream[:numel])


def test_random_bits_depend_on_seed_and_tensor() -> None:
    draws = [draw_uint16(f"{seed}:{name}", 0, 64) for seed in (0, 1) for name in ("a", "b")]
    assert len({draw.tobytes() for draw in draws}) == 4


def test_random_bits_are_uniform() -> None:
    """Mean within five sigmas of 32767.5 (std 18918 / sqrt n); every bit is set half the time."""
    draw = draw_uint16("0:model.embed_tokens.weight", 0, BLOCK_NUMEL)
    assert abs(draw.mean() - 32767.5) < 5 * 18918.6 / BLOCK_NUMEL**0.5
    for bit in range(16):
        share = float(((draw >> bit) & 1).mean())
        assert abs(share - 0.5) < 5 * 0.5 / BLOCK_NUMEL**0.5
