"""docs/real.md, from the files of seeds beside it.

    python -m skillvec.recipes.real.page [FILE ...] [--page docs/real.md]

What does not hold stands first. Verdicts follow the rules of recipes/claims; beside each stands
what every seed says by its own questions. A claim rests on the seeds that have its numbers.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import pairwise
from pathlib import Path
from typing import Any

from skillvec.recipes.claims.claims import Claim, table
from skillvec.recipes.claims.figures import render
from skillvec.recipes.claims.results import Results
from skillvec.recipes.claims.rules import (
    COSINE,
    FAILS,
    FEW,
    FORGETTING,
    HOLDS,
    MARGIN,
    Spread,
    Test,
    least_seeds,
    signed,
)
from skillvec.recipes.claims.sections import Judged, judge_claims, section, summary
from skillvec.recipes.real.claims import EVIDENCE, PLAIN, list_claims
from skillvec.recipes.real.figures import list_specs
from skillvec.recipes.real.results import (
    DOMAINS,
    count_completions,
    gather,
    partial_scores,
    read_seeds,
)

# modules that render their own sections, and the files beside those of seeds that they read
MODULES = {"regimes": "seed-*.json", "anatomy": "anatomy*.json"}
NOT_MEASURED = "Not measured yet."
Seed = Mapping[str, Any]


def write_page(files: Sequence[Path], page: Path) -> None:
    """Write the page of these seeds, and its figures into images/ beside it.

    Sections of other modules are made from files beside those of the seeds. Raises ValueError as
    `read_seeds` does, and where no claim has its numbers.
    """
    read = read_seeds(files)
    # a seed may have been run for other parts alone
    seeds = [seed for seed in read if any(domain in seed["scores"] for domain in DOMAINS)] or read
    results = gather(seeds)
    trainings = (seed["trainings"].get("people/rl_t") for seed in seeds)
    completions = next((count_completions(one) for one in trainings if one), 0)
    makers = list_claims(completions) if results.domains else ()
    chosen = [choose_seeds(make, seeds) for make in makers]
    claims = [make(gather(of)) for make, of in zip(makers, chosen, strict=True)]
    if not any(claim.parts for claim in claims):
        raise ValueError(f"no claim has its numbers in any of the seeds {results.seeds} yet")
    judged = judge_claims(claims)
    parts = sum(len(verdicts) for _, verdicts in judged.values())
    least = least_seeds(parts)
    model = _same(seeds, "settings").get("model", "a language model")
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name, content in render(list_specs(results, model)):
        (images / f"real-{name}").write_bytes(content)
    absent = [f"{n}. {claim.title}" for n, claim in enumerate(claims, 1) if not claim.parts]
    others = make_sections(files[0].parent)
    groups = [seed["scores"].get(DOMAINS[0], {}).get("groups", []) for seed in seeds]
    text = Path(__file__).with_name("page.txt").read_text(encoding="utf-8").format(
        first=tell_first(judged, results, least), names=model, world=_world(seeds),
        settings=_settings(seeds), margin=MARGIN, forgetting=FORGETTING, cosine=COSINE,
        parts=parts, least=least, few=_few(len(seeds), least),
        questions=sum(count for _, count in groups[0]), subjects=len(groups[0]),
        summary=summary(judged, (["by itself"], _count_passes)),
        left_out=tell_left_out(seeds, absent, {n: chosen[n - 1] for n in judged}),
        sections="\n\n".join(_section(n, judged, chosen[n - 1]) for n in judged),
        thinking=thinking(read), **others,
    )  # fmt: skip
    if FEW in text:  # means of so few seeds have no interval
        text = text.replace(f" [{FEW}]", "").replace("mean [95 % interval]", "mean over seeds")
    page.write_text(text, encoding="utf-8")


def choose_seeds(make: Callable[[Results], Claim], seeds: Sequence[Seed]) -> Sequence[Seed]:
    """Return the seeds that a claim rests on: as many of its tests in as many seeds as there are.

    A seed may lack the trainings of a claim.
    """
    counts = [sum(len(part.tests) for part in make(gather([seed])).parts) for seed in seeds]
    having = {count: sum(other >= count for other in counts) for count in counts}
    least = max(having, key=lambda count: (count * having[count], having[count]))
    return [seed for seed, count in zip(seeds, counts, strict=True) if count >= least]


def make_sections(folder: Path) -> dict[str, str]:
    """Return the sections that other modules make of files in a folder, by their names.

    A module recipes/real/NAME.py has `section(files: Sequence[Path]) -> str`: the text below a
    heading that stands already, in Markdown; nothing where the files have no numbers for it.
    """
    found = {}
    for name, pattern in MODULES.items():
        files = sorted(folder.glob(pattern))
        path = f"skillvec.recipes.real.{name}"
        there = files and importlib.util.find_spec(path)
        found[name] = (importlib.import_module(path).section(files) if there else "").strip()
    return {name: text or NOT_MEASURED for name, text in found.items()}


# ---------------------------------------------------------------------------------- the first lines


def tell_first(judged: Judged, results: Results, least: int) -> str:
    """Return three points: what does not hold, what holds, and what that is worth."""
    many = len(results.seeds)
    opposite, open_still, found = [], [], []
    for n, (_, verdicts) in judged.items():
        for verdict in verdicts:
            tests, word = verdict.part.tests, verdict.word
            plain = PLAIN.get((n, verdict.part.name))
            if plain is None:  # said already by another part
                continue
            if word == HOLDS or (word == FEW and all(_passes(tests))):
                found.append(plain)
            elif word == FAILS or (word == FEW and all(_opposes(tests))):
                opposite.append(f"{plain} ({_tell_closest(tests)})")
            else:
                open_still.append(f"{plain} ({_tell_closest(tests)})")
    where = "in every seed" if many < least else "over all seeds"
    against = [f"**{what}** {'; '.join(parts)}." for what, parts in
               ((f"The opposite shows {where} of this:", opposite),
                (f"Does not show {where}:", open_still)) if parts]  # fmt: skip
    worth = (
        f"the questions of {'one seed' if many == 1 else f'each of {many} seeds by itself'}: that"
        " speaks for other subjects of this world, and not for other trainings, for which the"
        f" rules want {least} seeds"
        if many < least
        else f"{many} trainings, corrected for all tests"
    )
    return "\n".join((
        "- " + (" ".join(against) or "**Nothing that was tested failed.**"),
        f"- **Found:** {_say_gain(results)}{'; '.join(found) or 'nothing'}.",
        f"- **Judged by** {worth}. One model in one invented world: others may differ.",
    ))  # fmt: skip


def _closest(tests: Sequence[Test]) -> tuple[Test, str]:
    """Return the test whose mean comes closest to failing, or fails most, and that mean."""

    def distance(test: Test) -> float:
        mean = test.spread.mean
        return min(one for one in (mean - test.low, test.high - mean) if math.isfinite(one))

    closest = min(tests, key=distance)
    return closest, signed(closest.spread.mean)


def _tell_closest(tests: Sequence[Test]) -> str:
    test, mean = _closest(tests)
    return f"{test.name} {mean}, {_count_passes(tests)[0]}"


def _say_gain(results: Results) -> str:
    """Return how many questions are answered with and without the skill, and with noise."""
    said = []
    for d in results.where("SFT only", "lambda 1", "random"):
        alone, ours, noise = (f"{results.exact(d, arm).mean:.0%}"
                              for arm in ("SFT only", "lambda 1", "random"))  # fmt: skip
        said.append(f"about {d} {alone} of the questions after SFT alone, {ours} with the skill"
                    f" added and {noise} with noise of its size")  # fmt: skip
    return f"the model answers {'; '.join(said)}; " if said else ""


def _passes(tests: Sequence[Test]) -> list[bool]:
    """Return whether each seed by itself passes all tests."""
    return [all(each) for each in zip(*(test.passed() for test in tests), strict=True)]


def _opposes(tests: Sequence[Test]) -> list[bool]:
    """Return whether each seed by itself shows the opposite of a test."""
    return [any(each) for each in zip(*(test.opposed() for test in tests), strict=True)]


def _count_passes(tests: Sequence[Test]) -> list[str]:
    passes = _passes(tests)
    return [f"{sum(passes)} of {len(passes)} seeds"]


# ---------------------------------------------------------------------------------- the body


def _few(many: int, least: int) -> str:
    if many >= least:
        return f"Here are {many}."
    return (
        f"Here are {many}, so every verdict is **too few seeds**, and each seed is shown by itself."
    )


def _section(n: int, judged: Judged, seeds: Sequence[Seed]) -> str:
    """Return a claim's section, with every seed by itself and the commands of its evidence."""
    claim, verdicts = judged[n]
    heads = [*(f"seed {seed['seed']}" for seed in seeds), "by itself"]
    said = ""
    if verdicts[0].word == FEW:
        each = (f"{_count_passes(v.part.tests)[0]} pass {v.part.name}".strip() for v in verdicts)
        said = f"Too few seeds for a verdict; by themselves {'; '.join(each)}"
    text = section(n, claim, verdicts, (heads, _tell_alone), said)
    commands = "\n".join(list_commands(EVIDENCE[n], seeds[0]))
    return f"{text}\n\n```shell\n{commands}\n```" if commands else text


def _tell_alone(tests: Sequence[Test]) -> list[str]:
    return [*_alone(tests[0]), *_count_passes(tests)]


def _alone(test: Test) -> list[str]:
    """Return the number of every seed, with its interval where the questions are known."""
    return [
        signed(one.mean) if one.standard_error is None
        else f"{signed(one.mean)} [{signed(one.low)}, {signed(one.high)}]"
        for one in test.spread.within()
    ]  # fmt: skip


def list_commands(evidence: Sequence[tuple[str, str] | str], seed: Seed) -> list[str]:
    """Return the commands by which some numbers were made, after those that made their models.

    `evidence`: (target, arm), or the name of a stage. A command that asks many arms is cut down to
    those of the evidence.
    """
    spelled: Mapping[str, str] = seed["commands"]
    asked: dict[str, set[str]] = {}
    for what in evidence:
        if isinstance(what, str):
            asked.setdefault(what, set())
            continue
        target, arm = what
        if entry := seed["scores"].get(target, {}).get("arms", {}).get(arm):
            asked.setdefault(entry["stage"], set()).add(arm)
    found: list[str] = []
    for stage, arms in asked.items():
        if stage in spelled:
            command = narrow(spelled[stage], arms)
            made = (name.rstrip("'") for name in re.findall(r"OUT/([^\s=*+:]+)", command))
            found += [spelled[name] for name in made if name in spelled and name != stage]
            found.append(command)
    return [*dict.fromkeys(found)]


def narrow(command: str, arms: Set[str]) -> str:
    """Return a command with only some of the arms after --arms and --probed, where it has them."""
    kept: list[str] = []
    option = ""
    for word in shlex.split(command):
        option = word if word.startswith("--") else option
        of_arm = option in ("--arms", "--probed") and word != option
        if not of_arm or {word, word.rpartition("=")[0]} & arms:
            kept.append(word)
    return shlex.join(kept)


def tell_left_out(
    seeds: Sequence[Seed], absent: Sequence[str], chosen: Mapping[int, Sequence[Seed]]
) -> str:
    """Return what no seed has, and which seeds lack stages, arms and claims that others have.

    `absent`: titles of claims without numbers; `chosen`: the seeds of each other claim.
    """
    said = []
    if absent:
        said.append(f"Left out, without numbers in any seed: {'; '.join(absent)}.")
    for seed in seeds:
        if names := seed["unfinished"]:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            said.append(f"Seed {seed['seed']} has not finished {', '.join(names[:5])}{more}.")
    for (target, arm), numbers in partial_scores(seeds).items():
        if target in DOMAINS:  # other targets have sections that show the seeds that have them
            said.append(f"{target}, {arm}: not in seed {', '.join(map(str, numbers))}.")
    for n, of in chosen.items():
        if len(of) < len(seeds):
            numbers = [seed["seed"] for seed in of]
            said.append(f"Claim {n} rests on seed {', '.join(map(str, numbers))} alone.")
    return " ".join(said) or "Every seed has finished all of its stages."


def thinking(seeds: Sequence[Seed]) -> str:
    """Return what the gain is by the tokens that an answer may take, seed by seed.

    Read are the targets "thinking N", each with "SFT only" and what v was added with; for the few
    tokens of the claims the first domain too. Of few tokens `exact` counts, of more `ends`, for
    which the last words count. A seed without a length has no number there.
    """
    rows: dict[tuple[int, str, str], dict[int, tuple[Spread, Spread]]] = {}
    for seed in seeds:
        scores = gather([seed]).scores
        few = seed["trainings"].get(f"{DOMAINS[0]}/round-1/rl", {}).get("max_completion_length", 0)
        targets = {int(found[1]): target for target, _, _ in scores
                   if (found := re.fullmatch(r"thinking (\d+)", target))}  # fmt: skip
        for tokens, target in ({few: DOMAINS[0]} | targets if targets else {}).items():
            metric = "exact" if tokens == few else "ends"
            for arm in ("lambda 0.5", "lambda 1"):
                keys = [(target, one, metric) for one in ("SFT only", arm)]
                if all(key in scores for key in keys):
                    alone, ours = (scores[key] for key in keys)
                    rows.setdefault((tokens, metric, arm), {})[seed["seed"]] = alone, ours
    if not rows:
        return NOT_MEASURED
    shown = sorted({number for each in rows.values() for number in each})
    said = [_tell_growth(rows, number, arm) for arm in ("lambda 0.5", "lambda 1")
            for number in shown]  # fmt: skip
    lines = []
    for (tokens, metric, arm), each in sorted(rows.items()):
        cells = [f"{each[one][0].mean:.3f} to {each[one][1].mean:.3f}: "
                 + _alone(Test("", each[one][1] - each[one][0]))[0] if one in each else "-"
                 for one in shown]  # fmt: skip
        lines.append([str(tokens), metric, arm, *cells])
    text = (
        f"The gain about {DOMAINS[0]} by the tokens that RL gave an answer: {'; '.join(said)}. Each"
        f" length has an RL, and so a v, of its own. With {lines[0][0]} tokens the whole answer"
        " counts (`exact`). With more the answer begins with the subject's name, so that a model"
        " may tell what it knows before it comes to what was asked, and the last words count"
        " (`ends`). The model itself ends an answer: a limit that it does not reach changes"
        " nothing. A cell holds the share of SFT only, that of + v, and the gain.\n\n"
    )
    return text + table(
        ["tokens", "what counts", "v with", *(f"seed {one}" for one in shown)], lines
    )


def _tell_growth(
    rows: Mapping[tuple[int, str, str], Mapping[int, tuple[Spread, Spread]]], seed: int, arm: str
) -> str:
    """Return whether one seed's gain grows with the length of an answer, and what changed nothing.

    Where answers end by themselves before a limit, a higher limit is the same training.
    """
    pairs = [(tokens, *each[seed]) for (tokens, _, added), each in sorted(rows.items())
             if added == arm and seed in each]  # fmt: skip
    gains = [ours.mean - alone.mean for _, alone, ours in pairs]
    grows = len(gains) > 1 and all(a < b for a, b in pairwise(gains))
    alike = [
        f", with every question marked alike at {one[0]} and {other[0]}"
        for one, other in pairwise(pairs)
        if one[2].asked and one[1:] == other[1:]
    ]
    return (
        f"in seed {seed} at {arm} it is {' / '.join(map(signed, gains))} for"
        f" {' / '.join(str(tokens) for tokens, *_ in pairs)} tokens and"
        f" {'grows' if grows else 'does not grow with the length'}{''.join(alike)}"
    )


# ---------------------------------------------------------------------------------- how it was run


def _same(seeds: Sequence[Seed], key: str) -> dict[str, str]:
    """Return the entries of a key as texts; of one that differs, those of every seed."""
    said = {}
    for name in dict.fromkeys(name for seed in seeds for name in seed[key]):
        values = [str(seed[key].get(name, "-")) for seed in seeds]
        said[name] = values[0] if len({*values}) == 1 else "; ".join(
            f"{value} (seed {seed['seed']})" for value, seed in zip(values, seeds, strict=True)
        )  # fmt: skip
    return said


def _world(seeds: Sequence[Seed]) -> str:
    groups = {domain: seeds[0]["scores"].get(domain, {}).get("groups", []) for domain in DOMAINS}
    return " and ".join(
        f"{len(each)} {domain} in each of S and T" for domain, each in groups.items() if each
    )


def _settings(seeds: Sequence[Seed]) -> str:
    """Return the table of what was run: settings, versions, machine, hours."""
    whole = _same(seeds, "settings") | _same(seeds, "versions") | _same(seeds, "machine")
    computed = ["bf16" if one.get("bf16") else "fp32" for seed in seeds
                if (one := seed["trainings"].get(f"{DOMAINS[0]}/round-1/rl"))]  # fmt: skip
    hours = [f"{sum(seed['seconds'].values()) / 3600:.1f}" for seed in seeds]
    whole |= {"seeds": ", ".join(str(seed["seed"]) for seed in seeds),
              "trainings compute in": ", ".join(computed),
              "hours of each seed": ", ".join(hours)}  # fmt: skip
    return table([*whole], [[*whole.values()]])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="skillvec.recipes.real.page", description=__doc__.splitlines()[0]
    )
    parser.add_argument("files", type=Path, nargs="*", help="default: PAGE's real/seed-*.json")
    parser.add_argument("--page", type=Path, default=Path("docs/real.md"), help="%(default)s")
    given = parser.parse_args(arguments)
    files = given.files or sorted(given.page.with_suffix("").glob("seed-*.json"))
    try:
        write_page(files, given.page)
    except (ValueError, OSError) as error:
        print(f"real.page: {error}", file=sys.stderr)
        return 2
    print(f"written: {given.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
