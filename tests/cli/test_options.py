"""Every option of every command changes what a user sees, in the way that its help promises.

The options are those that click knows. A case has a command line, the option and a condition on
what was seen without and with it; the condition must hold of the two, and not of the first twice.
"""

import gc
import json
import os
import shlex
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import torch
from click.testing import CliRunner, Result
from families import load, perturbed, save, toy
from hubserver import HubServer, Repo
from optuna.storages import InMemoryStorage
from safetensors import safe_open
from schemas import check_all_shown
from zoo import build

import skillvec as sv
from skillvec.analysis import search_page, sweep_page
from skillvec.cli import main
from skillvec.engine.threads import on_block
from skillvec.ops import svd
from skillvec.trials import search
from skillvec.trials.studies import open_storage

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16,
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 24, "attention_bias": True,
    "tie_word_embeddings": False,
}  # fmt: skip
WIDE = LLAMA | {"hidden_size": 80, "intermediate_size": 160, "num_hidden_layers": 1}
# the size of a tensor of each layer, in a loaded model
PROBE = """
import time, torch
def size(model, tokenizer, scale=1.0, wait=0.0):
    time.sleep(wait)
    weights = model.state_dict()
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    sizes = [scale * weights[name].float().norm().item() for name in names]
    bits = 8 * weights["lm_head.weight"].element_size()
    return {"size": sizes, "bits": bits, "random": torch.rand(3)}
def half(model, tokenizer, split, **options):
    return size(model, tokenizer, **options)
rest = size
"""
RECIPE = "op: ties\nvectors: [{vector: skill.safetensors, weight: 0.5}, {vector: far.safetensors}]"


# ------------------------------------------------------------------------------------------ inputs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that the commands run in, with all that they read."""
    folder = tmp_path_factory.mktemp("options")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(svd, "EXACT", 1)  # small matrices are decomposed as large ones are
        patch.setenv("COLUMNS", "200")
        for page in (search_page, sweep_page):  # their own tests draw them
            patch.setattr(page, "html", lambda content: "")
            patch.setattr(page, "figures", lambda content: [])
        patch.setattr(search, "open_storage", cache(open_in_memory))  # nor wait for the disk
        make_models()
        make_vectors()
        make_live()
        gc.freeze()  # trials collect garbage at their end, and a session of tests has much
        yield folder
        gc.unfreeze()


def make_models() -> None:
    base = toy(0, width=16, vocabulary=24)
    tuned = perturbed(base, 1, density=0.3)
    nan = {name: tensor.clone() for name, tensor in tuned.items()}
    nan["model.norm.weight"][3] = float("nan")
    other_names = {name.replace("up_proj", "lift"): tensor for name, tensor in tuned.items()}
    longer = {name: torch.cat([tensor, tensor[:3]]) if "embed" in name or "head" in name else tensor
              for name, tensor in tuned.items()}  # fmt: skip
    models = {"base": base, "tuned": tuned, "far": perturbed(base, 2, size=0.05), "nan": nan,
              "renamed": other_names, "longer": longer}  # fmt: skip
    models |= {f"{name}_base": perturbed(models[name], 5) for name in ("renamed", "longer")}
    models |= {f"gone_{name}": models[name] for name in ("base", "tuned")}
    for name, tensors in models.items():
        save(name, tensors, config=LLAMA)
    for name in ("target", "gone_target"):
        save(name, perturbed(base, 3, size=0.02), shards=2, config=LLAMA)
    weight = "model.layers.0.mlp.up_proj.weight"
    about = {"kind": "moments", "schema": 1, "tokens": 9,
             "weights": {weight: {"entry": "x", "input": "columns"}}}  # fmt: skip
    save("moments.safetensors", {"x.moment": torch.eye(16), "x.mean": torch.zeros(16)},
         {"skillvec": json.dumps(about)})  # fmt: skip
    wide = toy(0, width=80, layers=1)
    save("wide_base", wide, config=WIDE | {"vocab_size": 40})
    save("wide", perturbed(wide, 1), config=WIDE | {"vocab_size": 40})
    experts = build("MixtralForCausalLM")  # which has other names in memory
    experts.save_pretrained("experts_base")
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter += 0.01
    experts.save_pretrained("experts")


def make_vectors() -> None:
    for tuned, base, name in (
        ("tuned", "base", "skill"), ("far", "base", "far"), ("renamed", "renamed_base", "renamed"),
        ("longer", "longer_base", "longer"), ("wide", "wide_base", "wide"),
        ("experts", "experts_base", "experts"), ("gone_tuned", "gone_base", "gone_skill"),
        ("gone_tuned", "gone_base", "moved"),
    ):  # fmt: skip
        sv.diff(tuned, base, f"{name}.safetensors")
    sv.diff("nan", "base", "nan.safetensors", allow_nonfinite=True)
    sv.export_patch("skill.safetensors", "patch.safetensors")
    sv.export_patch("nan.safetensors", "nan_patch.safetensors", allow_nonfinite=True)
    sv.apply("target", "skill.safetensors", "merged")
    sv.apply("gone_target", "gone_skill.safetensors", "moved_merged")
    for name in ("base", "tuned", "target", "skill.safetensors"):
        Path(f"gone_{name}").rename(f"moved_{name}")
    Path("recipe.yaml").write_text(RECIPE)


def open_in_memory(url: str) -> Any:
    """Return a storage without a database, beside a file that looks like one."""
    if not url.startswith("sqlite"):
        return open_storage(url)
    Path(url.removeprefix("sqlite:///")).touch()
    return InMemoryStorage()


def make_live() -> None:
    """Make a model that transformers loads, vectors for it, and what evaluates it."""
    live = build("LlamaForCausalLM").bfloat16()
    live.save_pretrained("live")
    base = load("live")
    longer = {name: torch.cat([tensor, tensor[:3]]) if "embed" in name or "head" in name else tensor
              for name, tensor in base.items()}  # fmt: skip
    lifted = {name.replace("up_proj", "lift"): tensor for name, tensor in base.items()}
    for name, tensors in {"live": base, "live_longer": longer, "live_lifted": lifted}.items():
        save(f"{name}_base", tensors, config=LLAMA)
        save(f"{name}_tuned", perturbed(tensors, 1, size=0.05), config=LLAMA)
        sv.diff(f"{name}_tuned", f"{name}_base", f"{name}.safetensors")
    Path("probe.py").write_text(PROBE)
    Path("scores.json").write_text('{"size": 1.0}')


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[HubServer]:
    skill, far = ((place / f"{name}.safetensors").read_bytes() for name in ("skill", "far"))
    with HubServer() as server:
        for name in ("tuned", "base", "target"):
            server.add_repo(f"org/{name}", place / name)
        server.add_repo("org/skill", {"skill.safetensors": skill})
        server.commit("org/skill", {"skill.safetensors": far}, branch="older")
        server.add_repo("org/closed", {"skill.safetensors": skill}, private=True)
        yield server


# ------------------------------------------------------------------------------------ what is seen


@dataclass(frozen=True)
class Seen:
    """What one run of a command left for its user, and which threads worked on tensors."""

    code: int
    stdout: str
    stderr: str
    output: Path
    home: Path
    pushed: Repo | None
    threads: frozenset[int]

    def __repr__(self) -> str:
        return f"exit code {self.code}, {self.stdout[-500:]!r}, {self.stderr[-500:]!r}"

    @property
    def said(self) -> str:
        return " ".join((self.stdout + self.stderr).split())

    @property
    def lines(self) -> int:
        return (self.stdout + self.stderr).count("\n")

    @property
    def report(self) -> dict[str, Any]:
        return json.loads(self.stdout) if self.stdout.startswith("{") else {}

    @property
    def measured(self) -> dict[str, Any]:
        """The numbers over all tensors, of the first pair or of the one vector."""
        first: dict[str, Any] = (self.report["pairs"] or self.report["norms"])[0]["overall"]
        return first

    @property
    def norms(self) -> dict[str, Any]:
        first: dict[str, Any] = self.report["norms"][0]["overall"]
        return first

    @property
    def taken(self) -> set[str]:
        """The tensors that were worked on."""
        lines = self.report.get("tensors", [])
        return {line["name"] for line in lines if line["status"] != "excluded"}

    @property
    def files(self) -> set[str]:
        if self.output.is_file():
            return {self.output.name}
        found = (path for path in self.output.rglob("*") if path.is_file())
        return {str(path.relative_to(self.output)) for path in found}

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load(self.output)

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {tensor.dtype for tensor in self.weights.values()}

    @property
    def names(self) -> str:
        return " ".join(self.weights)

    @property
    def metadata(self) -> dict[str, str]:
        with safe_open(self.output, "pt") as file:
            return dict(file.metadata())

    @property
    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.metadata["skillvec"])
        return found

    @property
    def codecs(self) -> set[str]:
        return {line["codec"] for line in self.manifest["tensors"].values()}

    @property
    def distance(self) -> float:
        """How far a merged model is from its target."""
        target = load("target")
        moved = [tensor.double() - target[name].double() for name, tensor in self.weights.items()]
        return float(sum(tensor.square().sum() for tensor in moved)) ** 0.5

    @property
    def modules_to_save(self) -> list[str]:
        config = json.loads((self.output / "adapter_config.json").read_text())
        return config.get("modules_to_save") or []

    @property
    def cached(self) -> int:
        """How many bytes of safetensors files the Hub's cache holds."""
        held = [path.read_bytes() for path in self.home.rglob("*") if path.is_file()]
        return sum(len(content) for content in held if content[8:9] == b"{")

    @property
    def uploaded(self) -> dict[str, bytes]:
        assert self.pushed is not None
        main_branch = self.pushed.commits[self.pushed.refs["refs/heads/main"]]
        return {path: blob.data for path, blob in main_branch.items()}

    @property
    def titles(self) -> set[str]:
        assert self.pushed is not None
        return {title for title, _ in self.pushed.log.values()}

    @property
    def refs(self) -> set[str]:
        assert self.pushed is not None
        return set(self.pushed.refs)

    @property
    def named(self) -> set[str]:
        """What the text names, of the tensors of the models here and of files on the Hub."""
        files = self.uploaded if self.pushed else ["skill.safetensors"]
        return {name for name in (*load("base"), *files) if f" {name} " in f" {self.said} "}

    @property
    def did(self) -> bool:
        """Whether anything was written, sent, fetched, proved or measured."""
        found = self.report.get("verified") or self.report.get("norms")
        return self.code == 0 and bool(self.files or self.pushed or self.cached or found)


class Runner:
    """Runs command lines: OUT is an output, NEW a repository on the Hub, each of its own run."""

    def __init__(self, place: Path, server: HubServer, patch: pytest.MonkeyPatch) -> None:
        self.place, self.server, self.patch, self.count = place, server, patch, 0
        self.run = cache(self._run)  # several options are compared with one run without any

    def _run(self, words: str, before: str | None = None) -> Seen:
        """Run a command line, after another one on the same output."""
        self.count += 1
        output, repo = self.place / f"run{self.count}" / "out.safetensors", f"user/n{self.count}"
        output.parent.mkdir()
        signed_in = before != "signed out"
        self.server.adopt(self.patch, home := output.parent / "home", "good" if signed_in else None)
        self.patch.setenv("HOME", str(home))  # where completion is installed
        self.patch.delenv("XDG_DATA_HOME", raising=False)
        if before and signed_in:
            assert self._invoke(before, output, repo).exit_code == 0
        threads: set[int] = set()
        with on_block(lambda *rest: threads.add(threading.get_ident())):
            result = self._invoke(words, output, repo)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Seen(result.exit_code, result.stdout, result.stderr, output, home,
                    self.server.repos.get(repo), frozenset(threads))  # fmt: skip

    @staticmethod
    def _invoke(words: str, output: Path, repo: str) -> Result:
        words = words.replace("OUT", str(output)).replace("NEW", repo)
        return CliRunner().invoke(main, shlex.split(words))


@pytest.fixture(scope="module")
def runner(place: Path, server: HubServer) -> Iterator[Runner]:
    with pytest.MonkeyPatch.context() as patch:
        check_all_shown(patch)  # against the published schemas
        yield Runner(place, server, patch)


# --------------------------------------------------------------------------------------- the cases

Check = Callable[[Seen, Seen], Any]


class Case(NamedTuple):
    """A command line, what is added to it, what must be true without and with it, what goes before.

    `before` "itself" runs the command line once before each of the two, on the same output.
    """

    words: str
    given: str
    check: Check
    before: str | None = None


def refused(code: int) -> Check:
    """Without the option the run is refused; with it, it is done."""
    return lambda a, b: a.code == code and not a.did and b.code == 0 and (b.did or b.stdout)


def refuses(word: str) -> Check:
    """The option is understood: a word of it that cannot be is refused."""
    return lambda a, b: a.code == 0 and b.code == 2 and word in b.said


def values_differ(a: Seen, b: Seen) -> bool:
    left, right = a.weights, b.weights
    return {*left} == {*right} and any(not torch.equal(left[name], right[name]) for name in left)


def labelled(*path: str) -> Check:
    """The manifest has a value at a path of keys, and none without the option."""
    *keys, value = path

    def look(seen: Seen) -> Any:
        return reduce(dict.__getitem__, keys, seen.manifest)

    return lambda a, b: look(a) is None and look(b) == value


def becomes(before: torch.dtype, after: torch.dtype) -> Check:
    return lambda a, b: before in a.dtypes - b.dtypes and after in b.dtypes


def streamed(a: Seen, b: Seen) -> bool:
    """No weights stay in the cache, and the output is the same but for what it says of the run."""
    return (a.cached > 0 == b.cached and b.report["stream"]["fetched"] > 0
            and "stream" not in a.report and not values_differ(a, b) and b.did)  # fmt: skip


def is_norm(name: str) -> bool:
    return name.endswith("norm.weight")


NORMS = "'*norm.weight'"


def shared(words: str) -> dict[str, Case]:
    """Return the cases of options that mean the same for every command that has them."""
    to_output = words if "OUT" in words else f"{words} -o OUT"
    return {
        "--output": Case(words.replace("-o OUT", ""), "-o OUT",
                         lambda a, b: not a.files and b.files and b.code == 0),
        "--force": Case(to_output, "--force", lambda a, b: (
            a.code == 2 and "exists already" in a.said and b.code == 0), before="itself"),
        "--dry-run": Case(f"{words} --json", "--dry-run",
                          lambda a, b: a.did and b.code == 0 and b.report and not b.did),
        "--json": Case(words, "--json", lambda a, b: not a.report and "verb" in b.report),
        "--quiet": Case(words, "-q", lambda a, b: (
            b.stdout.count("\n") == 1 and b.lines < a.lines
            and (not b.stderr or b.stderr.startswith("warning: ")))),
        "--verbose": Case(words, "-v", lambda a, b: b.code == 0 and a.named < b.named),
        "--include": Case(f"{words} --json", f"--include {NORMS}", lambda a, b: (
            b.taken == set(filter(is_norm, a.taken)) < a.taken and b.did)),
        "--exclude": Case(f"{words} --json", f"--exclude {NORMS}", lambda a, b: (
            b.taken == a.taken - set(filter(is_norm, a.taken)) < a.taken and b.did)),
        "--engine": Case(f"{words} --json", "--engine serial", lambda a, b: (
            (a.report["engine"], b.report["engine"]) == ("threads", "serial") and b.did
            and b.threads == {threading.get_ident()} and not a.threads & b.threads)),
        "--workers": Case(f"{words} --json --workers 5", "--workers 1", lambda a, b: (
            (a.report["workers"], b.report["workers"]) == (5, 1) and len(b.threads) == 1)),
    }  # fmt: skip


def stores(words: str) -> dict[str, Case]:
    """Return the cases of a command that writes a vector."""
    return shared(words) | {
        "--codec": Case(words, "--codec dense",
                        lambda a, b: (a.codecs, b.codecs) == ({"packed"}, {"dense"})),
        "--max-shard-size": Case(words, "--max-shard-size 2KB",
                                 lambda a, b: len(a.files) == 1 and len(b.files) > 3),
        "--method": Case(words, "--method grpo", labelled("training", "method", "grpo")),
        "--notes": Case(words, "--notes seen", labelled("training", "notes", "seen")),
        "--license": Case(words, "--license mit", labelled("license", "mit")),
    }  # fmt: skip


def merges(words: str) -> dict[str, Case]:
    """Return the cases of a command that merges the vectors that end its words."""
    alone = words.replace("skill.safetensors far.safetensors", "")
    return {
        "--op": Case(words, "--op ties", values_differ),
        "--param": Case(f"{words} --op ties", "--param density=0.3", values_differ),
        "--recipe": Case(alone, "--recipe recipe.yaml", refused(2)),
    }


def measures(words: str) -> dict[str, Case]:
    """Return the cases of a command that measures vectors."""
    json_of = f"{words} --json"
    return shared(words) | {
        "--against": Case(json_of, "--against base", lambda a, b: (
            a.norms["steps"] is None and b.norms["steps"] and sum(b.norms["steps"]) > 0)),
        "--subspace": Case(json_of, "--subspace 2", lambda a, b: (
            "stable_rank" not in a.norms and b.norms.get("stable_rank", 0) > 1)),
        "--activations": Case(f"{json_of} --device cpu", "--activations moments.safetensors",
                              lambda a, b: "gain_outputs" not in a.norms
                              and b.norms.get("gain_outputs", 0) > 0),
        "--device": Case(f"{words} --subspace 2", "--device cuda:99", refuses("cuda:99")),
        "--figures": Case(f"{words} -o OUT", "--figures", lambda a, b: (
            {Path(file).suffix for file in b.files - a.files} == {".svg", ".png"})),
        "--allow-nonfinite": Case(words.replace("skill", "nan"), "--allow-nonfinite", refused(3)),
    }  # fmt: skip


def curves(seen: Seen) -> set[str]:
    return {point["curve"] for point in seen.report["points"]}


def sizes(seen: Seen) -> list[float]:
    return [point["scores"]["size"]["mean"] for point in seen.report["points"]]


def changed(seen: Seen) -> int:
    """How many values the vector changed."""
    found: int = seen.report["points"][1]["changed"]
    return found


def tries(words: str, anew: str) -> dict[str, Case]:
    """Return the cases of a command that tries vectors on a loaded model.

    `words` name target and vector, `anew` a command that has left something else in the output.
    """
    probe = f"{words} --eval probe:size -o OUT"
    as_json, command = f"{probe} --json", "--eval \"command: sh -c 'cat scores.json' {model}\""
    return {name: case for name, case in shared(probe).items() if name not in
            ("--engine", "--include", "--exclude")} | {
        "--force": Case(as_json, "--force", lambda a, b: (
            a.code == 2 and "--force" in a.said and b.did), before=anew),
        "--verbose": Case(probe, "-v", lambda a, b: "bits" not in a.stdout and "bits" in b.stdout),
        "--eval": Case(f"{words} -o OUT", "--eval probe:size", refused(2)),
        "--eval-option": Case(as_json, "--eval-option scale=2", lambda a, b: (
            [2 * size for size in sizes(a)] == pytest.approx(sizes(b)))),
        "--metric": Case(as_json, "--metric bits", lambda a, b: (
            (a.report["metric"], b.report["metric"]) == ("size", "bits"))),
        "--minimize": Case(as_json, "--minimize size", lambda a, b: (
            not a.report["less_is_better"] and b.report["less_is_better"])),
        "--scratch": Case(f"{words} {command} -o OUT", "--scratch nowhere", refuses("nowhere")),
        "--timeout": Case(f"{probe} --eval-option wait=0.2", "--timeout 0.02", lambda a, b: (
            a.code == 0 and b.code == 1 and "longer than 0.02 s" in b.said)),
        "--dtype": Case(f"{as_json} --metric bits", "--dtype float32", lambda a, b: (
            (a.report["target_score"], b.report["target_score"]) == (16, 32))),
        "--device": Case(probe, "--device cuda:99", refuses("cuda:99")),
        "--rounding": Case(f"{as_json} --lam 0.3", "--rounding stochastic", lambda a, b: (
            sizes(a)[0] == sizes(b)[0] and sizes(a)[1] != sizes(b)[1])),
        "--seed": Case(f"{as_json} --metric random", "--seed 1", lambda a, b: (
            a.report["target_score"] != b.report["target_score"])),
        "--include": Case(as_json, f"--include {NORMS}", lambda a, b: changed(b) < changed(a) / 4),
        "--exclude": Case(as_json, f"--exclude {NORMS}", lambda a, b: (
            0 < changed(a) - changed(b) < changed(a) / 4)),
        "--rename": Case(probe.replace("live.safe", "live_lifted.safe"), "--rename lift=up_proj",
                         refused(3)),
        "--rows": Case(probe.replace("live.safe", "live_longer.safe"), "--rows common", refused(3)),
    }  # fmt: skip


def reported(seen: Seen, point: str = "target", metric: str = "size") -> float:
    """A score of the items that judge a search."""
    found: float = seen.report["reported"][point][metric]["mean"]
    return found


def moves(seen: Seen) -> bool:
    """Whether the vector reaches the tensors that are measured."""
    return reported(seen, "lambda 1") != reported(seen)


def searches(words: str) -> dict[str, Case]:
    """Return the cases of search; `words` name target and vector."""
    probe = f"{words} --eval probe:half --budget 1 -o OUT"
    as_json, planned = f"{probe} --json", f"{probe} --json --dry-run"

    def asks(key: str, before: Any, after: Any) -> Check:
        return lambda a, b: (a.report[key], b.report[key]) == (before, after)

    return {name: case for name, case in shared(probe).items() if name != "--engine"} | {
        "--force": Case(as_json, "--force", lambda a, b: (
            a.code == 2 and "seed: 5, now 0" in a.said and b.did),
            before=f"search {probe} --seed 5"),
        "--verbose": Case(probe, "-v", lambda a, b: (
            "compared with" not in a.stdout and "compared with" in b.stdout)),
        "--eval": Case(f"{words} -o OUT --dry-run --json", "--eval probe:half", lambda a, b: (
            a.code == 2 and b.report.get("eval", "").startswith("probe:half"))),
        "--eval-option": Case(as_json, "--eval-option scale=2", lambda a, b: (
            2 * reported(a) == pytest.approx(reported(b)))),
        "--metric": Case(as_json, "--metric bits", asks("metric", "size", "bits")),
        "--minimize": Case(as_json, "--minimize size", asks("less_is_better", False, True)),
        "--scratch": Case(f"{as_json} --metric size --second bytes", "--scratch nowhere",
                          refuses("nowhere")),
        "--timeout": Case(f"{probe} --eval-option wait=0.1", "--timeout 0.02", lambda a, b: (
            a.code == 0 and b.code == 1 and "longer than 0.02 s" in b.said)),
        "--dtype": Case(as_json, "--dtype float32", lambda a, b: (
            [reported(seen, metric="bits") for seen in (a, b)] == [16, 32])),
        "--device": Case(probe, "--device cuda:99", refuses("cuda:99")),
        "--rounding": Case(f"{as_json} --space lam=0.3:0.4", "--rounding stochastic", lambda a, b: (
            reported(a) == reported(b) and reported(a, "winner") != reported(b, "winner"))),
        "--seed": Case(as_json, "--seed 1", lambda a, b: (
            a.report["history"][1:] != b.report["history"][1:] and b.did)),
        "--include": Case(as_json, f"--include {NORMS}", lambda a, b: moves(a) and not moves(b)),
        "--exclude": Case(as_json, "--exclude '*up_proj*'", lambda a, b: moves(a) and not moves(b)),
        "--rename": Case(probe.replace("live.safe", "live_lifted.safe"), "--rename lift=up_proj",
                         refused(3)),
        "--rows": Case(probe.replace("live.safe", "live_longer.safe"), "--rows common", refused(3)),
        "--space": Case(planned, "--space lam=0:1,by=layers:2", lambda a, b: (
            [len(seen.report["space"]["dimensions"]) for seen in (a, b)] == [1, 3])),
        "--budget": Case(as_json, "--budget 2", lambda a, b: (
            [seen.report["trials"]["complete"] for seen in (a, b)] == [1, 2])),
        "--sampler": Case(as_json, "--sampler random", lambda a, b: (
            "random" in a.report["reported"] and "random" not in b.report["reported"])),
        "--second": Case(f"{as_json} --metric size", "--second bytes", lambda a, b: (
            not a.report["nbytes"] and b.report["nbytes"].get("winner", 0) > 0)),
        "--keep": Case(planned, "--keep 0.9", asks("keep", 0.95, 0.9)),
        "--report-eval": Case(probe.replace("half", "size"), "--report-eval probe:rest",
                              refused(2)),
        "--storage": Case(probe, "--storage nonsense", refuses("Optuna cannot open it")),
        "--study": Case(planned, "--study other", asks("study", "search", "other")),
    }  # fmt: skip


BOTH = "skill.safetensors far.safetensors"
SWEEP = "live live.safetensors --lam 1"
CASES: dict[str, dict[str, Case]] = {
    "diff": stores("tuned base -o OUT") | {
        "--dtype": Case("tuned base -o OUT --json", "--dtype bf16", lambda a, b: (
            [seen.report["exactness"]["claim"] for seen in (a, b)] == ["bitwise", "rounded"])),
        "--rename": Case("renamed base -o OUT", "--rename lift=up_proj", refused(3)),
        "--rows": Case("longer base -o OUT", "--rows common", refused(3)),
        "--allow-nonfinite": Case("nan base -o OUT", "--allow-nonfinite", refused(3)),
        "--stream": Case("org/tuned org/base -o OUT --json", "--stream", streamed),
    },
    "combine": stores(f"{BOTH} -o OUT") | merges(f"{BOTH} -o OUT") | {
        "--seed": Case(f"{BOTH} -o OUT --op dare_linear", "--seed 1", values_differ),
        "--dtype": Case(f"{BOTH} -o OUT --codec dense", "--dtype bf16",
                        becomes(torch.float32, torch.bfloat16)),
        "--allow-nonfinite": Case("nan.safetensors far.safetensors -o OUT", "--allow-nonfinite",
                                  refused(3)),
        "--stream": Case("org/tuned::org/base far.safetensors -o OUT --json", "--stream", streamed),
    },
    "apply": shared("target skill.safetensors -o OUT") | merges(f"target {BOTH} -o OUT") | {
        "--lam": Case("target far.safetensors -o OUT --dtype fp32", "--lam 0.5",
                      lambda a, b: abs(b.distance / a.distance - 0.5) < 1e-4),
        "--tuned": Case("target --base base -o OUT", "--tuned tuned", refused(2)),
        "--base": Case("target --tuned tuned -o OUT", "--base base", refused(2)),
        "--dtype": Case("target skill.safetensors -o OUT", "--dtype fp32",
                        becomes(torch.bfloat16, torch.float32)),
        "--rounding": Case("target far.safetensors -o OUT --lam 0.3", "--rounding stochastic",
                           values_differ),
        "--seed": Case("target far.safetensors -o OUT --rounding stochastic --lam 0.3", "--seed 1",
                       values_differ),
        "--rename": Case("target renamed.safetensors -o OUT", "--rename lift=up_proj", refused(3)),
        "--rows": Case("target longer.safetensors -o OUT", "--rows common", refused(3)),
        "--allow-nonfinite": Case("target nan.safetensors -o OUT", "--allow-nonfinite", refused(3)),
        "--stream": Case("org/target skill.safetensors -o OUT --json", "--stream", streamed),
    },
    "import-patch": stores("patch.safetensors base -o OUT") | {
        "--allow-nonfinite": Case("nan_patch.safetensors base -o OUT", "--allow-nonfinite",
                                  refused(3)),
        "--stream": Case("patch.safetensors org/base -o OUT --json", "--stream", streamed),
    },
    "export-patch": shared("skill.safetensors -o OUT") | {
        "--base": Case("moved.safetensors -o OUT", "--base moved_base", refused(2)),
        "--form": Case("skill.safetensors -o OUT", "--form verl", lambda a, b: (
            "__delta_spec__" not in a.names and "__delta_spec__" in b.names)),
        "--names": Case("experts.safetensors -o OUT", "--names memory", lambda a, b: (
            "experts.0.w1.weight" in a.names and "experts.0" not in b.names
            and "experts.gate_up_proj" in b.names)),
        "--allow-nonfinite": Case("nan.safetensors -o OUT", "--allow-nonfinite", refused(3)),
    },
    "extract-lora": shared("far.safetensors -o OUT --rank 2") | {
        "--rank": Case("far.safetensors -o OUT", "--rank 2", refused(2)),
        "--energy": Case("far.safetensors -o OUT", "--energy 0.5", refused(2)),
        "--include": Case("far.safetensors -o OUT --rank 2", "--include '*q_proj.weight'",
                          lambda a, b: "up_proj" in a.names and "up_proj" not in b.names and b.did),
        "--embed-lora": Case("far.safetensors -o OUT --rank 2", "--embed-lora", lambda a, b: (
            "lora_embedding_A" not in a.names and "lora_embedding_A" in b.names)),
        "--save-module": Case(
            "far.safetensors -o OUT --rank 2", "--save-module lm_head",
            lambda a, b: (a.modules_to_save, b.modules_to_save) == ([], ["lm_head"])),
        "--base": Case("moved.safetensors -o OUT --rank 2", "--base moved_base", refused(2)),
        "--dtype": Case("far.safetensors -o OUT --rank 2", "--dtype bf16",
                        becomes(torch.float32, torch.bfloat16)),
        "--device": Case("far.safetensors -o OUT --rank 2", "--device cuda:99", refuses("cuda:99")),
        "--seed": Case("wide.safetensors -o OUT --rank 1", "--seed 1", values_differ),
        "--allow-nonfinite": Case("nan.safetensors -o OUT --rank 2", "--allow-nonfinite",
                                  refused(3)),
    },
    "push": shared("skill.safetensors NEW") | {
        "--private": Case("skill.safetensors NEW", "--private",
                          lambda a, b: b.pushed.private and not a.pushed.private),
        "--revision": Case("skill.safetensors NEW", "--revision side", lambda a, b: (
            b.refs - a.refs == {"refs/heads/side"} and len(a.uploaded) > len(b.uploaded))),
        "--create-pr": Case("skill.safetensors NEW", "--create-pr", lambda a, b: (
            b.refs - a.refs == {"refs/pr/1"} and len(a.uploaded) > len(b.uploaded))),
        "--commit-message": Case("skill.safetensors NEW", "--commit-message 'as asked'",
                                 lambda a, b: b.titles - a.titles == {"as asked"}),
        "--license": Case("skill.safetensors NEW", "--license mit", lambda a, b: (
            b"license: mit" in b.uploaded["README.md"]
            and b"license: mit" not in a.uploaded["README.md"])),
        "--token": Case("skill.safetensors NEW", "--token good", refused(2), before="signed out"),
    },
    "pull": shared("org/skill -o OUT") | {
        "--revision": Case("org/skill -o OUT", "--revision older", lambda a, b: (
            a.output.read_bytes() == Path("skill.safetensors").read_bytes()
            and b.output.read_bytes() == Path("far.safetensors").read_bytes())),
        "--token": Case("org/closed -o OUT", "--token good", refused(2), before="signed out"),
    },
    "orthogonality": measures(BOTH) | {
        "--control": Case(f"{BOTH} --json", "--control random", lambda a, b: (
            "control_cosine" not in a.measured
            and abs(b.measured.get("control_cosine", 1)) < 1)),
        "--seed": Case(f"{BOTH} --control random --json", "--seed 1", lambda a, b: (
            a.measured["control_cosine"] != b.measured["control_cosine"])),
    },
    "norms": measures("skill.safetensors") | {
        "--seed": Case("wide.safetensors --subspace 1 --json", "--seed 1", lambda a, b: (
            a.measured["effective_rank"] != b.measured["effective_rank"])),
    },
    "inspect": shared("base") | {
        "--target": Case("skill.safetensors --json", "--target target", lambda a, b: (
            "verdict" not in a.report and b.report.get("verdict") == "same family")),
        "--digest": Case("base --json", "--digest", lambda a, b: (
            "digest" not in a.report and len(b.report.get("digest", "")) == 32
            and all(len(line["digest"]) == 32 for line in b.report["tensors"]))),
        "--engine": Case("base --digest --json", "--engine serial", lambda a, b: (
            (a.report["engine"], b.report["engine"]) == ("threads", "serial")
            and b.threads == {threading.get_ident()} and not a.threads & b.threads
            and a.report["digest"] == b.report["digest"])),
        "--workers": Case("base --digest --json --workers 5", "--workers 1", lambda a, b: (
            (a.report["workers"], b.report["workers"]) == (5, 1) and len(b.threads) == 1
            and a.report["digest"] == b.report["digest"])),
    },
    "search": searches("live live.safetensors"),
    "sweep": tries(SWEEP, f"sweep {SWEEP} --eval probe:size --seed 5 -o OUT") | {
        "--lam": Case("live live.safetensors --eval probe:size -o OUT --json", "--lam 0.5,1",
                      lambda a, b: len(a.report["lam"]) == 13 and b.report["lam"] == [0, 0.5, 1]),
        "--control": Case(f"{SWEEP} --eval probe:size -o OUT --json", "--control random,shuffled",
                          lambda a, b: curves(b) - curves(a) == {"random", "shuffled"}),
    },
    "help": {},
    "completion": {
        "--install": Case("bash", "--install", lambda a, b: (
            "_skillvec_completion()" in a.stdout and ".bashrc" in b.stdout
            and not [*a.home.glob(".bashrc")] and "skillvec/completion.bash" in " ".join(
                map(str, b.home.rglob("completion.bash"))))),
    },
    "verify": shared("merged") | {
        "--tuned": Case("moved.safetensors --base moved_base", "--tuned moved_tuned", refused(2)),
        "--base": Case("moved.safetensors --tuned moved_tuned", "--base moved_base", refused(2)),
        "--target": Case("moved_merged --vector moved_skill.safetensors", "--target moved_target",
                         refused(2)),
        "--vector": Case("moved_merged --target moved_target", "--vector moved_skill.safetensors",
                         refused(2)),
    },
}  # fmt: skip


OPTIONS = [
    (command.name, max(option.opts, key=len))
    for command in main.commands.values() for option in command.params
    if isinstance(option, click.Option)
]  # fmt: skip


ALSO = [  # what else an option decides
    ("apply", "--seed", Case(f"target {BOTH} -o OUT --op dare_linear", "--seed 1", values_differ)),
    ("orthogonality", "--control", Case(f"{BOTH} --json", "--control moved.safetensors",
        lambda a, b: "control_cosine" in b.measured.keys() - a.measured.keys())),
    ("norms", "--against", Case("skill.safetensors --subspace 2 --json", "--against base",
        lambda a, b: a.norms["energy_in_w"] is None and 0 < (b.norms["energy_in_w"] or 0) < 1)),
    ("export-patch", "--form", Case("skill.safetensors -o OUT", "--form vllm", lambda a, b: (
        "update_info" in b.metadata.keys() - a.metadata.keys()))),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning:httpx2")
@pytest.mark.parametrize(
    ("command", "option", "case"),
    [
        *((command, option, CASES.get(command, {}).get(option)) for command, option in OPTIONS),
        *ALSO,
    ],
)
def test_an_option_does_what_it_promises(
    command: str, option: str, case: Case | None, runner: Runner
) -> None:
    assert case is not None, f"{command} {option}: write a case that shows what it changes"
    words = f"{command} {case.words}"
    before = words if case.before == "itself" else case.before
    without, given = runner.run(words, before), runner.run(f"{words} {case.given}", before)
    assert case.check(without, given)
    assert not case.check(without, without)


def test_cases_are_of_options_that_there_are() -> None:
    said = {name for cases in CASES.values() for name in cases}
    assert said == {option for _, option in OPTIONS}
    assert {*CASES} == {*main.commands}


def test_the_version_is_said() -> None:
    assert sv.__version__ in CliRunner().invoke(main, ["--version"]).stdout
