"""What a person reads of each verb: the lines before the work and those after it, as plain text.

One function a verb, found by its name; what several verbs say alike stands behind them.
"""

import re
import textwrap
from collections.abc import Callable
from typing import Any

from skillvec.angle_sentences import say_comparison, say_norms
from skillvec.report import Report
from skillvec.wording import (
    Grid,
    count_files,
    human_bytes,
    human_count,
    name_some,
    write_optional,
)  # fmt: skip

Facts = dict[str, Any]
BOUNDED = ("diff", "combine", "import-patch", "export-patch", "extract-lora")  # size known after
DRAWN = ("orthogonality", "norms")  # whose page has a size that is known after


def say_plan(report: Report, verbose: bool) -> list[str]:
    """Return the lines that stand before the work."""
    facts, verb = report.facts, report.verb
    lines = PLANS[verb](facts) if verb in PLANS else []
    lines += [f"  layout  {line}" for line in _layout(facts.get("layout", {}))]
    states = set(facts.get("left_behind", ()))
    states -= {*facts.get("old_weights", ()), *facts.get("adapter_files", ())}
    if states:  # a warning speaks of the others
        lines.append(f"  left    behind, not copied: {_left(states)}")
    if "fetched" in facts:
        lines.append(f"  fetch   {_fetched(facts)}")
    if "output" in facts and verb != "pull":
        lines.append(f"  output  {facts['output']}")
    free = report.now.get("nbytes_free")
    if free is not None and (verb == "pull" or free < facts["nbytes_written"]):
        most = "" if verb == "pull" else f", for {_written(report)}"
        lines.append(f"  free    {human_bytes(free)} on the disk of the output{most}")
    if verbose:
        indented = plan_sentence(report).replace("\n", "\n" + " " * 10)
        lines.append(f"  plan    {indented}")
    return lines


def say_answer(report: Report, verbose: bool) -> list[str | Grid]:
    """Return what stands after the work, or after a plan that stays one."""
    facts = report.facts
    if "norms" in facts:
        return (say_comparison if facts["pairs"] else say_norms)(facts, verbose)
    said: list[str | Grid] = []
    if report.verb in ("push", "pull"):
        said.append(str(facts["url"] if report.verb == "push" else facts["output"]))
    elif report.verb == "inspect":
        said += say_inspect(report)
    elif "nbytes" in facts or "gain" in facts or "verified" in facts:
        if "resumed" in facts:
            count = facts["resumed"]
            said.append(f"went on from an interrupted run; tensors taken over: {count}")
        said.append(done_sentence(report))
    else:
        said.append(plan_sentence(report))
    if verbose or report.verb == "inspect":
        said += _list_ledger(report, None if verbose else 8)
    elif facts.get("worst") and (facts["worst"][0]["cosine"] or 0) < 0.999:
        worst = facts["worst"][0]
        about = "about " if worst["estimated"] else ""
        said.append(
            f"worst tensor: {worst['name']}, gain {about}{write_optional(worst['gain'])},"
            f" cosine {about}{write_optional(worst['cosine'])}"
        )
    return said


def done_sentence(report: Report) -> str:
    """Return in a line or two what was done."""
    counts = ", ".join(f"{count} {status}" for status, count in report.counts.items())
    say = DONE.get(report.verb, say_verified)
    return say(report.facts, f"tensors: {counts}")


# ---------------------------------------------------------------------- diff, combine, import-patch


def say_vector_plan(facts: Facts) -> list[str]:
    """Return what becomes a vector."""
    if "tuned" not in facts:
        return [f"v = {facts['formula']}"]
    lines = ["v = TUNED - BASE"]
    for side in ("tuned", "base"):
        lines.append(f"  {side:7} {_point(facts[side])}")
        lines += [f"          {note}" for note in facts[side]["notes"]]
    return lines


def say_vector(facts: Facts, counts: str) -> str:
    """Return what a vector that was written holds, and what is claimed of it."""
    exact = facts["exactness"]
    taken = "" if facts["is_whole"] else ", in the tensors and rows that were taken"
    claim = {
        "bitwise": f"base + 1 * v is tuned, bit for bit{taken}",
        "partial": f"base + 1 * v is tuned but for {_unrestored(exact['unrestored'])}",
        "rounded": f"values rounded to {facts['dtype']}: base + 1 * v misses"
        f" {exact['unrestored']} values of tuned",
        "combined": f"values as the operator gives them, in {_stored_as(facts['dtype'])}",
    }[exact["claim"]]
    shards = f" in {len(facts['files'])} shards" if len(facts["files"]) > 1 else ""
    codecs = ", ".join(f"{count} {codec}" for codec, count in sorted(facts["codecs"].items()))
    return (
        f"{counts} ({codecs})\n"
        f"{human_count(facts['changed'])} of {human_count(facts['numel'])} values changed"
        f" ({100 * facts['density']:.3g} %), norm {facts['norm']:.5g},"
        f" {human_bytes(facts['nbytes'])}{shards}\n"
        f"{claim}\n"
        f"({exact['exceptions']} fp32 exceptions, {exact['replacements']} replacements)"
    )


# ------------------------------------------------------------------------------------------- apply


def say_apply_plan(facts: Facts) -> list[str]:
    """Return what is added to what."""
    return [
        "OUT = TARGET + LAM * V",
        f"  target  {_point(facts['target'])}",
        *(f"          {note}" for note in facts["target"]["notes"]),
        f"  vector  {_source(facts['vector'])}{_from(facts)}, lam {facts['lam']:g}",
        f"  verdict {facts['verdict']}{_sampled(facts['verdict'])}",
    ]


def say_applied(facts: Facts, counts: str) -> str:
    """Return what of a vector arrived in a model."""
    about = "about " if facts["estimated"] else ""
    lost = facts.get("nonfinite", {}).get("lost")
    finite = "\n(what is not finite counts as not arrived)" if lost else ""
    return (
        f"{counts}; verdict {_verdict(facts)}\n"
        f"{about}{human_count(facts['changed'])} of {human_count(facts['numel'])} values"
        f" changed; realised gain {about}{write_optional(facts['gain'])},"
        f" cosine {about}{write_optional(facts['cosine'])}{finite}"
    )


# ------------------------------------------------------------------------------------------ verify


def say_verified(facts: Facts, counts: str) -> str:
    """Return what a proof shows."""
    verdict = f"; verdict {_verdict(facts)}" if "verdict" in facts else ""
    return f"{facts['claim']}: {_held(facts)}\n{counts}{verdict}"


def _held(facts: Facts) -> str:
    """Return that a proof holds, or for what it does not: what the manifest announces."""
    unrestored, lines = facts.get("unrestored") or {}, []
    if unrestored:
        lines.append(f"{sum(unrestored.values())} values of {name_some(list(unrestored))}: rounded")
    if facts.get("differing"):
        lines.append(f"{name_some(facts['differing'])}: integers that differ, not transferred")
    if facts.get("excluded"):
        lines.append(f"{name_some(facts['excluded'])}: left out of the vector")
    if facts.get("rows"):
        lines.append(f"rows that only one model has: --rows {facts['rows']}")
    if not lines:
        return "holds"
    return "\n  ".join(["holds but for what the manifest announces:", *lines])


# ------------------------------------------------------------------------------------ export-patch


def say_patch(facts: Facts, counts: str) -> str:
    """Return what a patch that was written lists."""
    return (
        f"{counts}\n{human_count(facts['changed'])} of {human_count(facts['numel'])}"
        f" values listed, {human_bytes(facts['nbytes'])}; they hold on the exact base alone"
    )


# ------------------------------------------------------------------------------------ extract-lora


def say_adapter_plan(facts: Facts) -> list[str]:
    """Return what becomes an adapter."""
    wish = f"energy {facts['energy']:g}" if facts["energy"] else f"rank {facts['rank']}"
    return [
        f"s B A ~ V at {wish}, of {facts['vector']}{_from(facts)}",
        f"  base    {facts['base']}",
    ]


def say_adapter(facts: Facts, counts: str) -> str:
    """Return what an adapter that was written keeps of the vector."""
    ranks = sorted({facts["least_rank"], facts["most_rank"]})
    places = (("left_out_energy", "that are left out (embeddings, norms, ...)"),
              ("not_found_energy", "not found among the modules of the base"))  # fmt: skip
    elsewhere = [(facts[key], where) for key, where in places if facts[key]]
    return (
        f"{counts}\n{facts['modules']} modules of rank"
        f" {' to '.join(map(str, ranks))}, {human_bytes(facts['nbytes'])}\n"
        f"keeps {100 * facts['kept_energy']:.3g} % of the vector's squared norm"
        + "".join(f"\n{100 * share:.3g} % is in tensors {where}" for share, where in elsewhere)
    )


# -------------------------------------------------------------------------------------- push, pull


def say_push_plan(facts: Facts) -> list[str]:
    """Return what goes to the Hub, and what is deleted there."""
    return [f"push {facts['kind']} {_transfer(facts)}", *_list_deleted(facts)]


def say_pull_plan(facts: Facts) -> list[str]:
    """Return what comes from the Hub, and what is deleted here."""
    return [f"pull {facts['kind']} {_transfer(facts)}", *_list_deleted(facts)]


def _list_deleted(facts: Facts) -> list[str]:
    return [f"  delete  {name}" for name in facts.get("deleted", [])]


def _transfer(facts: Facts) -> str:
    """Return what goes where, between this disk and the Hub."""
    where = facts["repo"] + (f"@{facts['revision'][:12]}" if facts["revision"] else "")
    if "exists" in facts:
        kind = "private" if facts["private"] else "public"
        where += f" ({kind}{'' if facts['exists'] else ', new'})"
    return f"{where}: {count_files(list(facts['files']))}, {human_bytes(facts['nbytes'])}"


# ----------------------------------------------------------------------------------------- inspect


def say_inspect(report: Report) -> list[str]:
    """Return what a file or folder is."""
    facts = report.facts
    said = [f"{facts['kind']} {facts['path']}"]
    if facts["kind"] == "vector":
        return said + _say_manifest(facts) + _say_content(facts)
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in facts["dtypes"].items())
    said.append(
        f"  {facts['model_type'] or 'no config'}, {human_count(facts['numel'])} values in"
        f" {len(report.ledger)} tensors ({dtypes}), {human_bytes(facts['nbytes'])} in"
        f" {count_files(facts['files'])}"
    )
    if facts["kind"] == "model" and facts["model_type"] is not None:
        tied = {True: "yes", False: "no", None: "unknown"}[facts["ties_embeddings"]]
        said.append(f"  embeddings tied: {tied}")
    if "recipe" in facts:
        recipe = facts["recipe"]
        said.append(
            f"  {recipe['target']['ref']} + {recipe['lam']:g} * {_source(recipe['vector'])}"
        )
    return said


def _say_manifest(facts: Facts) -> list[str]:
    """Return identity and origin of a vector."""
    said = [f"  {facts['formula']}, made by {facts['tool']}:\n  {facts['command']}"]
    for side in ("tuned", "base"):
        if facts[side]:
            ref, revision = facts[side]["ref"], facts[side]["revision"] or ""
            at = f"@{revision[:12]}" if revision not in ref else ""  # of the Hub: it says it itself
            said.append(
                f"  {side:8} {ref}{at}"
                f" ({facts[side]['model_type'] or 'no config'}, {_dtypes(facts[side])})"
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
        f" {facts['norm']:.5g}, {human_bytes(facts['nbytes'])}{files}"
    )
    codecs = (
        f"{held['tensors']} {codec} ({human_bytes(held['nbytes'])})"
        for codec, held in sorted(facts["codecs"].items())
    )
    said.append(f"  stored   {', '.join(codecs)}")
    exact = facts["exactness"]
    said.append(
        f"  exact    {exact['claim']}, {exact['exceptions']} fp32 exceptions,"
        f" {exact['replacements']} replacements, {exact['unrestored']} not restored"
    )
    if facts["nonfinite"]:
        who = "which only the exact base gets" if facts["tuned"] else "which nobody gets"
        most = "" if facts["tuned"] else "at most "
        said.append(f"  finite   but for {most}{facts['nonfinite']} values, {who}")
    top = (f"{layer['name']} {layer['norm']:.3g}" for layer in facts["layers"][:3])
    text = f"  largest  {', '.join(top)}"
    said.append(textwrap.fill(text, 80, subsequent_indent=" " * 11, break_on_hyphens=False))
    if "verdict" in facts:
        verdict = facts["verdict"]
        said.append(f"  verdict  on {facts['target']}: {verdict}{_sampled(verdict)}")
    return said


# --------------------------------------------------------------------------------- of several verbs


def plan_sentence(report: Report) -> str:
    """Return what a plan would read, write and hold in memory."""
    facts = report.facts
    counts = ", ".join(f"{count} {status}" for status, count in report.counts.items())
    text = (
        f"reads {human_bytes(facts['nbytes_read'])}, writes {_written(report)}, memory about"
        f" {human_bytes(facts['memory_nbytes'])}{_each(facts['engine'])}\n{_free(report)}"
        f"{_workers(report)} ({facts['kernels']}); tensors: {counts}"
    )
    if facts["files"]:
        weights, sides = facts["files"], facts["side_files"]
        text += f"; {count_files(weights, 'weight ')}, {count_files(sides, 'side ')}"
    return text


def _written(report: Report) -> str:
    nbytes = report.facts["nbytes_written"]
    most = "at most " if report.verb in BOUNDED else ""
    return ("about " if report.verb in DRAWN and nbytes else most) + human_bytes(nbytes)


def _free(report: Report) -> str:
    free = report.now.get("nbytes_free")
    return "" if free is None else f"{human_bytes(free)} free on the disk of the output\n"


def _workers(report: Report) -> str:
    engine, count = report.facts["engine"], report.facts["workers"]
    return f"{count} worker{'' if count == 1 else 's'}" + (f" of {engine}" if _each(engine) else "")


def _each(engine: str) -> str:
    return "" if engine in ("threads", "serial") else " a worker"


def _dtypes(side: Facts) -> str:
    return "+".join(side["dtypes"])


def _point(side: Facts) -> str:
    """Return where a model lies, its dtypes, and its format if that is not plain safetensors."""
    words = [_dtypes(side)]
    if side["format"] != "safetensors":
        words.append(side["format"])
    words += side["stored"]
    return f"{side['ref'] if side['revision'] else side['path']} ({', '.join(words)})"


def _layout(notes: dict[str, str]) -> list[str]:
    """Return how tensors of another layout fit, up to five ways, each with an example."""
    ways: dict[str, list[str]] = {}
    for name, note in notes.items():
        ways.setdefault(re.sub(r"\d+", "N", note), []).append(name)
    lines = [
        f"{f'{len(names)} such as ' if len(names) > 1 else ''}{names[0]}: {notes[names[0]]}"
        for names in ways.values()
    ]
    return lines[:5] + ([f"... and {len(lines) - 5} more ways (--json)"] if len(lines) > 5 else [])


def _left(names: set[str]) -> str:
    """Return up to five files that differ in more than their numbers, and how many more."""
    alike: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: (name.count("/"), name)):
        alike.setdefault(re.sub(r"\d+", "N", name), []).append(name)
    words = [held[0] + (f" and {len(held) - 1} like it" if held[1:] else "")
             for held in alike.values()]  # fmt: skip
    more = sum(map(len, list(alike.values())[5:]))
    return ", ".join(words[:5] + ([f"and {more} more"] if more else []))


def _fetched(facts: Facts) -> str:
    plural = "" if facts["fetched"] == 1 else "s"
    text = f"{human_bytes(facts['nbytes_fetched'])} in {facts['fetched']} file{plural} from the Hub"
    if "stream" in facts:
        text += f", at most {facts['stream']['most_files']} of them on the disk"
    return text


def _from(facts: Facts) -> str:
    """Return the dtypes of what was subtracted; an adapter that is applied as it is has none."""
    return f" (from {facts['lineage']})" if facts["lineage"] else ""


def _source(vector: Facts) -> str:
    if "recipe" in vector:
        shares = vector["recipe"]["vectors"]
        words = [f"{share.get('weight', 1)}*{share['vector']}" for share in shares]
        return f"{vector['recipe'].get('op', 'linear')}({', '.join(words)})"
    return str(vector.get("ref") or f"({vector.get('tuned')} - {vector.get('base')})")


def _sampled(verdict: str) -> str:
    """Return what to add to a verdict of which no digest knows yet."""
    return " (by samples of its weights)" if verdict == "exact base" else ""


def _verdict(facts: Facts) -> str:
    """Return a verdict after the work: digests confirm it, but for combinations without any."""
    verdict = str(facts["verdict"])
    return verdict + (_sampled(verdict) if facts.get("verdict_sampled") else "")


def _unrestored(count: int) -> str:
    """Return what base + 1 * v misses: values in vectors made before all were kept, or integers."""
    return f"{count} values, where fp32 rounded the difference" if count else "integer tensors"


def _stored_as(dtype: str) -> str:
    return "fp32 (fp64 where an input is)" if dtype == "auto" else dtype


def _list_ledger(report: Report, limit: int | None) -> list[str | Grid]:
    """Return the first lines of the ledger as a table, and how many more there are."""
    known = ("status", "codec", "dtype", "shape", "changed", "norm", "gain", "cosine", "note")
    keys = [key for key in known if any(key in line for line in report.ledger)]
    lines = report.ledger[:limit]
    rows = [
        [line["name"], *(_about(line, key) + _cell(line.get(key)) for key in keys)]
        for line in lines
    ]
    more = len(report.ledger) - len(lines)
    said: list[str | Grid] = [Grid(["tensor", *keys], rows)]
    return said + ([f"... and {more} more tensors (-v shows all)"] if more else [])


def _about(line: Facts, key: str) -> str:
    """Return the sign before a number that a sample gave."""
    sampled = line.get("estimated") and key in ("changed", "gain", "cosine")
    return "~" if sampled and line.get(key) is not None else ""


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "x".join(map(str, value)) or "scalar"
    return f"{value:.4g}" if isinstance(value, float) else str("" if value is None else value)


PLANS: dict[str, Callable[[Facts], list[str]]] = {
    "diff": say_vector_plan, "combine": say_vector_plan, "import-patch": say_vector_plan,
    "apply": say_apply_plan, "extract-lora": say_adapter_plan, "push": say_push_plan,
    "pull": say_pull_plan,
}  # fmt: skip
DONE: dict[str, Callable[[Facts, str], str]] = {
    "diff": say_vector, "combine": say_vector, "import-patch": say_vector, "apply": say_applied,
    "export-patch": say_patch, "extract-lora": say_adapter,
}  # fmt: skip
