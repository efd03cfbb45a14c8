"""The kinds of vectors, each a class, and the types of what a manifest says."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import skillvec as sv
from skillvec.checkpoints.fingerprint import ModelFacts
from skillvec.files.typed_json import check_json
from skillvec.vectors.manifest import (
    WRITTEN,
    Manifest,
    TensorEntry,
    check_manifest,
    encode_manifest,
)
from skillvec.vectors.vector import (
    AdapterVector,
    CombinedVector,
    PairVector,
    PatchVector,
    SkillVector,
    StoredVector,
)

NAME = "model.layers.0.q_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SkillVector]:
    """Return a vector of each kind, on one base."""
    folder = tmp_path_factory.mktemp("kinds")
    base = {NAME: np.eye(4, 6, dtype=np.float32), "ids": np.arange(3)}
    for name, step in {"base": 0, "tuned": 1}.items():
        (folder / name).mkdir()
        save_file(base | {NAME: base[NAME] + step}, folder / name / "model.safetensors")
    (folder / "adapter").mkdir()
    factors = {"lora_A": np.ones((2, 6), np.float32), "lora_B": np.ones((4, 2), np.float32)}
    stem = f"base_model.model.{NAME.removesuffix('.weight')}"
    save_file({f"{stem}.{key}.weight": value for key, value in factors.items()},
              folder / "adapter" / "adapter_model.safetensors")  # fmt: skip
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    sv.diff(folder / "tuned", folder / "base", folder / "v.safetensors")
    sv.export_patch(folder / "v.safetensors", folder / "patch.safetensors")
    stored = SkillVector.open(folder / "v.safetensors")
    pair = SkillVector.between(folder / "tuned", folder / "base")
    return {
        "stored": stored, "pair": pair, "combined": stored + pair,
        "patch": SkillVector.patched(folder / "patch.safetensors", folder / "base"),
        "adapter": SkillVector.between(folder / "adapter", folder / "base"),
        "lone adapter": SkillVector.open(folder / "adapter"),
    }  # fmt: skip


KINDS: dict[str, tuple[type, str, set[str]]] = {
    "stored": (StoredVector, "combine", {"ref", "digest"}),
    "pair": (PairVector, "diff", {"tuned", "base"}),
    "combined": (CombinedVector, "combine", {"recipe", "parts"}),
    "patch": (PatchVector, "import-patch", {"tuned", "base"}),
    "adapter": (AdapterVector, "diff", {"ref", "digest"}),
    "lone adapter": (AdapterVector, "diff", {"ref", "digest"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_vector_is_a_class_that_answers(made: dict[str, SkillVector], kind: str):
    expected, verb, keys = KINDS[kind]
    for vector in (made[kind], -2 * made[kind]):
        assert type(vector) is expected and isinstance(vector, SkillVector)
        assert vector.to_command()[0] == verb
        assert set(vector.describe()) == keys
        assert vector.inputs() and set(vector.deltas) <= {NAME}
    assert (made[kind].digest is None) == (kind != "stored")
    assert vector.scale == -2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lone adapter"])
def test_each_kind_is_stored_and_proved(made: dict[str, SkillVector], kind: str, tmp_path: Path):
    saved = made[kind].save(tmp_path / "v.safetensors")
    assert type(saved) is StoredVector
    assert saved.manifest["identity"] == made[kind].manifest["identity"]
    assert sv.verify(tmp_path / "v.safetensors").facts["verified"]


def test_a_dtype_that_misses_nothing_claims_no_less(tmp_path: Path):
    weights = np.linspace(-1, 1, 24, dtype=np.float16).reshape(4, 6)
    for side, values in {"tuned": 2 * weights, "base": weights}.items():
        save_file({NAME: values}, tmp_path / f"{side}.safetensors")
    sides = tmp_path / "tuned.safetensors", tmp_path / "base.safetensors"
    exact = sv.diff(*sides, tmp_path / "v.safetensors", dtype="fp32")
    assert exact.manifest["exactness"]["claim"] == "bitwise"
    rounded = sv.diff(*sides, tmp_path / "w.safetensors", dtype="bf16")
    assert rounded.manifest["exactness"]["claim"] == "rounded"


def test_the_digest_of_a_base_is_known_where_all_parts_have_it(
    made: dict[str, SkillVector], tmp_path: Path
):
    stored, digest = made["stored"], made["stored"].base_digest(NAME)
    assert digest and (stored + stored).base_digest(NAME) == digest
    for side in ("tuned", "base"):
        save_file({NAME: np.full((4, 6), len(side), np.float32)}, tmp_path / f"{side}.safetensors")
    sides = tmp_path / "tuned.safetensors", tmp_path / "base.safetensors"
    other = sv.diff(*sides, tmp_path / "v.safetensors")
    assert other.base_digest(NAME) not in (None, digest)
    assert (stored + other).base_digest(NAME) is None


def test_nothing_is_said_of_the_sides_of_an_empty_tensor_of_a_combination(tmp_path: Path):
    plain = {NAME: np.ones((4, 6), np.float32), "empty": np.zeros((0, 3), np.float32)}
    for side, factor in {"tuned": 2, "base": 1}.items():
        held = {name: factor * values for name, values in plain.items()}
        save_file(held, tmp_path / f"{side}.safetensors")
    sides = tmp_path / "tuned.safetensors", tmp_path / "base.safetensors"
    vector = sv.diff(*sides, tmp_path / "v.safetensors")
    merged = (vector + vector).save(tmp_path / "w.safetensors")
    for made, known in ((vector, True), (merged, False)):
        for entry in made.manifest["tensors"].values():
            assert (entry["base"] is not None) == (entry["tuned"] is not None) == known


def test_a_merged_model_that_holds_more_than_its_recipe_says_is_none_of_it(
    made: dict[str, SkillVector], tmp_path: Path
):
    base = {NAME: np.eye(4, 6, dtype=np.float32), "ids": np.arange(3)}
    save_file(base, tmp_path / "base.safetensors")
    sv.apply(tmp_path / "base.safetensors", made["stored"], tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "numpy") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    assert sv.verify(tmp_path / "out.safetensors").facts["verified"]
    save_file(held | {"more": np.ones(2)}, tmp_path / "out.safetensors", metadata)
    with pytest.raises(sv.IncompatibleError, match=r"not of this target:\n  more: only in"):
        sv.verify(tmp_path / "out.safetensors")


def test_tensors_with_the_very_same_delta_are_found(tmp_path: Path):
    names = ("head.weight", "embed.weight", "layers.0.w", "layers.1.w")
    for side, step in {"tuned": 1, "base": 0}.items():
        values = np.arange(6, dtype=np.float32).reshape(2, 3) + step
        save_file(dict.fromkeys(names, values), tmp_path / f"{side}.safetensors")
    pair = SkillVector.between(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors")
    assert pair.find_same("head.weight") == {*names} - {"head.weight"}
    lent = replace(pair, deltas={"lent": pair.deltas["head.weight"], **pair.deltas})
    assert lent.find_same("lent") == {*names}
    # of a stored combination no digest of a base is known: a layer is no twin of a head
    mixed = (pair + pair).save(tmp_path / "v.safetensors")
    assert mixed.find_same("head.weight") == {"embed.weight"}
    assert mixed.find_same("layers.0.w") == {"layers.1.w"}


def test_keys_of_a_newer_version_survive_in_their_places(
    made: dict[str, SkillVector], tmp_path: Path
):
    stored = made["stored"]
    assert isinstance(stored, StoredVector)
    content = stored.stored.path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    manifest: Any = {"newer": [1], **stored.manifest, "latest": {"a": None}}
    manifest["base"] = {**manifest["base"], "shape of things": 1}
    header["__metadata__"] = encode_manifest(manifest)
    text = json.dumps(header).encode()
    file = tmp_path / "newer.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    again = SkillVector.open(file).save(tmp_path / "again.safetensors", codec="dense").manifest
    assert {**again}["newer"] == [1] and {**again}["latest"] == {"a": None}
    assert [*again["base"]] == [*manifest["base"]]
    assert list(again) == list(manifest)


DIGEST = "0" * 32
FACTS = {"ref": "a", "revision": None, "model_type": None, "config": None, "tokenizer": None,
         "family": DIGEST, "probe": None, "sketch": {"w": [1]}, "dtypes": {"F32": 1}}  # fmt: skip
ENTRY = {"dtype": "F32", "shape": [1], "codec": "dense", "block": 0, "digest": DIGEST,
         "changed": 1, "norm": 1.5, "base": ["F32", DIGEST], "tuned": None}  # fmt: skip


@pytest.mark.parametrize(
    "kind, value, changed, said",
    [
        (ModelFacts, FACTS, {"ref": 1}, "x.ref: expected str, found '1'"),
        (ModelFacts, FACTS, {"revision": 1}, "x.revision: expected str | None, found '1'"),
        (ModelFacts, FACTS, {"probe": "0"}, "x.probe: expected a digest of 32 hex digits"),
        (ModelFacts, FACTS, {"sketch": {"w": [128]}}, "x.sketch.w[0]: expected a number in range("),
        (ModelFacts, FACTS, {"sketch": {"w": [True]}}, "x.sketch.w[0]: expected a number in"),
        (ModelFacts, FACTS, {"dtypes": []}, "x.dtypes: expected an object, found '[]'"),
        (TensorEntry, ENTRY, {"block": True}, "x.block: expected int, found 'True'"),
        (TensorEntry, ENTRY, {"norm": "1"}, "x.norm: expected int | float, found '1'"),
        (TensorEntry, ENTRY, {"shape": 1}, "x.shape: expected a list, found '1'"),
        (TensorEntry, ENTRY, {"base": ["F32"]}, "x.base: expected a pair"),
        (TensorEntry, ENTRY, {"base": ["F32", None]}, "x.base[1]: expected a digest"),
        (dict[str, bool], {"a": True}, {"a": 1}, "x.a: expected true or false, found '1'"),
    ],
)
def test_what_is_of_another_type_is_named(kind: Any, value: Any, changed: Any, said: str):
    check_json(value, kind, "x")
    check_json({**value, "of a newer version": True}, kind, "x")
    with pytest.raises(TypeError, match=re.escape(said)):
        check_json({**value, **changed}, kind, "x")


def test_a_manifest_is_text_in_which_letters_stand_as_they_are(made: dict[str, SkillVector]):
    manifest = made["stored"].manifest | {"license": "mögen"}
    assert '"license":"mögen"' in encode_manifest(manifest)["skillvec"]  # type: ignore[arg-type]


def test_a_manifest_lacks_no_key(made: dict[str, SkillVector]):
    for vector in made.values():
        assert set(vector.manifest) >= Manifest.__required_keys__
    for key in (*Manifest.__required_keys__, *WRITTEN):
        lacking = {k: v for k, v in made["stored"].manifest.items() if k != key}
        with pytest.raises(TypeError, match=f"manifest: {key} is missing"):
            check_manifest(lacking)


def test_what_a_kind_has_not_is_none_as_it_was(made: dict[str, SkillVector]) -> None:
    asked = ("stored", "tuned", "base", "adapter", "origin", "recipe")
    has = {"StoredVector": ["stored"], "PairVector": ["tuned", "base"],
           "PatchVector": ["tuned", "base"], "CombinedVector": ["recipe"],
           "AdapterVector": ["adapter", "origin"]}  # fmt: skip
    for vector in made.values():
        found = [key for key in asked if getattr(vector, key) is not None]
        expected = has[type(vector).__name__]
        assert [key for key in found if key != "base" or key in expected] == expected
    assert {type(vector).__name__ for vector in made.values()} == set(has)
