"""Hostile files: a short form of the long run (fuzz.py), and every finding and hazard by name.

Headers, manifests, blocks and indexes have hostile files of their own in test_storage,
test_vector_file, test_codecs and test_checkpoint; what stands here is what those do not hold. No
file here harms a program that takes it: each is small, and the limit that it breaks is lowered.
"""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harm
import hostile
import pytest
import torch
from families import perturbed, save, toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import skillvec
from skillvec.checkpoints.lora import open_adapter
from skillvec.checkpoints.lora_fit import fit_adapter
from skillvec.checkpoints.opening import open_checkpoint
from skillvec.checkpoints.parts import assemble
from skillvec.checkpoints.pickles import Stored, load_pickle
from skillvec.errors import (
    FormatError,
    IncompatibleError,
    NonfiniteError,
    SkillvecError,
    UsageError,
)
from skillvec.files.file import digest_bytes, read_bytes
from skillvec.files.header import TensorSpec, read_header
from skillvec.remote import hub
from skillvec.vectors.reader import find_vector
from skillvec.vectors.recipe import read_recipe
from skillvec.vectors.vector import SkillVector
from skillvec.verbs import card_file, cards

INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk, and names of the Hub lead nowhere."""

    def away(ref: str, role: str) -> None:
        raise UsageError(f"{role} {ref}: not on this disk")

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(hub, "locate", away)


@pytest.fixture(scope="module")
def target_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], hostile.Target]:
    folder, known = tmp_path_factory.mktemp("hostile"), dict[str, hostile.Target]()

    def target_of(name: str) -> hostile.Target:
        if name not in known:
            known[name] = hostile.TARGETS[name](folder / name)
        return known[name]

    return target_of


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(tmp_path / "model", toy(0, layers=1, width=8, vocabulary=10), shards=2)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return save(tmp_path / "single", toy(0, layers=1, width=8, vocabulary=10))


def refused(action: Callable[[], object], folder: Path, *kinds: type[BaseException]) -> str:
    """Return the message of what must be refused, in no time and not at length."""
    with harm.guarded(folder), pytest.raises(kinds or (SkillvecError,)) as caught:
        action()
    assert len(str(caught.value)) < 4000
    return str(caught.value)


# ------------------------------------------------------------------------- harm of every kind


@pytest.mark.parametrize("name", hostile.TARGETS)
def test_what_is_harmed_below_is_taken_unharmed(
    name: str, target_of: Callable[[str], hostile.Target]
) -> None:
    target = target_of(name)
    for seed in target.seeds:
        assert target.run(seed), seed[:80]
    assert target.once(target.seeds[0], deep=True)


@pytest.mark.parametrize("name", hostile.TARGETS)
def test_harmed_files_are_refused_or_mean_what_verify_finds(
    name: str, target_of: Callable[[str], hostile.Target]
) -> None:
    target = target_of(name)

    @settings(max_examples=100, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False), st.integers(0, 9))
    def harmed(rng: Any, depth: int) -> None:
        target.once(target.harm(rng, rng.choice(target.seeds)), deep=depth == 0)

    harmed()


def test_a_guard_that_sees_nothing_would_prove_nothing(tmp_path: Path) -> None:
    with pytest.raises(harm.Escape), harm.guarded(tmp_path):
        open("/etc/hostname").close()
    with pytest.raises(harm.Escape), harm.guarded(tmp_path):
        os.system("true")
    with pytest.raises(harm.Hang), harm.guarded(tmp_path, 0.05):
        time.sleep(5)
    open("/etc/hostname").close()


# ------------------------------------------------------------------------------- the file system


def device(path: Path) -> None:
    path.symlink_to(os.devnull)


@pytest.mark.parametrize("make", [device, os.mkdir], ids=["device", "folder"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", INDEX, "model_world_size_1_rank_0.pt", "pytorch_model.bin"]
)
def test_what_is_no_file_is_refused_before_it_is_opened(
    name: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / name)
    said = refused(lambda: skillvec.inspect(tmp_path), tmp_path, FormatError)
    assert name in said and "a folder, a pipe or a device" in said
    if make is device:
        assert "a device" in refused(lambda: skillvec.inspect(tmp_path / name), tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "adapter_config.json", ".metadata"])
def test_links_that_go_in_circles_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(name)
    assert str(tmp_path) in refused(
        lambda: skillvec.inspect(tmp_path), tmp_path, OSError, SkillvecError
    )


@pytest.mark.parametrize("name", [INDEX, "config.json", "adapter_config.json"])
def test_json_of_any_length_is_not_read(name: str, model: Path, monkeypatch) -> None:
    if name == "adapter_config.json":  # beside a model it is not asked
        shutil.rmtree(model)
        save(model / "adapter_model.safetensors", toy())
    (model / name).write_text(" " * 1001)
    monkeypatch.setattr("skillvec.checkpoints.folder.MAX_HEADER_NBYTES", 1000)
    read = SkillVector.open if name == "adapter_config.json" else skillvec.inspect
    said = refused(lambda: read(model), model, FormatError)
    assert name in said and "1001 bytes, over the cap of 1000" in said


def test_vocabularies_are_digested_piece_by_piece(single: Path, monkeypatch) -> None:
    content = bytes(range(256)) * 13_000
    (single / "tokenizer.model").write_bytes(content)
    expected = digest_bytes(json.dumps([["tokenizer.model", digest_bytes(content)]]).encode())

    def whole(path: Path) -> bytes:
        raise AssertionError(f"{path} is read at once")

    monkeypatch.setattr(Path, "read_bytes", whole)
    assert open_checkpoint(single).tokenizer_digest == expected


@pytest.mark.parametrize("name", [".metadata", "latest"])
def test_training_files_of_any_length_are_not_read(name: str, tmp_path: Path, monkeypatch) -> None:
    for module in ("pickles", "dcp"):
        monkeypatch.setattr(f"skillvec.checkpoints.{module}.MAX_PICKLE_NBYTES", 1000)
    asked = []

    def counted(path: str, offset: int, nbytes: int) -> bytes:
        asked.append(nbytes)
        return read_bytes(path, offset, nbytes)

    for module in ("dcp", "zero"):
        monkeypatch.setattr(f"skillvec.checkpoints.{module}.read_bytes", counted)
    (tmp_path / name).write_bytes(bytes(5000))
    refused(lambda: skillvec.inspect(tmp_path), tmp_path, FormatError)
    assert asked == [1001 if name == ".metadata" else 256]


@pytest.mark.parametrize("ref", ["~nobody.here/x", "x" * 5000, "a\0b", "\ud800", "y/" * 3000])
def test_names_that_no_system_takes_are_a_usage_error(ref: str, tmp_path: Path) -> None:
    refused(lambda: open_checkpoint(ref), tmp_path, UsageError)


# ----------------------------------------------------------------------------- headers and indexes


def test_shapes_of_any_length_are_not_multiplied(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(harm.join({}, [("w", "F32", [1] * 65, b"abcd")]))
    monkeypatch.setattr("skillvec.files.header.tensor_nbytes", lambda dtype, shape: 1 / 0)
    assert "at most 64" in refused(lambda: read_header(path), tmp_path, FormatError)


@pytest.mark.parametrize(
    "tensor",
    [("w" * 9_000, "F33", [1], b"abcd"), ("w", "F" * 9_000, [1], b"abcd"),
     ("w" * 9_000, "F32", [2], b"abcd")],
)  # fmt: skip
def test_a_refusal_does_not_quote_names_at_length(tensor: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(harm.join({}, [tensor]))
    refused(lambda: read_header(path), tmp_path, FormatError)
    names = harm.Pairs([("k" * 9_000, 1), ("k" * 9_000, 2)])
    header = harm.json_text(names).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refused(lambda: read_header(path), tmp_path, FormatError)


def test_an_index_with_names_at_length_is_not_quoted_at_length(model: Path) -> None:
    index = json.loads((model / INDEX).read_text())
    index["weight_map"] |= {f"{i}" * 9_000: "model-00001-of-00002.safetensors" for i in range(9)}
    (model / INDEX).write_text(json.dumps(index))
    assert "4 more" in refused(lambda: open_checkpoint(model), model, FormatError)
    (model / INDEX).write_bytes(b'{"weight_map": "\xff' + b"x" * 9_000)
    assert "weight_map" in refused(lambda: open_checkpoint(model), model, FormatError)


def test_many_tensors_take_memory_in_proportion(tmp_path: Path) -> None:
    """As many as a checkpoint of unfused experts has, described in a process of its own."""
    count = 50_000
    entry = '"model.layers.{0}.w":{{"dtype":"U8","shape":[1],"data_offsets":[{0},{1}]}}'
    header = "{" + ",".join(entry.format(i, i + 1) for i in range(count)) + "}"
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(count))

    code = """
import sys, skillvec
print(len(str(skillvec.inspect(sys.argv[1]).to_dict())))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print((int(status["VmHWM"].split()[0]) - int(status["RssFile"].split()[0])) * 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=600,
        check=True,
    )  # fmt: skip
    described, peak = map(int, done.stdout.split())
    assert described and peak < (100 << 20) + count * 1200


@pytest.mark.parametrize("file", [INDEX, "config.json"])
def test_a_key_that_stands_twice_is_refused(file: str, model: Path) -> None:
    text = (model / file).read_text()
    key = "lm_head.weight" if file == INDEX else "model_type"
    at = text.index(f'"{key}"')
    text = text[:at] + f'"{key}": "model-00002-of-00002.safetensors", ' + text[at:]
    (model / file).write_text(text)
    said = refused(lambda: skillvec.diff(model, model), model, FormatError)
    assert key in said and "twice" in said


@pytest.mark.parametrize(
    ("file", "words"),
    [("a\0b", "missing"), ("x" * 300, "missing"), ("..", "no plain file"), ("/x", "no plain file"),
     ("../near/config.json", "no plain file")],
)  # fmt: skip
def test_a_vector_index_names_plain_files_of_its_folder_only(
    file: str, words: str, target_of: Callable[[str], hostile.Target]
) -> None:
    target = target_of("vector index")
    index = json.loads(target.seeds[0])
    index["weight_map"] |= {next(iter(index["weight_map"])): file}
    content = json.dumps(index).encode()
    assert words in refused(lambda: target.run(content), target.folder, FormatError)


# ------------------------------------------------------------------- manifests, recipes, numbers


def test_a_manifest_with_a_key_twice_is_refused(
    target_of: Callable[[str], hostile.Target], tmp_path: Path
) -> None:
    metadata, tensors = harm.split(target_of("vector").seeds[0])
    text = metadata["skillvec"].replace('"kind":', '"kind":"vector","kind":', 1)
    path = tmp_path / "v.safetensors"
    path.write_bytes(harm.join(metadata | {"skillvec": text}, tensors))
    assert "'kind' stands twice" in refused(lambda: find_vector(path), tmp_path, FormatError)


NUMBERS = ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"]


@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_no_finite_number_is_refused_wherever_one_stands(
    number: str, target_of: Callable[[str], hostile.Target]
) -> None:
    def cut(name: str, old: str, which: int = 0) -> None:
        target = target_of(name)
        seed = target.seeds[which].decode()
        assert old in seed
        text = seed.replace(old, old[: old.index(":") + 1] + number, 1)
        refused(lambda: target.run(text.encode(), deep=True), target.folder, SkillvecError)

    cut("adapter", '"lora_alpha": 4')
    cut("merged", '"lam":1.0')
    cut("recipe", '"density": 0.1', 1)
    target = target_of("vector")
    metadata, tensors = harm.split(target.seeds[0])
    norm = re.sub(r'"norm":[0-9.e+-]+', f'"norm":{number}', metadata["skillvec"], count=1)
    text = hostile.sealed(json.loads(norm), norm, [tensors])
    content = harm.join(metadata | {"skillvec": text}, tensors)
    assert "norm" in refused(lambda: target.run(content), target.folder, FormatError)


@pytest.mark.parametrize("name", ["r.json", "r.yaml"])
def test_recipes_hold_text_that_can_be_written_again(name: str, tmp_path: Path) -> None:
    for recipe in (
        '{"vectors": [{"vector": "\\ud800"}]}',
        '{"vectors": [{"vector": "v"}], "parameters": {"\\ud800": 1}}',
        '{"vectors": [{"vector": "v"}], "parameters": {"a": "\\udfff"}}',
        '{"vectors": [{"vector": "v"}], "op": "\\udc00"}',
    ):
        (tmp_path / name).write_text(recipe)
        refused(lambda: read_recipe(tmp_path / name), tmp_path, UsageError)
    (tmp_path / name).write_bytes(b'{"vectors": [{"vector": "\xff"}]}')
    refused(lambda: read_recipe(tmp_path / name), tmp_path, UsageError)


def test_a_model_type_is_text_that_can_be_written_again(single: Path, tmp_path: Path) -> None:
    (single / "config.json").write_text('{"model_type": "\\ud800\\u0007"}')
    vector = skillvec.diff(single, single, tmp_path / "v.safetensors")
    assert vector.manifest["base"]["model_type"] == "\\ud800\\x07"


def test_a_recipe_nested_too_deep_is_none(target_of: Callable[[str], hostile.Target]) -> None:
    target = target_of("merged")
    for seed in (harm.NESTED.encode(), b'{"kind": "merged", "vector":' + harm.NESTED.encode()):
        with harm.lowered():
            said = refused(lambda seed=seed: target.run(seed), target.folder, UsageError)
        assert "no recipe in its header" in said


def test_numbers_in_names_may_have_any_length(tmp_path: Path) -> None:
    """Python counts to so many digits and no further."""
    shapes = {f"layers.{number}.w.weight": torch.zeros(4, 4) for number in ("0", "1", harm.DIGITS)}
    base = save(tmp_path / "base", shapes)
    tuned = save(tmp_path / "tuned", {name: tensor + 1 for name, tensor in shapes.items()})
    share = {"vector": str(tmp_path / "v.safetensors"), "weight": [0, 1]}
    with harm.lowered():
        vector = skillvec.diff(tuned, base, share["vector"])
        assert len(skillvec.norms(vector).facts["norms"][0]["layers"]) == 3
        skillvec.apply(base, vector, tmp_path / "out")
        recipe, output = {"vectors": [share]}, tmp_path / "c.safetensors"
        said = refused(lambda: skillvec.combine(recipe=recipe, output=output), tmp_path, UsageError)
    assert "tensors outside every layer" in said


# -------------------------------------------------------------------------------------- adapters


def specs(shapes: dict[str, tuple[int, ...]], dtype: str = "F32") -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, dtype, shape, "", 0, 0) for name, shape in shapes.items()}


def factors(modules: list[str]) -> dict[str, TensorSpec]:
    return specs(
        {f"base_model.model.{m}.lora_A.weight": (2, 6) for m in modules}
        | {f"base_model.model.{m}.lora_B.weight": (8, 2) for m in modules}
    )


@pytest.mark.parametrize("pattern", ["a?b", "a|b", "a*b", "[a-z]+b", "a{2}b"])
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_of_an_adapter_cannot_be_tried_for_ever(
    key: str, pattern: str, tmp_path: Path, monkeypatch
) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, key: {pattern: 2}}
    tensors = factors([f"layers.{i}.q_proj" for i in range(3)])
    assert len(open_adapter("x", config, tensors, "adapter x").deltas) == 3
    plain = 3 * (len("layers.0.q_proj") + 1)  # ways to try a pattern that has no wildcard
    monkeypatch.setattr("skillvec.checkpoints.lora_settings.MOST_STEPS", plain)
    said = refused(lambda: open_adapter("x", config, tensors, "adapter x"), tmp_path)
    assert "too many wildcards for 3 names of up to 15 characters" in said
    open_adapter("x", config | {key: {"q_proj": 2}}, tensors, "adapter x")


def test_a_pattern_that_is_none_among_others_is_refused(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"(?i)q_proj": 2}}
    said = refused(lambda: open_adapter("x", config, factors(["q_proj"]), "adapter x"), tmp_path)
    assert "rank_pattern" in said


def test_an_adapter_of_many_modules_is_fitted_in_time_that_grows_as_they_do(tmp_path: Path) -> None:
    modules = [f"layers.{i}.q_proj" for i in range(20_000)]
    base = specs({f"{module}.weight": (8, 6) for module in modules})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {r"layers\.\d+\.x": 3}}
    with harm.guarded(tmp_path):
        opened = open_adapter("x", config, factors(modules), "adapter x")
        assert len(fit_adapter(opened, base).deltas) == len(modules)


@pytest.mark.parametrize("key", ["base_model_name_or_path", "revision"])
@pytest.mark.parametrize("text", ["\ud800", "a\0b", "\u200b"])
def test_an_adapter_names_its_base_in_text_that_can_be_written(
    text: str, key: str, tmp_path: Path
) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, key: text}
    said = refused(lambda: open_adapter("x", config, factors(["q"]), "adapter x"), tmp_path)
    assert "base_model_name_or_path" in said


def test_whole_weights_in_eight_bits_are_refused_by_name(tmp_path: Path) -> None:
    whole = specs({"base_model.model.lm_head.weight": (8, 6)}, "F8_E4M3")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    said = refused(
        lambda: open_adapter("x", config, factors(["q"]) | whole, "adapter x"), tmp_path,
        IncompatibleError,
    )  # fmt: skip
    assert "lm_head.weight: F8_E4M3" in said


def test_signalling_nans_are_refused_without_a_warning(tmp_path: Path) -> None:
    nan = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)
    tensors = {"base_model.model.q.lora_A.weight": nan.expand(2, 6).contiguous(),
               "base_model.model.q.lora_B.weight": torch.ones(8, 2)}  # fmt: skip
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    base = save(tmp_path / "base", {"q.weight": torch.ones(8, 6)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vector, output = SkillVector.between(folder, base), tmp_path / "v.safetensors"
        said = refused(lambda: vector.save(output), tmp_path, NonfiniteError)
        saved = vector.save(output, allow_nonfinite=True)
    assert "not finite" in said and "q.weight: 48 of 48 values" in said
    assert saved.manifest["tensors"]["q.weight"]["nonfinite"] == 48


# --------------------------------------------------------------------------------------- pickles

# a list and a dict of two items, which are copied once: what is copied at all could be copied often
PAIR, ITEMS = b"](NNeq\0", b"}(K\1NK\2Nuq\0"
ORDERED, THROUGH = b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_parameter\n"
COPIES = {
    "as arguments": (PAIR + b"cbuiltins\nlist\nh\0R", "made elsewhere"),
    "as arguments of a class": (PAIR + b"cbuiltins\nlist\nh\0\x81", "made elsewhere"),
    "as a shape": (PAIR + b"ctorch\nSize\nh\0\x85R", "torch.Size of 2 dimensions"),
    "as a dict": (ITEMS + ORDERED + b"h\0\x85R", "made of another object"),
    "as a state": (ITEMS + ORDERED + b")Rh\0b", "made elsewhere"),
    "through a function": (ITEMS + ORDERED + b")R" + THROUGH + b"h\0N\x86Rb", "made elsewhere"),
}


@pytest.mark.parametrize("copied", COPIES)
def test_pickles_do_not_grow_by_copies(copied: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("skillvec.checkpoints.pickles.MAX_DIMENSIONS", 1)
    raw, words = COPIES[copied]
    raw = b"\x80\x02" + raw + b"."
    assert words in refused(lambda: load_pickle(raw, "x"), tmp_path, FormatError)


def test_sets_are_not_made(tmp_path: Path) -> None:
    tree = load_pickle(b"\x80\x02cbuiltins\nset\n](K\1K\2e\x85R.", "x")
    assert (tree.name, tree.args) == ("builtins.set", ([1, 2],))


@pytest.mark.parametrize("name", [None, 3, "__metadata__", "\ud800"])
def test_names_that_no_header_holds_are_refused_in_pickles(name: Any, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), name: torch.ones(2)}, tmp_path / "pytorch_model.bin")
    refused(lambda: open_checkpoint(tmp_path), tmp_path, FormatError, IncompatibleError)


def test_names_that_no_header_holds_are_refused_in_shards(
    target_of: Callable[[str], hostile.Target], monkeypatch
) -> None:
    target = target_of("training")
    folder = target.folder / "zero2"
    path = folder / "global_step7" / "mp_rank_00_model_states.pt"
    valid = path.read_bytes()
    try:
        torch.save(torch.load(path) | {"shared_params": {None: "a.weight"}}, path)
        assert "no name" in refused(lambda: open_checkpoint(folder), target.folder, FormatError)
    finally:
        path.write_bytes(valid)


def test_many_parts_of_a_tensor_take_time_in_proportion(tmp_path: Path) -> None:
    parts = [((i,), Stored("F32", (1,), (1,), "", 4 * i)) for i in range(100_000)]
    with harm.guarded(tmp_path):
        assert assemble("w", (100_000,), parts).shape == (100_000,)


# ----------------------------------------------------------------------------------------- cards


@pytest.mark.parametrize(
    ("head", "values"),
    [("tags: [a, b, c]", 5), ("a: &a [b, c]\nd: [*a, *a]", 11), ("a: {b: {c: [d, e]}}", 6)],
)  # an alias is as many values as it stands for
def test_metadata_of_too_many_values_does_not_stop_an_apply(
    head: str, values: int, single: Path, tmp_path: Path, monkeypatch
) -> None:
    text, mine = f"---\n{head}\n---\n\n# target\n", "---\nlicense: mit\n---\n"
    assert "license: mit" in cards.renewed(text, card_file.make_card({"license": "mit"}, "# x"))
    assert card_file.MOST_VALUES == 100_000
    monkeypatch.setattr(card_file, "MOST_VALUES", values)
    card_file.parse_card(text)
    monkeypatch.setattr(card_file, "MOST_VALUES", values - 1)
    said = refused(lambda: cards.renewed(text, mine), tmp_path, UsageError)
    assert f"more than {values - 1} values" in said
    (single / "README.md").write_text(text)
    tuned = save(tmp_path / "tuned", perturbed(toy(0, layers=1, width=8, vocabulary=10), 1))
    with harm.guarded(tmp_path):
        report = skillvec.apply(single, tuned=tuned, base=single, output=tmp_path / "out")
    assert any("README.md is copied as it is" in said for said in report.warnings)
    assert (tmp_path / "out" / "README.md").read_text() == text
