"""What inspect says, as lines of text."""

from collections.abc import Callable
from typing import Any

from skillvec.analysis.wording import count_files, human_bytes, human_count, name_some, wrap
from skillvec.report import Report
from skillvec.verbs.phrases import Facts, say_dtypes, say_sampled, say_source


def say_inspect(report: Report) -> list[str]:
    """Return what a file or folder is: in one sentence first, then what else is known of it."""
    facts = report.facts
    said = [wrap(f"{facts['path']} is {KINDS[facts['kind']](report)}.")]
    if facts["kind"] == "vector":
        return said + _say_manifest(facts) + _say_content(facts)
    if facts["kind"] == "model" and facts["model_type"] is not None:
        tied = {True: "yes", False: "no", None: "unknown"}[facts["ties_embeddings"]]
        said.append(f"  embeddings tied: {tied}")
    if "recipe" in facts:
        recipe = facts["recipe"]
        said.append(
            f"  {recipe['target']['ref']} + {recipe['lam']:g} * {say_source(recipe['vector'])}"
        )
    if "digest" in facts:
        said.append(f"  content digest {facts['digest']}")
    return said


# ------------------------------------------------------------------------ what kind of thing it is


def _say_model(report: Report) -> str:
    facts = report.facts
    what = next((said for begin, said in STORED.items() if facts["format"].startswith(begin)), "")
    what = what or f"a model in the format {facts['format']}"
    if "recipe" in facts:
        what += " that skillvec apply made"
    named = [name for name in (facts["architecture"], facts["model_type"]) if name]
    named[1:] = [f"({name})" for name in named[1:]]
    if facts["quantised"]:
        what += ", with quantised weights"
        schemes = ", ".join(f"{count} {form}" for form, count in facts["quantised"].items())
        named.append(f"({schemes})")
    if not named[:1] or named[0].startswith("("):
        what = what.replace("a full model", "the weights of a model")
        named = ["no config.json names its architecture", *named]
    who = " ".join(named)
    count = facts["parameters"]
    counted = f"{human_count(facts['numel'])} values" if count is None else (
        f"{human_count(count)} parameters")  # fmt: skip
    return f"{what}: {who}, {counted} {_say_tensors(report)}"


def _say_tensors(report: Report) -> str:
    """Return in how many tensors, of which dtypes, and how many bytes it lies."""
    facts, dtypes = report.facts, report.facts["dtypes"]
    count = len(report.ledger)
    plural = "" if count == 1 else "s"
    if not count:
        return "in no tensors at all"
    kinds = f"{count} {next(iter(dtypes))} tensor{plural}" if len(dtypes) == 1 else (
        f"{count} tensors ({', '.join(f'{n} {dtype}' for dtype, n in dtypes.items())})"
    )  # fmt: skip
    return f"in {kinds}, {human_bytes(facts['nbytes'])} in {count_files(facts['files'])}"


def _say_adapter(report: Report) -> str:
    said = report.facts["adapter"]
    method = {"LORA": "LoRA", None: "an unknown method"}.get(said["method"], said["method"])
    rank = f" of rank {said['rank']!s:.20}" if said["rank"] is not None else ""
    alpha = f" (alpha {said['alpha']!s:.20})" if said["alpha"] is not None else ""
    base = f" for {said['base']}" if said["base"] else ""
    model = "that model" if base else "a model"
    return (
        f"an adapter{base}, which is added to {model} and is none itself: {method}{rank}{alpha},"
        f" {human_count(report.facts['numel'])} values {_say_tensors(report)}"
    )


def _say_patch(report: Report) -> str:
    return (
        f"a patch: values that take the place of those of one exact base, in the form"
        f" {report.facts['form']}, {_say_tensors(report)}"
    )


def _say_vector(report: Report) -> str:
    facts = report.facts
    return f"a skill vector, {facts['formula']}: {CLAIMS[facts['exactness']['claim']]}"


def _say_report(report: Report) -> str:
    page = report.facts["page"]
    seen = f"open {page} in a browser" if page else "report.json has all of it"
    return f"a report of skillvec {report.facts['verb_run']}: {seen}"


def _say_unfinished(report: Report) -> str:
    facts = report.facts
    verb = f"skillvec {facts['verb_run']}" if facts["verb_run"] else "skillvec"
    if facts["output"] is None:
        return f"what {verb} has written so far: the same command goes on with it"
    count = facts["tensors_done"]
    done = f", with {count} tensor{'' if count == 1 else 's'} done" if count else ""
    return (
        f"an unfinished run of {verb}, which was to write {facts['output']}{done}: the same command"
        " goes on with it if it was cut off"
    )


def _say_checkpoints(report: Report) -> str:
    names, newest = report.facts["checkpoints"], report.facts["newest"]
    which = f"the newest is {' and '.join(f'{name}/' for name in newest)}: name that to read it"
    return (
        f"a folder of {len(names)} checkpoint{'' if len(names) == 1 else 's'} of a training"
        f" ({name_some(names)}), and no model itself; {which}"
    )


def _say_cache(report: Report) -> str:
    facts = report.facts
    repos = facts["repos"]
    if not facts["commits"]:
        plural = "repository" if len(repos) == 1 else "repositories"
        return f"a cache of the Hub, which holds {len(repos)} {plural} ({name_some(repos)})"
    newest = f"name {facts['newest'][0]}/ in it" if facts["newest"] else "name a snapshot in it"
    plural = "" if len(facts["commits"]) == 1 else "s"
    return (
        f"the Hub's cache of {repos[0]}, with {len(facts['commits'])} commit{plural}: {newest}, or"
        f" {repos[0]}"
    )


KINDS: dict[str, Callable[[Report], str]] = {
    "model": _say_model, "adapter": _say_adapter, "patch": _say_patch, "vector": _say_vector,
    "report": _say_report, "unfinished": _say_unfinished, "checkpoints": _say_checkpoints,
    "cache": _say_cache,
}  # fmt: skip
STORED = {  # by how the name of a format begins
    "safetensors": "a full model",
    "pytorch_model.bin": "a full model, pickled by torch",
    "GGUF": "a GGUF file, a model for llama.cpp",
    "FSDP rank files": "a model in the shards of a training by FSDP, a file a rank, as verl writes",
    "FSDP full state dict": "a model that a training by FSDP gathered into one state dict",
    "torch.distributed.checkpoint": "a model in the shards of a training (DCP)",
    "DCP safetensors": "a model in the safetensors shards of a training (DCP)",
    "DeepSpeed ZeRO": "a model in the shards of a training by DeepSpeed ZeRO",
}
CLAIMS = {
    "bitwise": "exact, base + vector restores tuned bit for bit",
    "partial": "exact but for the values and integer tensors that it names",
    "rounded": "lossy, its values are rounded to the dtype that was asked for",
    "combined": "the result of an operator, rounded once",
    "lossy": "lossy, a coarser copy of what it was made of",
}


# --------------------------------------------------------------------------------------- vectors


def _say_manifest(facts: Facts) -> list[str]:
    """Return identity and origin of a vector."""
    said = [f"  {facts['formula']}, made by {facts['tool']}:\n  {facts['command']}"]
    for side in ("tuned", "base"):
        if facts[side]:
            ref, revision = facts[side]["ref"], facts[side]["revision"] or ""
            at = f"@{revision[:12]}" if revision not in ref else ""  # of the Hub: it says it itself
            said.append(
                f"  {side:8} {ref}{at}"
                f" ({facts[side]['model_type'] or 'no config'}, {say_dtypes(facts[side])})"
            )
    for parent in facts["parents"]:
        said.append(f"  parent   {parent['ref']} ({parent['identity'][:12]})")
    labels = {"method": facts["training"]["method"], "licence": facts["license"],
              "notes": facts["training"]["notes"]}  # fmt: skip
    for label, text in labels.items():
        if text:
            said.append(f"  {label:8} {text}")
    said.append(f"  identity {facts['identity']}, family {facts['base']['family'][:12]}")
    return said


def _say_content(facts: Facts) -> list[str]:
    """Return sizes and norms of a vector: with its origin and the ledger's head one screen."""
    said = []
    files = f" in {len(facts['files'])} files" if len(facts["files"]) > 1 else ""
    said.append(
        f"  {human_count(facts['numel'])} values, {100 * facts['density']:.3g} % changed, norm"
        f" {facts['norm']:.5g}{files}"
    )
    codecs = (
        f"{held['tensors']} {codec} ({human_bytes(held['nbytes'])})"
        for codec, held in sorted(facts["codecs"].items())
    )
    size = human_bytes(facts["nbytes"])
    said.append(f"  stored   {size} without the header: {', '.join(codecs)}")
    exact = facts["exactness"]
    said.append(
        f"  exact    {exact['claim']}, {exact['exceptions']} fp32 exceptions,"
        f" {exact['replacements']} replacements, {exact['unrestored']} not restored"
    )
    if exact["claim"] == "lossy":
        said.append(f"  lossy    {', '.join(['coarsen', *_say_coarse(facts['recipe'])])}")
        if "kept" in facts:
            said.append(f"           keeps {100 * facts['kept']:.3g} % of its matrices' norm^2")
    if facts["nonfinite"]:
        who = "which only the exact base gets" if facts["tuned"] else "which nobody gets"
        most = "" if facts["tuned"] else "at most "
        said.append(f"  finite   but for {most}{facts['nonfinite']} values, {who}")
    for side, digest in facts["content"].items():
        if digest:
            said.append(f"  content  of {side}: {digest}")
    top = (f"{layer['name']} {layer['norm']:.3g}" for layer in facts["layers"][:3])
    said.append(f"  largest  {', '.join(top)}")
    if "verdict" in facts:
        verdict = facts["verdict"]
        said.append(f"  verdict  on {facts['target']}: {verdict}{say_sampled(verdict)}")
    return said


def _say_coarse(recipe: Any) -> list[str]:
    """Return how coarse a copy is, by a recipe that anyone may have written."""
    whole = recipe if isinstance(recipe, dict) else {}
    shares = whole.get("vectors")
    held = (whole, *(shares if isinstance(shares, list) else ()))
    given = [one.get("parameters") for one in held if isinstance(one, dict)]
    return [
        f"{name} {str(value)[:20].removesuffix('.0')}"
        for one in given if isinstance(one, dict)
        for name in ("rank", "bits", "others") if (value := one.get(name)) is not None
        if isinstance(value, int | float) or value in ("keep", "drop", "split")
    ]  # fmt: skip
