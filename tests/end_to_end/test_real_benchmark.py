"""benchmarks/real.py: its oracle against fractions, its counts, copies and rows, on small files."""

import json
import sqlite3
from fractions import Fraction
from pathlib import Path

import exact
import numpy as np
import pytest
import real
import real_models
import real_peers
from exact import STORED, compare, round_once, sum_to_odd
from safetensors.numpy import save_file

# significant bits, and the exponents of the least and the greatest power of two
KINDS = {"F32": (24, -149, 127), "F16": (11, -24, 15), "BF16": (8, -133, 127)}


def nearest(value: Fraction, dtype: str) -> Fraction | None:
    """Round to the nearest value of a dtype, ties to even; None is infinity."""
    bits, least, greatest = KINDS[dtype]
    if not value:
        return Fraction(0)
    power = abs(value).numerator.bit_length() - abs(value).denominator.bit_length() + 1
    while Fraction(2) ** power > abs(value):
        power -= 1
    unit = Fraction(2) ** max(power - bits + 1, least)
    rounded = round(value / unit) * unit  # of a Fraction, ties to even
    return None if abs(rounded) >= Fraction(2) ** (greatest + 1) else rounded


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return float32 numbers as values of a dtype, cut where they do not fit."""
    if dtype == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(STORED[dtype])


def draw(rng: np.random.Generator, dtype: str, numel: int, spread: int) -> np.ndarray:
    """Return numbers whose exponents lie up to `spread` apart, many with few bits."""
    mantissa = rng.integers(-(2**24), 2**24, numel) & -(1 << rng.integers(0, 24, numel))
    values = np.ldexp(mantissa.astype(np.float64), rng.integers(-24 - spread, -23, numel))
    return exact.widen(stored(values, dtype), dtype)


@pytest.mark.parametrize("out", KINDS)
@pytest.mark.parametrize(("dtype", "spread"), [("F32", 3), ("F32", 30), ("F32", 120), ("BF16", 9)])
def test_sums_are_those_of_fractions(dtype: str, spread: int, out: str):
    rng = np.random.default_rng(spread)
    a, b, c = (draw(rng, dtype, 2000, spread) for _ in range(3))
    c[::3] = -b[::3] * (1 + 2.0**-7 * rng.integers(0, 2, c[::3].size))  # cancels almost wholly
    c = exact.widen(stored(c, dtype), dtype)
    found = exact.widen(round_once(sum_to_odd(a, b, c), out), out)
    for x, y, z, got in zip(a, b, c, found, strict=True):
        right = nearest(sum(map(Fraction, (x, y, z))), out)
        assert np.isinf(got) if right is None else Fraction(got) == right


def test_a_value_just_beside_a_tie_is_rounded_from_where_it_is():
    one, half, tiny = 1.0, 2.0**-24, 2.0**-100  # 1 + half is a tie of float32, which goes to 1
    values = [np.array([x, x]) for x in (one, half)] + [np.array([tiny, -tiny])]
    assert (np.add(values[0], values[1]) + values[2] == 1 + half).all()  # float64 does not see it
    found = round_once(sum_to_odd(*values), "F32")
    assert found.tolist() == [1 + 2.0**-23, 1.0]
    values[1] = np.array([2.0**-8, 2.0**-8])  # a tie of bf16
    found = exact.widen(round_once(sum_to_odd(*values), "BF16"), "BF16")
    assert found.tolist() == [1 + 2.0**-7, 1.0]
    assert stored(np.float32(1 + 2.0**-8 + tiny), "BF16") == stored(np.float32(1), "BF16")


def test_what_vanishes_below_the_least_number_is_still_seen():
    value = np.array([2.0**-150 * 1.5, -(2.0**-160)])
    assert exact.widen(round_once(value, "F32"), "F32").tolist() == [2.0**-149, 0]
    assert round_once(value, "BF16").tolist() == [0, 0x8000]


# ------------------------------------------------------------------------------------- the counts


def write_bf16(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write bf16 bits as a safetensors file, by hand: numpy has no such dtype."""
    header, data = {}, b""
    for name, bits in tensors.items():
        offsets = [len(data), len(data) + bits.nbytes]
        header[name] = {"dtype": "BF16", "shape": bits.shape, "data_offsets": offsets}
        data += bits.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    rng = np.random.default_rng(1)
    kinds = {"base": 0.0, "tuned": 1e-4, "target": 1e-3}
    start = {"a.weight": rng.normal(0, 0.02, (40, 30)), "b.weight": rng.normal(1, 0.1, 50)}
    for role, size in kinds.items():
        (tmp_path / role).mkdir()
        moved = {n: (v + rng.normal(0, 1, v.shape) * size).astype("f4") for n, v in start.items()}
        save_file(moved, tmp_path / role / "model.safetensors")
    return {role: tmp_path / role for role in kinds}


def read(place: Path) -> dict[str, np.ndarray]:
    found = exact.tensors(place)
    return {n: exact.block(t, 0).reshape(t.shape).copy() for n, t in found.items()}


def right_sum(models: dict[str, Path]) -> dict[str, np.ndarray]:
    """Return target + (tuned - base), each value by way of fractions."""
    roles = {role: read(place) for role, place in models.items()}

    def one(target: float, tuned: float, base: float) -> float:
        exactly = Fraction(float(target)) + Fraction(float(tuned)) - Fraction(float(base))
        return float(nearest(exactly, "F32") or 0)

    by_value = np.vectorize(one, otypes=["f4"])
    return {n: by_value(roles["target"][n], roles["tuned"][n], roles["base"][n])
            for n in roles["tuned"]}  # fmt: skip


def test_a_right_sum_has_no_wrong_value_and_each_wrong_one_counts(models: dict[str, Path]):
    out, right = models["base"].parent / "out.safetensors", right_sum(models)
    save_file(right, out)
    found = compare(out, "sum", models)
    assert found.pop("values") == 1250
    assert not any(found.values())
    right["a.weight"][3, :4] = np.nextafter(right["a.weight"][3, :4], np.float32(9))
    right["b.weight"][7] += 1e-3
    save_file(right, out)
    found = compare(out, "sum", models)
    assert (found["wrong"], found["unequal_bits"]) == (5, 5)
    moved = [read(models["tuned"])[n].astype("f8") - read(models["base"])[n] for n in right]
    assert found["lost"] == pytest.approx(1e-3 / np.sqrt(sum((v**2).sum() for v in moved)), 1e-3)
    right["b.weight"][7] = np.nan
    save_file(right, out)
    assert compare(out, "sum", models)["wrong"] == 5


def test_rounding_on_the_way_is_seen(models: dict[str, Path]):
    roles = {role: read(place) for role, place in models.items()}
    first = {n: (roles["target"][n] + roles["tuned"][n]) - roles["base"][n] for n in roles["base"]}
    out, right = models["base"].parent / "out.safetensors", right_sum(models)
    save_file(first, out)
    wrong = sum(int((first[n] != right[n]).sum()) for n in first)
    assert wrong > 100
    assert compare(out, "sum", models)["wrong"] == wrong


def test_a_zero_of_the_other_sign_is_right_but_not_the_same_bits(models: dict[str, Path]):
    tuned = read(models["tuned"])
    tuned["b.weight"][:2] = 0.0
    save_file(tuned, models["tuned"] / "model.safetensors")
    tuned["b.weight"][1] = -0.0
    out = models["base"].parent / "out.safetensors"
    save_file(tuned, out)
    sources = {role: models[role] for role in ("tuned", "base")}
    found = compare(out, "tuned", sources)
    assert (found["wrong"], found["unequal_bits"], found["lost"]) == (0, 1, 0)


def test_a_vector_is_judged_in_the_dtype_it_is_stored_in(models: dict[str, Path]):
    sources = {role: models[role] for role in ("tuned", "base")}
    tuned, base = (read(place) for place in sources.values())
    differences = {n: tuned[n].astype("f8") - base[n] for n in tuned}
    out = models["base"].parent / "v.safetensors"
    save_file({n: v.astype("f4") for n, v in differences.items()}, out)
    assert compare(out, "vector", sources)["wrong"] == 0
    cut = {n: stored(v, "BF16") for n, v in differences.items()}
    write_bf16(out, cut)
    found = compare(out, "vector", sources)
    assert 400 < found["wrong"] < 800  # cut, not rounded: about half are a step too small
    assert 1e-3 < found["lost"] < 1e-2
    assert found["other_dtype"] == 2


def test_tensors_that_are_missing_misshapen_or_more_are_told(models: dict[str, Path]):
    sources = {role: models[role] for role in ("tuned", "base")}
    tuned = read(models["tuned"])
    out = models["base"].parent / "out.safetensors"
    save_file({"a.weight": tuned["a.weight"], "b.weight": tuned["b.weight"][:49]}, out)
    found = compare(out, "tuned", sources)
    assert (found["missing"], found["wrong"]) == (1, 50)
    save_file({"b.weight": tuned["b.weight"], "lm_head.weight": tuned["a.weight"]}, out)
    found = compare(out, "tuned", sources)
    assert (found["missing"], found["extra"], found["wrong"]) == (1, 1, 1200)


def test_nothing_is_counted_over_models_that_do_not_fit(models: dict[str, Path]):
    out = models["base"].parent / "out.safetensors"
    base = read(models["base"])
    save_file(base, out)
    base["a.weight"][0, 0] = np.inf
    save_file(base, models["base"] / "model.safetensors")
    with pytest.raises(ValueError, match=r"a\.weight: a model has values that are not finite"):
        compare(out, "sum", models)
    save_file({"a.weight": base["a.weight"]}, models["base"] / "model.safetensors")
    with pytest.raises(ValueError, match="names or shapes are not those of the tuned model"):
        compare(out, "sum", models)
    save_file({"a.weight": np.arange(3)}, out)
    with pytest.raises(ValueError, match="tensors of I64"):
        compare(out, "sum", models)


def test_a_database_is_read_as_its_file_is(models: dict[str, Path]):
    held = read(models["tuned"])
    place = models["base"].parent / "tuned.db"
    base = sqlite3.connect(place)
    base.execute("CREATE TABLE tensors (name TEXT, shape TEXT, dtype TEXT, data BLOB)")
    for name, values in held.items():
        row = (name, json.dumps(values.shape[::-1]), "F32", values.tobytes())
        base.execute("INSERT INTO tensors VALUES (?, ?, ?, ?)", row)
    base.commit()
    base.close()
    sources = {role: models[role] for role in ("tuned", "base")}
    assert compare(place, "tuned", sources)["unequal_bits"] == 0
    assert compare(models["base"], "tuned", sources)["wrong"] > 1000


# --------------------------------------------------------------------- copies, stand-ins and rows


def test_a_copy_in_bf16_is_rounded_once_and_says_its_dtype(models: dict[str, Path]):
    start, out = models["tuned"], models["tuned"].parent / "copy"
    (start / "config.json").write_text(json.dumps({"dtype": "float32", "hidden_size": 30}))
    assert real.dtype_of(start) == "fp32"
    real_models.main("bf16", str(start), str(out))
    assert real.dtype_of(out) == "bf16"
    assert json.loads((out / "config.json").read_text()) == {"dtype": "bfloat16", "hidden_size": 30}
    values, copied = read(start), read(out)
    for name, bits in copied.items():
        assert (bits == round_once(values[name].astype("f8"), "BF16")).all()
    with pytest.raises(ValueError, match=r"a\.weight is BF16; expected F32"):
        real_models.main("bf16", str(out), str(out.parent / "again"))


def test_stand_ins_differ_by_updates_of_the_sizes_that_were_meant(models: dict[str, Path]):
    start, out = models["base"], models["base"].parent / "made"
    (start / "config.json").write_text("{}")
    real_models.main("stand-in", str(start), str(out))
    base, tuned, target = (read(out / role) for role in ("base", "tuned", "target"))
    moved = np.std(tuned["a.weight"] - base["a.weight"])
    assert moved == pytest.approx(real_models.RL_UPDATE_RMS, rel=0.1)
    apart = np.std(target["a.weight"] - base["a.weight"])
    assert apart == pytest.approx(2**0.5 * real_models.DENSE_UPDATE_RMS, rel=0.1)
    written = (out / "tuned/model.safetensors").read_bytes()
    (out / "made").unlink()
    real_models.main("stand-in", str(start), str(out))
    assert (out / "tuned/model.safetensors").read_bytes() == written


def test_models_that_cannot_be_measured_are_refused(models: dict[str, Path]):
    with pytest.raises(SystemExit, match=r"expected config\.json and safetensors"):
        real.dtype_of(models["base"])
    (models["base"] / "config.json").write_text("{}")
    save_file({"a.weight": np.zeros(3, "f2")}, models["base"] / "more.safetensors")
    with pytest.raises(SystemExit, match="found tensors of F16, F32"):
        real.dtype_of(models["base"])


@pytest.mark.parametrize("task", real_peers.TASKS)
def test_a_peer_that_is_not_there_has_a_row_that_says_so(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for place in ("OTHERS", "PEERS"):
        monkeypatch.setattr(real_peers, place, tmp_path / "nowhere" / "bin")
    models = (tmp_path / role for role in ("base", "tuned", "target"))
    trio = real_peers.Trio(*models, "bf16", tmp_path, tmp_path / "skillvec")
    ways = real_peers.ways_of(task, trio, [*real_peers.WAYS])
    there = {who for who, way in ways.items() if way.command}
    assert there == {"floor+sync", "skillvec", *["skillvec stored"] * (task == "apply")}
    missing = [way.note for who, way in ways.items() if who not in there and who != "PEFT"]
    assert len(missing) >= 4
    assert {*missing} == {real_peers.ABSENT}
    assert real_peers.ABSENT in str(real.look(task, "reminis", ways["reminis"], trio))


def test_a_run_that_fails_is_a_row_with_its_last_line(tmp_path: Path):
    places = (tmp_path, tmp_path, tmp_path)
    trio = real_peers.Trio(*places, "bf16", tmp_path, tmp_path / "skillvec")
    broken = real_peers.Command(["sh", "-c", "echo no such thing; exit 3"], (), tmp_path / "out")
    row = real.look("apply", "peer", real_peers.Way(broken), trio)
    assert str(row).endswith("failed: no such thing")


def test_the_columns_of_the_counts():
    counts = {"values": 200, "wrong": 3, "lost": 0.5, "missing": 0, "extra": 1, "other_dtype": 0}
    assert real.told(counts).split() == ["3", "1.50%", "5.0e-01", "1", "tensors", "more;"]
    assert len(real.told(None)) == len(real.told(counts | {"extra": 0}))
