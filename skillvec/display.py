"""What a person sees: plans, reports and progress. Data goes to stdout, talk to stderr.

Only this module imports rich, and only to draw a table or a bar: a quiet run starts faster.
"""

import json
import re
import shutil
import sys
import textwrap
from itertools import combinations
from math import inf
from typing import Any

from skillvec.errors import printable
from skillvec.report import Report


def _files(files: list[str], kind: str = "") -> str:
    return f"{len(files)} {kind}file{'' if len(files) == 1 else 's'}"


TRANSFERS = ("push", "pull")
REPORTS = ("orthogonality", "norms")
STORES = ("diff", "combine", "import-patch", "export-patch", "extract-lora")


def _print(text: str, to_stderr: bool = False) -> None:
    text = printable(text)
    if to_stderr:
        print(folded(text), file=sys.stderr)
    else:
        print(text)


def folded(text: str) -> str:
    """Return talk for a terminal, lines broken between words below where they begin."""
    if not sys.stderr.isatty():
        return text
    width, lines = shutil.get_terminal_size().columns, []
    for line in text.split("\n"):
        begin = re.match(r" *(?:\w+(?:  +|: ))?", line)
        indent = " " * (begin.end() if begin else 0)
        lines.append(textwrap.fill(line, max(width, 40), subsequent_indent=indent,
                                   break_on_hyphens=False, break_long_words=False))  # fmt: skip
    return "\n".join(lines)


def human_bytes(nbytes: float) -> str:
    """Return a byte count in decimal units: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def human_count(count: float) -> str:
    """Return a number of values: 1.24 B."""
    for unit in ("", " K", " M", " B"):
        if count < 1000:
            return f"{count:.3g}{unit}" if unit else f"{count:.0f}"
        count /= 1000
    return f"{count:.3g} T"


def _number(value: float | None, digits: str = ".4f") -> str:
    return "-" if value is None else format(value, digits)


def _dtypes(side: dict[str, Any]) -> str:
    return "+".join(side["dtypes"])


def _transfer(facts: dict[str, Any]) -> str:
    """Return what goes where, between this disk and the Hub."""
    where = facts["repo"] + (f"@{facts['revision'][:12]}" if facts["revision"] else "")
    if "exists" in facts:
        kind = "private" if facts["private"] else "public"
        where += f" ({kind}{'' if facts['exists'] else ', new'})"
    return f"{where}: {_files(list(facts['files']))}, {human_bytes(facts['nbytes'])}"


def _point(side: dict[str, Any]) -> str:
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


def _fetched(facts: dict[str, Any]) -> str:
    plural = "" if facts["fetched"] == 1 else "s"
    text = f"{human_bytes(facts['nbytes_fetched'])} in {facts['fetched']} file{plural} from the Hub"
    if "stream" in facts:
        text += f", at most {facts['stream']['most_files']} of them on the disk"
    return text


def _from(facts: dict[str, Any]) -> str:
    """Return the dtypes of what was subtracted; an adapter that is applied as it is has none."""
    return f" (from {facts['lineage']})" if facts["lineage"] else ""


def _source(vector: dict[str, Any]) -> str:
    if "recipe" in vector:
        shares = vector["recipe"]["vectors"]
        words = [f"{share.get('weight', 1)}*{share['vector']}" for share in shares]
        return f"{vector['recipe'].get('op', 'linear')}({', '.join(words)})"
    return str(vector.get("ref") or f"({vector.get('tuned')} - {vector.get('base')})")


class Screen:
    """The one sink of the command line: human, json or quiet.

    Implements `Watcher`: prints the plan to stderr and, on a terminal, a progress bar.
    """

    def __init__(
        self, *, as_json: bool = False, quiet: bool = False, verbose: bool = False
    ) -> None:
        self.as_json, self.quiet, self.verbose = as_json, quiet, verbose
        self._bar: Any = None
        self._task: Any = None

    # ------------------------------------------------------------------------------- talking

    def say(self, text: str) -> None:
        """Print a line of talk to stderr, unless quiet."""
        if not self.quiet:
            _print(text, to_stderr=True)

    def planned(self, report: Report) -> None:
        """Show the plan before the work."""
        facts = report.facts
        if report.verb in STORES[:3]:
            self.say("v = TUNED - BASE" if "tuned" in facts else f"v = {facts['formula']}")
            for side in ("tuned", "base") if "tuned" in facts else ():
                self.say(f"  {side:7} {_point(facts[side])}")
                for note in facts[side]["notes"]:
                    self.say(f"          {note}")
        elif report.verb == "apply":
            name = _source(facts["vector"])
            self.say("OUT = TARGET + LAM * V")
            self.say(f"  target  {_point(facts['target'])}")
            for note in facts["target"]["notes"]:
                self.say(f"          {note}")
            self.say(f"  vector  {name}{_from(facts)}, lam {facts['lam']:g}")
            self.say(f"  verdict {facts['verdict']}{_sampled(facts['verdict'])}")
        elif report.verb == "extract-lora":
            wish = f"energy {facts['energy']:g}" if facts["energy"] else f"rank {facts['rank']}"
            self.say(f"s B A ~ V at {wish}, of {facts['vector']}{_from(facts)}")
            self.say(f"  base    {facts['base']}")
        elif report.verb in TRANSFERS:
            self.say(f"{report.verb} {facts['kind']} {_transfer(facts)}")
            for name in facts.get("deleted", []):
                self.say(f"  delete  {name}")
        for line in _layout(facts.get("layout", {})):
            self.say(f"  layout  {line}")
        states = set(facts.get("left_behind", ()))
        states -= {*facts.get("old_weights", ()), *facts.get("adapter_files", ())}
        if states:  # a warning speaks of the others
            self.say(f"  left    behind, not copied: {_left(states)}")
        if "fetched" in facts:
            self.say(f"  fetch   {_fetched(facts)}")
        if "output" in facts and report.verb != "pull":
            self.say(f"  output  {facts['output']}")
        free = report.now.get("nbytes_free")
        if free is not None and (report.verb == "pull" or free < facts["nbytes_written"]):
            most = "" if report.verb == "pull" else f", for {_written(report)}"
            self.say(f"  free    {human_bytes(free)} on the disk of the output{most}")
        if self.verbose:
            indented = plan_sentence(report).replace("\n", "\n" + " " * 10)
            self.say(f"  plan    {indented}")

    def advanced(self, done_nbytes: int, total_nbytes: int) -> None:
        """Move the bar; only on a terminal, only for work one would notice."""
        if self.quiet or self.as_json or not sys.stderr.isatty():
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=total_nbytes)
        self._bar.update(self._task, completed=done_nbytes, total=total_nbytes)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    # ------------------------------------------------------------------------------- answers

    def show(self, report: Report, last_line: str | None = None) -> None:
        """Print the answer: JSON, or the last line alone if quiet, or tables."""
        self.close()
        for warning in report.warnings:
            if not self.as_json:
                _print(f"warning: {warning}", to_stderr=True)
        if self.as_json:
            _print(json.dumps(report.to_dict() | report.now, indent=2))
        elif self.quiet:
            if last_line is not None:
                _print(last_line)
        else:
            self._show_human(report)

    def _show_human(self, report: Report) -> None:
        if "norms" in report.facts:
            shown = _print_comparison if report.facts["pairs"] else _print_norms
            shown(report, self.verbose)
            return
        if report.verb in TRANSFERS:
            _print(report.facts["url"] if report.verb == "push" else report.facts["output"])
        elif report.verb == "inspect":
            _print_inspect(report)
        elif "nbytes" in report.facts or "gain" in report.facts or "verified" in report.facts:
            if "resumed" in report.facts:
                count = report.facts["resumed"]
                _print(f"went on from an interrupted run; tensors taken over: {count}")
            _print(done_sentence(report))
        else:
            _print(plan_sentence(report))
        if self.verbose or report.verb == "inspect":
            _print_ledger(report, None if self.verbose else 8)
        elif report.facts.get("worst") and (report.facts["worst"][0]["cosine"] or 0) < 0.999:
            worst = report.facts["worst"][0]
            about = "about " if worst["estimated"] else ""
            _print(
                f"worst tensor: {worst['name']}, gain {about}{_number(worst['gain'])},"
                f" cosine {about}{_number(worst['cosine'])}"
            )


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
        text += f"; {_files(facts['files'], 'weight ')}, {_files(facts['side_files'], 'side ')}"
    return text


def _written(report: Report) -> str:
    nbytes = report.facts["nbytes_written"]
    most = "at most " if report.verb in STORES else ""
    return ("about " if report.verb in REPORTS and nbytes else most) + human_bytes(nbytes)


def _free(report: Report) -> str:
    free = report.now.get("nbytes_free")
    return "" if free is None else f"{human_bytes(free)} free on the disk of the output\n"


def _workers(report: Report) -> str:
    engine, count = report.facts["engine"], report.facts["workers"]
    return f"{count} worker{'' if count == 1 else 's'}" + (f" of {engine}" if _each(engine) else "")


def _each(engine: str) -> str:
    return "" if engine in ("threads", "serial") else " a worker"


def done_sentence(report: Report) -> str:
    """Return in a line or two what was done."""
    facts = report.facts
    counts = ", ".join(f"{count} {status}" for status, count in report.counts.items())
    if report.verb == "export-patch":
        return (
            f"tensors: {counts}\n{human_count(facts['changed'])} of {human_count(facts['numel'])}"
            f" values listed, {human_bytes(facts['nbytes'])}; they hold on the exact base alone"
        )
    if report.verb == "extract-lora":
        ranks = sorted({facts["least_rank"], facts["most_rank"]})
        places = (("left_out_energy", "that are left out (embeddings, norms, ...)"),
                  ("not_found_energy", "not found among the modules of the base"))  # fmt: skip
        elsewhere = [(facts[key], where) for key, where in places if facts[key]]
        return (
            f"tensors: {counts}\n{facts['modules']} modules of rank"
            f" {' to '.join(map(str, ranks))}, {human_bytes(facts['nbytes'])}\n"
            f"keeps {100 * facts['kept_energy']:.3g} % of the vector's squared norm"
            + "".join(f"\n{100 * share:.3g} % is in tensors {where}" for share, where in elsewhere)
        )
    if report.verb in STORES[:3]:
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
            f"tensors: {counts} ({codecs})\n"
            f"{human_count(facts['changed'])} of {human_count(facts['numel'])} values changed"
            f" ({100 * facts['density']:.3g} %), norm {facts['norm']:.5g},"
            f" {human_bytes(facts['nbytes'])}{shards}\n"
            f"{claim}\n"
            f"({exact['exceptions']} fp32 exceptions, {exact['replacements']} replacements)"
        )
    if report.verb == "apply":
        about = "about " if facts["estimated"] else ""
        lost = facts.get("nonfinite", {}).get("lost")
        finite = "\n(what is not finite counts as not arrived)" if lost else ""
        return (
            f"tensors: {counts}; verdict {_verdict(facts)}\n"
            f"{about}{human_count(facts['changed'])} of {human_count(facts['numel'])} values"
            f" changed; realised gain {about}{_number(facts['gain'])},"
            f" cosine {about}{_number(facts['cosine'])}{finite}"
        )
    verdict = f"; verdict {_verdict(facts)}" if "verdict" in facts else ""
    return f"{facts['claim']}: {_held(facts)}\ntensors: {counts}{verdict}"


def _sampled(verdict: str) -> str:
    """Return what to add to a verdict of which no digest knows yet."""
    return " (by samples of its weights)" if verdict == "exact base" else ""


def _verdict(facts: dict[str, Any]) -> str:
    """Return a verdict after the work: digests confirm it, but for combinations without any."""
    verdict = str(facts["verdict"])
    return verdict + (_sampled(verdict) if facts.get("verdict_sampled") else "")


def _unrestored(count: int) -> str:
    """Return what base + 1 * v misses: values in vectors made before all were kept, or integers."""
    return f"{count} values, where fp32 rounded the difference" if count else "integer tensors"


def _held(facts: dict[str, Any]) -> str:
    """Return that a proof holds, or for what it does not: what the manifest announces."""
    unrestored, lines = facts.get("unrestored") or {}, []
    if unrestored:
        lines.append(f"{sum(unrestored.values())} values of {_some(list(unrestored))}: rounded")
    if facts.get("differing"):
        lines.append(f"{_some(facts['differing'])}: integers that differ, not transferred")
    if facts.get("excluded"):
        lines.append(f"{_some(facts['excluded'])}: left out of the vector")
    if facts.get("rows"):
        lines.append(f"rows that only one model has: --rows {facts['rows']}")
    if not lines:
        return "holds"
    return "\n  ".join(["holds but for what the manifest announces:", *lines])


def _some(names: list[str]) -> str:
    """Return up to three names of tensors, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _stored_as(dtype: str) -> str:
    return "fp32 (fp64 where an input is)" if dtype == "auto" else dtype


def _table(columns: list[str], rows: list[list[str]], bars: str = "") -> None:
    """Print a table no wider than the terminal: names too long lose their beginning.

    The column `bars` is set to the left, all others but the first to the right.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    room = max(12, console.width - sum(widths[1:]) - 3 * len(widths))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(columns[0], no_wrap=True)
    for column, width in zip(columns[1:], widths[1:], strict=True):
        side: Any = "left" if column == bars else "right"
        table.add_column(column, justify=side, no_wrap=True, min_width=width)
    for name, *cells in rows:
        table.add_row(name if len(name) <= room else f"\u2026{name[1 - room :]}", *cells)
    console.print(table)


PAIR_COLUMNS = {  # title: key, format
    "cosine": ("cosine", "+.4f"), "\u00b1": ("cosine_se", ".4f"), "z": ("z", "+.1f"),
    "z groups": ("z_groups", "+.1f"), "control": ("control_cosine", "+.4f"),
    "|A|/|B|": ("norm_ratio", ".3g"), "lift": ("lift", ".2f"), "signs": ("sign_agreement", ".3f"),
}  # fmt: skip
SUBSPACE_COLUMNS = {
    "overlap": ("overlap_left", ".3f"), "chance": ("overlap_chance", ".3f"),
    "A in B": ("a_in_b", ".2e"), "B in A": ("b_in_a", ".2e"), "chance ": ("in_chance", ".2e"),
    "SAR A": ("sar_a", ".3f"), "SAR B": ("sar_b", ".3f"),
}  # fmt: skip


def _print_comparison(report: Report, verbose: bool) -> None:
    """Print one screen: who was compared, every pair, what it means; all levels if verbose."""
    facts = report.facts
    letters = [_letter(i) for i in range(len(facts["vectors"]))]
    pairs = list(zip(combinations(letters, 2), facts["pairs"], strict=True))
    for letter, vector in zip(letters, facts["norms"], strict=True):
        said = _vector_line(vector, "estimated" in facts)
        line = _wrapped(f"{letter}\xa0=\xa0{said}")
        _print(line.replace("\xa0", " "))  # a long path stays behind its letter
    left_out = {"z", "lift"} if verbose else set()  # room for names; the report has them all
    left_out |= {"|A|/|B|"} if facts["control"] else {"control"}
    shown = {title: spec for title, spec in PAIR_COLUMNS.items() if title not in left_out}
    rows = []
    for names, pair in pairs:
        rows.append([", ".join(names), *_columns(pair["overall"], shown)])
        for level in ("modules", "kinds", "layers", "tensors") if verbose else ("kinds",):
            if not verbose and (len(facts["pairs"]) > 1 or len(pair[level]) > 14):
                continue
            rows += [[""] * (1 + len(shown))] if verbose else []
            rows += [[f"  {row['name'].removesuffix('.weight')}", *_columns(row, shown)]
                     for row in pair[level]]  # fmt: skip
    _table(["", *shown], rows)
    if facts["subspace"]:
        _print(f"\ntop {facts['subspace']['k']} singular directions")
        _table(["", *SUBSPACE_COLUMNS], [
            [", ".join(names), *_columns(pair["overall"], SUBSPACE_COLUMNS)]
            for names, pair in pairs
        ])  # fmt: skip
    for names, pair in pairs:
        words = f"{', '.join(names)}: {pair['sentence']}."
        own = dict(zip("AB", names, strict=True))
        forecast = re.sub(r"\b[AB]\b", lambda found: own[found[0]], pair["forecast"]["sentence"])  # noqa: B023
        _print(_wrapped(f"{words} {forecast[0].upper()}{forecast[1:]}."))


def _letter(i: int) -> str:
    """Return A to Z, then AA to ZZ and so on."""
    return (_letter(i // 26 - 1) if i >= 26 else "") + chr(ord("A") + i % 26)


def _vector_line(vector: dict[str, Any], estimated: bool) -> str:
    """Return label, dtype lineage, norm and density of a vector."""
    row = vector["overall"]
    words = f"{vector['label']} ({vector['lineage']}), norm {row['norm']:.4g}"
    if row["density"] is not None:
        words += f", {100 * row['density']:.3g} % changed"
    if row["below_half_step"] is not None:
        about = "about " if estimated else ""
        words += f", {about}{100 * row['below_half_step']:.2g} % by under half a 16-bit step"
    return words


def _columns(row: dict[str, Any], shown: dict[str, tuple[str, str]]) -> list[str]:
    cells = {title: _number(row.get(key), form) for title, (key, form) in shown.items()}
    if cells.get("\u00b1", "-") != "-":  # of 95 %
        cells["\u00b1"] = _number(1.96 * row["cosine_se"], ".4f")
    return list(cells.values())


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 80, subsequent_indent="  ", break_on_hyphens=False,
                         break_long_words=False)  # fmt: skip


def _print_norms(report: Report, verbose: bool) -> None:
    """Print norms by kind and layer, with bars of the root mean square of the values."""
    (vector,) = report.facts["norms"]
    _print(_wrapped(_vector_line(vector, "estimated" in report.facts)))
    rows = []
    for level in ("modules", "kinds", "layers", *(["tensors"] if verbose else [])):
        most = max((row["rms"] or 0 for row in vector[level]), default=0)
        rows.append([level, *[""] * 5])
        for row in vector[level]:
            filled = round(16 * (row["rms"] or 0) / most) if 0 < most < inf else 0
            rows.append([
                f"  {row['name'].removesuffix('.weight')}", _number(row["norm"], ".4g"),
                _number(row["rms"], ".2e"), "█" * filled,
                _percent(row["energy_share"]), _percent(row["density"]),
            ])  # fmt: skip
    _table(["", "norm", "rms", "(rms)", "energy", "changed"], rows, bars="(rms)")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g} %"


def _print_inspect(report: Report) -> None:
    facts = report.facts
    _print(f"{facts['kind']} {facts['path']}")
    if facts["kind"] == "vector":
        _print_vector(facts)
        return
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in facts["dtypes"].items())
    _print(
        f"  {facts['model_type'] or 'no config'}, {human_count(facts['numel'])} values in"
        f" {len(report.ledger)} tensors ({dtypes}), {human_bytes(facts['nbytes'])} in"
        f" {_files(facts['files'])}"
    )
    if facts["kind"] == "model" and facts["model_type"] is not None:
        tied = {True: "yes", False: "no", None: "unknown"}[facts["ties_embeddings"]]
        _print(f"  embeddings tied: {tied}")
    if "recipe" in facts:
        recipe = facts["recipe"]
        _print(f"  {recipe['target']['ref']} + {recipe['lam']:g} * {_source(recipe['vector'])}")


def _print_vector(facts: dict[str, Any]) -> None:
    """Print identity, sizes and origin of a vector: with the ledger's head one screen."""
    _print(f"  {facts['formula']}, made by {facts['tool']}:\n  {facts['command']}")
    for side in ("tuned", "base"):
        if facts[side]:
            ref, revision = facts[side]["ref"], facts[side]["revision"] or ""
            at = f"@{revision[:12]}" if revision not in ref else ""  # of the Hub: it says it itself
            _print(
                f"  {side:8} {ref}{at}"
                f" ({facts[side]['model_type'] or 'no config'}, {_dtypes(facts[side])})"
            )
    for parent in facts["parents"]:
        _print(f"  parent   {parent['ref']} ({parent['identity'][:12]})")
    labels = {"method": facts["training"]["method"], "licence": facts["license"],
              "notes": facts["training"]["notes"]}  # fmt: skip
    for label, text in labels.items():
        if text:
            _print(f"  {label:8} {text}")
    _print(f"  identity {facts['identity']}, family {facts['base']['family'][:12]}")
    files = f" in {len(facts['files'])} files" if len(facts["files"]) > 1 else ""
    _print(
        f"  {human_count(facts['numel'])} values, {100 * facts['density']:.3g} % changed, norm"
        f" {facts['norm']:.5g}, {human_bytes(facts['nbytes'])}{files}"
    )
    codecs = (
        f"{held['tensors']} {codec} ({human_bytes(held['nbytes'])})"
        for codec, held in sorted(facts["codecs"].items())
    )
    _print(f"  stored   {', '.join(codecs)}")
    exact = facts["exactness"]
    _print(
        f"  exact    {exact['claim']}, {exact['exceptions']} fp32 exceptions,"
        f" {exact['replacements']} replacements, {exact['unrestored']} not restored"
    )
    if facts["nonfinite"]:
        who = "which only the exact base gets" if facts["tuned"] else "which nobody gets"
        most = "" if facts["tuned"] else "at most "
        _print(f"  finite   but for {most}{facts['nonfinite']} values, {who}")
    top = (f"{layer['name']} {layer['norm']:.3g}" for layer in facts["layers"][:3])
    text = f"  largest  {', '.join(top)}"
    _print(textwrap.fill(text, 80, subsequent_indent=" " * 11, break_on_hyphens=False))
    if "verdict" in facts:
        verdict = facts["verdict"]
        _print(f"  verdict  on {facts['target']}: {verdict}{_sampled(verdict)}")


def _print_ledger(report: Report, limit: int | None) -> None:
    known = ("status", "codec", "dtype", "shape", "changed", "norm", "gain", "cosine", "note")
    keys = [key for key in known if any(key in line for line in report.ledger)]
    lines = report.ledger[:limit]
    rows = [
        [line["name"], *(_about(line, key) + _cell(line.get(key)) for key in keys)]
        for line in lines
    ]
    _table(["tensor", *keys], rows)
    if len(lines) < len(report.ledger):
        _print(f"... and {len(report.ledger) - len(lines)} more tensors (-v shows all)")


def _about(line: dict[str, Any], key: str) -> str:
    """Return the sign before a number that a sample gave."""
    sampled = line.get("estimated") and key in ("changed", "gain", "cosine")
    return "~" if sampled and line.get(key) is not None else ""


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "x".join(map(str, value)) or "scalar"
    return f"{value:.4g}" if isinstance(value, float) else str("" if value is None else value)
