"""What a person reads of each verb: the lines before the work and those after it, as plain text.

One function a verb, found by its name in one of the tables at the end: PLANS has what stands before
the work, DONE what was done, ANSWERS what a verb says that runs no jobs, TRIALS what evaluations
show.
"""

from collections.abc import Callable, Sequence

from skillvec.analysis.angle_sentences import say_comparison, say_norms
from skillvec.analysis.search_sentences import say_search, say_search_plan
from skillvec.analysis.sweep_sentences import say_sweep, say_sweep_plan
from skillvec.analysis.wording import (
    Document,
    Grid,
    count_files,
    human_bytes,
    human_count,
    name_some,
    write_optional,
)
from skillvec.report import Report
from skillvec.verbs.inspect_sentences import say_inspect
from skillvec.verbs.phrases import (
    Facts,
    count_rest,
    list_ledger,
    say_each,
    say_fetched,
    say_free,
    say_from,
    say_layout,
    say_left,
    say_model,
    say_sampled,
    say_source,
    say_stored_as,
    say_unrestored,
    say_verdict,
    say_workers,
    say_written,
)

LISTED = 8  # lines of a list, where nobody asked for all


def say_plan(report: Report, verbose: bool) -> list[str]:
    """Return the lines that stand before the work."""
    facts, verb = report.facts, report.verb
    lines = PLANS[verb](facts) if verb in PLANS else []
    lines += [f"  layout  {line}" for line in say_layout(facts.get("layout", {}))]
    states = set(facts.get("left_behind", ()))
    states -= {*facts.get("old_weights", ()), *facts.get("adapter_files", ())}
    if states:  # a warning speaks of the others
        lines.append(f"  left    behind, not copied: {say_left(states)}")
    if "fetched" in facts:
        lines.append(f"  fetch   {say_fetched(facts)}")
    if "output" in facts and verb != "pull":
        lines.append(f"  output  {facts['output']}")
    free = report.now.get("nbytes_free")
    if free is not None and (verb == "pull" or free < facts["nbytes_written"]):
        most = "" if verb == "pull" else f", for {say_written(report)}"
        lines.append(f"  free    {human_bytes(free)} on the disk of the output{most}")
    if verbose and "nbytes_read" in facts:  # push and pull have no tensors to read
        indented = plan_sentence(report).replace("\n", "\n" + " " * 10)
        lines.append(f"  plan    {indented}")
    return lines


def say_answer(report: Report, verbose: bool) -> list[str | Grid]:
    """Return what stands after the work, or after a plan that stays one."""
    facts = report.facts
    if "norms" in facts:
        return (say_comparison if facts["pairs"] else say_norms)(facts, verbose)
    said: list[str | Grid] = []
    if report.verb in TRIALS:
        return [*TRIALS[report.verb](facts, verbose)]
    if report.verb in ANSWERS:
        said += ANSWERS[report.verb](report)
    elif "nbytes" in facts or "gain" in facts or "verified" in facts:
        if "resumed" in facts:
            count = facts["resumed"]
            said.append(f"went on from an interrupted run; tensors taken over: {count}")
        said.append(done_sentence(report))
    else:
        said.append(plan_sentence(report))
    if report.ledger and (verbose or report.verb == "inspect"):
        said += list_ledger(report, None if verbose else LISTED)
    elif facts.get("worst") and (facts["worst"][0]["cosine"] or 0) < 0.999:
        worst = facts["worst"][0]
        said.append(
            f"worst tensor: {worst['name']}, gain {write_optional(worst['gain'])},"
            f" cosine {write_optional(worst['cosine'])}"
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
        lines.append(f"  {side:7} {say_model(facts[side])}")
        lines += [f"          {note}" for note in facts[side]["notes"]]
    return lines


def say_vector(facts: Facts, counts: str) -> str:
    """Return what a vector that was written holds, and what is claimed of it."""
    exact = facts["exactness"]
    taken = "" if facts["is_whole"] else ", in the tensors and rows that were taken"
    claim = {
        "bitwise": f"base + 1 * v is tuned, bit for bit{taken}",
        "partial": f"base + 1 * v is tuned but for {say_unrestored(exact['unrestored'])}",
        "rounded": f"values rounded to {facts['dtype']}: base + 1 * v misses"
        f" {exact['unrestored']} values of tuned",
        "combined": f"values as the operator gives them, in {say_stored_as(facts['dtype'])}",
        "lossy": "lossy, as the operator was asked to be: not what the whole vector does",
    }[exact["claim"]]
    shards = f" in {len(facts['files'])} shards" if len(facts["files"]) > 1 else ""
    codecs = ", ".join(f"{count} {codec}" for codec, count in sorted(facts["codecs"].items()))
    return (
        f"{counts} ({codecs})\n"
        f"{human_count(facts['changed'])} of {human_count(facts['numel'])} values changed"
        f" ({100 * facts['density']:.3g} %), norm {facts['norm']:.5g},"
        f" {human_bytes(facts['nbytes'])}{shards}\n"
        f"{claim}\n{say_energies(facts)}"
        f"({exact['exceptions']} fp32 exceptions, {exact['replacements']} replacements)"
    )


# ------------------------------------------------------------------------------------------- apply


def say_apply_plan(facts: Facts) -> list[str]:
    """Return what is added to what."""
    return [
        "OUT = TARGET + LAM * V",
        f"  target  {say_model(facts['target'])}",
        *(f"          {note}" for note in facts["target"]["notes"]),
        f"  vector  {say_source(facts['vector'])}{say_from(facts)}, lam {facts['lam']:g}",
        f"  verdict {facts['verdict']}{say_sampled(facts['verdict'])}",
    ]


def say_applied(facts: Facts, counts: str) -> str:
    """Return what of a vector arrived in a model."""
    lost = facts.get("nonfinite", {}).get("lost")
    finite = "\n(what is not finite counts as not arrived)" if lost else ""
    return (
        f"{counts}; verdict {say_verdict(facts)}\n"
        f"{human_count(facts['changed'])} of {human_count(facts['numel'])} values"
        f" changed; realised gain {write_optional(facts['gain'])},"
        f" cosine {write_optional(facts['cosine'])}{finite}" + f"\n{say_energies(facts)}".rstrip()
    )


def say_energies(facts: Facts) -> str:
    """Return a line on what an operator has kept of whole matrices, "" where none was taken apart.

    The shares are by vector.
    """
    if "matrices" not in facts:
        return ""
    said = facts["matrices"]
    ranks = sorted({said["least_rank"], said["most_rank"]})
    shares = ", ".join("-" if one is None else f"{100 * one:.3g} %" for one in said["kept_energy"])
    return (
        f"keeps {shares} of the squared norm of {said['tensors']} matrices (rank"
        f" {' to '.join(map(str, ranks))})\n"
    )


# ------------------------------------------------------------------------------------------ verify


def say_verified(facts: Facts, counts: str) -> str:
    """Return what a proof shows."""
    verdict = f"; verdict {say_verdict(facts)}" if "verdict" in facts else ""
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
        f"s B A ~ V at {wish}, of {facts['vector']}{say_from(facts)}",
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


def say_url(report: Report) -> list[str | Grid]:
    """Return where on the Hub it lies now; of a dry run the card that it would have there."""
    facts = report.facts
    return [str(facts["url"]) if "commit" in facts else Document(facts["card"])]


def say_output(report: Report) -> list[str | Grid]:
    """Return where on this disk it lies now."""
    return [str(report.facts["output"])]


def _list_deleted(facts: Facts) -> list[str]:
    names = facts.get("deleted", [])
    rest = count_rest(len(names) - LISTED, "files", "--json")
    return [f"  delete  {name}" for name in names[:LISTED]] + [f"          {more}" for more in rest]


def _transfer(facts: Facts) -> str:
    """Return what goes where, between this disk and the Hub."""
    where = facts["repo"] + (f"@{facts['revision'][:12]}" if facts["revision"] else "")
    if "exists" in facts:
        kind = "private" if facts["private"] else "public"
        new = {True: "", False: ", new", None: " if it is new"}[facts["exists"]]
        where += f" ({kind}{new})"
    return f"{where}: {count_files(list(facts['files']))}, {human_bytes(facts['nbytes'])}"


# --------------------------------------------------------------------------------- of several verbs


def plan_sentence(report: Report) -> str:
    """Return what a plan would read, write and hold in memory."""
    facts = report.facts
    counts = ", ".join(f"{count} {status}" for status, count in report.counts.items())
    text = (
        f"reads {human_bytes(facts['nbytes_read'])}, writes {say_written(report)}, memory about"
        f" {human_bytes(facts['memory_nbytes'])}{say_each(facts['engine'])}\n{say_free(report)}"
        f"{say_workers(report)} ({facts['kernels']}); tensors: {counts}"
    )
    if facts["files"]:
        weights, sides = facts["files"], facts["side_files"]
        text += f"; {count_files(weights, 'weight ')}, {count_files(sides, 'side ')}"
    return text


PLANS: dict[str, Callable[[Facts], list[str]]] = {
    "diff": say_vector_plan, "combine": say_vector_plan, "import-patch": say_vector_plan,
    "apply": say_apply_plan, "extract-lora": say_adapter_plan, "push": say_push_plan,
    "pull": say_pull_plan, "search": say_search_plan,
    "sweep": say_sweep_plan,
}  # fmt: skip
DONE: dict[str, Callable[[Facts, str], str]] = {
    "diff": say_vector, "combine": say_vector, "import-patch": say_vector, "apply": say_applied,
    "attach": say_applied, "export-patch": say_patch, "extract-lora": say_adapter,
}  # fmt: skip
ANSWERS: dict[str, Callable[[Report], Sequence[str | Grid]]] = {
    "inspect": say_inspect, "push": say_url, "pull": say_output,
}  # fmt: skip
TRIALS: dict[str, Callable[[Facts, bool], Sequence[str | Grid]]] = {
    "search": say_search, "sweep": say_sweep,
}  # fmt: skip
