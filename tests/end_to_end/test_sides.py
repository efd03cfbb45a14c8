"""Two sides that do not match: the error shows names of both, so that a reader sees why.

Five names of one side alone look like a model with tensors missing; a name of either side beside
them shows a prefix, an infix or another spelling at once.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from families import perturbed, save, toy
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from skillvec.cli.commands import main
from skillvec.errors import up_to_five, up_to_five_each


def refusal(code: int, *arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result.stderr


def marked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors with a word inside the names of layers, where no prefix rule reaches it."""
    return {re.sub(r"(layers\.\d+)", r"\1._inner", name): t for name, t in tensors.items()}


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a model, one tuned from it, both under other names, and vectors."""
    folder = tmp_path_factory.mktemp("sides")
    base = toy(0, layers=4)
    tuned = perturbed(base, 1)
    for name, tensors in (("base", base), ("tuned", tuned)):
        save(folder / name, tensors)
        save(folder / f"{name}_", marked(tensors))
    run = CliRunner().invoke
    for mark in ("", "_"):
        words = ["diff", f"{folder}/tuned{mark}", f"{folder}/base{mark}"]
        assert run(main, [*words, "-o", f"{folder}/v{mark}.safetensors"]).exit_code == 0
    words = ["apply", f"{folder}/base", f"{folder}/v.safetensors", "-o", f"{folder}/merged"]
    assert run(main, words).exit_code == 0
    words = ["export-patch", f"{folder}/v.safetensors", "-o", f"{folder}/patch.safetensors"]
    assert run(main, words).exit_code == 0
    return folder


COMMANDS = {
    "diff": "diff {0}/tuned_ {0}/base -o {0}/x.safetensors",
    "diff of compiled base": "diff {0}/tuned {0}/base_ -o {0}/x.safetensors",
    "apply": "apply {0}/base_ {0}/v.safetensors -o {0}/x",
    "combine": "combine {0}/v.safetensors {0}/v_.safetensors -o {0}/x.safetensors",
    "orthogonality": "orthogonality {0}/v.safetensors {0}/v_.safetensors",
    "against": "orthogonality {0}/v.safetensors {0}/v.safetensors --against {0}/base_",
    "verify": "verify {0}/v.safetensors --base {0}/base_ --tuned {0}/tuned",
    "import-patch": "import-patch {0}/patch.safetensors {0}/base_ -o {0}/x.safetensors",
    "export-patch": "export-patch {0}/v.safetensors --base {0}/base_ -o {0}/x.safetensors",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_names_of_both_sides_are_shown(command: str, sides: Path) -> None:
    said = refusal(3, *command.format(sides).split())
    rows = [row for row in said.splitlines() if row.startswith("  ")]
    with_mark = [row for row in rows if "layers.0._inner." in row]
    without = [row for row in rows if re.search(r"layers\.0\.(?!_inner)", row)]
    assert with_mark and without, said
    counts = re.findall(r"\.\.\. and (\d+) more ((?:only|not|missing) \S+)", said)
    assert len(counts) == 2 and len(rows) == 12, said


def test_a_merged_model_of_another_target_shows_both_sides(sides: Path, tmp_path: Path) -> None:
    content = marked(load_file(sides / "merged" / "model.safetensors"))
    with safe_open(sides / "merged" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(content, tmp_path / "model.safetensors", metadata)
    said = refusal(3, "verify", tmp_path / "model.safetensors")
    assert "layers.0._inner." in said and re.search(r"layers\.0\.(?!_inner)", said), said


def test_an_index_that_disagrees_shows_both_sides(sides: Path, tmp_path: Path) -> None:
    shards = save(tmp_path / "shards", toy(0, layers=4), shards=2)
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = marked(content["weight_map"])
    index.write_text(json.dumps(content))
    said = refusal(1, "inspect", shards)
    assert said.count("index: not in the index\n") == 5 and said.count("._inner.") == 5, said
    assert "and 11 more not in the index" in said and "and 11 more not in the shards" in said
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    torch.save(toy(0, layers=4), pickles / "pytorch_model-00001-of-00001.bin")
    weight_map = dict.fromkeys(marked(toy(0, layers=4)), "pytorch_model-00001-of-00001.bin")
    (pickles / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    said = refusal(1, "inspect", pickles)
    assert ": only in the shards" in said and ": only in the index" in said, said


def test_kinds_are_shown_five_each_and_counted() -> None:
    kinds = {"only in A": list("abcdefgh"), "only in B": ["z"], "nothing": []}
    assert up_to_five_each(kinds).splitlines() == [
        *(f"  {letter}" for letter in "abcde"), "  ... and 3 more only in A", "  z",
    ]  # fmt: skip
    many = up_to_five_each({f"not in {i}": ["x", "y"] for i in range(7)}).splitlines()
    assert len(many) == 11 and many[-1] == "  ... and 4 more of 2 other kinds"
    assert up_to_five(list("abcdefg")).splitlines()[-1] == "  ... and 2 more"
