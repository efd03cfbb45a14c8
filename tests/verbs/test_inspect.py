"""What inspect says first: which kind of thing a path is; and the digest of a model's content."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from families import load, perturbed, save, toy
from safetensors.torch import save_file
from schemas import check_json
from torch.distributed import checkpoint
from xxhash import xxh3_64

import skillvec as sv
from skillvec.cli.commands import main
from skillvec.cli.screen import FORMAT_VERSION
from skillvec.engine.threads import on_block
from skillvec.errors import FormatError, UsageError
from skillvec.files.staging import staging_of
from skillvec.report import Report
from skillvec.trials.journal import Journal
from skillvec.trials.search import DATABASE
from skillvec.trials.sweep import JOURNAL
from skillvec.verbs import other_folders
from skillvec.verbs.inspect_sentences import CLAIMS, KINDS, say_inspect

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 40,
         "tie_word_embeddings": False}  # fmt: skip
FORMAT_PAGE = Path(__file__).parents[2] / "docs" / "format.md"


def looked_at(path: Path, *args: Any, **options: Any) -> Report:
    """Return the report on a path, after it was held against its schema."""
    report = sv.inspect(path, *args, **options)
    check_json(json.loads(json.dumps({"format_version": FORMAT_VERSION} | report.to_dict())))
    return report


def sentence(path: Path) -> str:
    """Return the first sentence that a user reads, without the path."""
    result = CliRunner().invoke(main, ["inspect", str(path)])
    assert result.exit_code == 0, result.output
    first = say_inspect(looked_at(path))[0]
    assert result.stdout.startswith(first)
    assert all(len(line) <= 80 or " " not in line.strip() for line in first.splitlines())
    return " ".join(first.split()).partition(" is ")[2]


# ---------------------------------------------------------------------------------- content digest


def digest_of(path: Path, **options: Any) -> str:
    found: str = looked_at(path, digest=True, **options).facts["digest"]
    return found


def test_the_digest_is_of_the_tensors_alone(tmp_path: Path) -> None:
    """Not of their order, of files, shards, header metadata, config or padding."""
    tensors = toy()
    whole = digest_of(save(tmp_path / "whole", tensors))
    turned = dict(reversed(tensors.items()))
    same = [
        save(tmp_path / "shards", tensors, shards=3), save(tmp_path / "turned", turned),
        save(tmp_path / "alone.safetensors", turned, metadata={"who": "someone else"}),
        save(tmp_path / "told", tensors, config=LLAMA, side_files={"tokenizer.json": "{}"}),
    ]  # fmt: skip
    (tmp_path / "pickled").mkdir()
    torch.save(tensors, tmp_path / "pickled" / "pytorch_model.bin")
    assert {digest_of(path) for path in (*same, tmp_path / "pickled")} == {whole}


def test_the_digest_changes_with_names_dtypes_shapes_and_bytes(tmp_path: Path) -> None:
    tensors = toy()
    name = "model.norm.weight"
    flipped = tensors[name].view(torch.int16).clone()
    flipped[5] ^= 1
    others = [
        {("other" if key == name else key): tensor for key, tensor in tensors.items()},
        tensors | {name: tensors[name].view(torch.float16)},
        tensors | {name: tensors[name].reshape(2, -1)},
        tensors | {name: flipped.view(torch.bfloat16)},
        {key: tensor for key, tensor in tensors.items() if key != name},
        tensors | {"empty": torch.zeros(0, 3)},
        tensors | {"empty": torch.zeros(3, 0)},
    ]  # fmt: skip
    folders = [save(tmp_path / str(n), made) for n, made in enumerate([tensors, *others])]
    assert len({digest_of(folder) for folder in folders}) == len(folders)


def test_the_program_in_the_docs_computes_the_digest(tmp_path: Path) -> None:
    """Ten lines without skillvec; of more than one leaf, several dtypes and names of all kinds."""
    tensors = {
        "z.weight": torch.randn(700, 900), "größe": torch.arange(7), "a": torch.zeros(0),
        "mask": torch.tensor([True, False]), 'b"\\': torch.ones(3, dtype=torch.float16),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "eight": torch.ones(4).to(torch.float8_e4m3fn),
    }  # fmt: skip
    folder = save(tmp_path / "model", tensors, shards=2)
    (code,) = re.findall(r"^```py\n(.*?)^```$", FORMAT_PAGE.read_text(), re.M | re.S)
    lines = [line for line in code.splitlines() if line and not line.startswith("import")]
    assert "skillvec" not in code and len(lines) == 10
    files = sorted(folder.glob("*.safetensors"))
    command = [sys.executable, "-c", code, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest_of(folder)


def test_engines_and_workers_give_one_digest(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", {"w": torch.randn(1500, 1500), "v": torch.randn(9)})
    blocks: list[int] = []
    with on_block(lambda plan, number, index, again: blocks.append(index)):
        found = {digest_of(folder, engine="serial"), digest_of(folder, workers=3)}
    assert len(found) == 1
    assert sorted(blocks) == sorted(2 * [0, 1, 2, 0])  # in pieces, each once a run
    report = sv.inspect(folder, digest=True, workers=3)
    assert (report.facts["engine"], report.facts["workers"]) == ("threads", 3)
    assert report.facts["nbytes_read"] == 4 * (1500 * 1500 + 9)


def test_headers_alone_are_read_unless_it_is_asked_for(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", toy())
    with on_block(lambda *block: pytest.fail("a tensor was read")):
        report = looked_at(folder)
    assert "digest" not in report.facts and "engine" not in report.facts
    assert not any("digest" in line for line in report.ledger)


def test_a_vector_tells_the_digests_of_what_it_was_made_of(tmp_path: Path) -> None:
    base = save(tmp_path / "base", toy(), shards=2)
    tuned = save(tmp_path / "tuned", perturbed(toy(), 1))
    v = tmp_path / "v.safetensors"
    sv.diff(tuned, base, v)
    content = looked_at(v).facts["content"]
    assert content == {"base": digest_of(base), "tuned": digest_of(tuned)}
    shown = CliRunner().invoke(main, ["inspect", str(v)]).stdout
    assert f"content  of base: {content['base']}" in shown
    lines = {line["name"]: line["digest"] for line in sv.inspect(base, digest=True).ledger}
    entries = sv.SkillVector.open(v).manifest["tensors"]
    assert lines == {name: entry["base"][1] for name, entry in entries.items()}


@pytest.mark.parametrize("why", ["excluded", "integers", "tied", "renamed", "combined"])
def test_a_vector_tells_no_digest_that_it_does_not_know(why: str, tmp_path: Path) -> None:
    base, tuned = toy(), perturbed(toy(), 1)
    config, options = {"model_type": "toy"}, {}
    if why == "excluded":
        options = {"exclude": ["*norm*"]}
    elif why == "integers":
        base, tuned = (side | {"ids": torch.arange(3)} for side in (base, tuned))
    elif why == "tied":
        config |= {"tie_word_embeddings": True}
        del base["lm_head.weight"]
        tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"].clone()
    elif why == "renamed":
        tuned = {name.replace("up_proj", "lift"): tensor for name, tensor in tuned.items()}
        options = {"rename": ["lift=up_proj"]}
    sides = [save(tmp_path / name, made, config=config)
             for name, made in (("tuned", tuned), ("base", base))]  # fmt: skip
    v = tmp_path / "v.safetensors"
    sv.diff(*sides, v, **options)
    if why == "combined":
        sv.combine(v, v, output=tmp_path / "c.safetensors")
        v = tmp_path / "c.safetensors"
    found = looked_at(v).facts["content"]
    known = {"tied": "base", "renamed": "base"}.get(why)
    for side, folder in zip(("tuned", "base"), sides, strict=True):
        assert found[side] == (digest_of(folder) if side == known else None), side


def test_a_file_that_changes_while_it_is_digested_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", toy())
    with (
        on_block(lambda *block: save(folder, perturbed(toy(), 1))),
        pytest.raises(FormatError, match="changed while"),
    ):
        sv.inspect(folder, digest=True, engine="serial")


def test_a_digest_is_of_models_alone(tmp_path: Path) -> None:
    base = save(tmp_path / "base", toy())
    sv.diff(save(tmp_path / "tuned", perturbed(toy(), 1)), base, tmp_path / "v.safetensors")
    with pytest.raises(UsageError, match="is a vector: its manifest has the digests"):
        sv.inspect(tmp_path / "v.safetensors", digest=True)
    shutil.copytree(base, tmp_path / "run" / "checkpoint-5")
    with pytest.raises(UsageError, match="no model at its top, and digest is of models"):
        sv.inspect(tmp_path / "run", digest=True)


def test_quiet_prints_the_digest_alone_and_verbose_those_of_tensors(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", toy())
    report = sv.inspect(folder, digest=True)
    quiet = CliRunner().invoke(main, ["inspect", str(folder), "--digest", "-q"])
    assert quiet.stdout == f"{report.facts['digest']}\n"
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(
        main, ["inspect", str(folder), "--digest", "-v"]
    )
    assert all(line["digest"] in shown.stdout for line in report.ledger)
    assert f"content digest {report.facts['digest']}" in shown.stdout


# ------------------------------------------------------------------------------------------- kinds


def test_a_model_is_said_to_be_one(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", toy(), config=LLAMA)
    assert sentence(folder) == (
        "a full model: LlamaForCausalLM (llama), 5.5 K parameters in 11 BF16 tensors, 11 kB in 1"
        " file."
    )
    mixed = toy() | {"model.norm.weight": torch.ones(24), "ids": torch.arange(9)}
    said = sentence(save(tmp_path / "mixed", mixed, shards=2))
    assert said.startswith(
        "a full model: toy, 5.5 K parameters in 12 tensors (10 BF16, 1 F32, 1 I6"
    )
    assert said.endswith("in 2 files.")
    alone = sentence(folder / "model.safetensors")
    assert alone.startswith("the weights of a model: no config.json names its architecture, 5.5 K")
    facts = looked_at(tmp_path / "mixed").facts
    assert facts["parameters"] == facts["numel"] - 9 and facts["architecture"] is None


def test_a_merged_model_and_vectors_are_said_to_be_ones(tmp_path: Path) -> None:
    base = save(tmp_path / "base", toy())
    tuned = save(tmp_path / "tuned", perturbed(toy(), 1))
    v = tmp_path / "v.safetensors"
    sv.diff(tuned, base, v)
    assert sentence(v) == (
        "a skill vector, tuned - base: exact, base + vector restores tuned bit for bit."
    )
    sv.apply(base, v, tmp_path / "out")
    assert sentence(tmp_path / "out").startswith("a full model that skillvec apply made: toy, 5.5")
    sv.diff(tuned, base, tmp_path / "r.safetensors", dtype="bf16")
    assert "lossy, its values are rounded" in sentence(tmp_path / "r.safetensors")
    sv.combine(v, v, output=tmp_path / "c.safetensors")
    assert "the result of an operator, rounded once" in sentence(tmp_path / "c.safetensors")
    sv.export_patch(v, tmp_path / "p.safetensors")
    assert sentence(tmp_path / "p.safetensors").startswith(
        "a patch: values that take the place of those of one exact base, in the form lists, in 22"
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base"},
         "an adapter for org/base, which is added to that model and is none itself: LoRA of rank 2"
         " (alpha 4), 10 values in 2 F32 tensors, 40 B in 1 file."),
        ({"peft_type": "VERA", "r": True, "lora_alpha": "x", "base_model_name_or_path": None},
         "an adapter, which is added to a model and is none itself: VERA, 10 values in 2 F32"
         " tensors, 40 B in 1 file."),
        ({"r": 10**30, "lora_alpha": 10**400},
         "an adapter, which is added to a model and is none itself: an unknown method of rank"
         " 10000000000000000000 (alpha 10000000000000000000), 10 values in 2 F32 tensors, 40 B in 1"
         " file."),
        ({}, "an adapter, which is added to a model and is none itself: an unknown method, 10"
         " values in 2 F32 tensors, 40 B in 1 file."),
    ],
)  # fmt: skip
def test_an_adapter_is_said_to_be_one(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    factors = {"base_model.model.q.lora_A.weight": torch.ones(2, 3),
               "base_model.model.q.lora_B.weight": torch.ones(2, 2)}  # fmt: skip
    save_file(factors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert sentence(tmp_path) == said
    (tmp_path / "adapter_config.json").write_text("[]")
    report = looked_at(tmp_path)
    assert report.facts["adapter"]["rank"] is None and len(report.ledger) == 2
    assert ["expected a JSON object" in text for text in report.warnings] == [True]


def test_quantised_weights_are_said_with_their_scheme(tmp_path: Path) -> None:
    config = LLAMA | {"quantization_config": {
        "quant_method": "fp8", "weight_block_size": [128, 128]}}  # fmt: skip
    tensors = toy(width=128)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(2, 1)
    facts = looked_at(folder := save(tmp_path / "fp8", tensors, config=config)).facts
    ((scheme, count),) = facts["quantised"].items()
    assert count == 1 and "fp8" in scheme
    assert facts["parameters"] == facts["numel"] - 2  # scales are no parameters
    assert f"with quantised weights: LlamaForCausalLM (llama) (1 {scheme}), " in sentence(folder)
    unknown = LLAMA | {"quantization_config": {"quant_method": "gptq"}}
    facts = looked_at(save(tmp_path / "gptq", toy(), config=unknown)).facts
    assert facts["parameters"] is None and facts["quantised"] == {}


def test_shards_of_a_training_are_said_to_be_such(tmp_path: Path) -> None:
    torch.save(toy(), tmp_path / "model_world_size_1_rank_0.pt")
    assert sentence(tmp_path).startswith("a model in the shards of a training by FSDP, a file a ra")
    checkpoint.save({"w": torch.ones(3, 4)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert sentence(tmp_path / "dcp").startswith(
        "a model in the shards of a training (DCP): no con"
    )
    torch.save(toy(), tmp_path / "model.pt")
    assert sentence(tmp_path / "model.pt").startswith(
        "the weights of a model, pickled by torch: no"
    )


def test_a_folder_of_checkpoints_names_the_newest(tmp_path: Path) -> None:
    model = save(tmp_path / "model", toy())
    for step in (100, 200, 1000):
        shutil.copytree(model, tmp_path / "run" / f"checkpoint-{step}")
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "run" / "checkpoint-2000").mkdir()  # cut off: it holds nothing
    facts = looked_at(tmp_path / "run").facts
    assert facts["checkpoints"] == ["checkpoint-100", "checkpoint-200", "checkpoint-1000"]
    assert facts["newest"] == ["checkpoint-1000"]
    assert sentence(tmp_path / "run") == (
        "a folder of 3 checkpoints of a training (checkpoint-100, checkpoint-200, checkpoint-1000),"
        " and no model itself; the newest is checkpoint-1000/: name that to read it."
    )
    for step in (9, 10):
        shutil.copytree(model, tmp_path / "verl" / f"global_step_{step}" / "actor")
    assert looked_at(tmp_path / "verl").facts["newest"] == ["global_step_10/actor"]
    shutil.copytree(model, tmp_path / "run", dirs_exist_ok=True)
    assert sentence(tmp_path / "run").startswith("a full model")  # with the last weights at its top


def test_the_cache_of_the_hub_is_known(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    for commit in ("a" * 40, "b" * 40):
        save(repo / "snapshots" / commit, toy())
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    facts = looked_at(repo).facts
    assert facts["kind"] == "cache" and facts["repos"] == ["org/name"]
    assert facts["newest"] == [f"snapshots/{'a' * 40}"] and len(facts["commits"]) == 2
    named = f"snapshots/{'a' * 40}/"
    assert f"the Hub's cache of org/name, with 2 commits: name {named} in it, or" in sentence(repo)
    (tmp_path / "models--gpt2").mkdir()
    assert sentence(tmp_path) == (
        "a cache of the Hub, which holds 2 repositories (gpt2, org/name)."
    )
    assert looked_at(repo / "snapshots" / ("a" * 40)).facts["kind"] == "model"
    (repo / "refs" / "main").unlink()
    assert looked_at(repo).facts["newest"] == []  # which of two is not known


def test_reports_are_known(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"verb": "norms"}))
    (tmp_path / "report.html").write_text("")
    assert sentence(tmp_path) == "a report of skillvec norms: open report.html in a browser."
    (tmp_path / "report.html").unlink()
    assert sentence(tmp_path) == "a report of skillvec norms: report.json has all of it."
    for other in ('{"verb": 3}', "[]", "{", '{"verb": "a b"}'):
        (tmp_path / "report.json").write_text(other)
        with pytest.raises(UsageError, match="nothing in it that skillvec knows"):
            sv.inspect(tmp_path)


def test_trials_that_go_on_are_known(tmp_path: Path) -> None:
    found = {name: verb for name, verb, _ in other_folders.TRIALS}
    assert found == {JOURNAL: "sweep", DATABASE: "search"}
    for name in found:  # of others
        (tmp_path / name).write_text("{}\n")
    with pytest.raises(UsageError, match="nothing in it that skillvec knows"):
        sv.inspect(tmp_path)
    Journal(tmp_path / JOURNAL, {"form": 1, "target": "t"}, force=True).close()
    assert sentence(tmp_path) == (
        "what skillvec sweep has written so far: the same command goes on with it."
    )
    (tmp_path / "report.json").write_text(json.dumps({"verb": "sweep"}))
    (tmp_path / "index.html").write_text("")
    assert sentence(tmp_path) == "a report of skillvec sweep: open index.html in a browser."


def test_an_unfinished_run_is_found_by_the_name_of_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save(tmp_path / "base", {f"w{n}": torch.randn(1100, 1000) for n in range(3)})
    tuned = save(tmp_path / "tuned", perturbed(load(base), 1))
    out = tmp_path / "v.safetensors"
    monkeypatch.setattr("skillvec.engine.runner.CLAIM_SECONDS", 0.0)

    def stop(plan: Any, number: int, index: int, again: bool) -> None:
        if number == 2:
            raise KeyboardInterrupt

    with on_block(stop), pytest.raises(KeyboardInterrupt):
        sv.diff(tuned, base, out, engine="serial")
    for path in (out, staging_of(out)):
        facts = looked_at(path).facts
        assert (facts["kind"], facts["verb_run"]) == ("unfinished", "diff")
        assert facts["output"] == "v.safetensors" and facts["tensors_done"] == 1
    assert sentence(out) == (
        "an unfinished run of skillvec diff, which was to write v.safetensors, with 1 tensor done:"
        " the same command goes on with it if it was cut off."
    )
    sv.diff(tuned, base, out)
    assert looked_at(out).facts["kind"] == "vector"
    staging_of(out).mkdir()  # nothing stands in it yet, or what nobody wrote
    journal = staging_of(out) / "journal"
    for said in (b"", b"[]", b'{"request":[]}', b'{"request":{"verb":"\\u001b"}}', b"{"):
        journal.write_bytes(xxh3_64(said, seed=0).hexdigest().encode() + b" " + said + b"\n")
        facts = looked_at(staging_of(out)).facts
        assert facts["verb_run"] is None and facts["tensors_done"] == 0


def test_a_file_without_tensors_is_said_to_have_none(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    assert sentence(tmp_path).endswith("0 parameters in no tensors at all.")


def test_links_that_lead_in_a_circle_are_passed_by(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint-3", toy())
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert looked_at(tmp_path).facts["newest"] == ["checkpoint-3"]


def test_a_json_file_of_a_model_leads_to_its_folder(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", toy(), config=LLAMA, shards=2)
    for name in ("config.json", "model.safetensors.index.json"):
        with pytest.raises(FormatError, match=r"name the folder that it lies in$"):
            sv.inspect(folder / name)


@pytest.mark.parametrize("names", [[], ["notes.txt", "data.csv"]])
def test_what_is_not_known_is_said_with_what_was_looked_for(
    names: list[str], tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).write_text("")
    result = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert result.exit_code == 2 and result.stdout == ""
    told = "a folder with nothing in it that skillvec knows" if names else "an empty folder"
    assert told in result.stderr and "looked for weights of a model" in result.stderr
    assert all(f"  {name}" in result.stderr for name in names)


def test_only_a_vector_has_a_verdict(tmp_path: Path) -> None:
    model = save(tmp_path / "run" / "checkpoint-5", toy())
    for path in (model, tmp_path / "run"):
        with pytest.raises(UsageError, match="only a vector has a verdict on a target"):
            sv.inspect(path, model)


def test_every_kind_and_claim_has_words() -> None:
    from skillvec.vectors.manifest import CLAIMS as STATED

    assert {*CLAIMS} == {*STATED}
    kinds = ("model", "adapter", "patch", "vector", "report", "unfinished", "checkpoints", "cache")
    assert {*KINDS} == {*kinds}


@pytest.mark.parametrize("open_it", [sv.inspect, sv.verify, sv.norms, lambda it: sv.diff(it, it)])
def test_what_is_no_name_is_said_to_be_none(open_it: Any) -> None:
    with pytest.raises(UsageError, match="expected a path or a name on the Hub, found 3"):
        open_it(3)
