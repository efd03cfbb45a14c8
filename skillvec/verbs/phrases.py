"""Words that sentences of several verbs share."""

import re
from typing import Any

from skillvec.analysis.wording import Grid, human_bytes
from skillvec.report import Report

Facts = dict[str, Any]
BOUNDED = ("diff", "combine", "import-patch", "export-patch", "extract-lora")  # size known after
DRAWN = ("orthogonality", "norms")  # whose page has a size that is known after


def say_written(report: Report) -> str:
    nbytes = report.facts["nbytes_written"]
    most = "at most " if report.verb in BOUNDED else ""
    return ("about " if report.verb in DRAWN and nbytes else most) + human_bytes(nbytes)


def say_free(report: Report) -> str:
    free = report.now.get("nbytes_free")
    return "" if free is None else f"{human_bytes(free)} free on the disk of the output\n"


def say_workers(report: Report) -> str:
    engine, count = report.facts["engine"], report.facts["workers"]
    return f"{count} worker{'' if count == 1 else 's'}" + (
        f" of {engine}" if say_each(engine) else ""
    )


def say_each(engine: str) -> str:
    return "" if engine in ("threads", "serial") else " a worker"


def say_dtypes(side: Facts) -> str:
    return "+".join(side["dtypes"])


def say_model(side: Facts) -> str:
    """Return where a model lies, its dtypes, and its format if that is not plain safetensors."""
    words = [say_dtypes(side)]
    if side["format"] != "safetensors":
        words.append(side["format"])
    words += side["stored"]
    return f"{side['ref'] if side['revision'] else side['path']} ({', '.join(words)})"


def say_layout(notes: dict[str, str]) -> list[str]:
    """Return how tensors of another layout fit, up to five ways, each with an example."""
    ways: dict[str, list[str]] = {}
    for name, note in notes.items():
        ways.setdefault(re.sub(r"\d+", "N", note), []).append(name)
    lines = [
        f"{f'{len(names)} such as ' if len(names) > 1 else ''}{names[0]}: {notes[names[0]]}"
        for names in ways.values()
    ]
    return lines[:5] + count_rest(len(lines) - 5, "ways", "--json")


def say_left(names: set[str]) -> str:
    """Return up to five files that differ in more than their numbers, and how many more."""
    alike: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: (name.count("/"), name)):
        alike.setdefault(re.sub(r"\d+", "N", name), []).append(name)
    words = [held[0] + (f" and {len(held) - 1} like it" if held[1:] else "")
             for held in alike.values()]  # fmt: skip
    more = sum(map(len, list(alike.values())[5:]))
    return ", ".join(words[:5] + ([f"and {more} more"] if more else []))


def say_fetched(facts: Facts) -> str:
    plural = "" if facts["fetched"] == 1 else "s"
    text = f"{human_bytes(facts['nbytes_fetched'])} in {facts['fetched']} file{plural} from the Hub"
    if "stream" in facts:
        text += f", at most {facts['stream']['most_files']} of them on the disk"
    return text


def say_from(facts: Facts) -> str:
    """Return the dtypes of what was subtracted; an adapter that is applied as it is has none."""
    return f" (from {facts['lineage']})" if facts["lineage"] else ""


def say_source(vector: Facts) -> str:
    if "recipe" in vector:
        shares = vector["recipe"]["vectors"]
        words = [f"{share.get('weight', 1)}*{share['vector']}" for share in shares]
        return f"{vector['recipe'].get('op', 'linear')}({', '.join(words)})"
    return str(vector.get("ref") or f"({vector.get('tuned')} - {vector.get('base')})")


def say_sampled(verdict: str) -> str:
    """Return what to add to a verdict of which no digest knows yet."""
    return " (by samples of its weights)" if verdict == "exact base" else ""


def say_verdict(facts: Facts) -> str:
    """Return a verdict after the work: digests confirm it, but for combinations without any."""
    verdict = str(facts["verdict"])
    return verdict + (say_sampled(verdict) if facts.get("verdict_sampled") else "")


def say_unrestored(count: int) -> str:
    """Return what base + 1 * v misses: values in vectors made before all were kept, or integers."""
    return f"{count} values, where fp32 rounded the difference" if count else "integer tensors"


def say_stored_as(dtype: str) -> str:
    return "fp32 (fp64 where an input is)" if dtype == "auto" else dtype


def list_ledger(report: Report, limit: int | None) -> list[str | Grid]:
    """Return the first lines of the ledger as a table, and how many more there are."""
    known: tuple[str, ...] = (
        "status", "codec", "dtype", "shape", "changed", "norm", "gain", "cosine", "note"
    )  # fmt: skip
    known += ("digest",) * (limit is None)  # as wide as a name
    keys = [key for key in known if any(key in line for line in report.ledger)]
    lines = report.ledger[:limit]
    rows = [[line["name"], *(write_cell(line.get(key)) for key in keys)] for line in lines]
    listed = "file" if report.verb in ("push", "pull") else "tensor"
    rest = count_rest(len(report.ledger) - len(lines), f"{listed}s", "-v or --json")
    return [Grid([listed, *keys], rows), *rest]


def count_rest(count: int, things: str, where: str) -> list[str]:
    """Return a line on what a list leaves out and which option has it all, none for nothing."""
    things = things if count > 1 else things.removesuffix("s")
    return [f"... and {count} more {things}; {where} has all"] if count > 0 else []


def write_cell(value: Any) -> str:
    if isinstance(value, list):
        return "x".join(map(str, value)) or "scalar"
    return f"{value:.4g}" if isinstance(value, float) else str("" if value is None else value)
