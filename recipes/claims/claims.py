"""The ten claims of the paper: what is tested for each, and its numbers over seeds.

Every number is read from what the stages wrote. The verdicts follow from the tests by the rules of
recipes/claims/rules.py, which run over all claims together. What an experiment did not measure is
left out: of the tests, of the tables, and a claim without a test has no parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from statistics import fmean

from skillvec.recipes.claims.results import NAMES, Results, find_pair
from skillvec.recipes.claims.rules import (
    COSINE,
    FORGETTING,
    MARGIN,
    Part,
    Spread,
    better,
    equal,
    less,
    no_worse,
)


@dataclass(frozen=True)
class Claim:
    """A claim, what the paper says, what is tested, what is found, the evidence in Markdown.

    Without parts there was nothing to test, and the rest is of no use.
    """

    title: str
    paper: str
    parts: tuple[Part, ...]
    found: str
    evidence: str


def knowledge_is_not_enough(results: Results) -> Claim:
    domains = results.where("SFT only", told=("base", "SFT only"))
    rows, gaps, said = [], {}, []
    for domain in domains:
        told = results.probe(domain, "SFT only", "told")
        exact = results.exact(domain, "SFT only")
        before = results.probe(domain, "base", "told")
        gaps[f"{domain}: told less answered"] = told - exact
        said.append(f"{told.mean:.0%} of the facts about {domain} are in the model,"
                    f" {exact.mean:.0%} are answered")  # fmt: skip
        rows.append([domain, before.show(), told.show(), exact.show(),
                     results.show(domain, "lambda 1")])  # fmt: skip
    heads = ["facts of T", "base can tell", "SFT can tell", "SFT answers", "SFT + v answers"]
    text = (
        "*Can tell*: the value is the likeliest, among all values of its attribute, to end a"
        " sentence of the kind that SFT showed. *Answers*: the closed-book question is answered"
        " exactly. The difference is knowledge that is there and is not used.\n\n"
    )
    return Claim("Knowledge is not enough", "SFT puts facts in, using them takes RL",
                 tested(better("", gaps)), "after SFT " + "; ".join(said),
                 text + table(heads, rows))  # fmt: skip


def injection_lifts(results: Results) -> Claim:
    domains = results.where("SFT only", "lambda 1")
    arms = ("base", "SFT only", "lambda 1", "random", "shuffled", "lambda -1",
            "SFT on S", "RL on S")  # fmt: skip
    rows = [[f"{arm}, asked about S" if arm.endswith("on S") else NAMES.get(arm, arm),
             *(results.show(d, arm) for d in domains)]
            for arm in arms if results.where(arm)]  # fmt: skip
    parts = tested(*(
        better(title, {f"{d}: + v less {NAMES.get(arm, arm)}": _gap(results, d, "lambda 1", arm)
                       for d in domains for arm in others if d in results.where(arm)})
        for title, others in (("over SFT only", ("SFT only",)),
                              ("over noise of its size", ("random", "shuffled")))
    ))  # fmt: skip
    noises = "; ".join(
        f"{NAMES[arm]}: " + _say(gaps)
        for arm in ("random", "shuffled", "lambda -1")
        if (gaps := _gaps(results, arm, "SFT only"))
    )
    text = (
        "v comes from RL on S alone; T is asked about. The random vector has the norm of v in"
        " every tensor, the shuffled one its very values in random places. Against SFT only, seed"
        f" by seed: {noises}. Where SFT only is near 0, nothing can lower it.\n\n"
    )
    every = [[str(seed), *(f"{results.exact(d, arm).values[i]:.3f}" for d in domains
                           for arm in ("SFT only", "lambda 1"))]
             for i, seed in enumerate(results.seeds)]  # fmt: skip
    heads = ["seed", *(f"{d}, {arm}" for d in domains for arm in ("SFT only", "+ v"))]
    text += _nothing_learnt(results)
    return Claim("Post-hoc injection lifts a target that RL never saw",
                 "theta_sft_T + v beats theta_sft_T", parts,
                 f"the gain at lambda 1 is {_say(_gaps(results, 'lambda 1', 'SFT only'))}",
                 f"{text}{table(['exact match on T', *domains], rows)}\n\n{table(heads, every)}",
                 )  # fmt: skip


def _nothing_learnt(results: Results) -> str:
    said = [f"{domain} in seed {', '.join(map(str, seeds))}"
            for domain in results.domains if (seeds := results.empty(domain))]  # fmt: skip
    if not said:
        return ""
    return (
        f"RL learnt nothing about {'; '.join(said)}: GRPO never met a reward (SFT on S answers"
        " nothing exactly) and v is zero. Such a seed counts like all others; only angles, which"
        " a zero vector does not have, leave it out.\n\n"
    )


def lambda_curve(results: Results) -> Claim:
    arms = results.curve
    domains = results.where("lambda 1", *arms.values())
    rows, lines = [], []
    for lam, arm in arms.items():
        cells = [results.show(d, arm) for d in domains]
        gaps = [_gap(results, d, "lambda 1", arm).show_interval() if lam != 1 else ""
                for d in domains]  # fmt: skip
        rows.append([f"{lam:g}", *cells, *gaps])
    for domain in domains:
        best = max(results.lambdas, key=lambda lam: results.exact(domain, arms[lam]).mean)
        gap = _gap(results, domain, "lambda 1", arms[best])
        less_best = f", lambda 1 less that is {gap.show_interval()}" if best != 1 else ""
        lines.append(f"{domain} are answered best at {best:g}{less_best}")
    parts = tested(*(
        no_worse(title, {f"{d}: lambda 1 less {lam:g}": _gap(results, d, "lambda 1", arms[lam])
                         for d in domains for lam in others if lam in arms})
        for title, others in (("against smaller lambdas", (0.5, 0.75)),
                              ("against larger lambdas", (1.25, 1.5)))
    ))  # fmt: skip
    text = (
        "The neighbours of 1 are tested, and not the best lambda alone, which would be chosen from"
        f" the same seeds that judge it.\n\n![accuracy by lambda]({results.pictures}lambda.svg)\n\n"
    )
    heads = ["lambda", *domains, *(f"lambda 1 less this, {d}" for d in domains)]
    return Claim("Lambda = 1 is a good choice", "lambda = 1 in every experiment",
                 parts, "; ".join(lines), text + table(heads, rows))  # fmt: skip


def rounds_help(results: Results, longer: str = "") -> Claim:
    """Two rounds against one, in the first domain; `longer` is how arms of more steps end."""
    domain = results.domains[0]
    arms = {"K = 1": "lambda 1", "K = 2": "K = 2"}
    if longer:
        arms |= {arm: arm for arm in (f"K = 1, {longer}", f"K = 2, {longer}")}
    text = (
        "The source is cut into two disjoint parts. Every round begins at the base, and RL at the"
        " round's SFT model plus the skill so far. *At equal steps* each round has half of the RL"
        " steps."
    )
    if longer:
        text += (
            f" With all steps in each round there are {longer}, so beside K = 1 stands a K = 1"
            " that trained as long: its RL went on for as many steps again."
        )
    gaps: dict[str, Spread] = {}
    rows: list[list[str]] = []
    if domain in results.where(*arms.values()):
        found = {title: results.exact(domain, arm) for title, arm in arms.items()}
        once = found["K = 1"]
        gaps["at equal steps"] = found["K = 2"] - once
        if longer:
            twice = found[f"K = 2, {longer}"]
            gaps[f"at {longer}, for both"] = twice - found[f"K = 1, {longer}"]
            gaps["with all steps in each round"] = twice - once
        rows = [[title, one.show(), (one - once).show_interval() if title != "K = 1" else ""]
                for title, one in found.items()]  # fmt: skip
    said = "; ".join(f"{title} {gap.show_interval()}" for title, gap in gaps.items())
    return Claim("Two rounds of refinement beat one", "K = 2 beats K = 1",
                 tuple(better(title, {f"{domain}: K = 2 less K = 1": gap})
                       for title, gap in gaps.items()),
                 f"K = 2 less K = 1: {said}",
                 f"{text}\n\n" + table([domain, "exact match", "less K = 1"], rows))  # fmt: skip


def order_matters(results: Results) -> Claim:
    arms = ("lambda 1", "pre-injection", "sequential")
    rows = [[NAMES[arm], *(results.show(d, arm) for d in results.domains)]
            for arm in arms if results.where(arm)]  # fmt: skip
    gaps = {arm: each for arm in arms[1:] if (each := _gaps(results, "lambda 1", arm))}
    text = (
        "*Post-hoc*: theta_sft_T + v. *Pre-injection*: v is added to the base, then SFT on T."
        " *Sequential*: SFT on T on top of theta_rl_S.\n\n"
    )
    parts = (better(f"against {arm}", {f"{d}: post-hoc less {arm}": gap for d, gap in each.items()})
             for arm, each in gaps.items())  # fmt: skip
    said = "; less ".join(f"{arm} {_say(each)}" for arm, each in gaps.items())
    return Claim("Post-hoc beats the other orders",
                 "post-hoc beats sequential training and pre-injection", tuple(parts),
                 f"post-hoc less {said}",
                 text + table(["exact match on T", *results.domains], rows))  # fmt: skip


def nearly_orthogonal(results: Results) -> Claim:
    title = "The RL and the SFT update are nearly orthogonal"
    if not results.angles:
        return Claim(title, "nearly orthogonal", (), "", "")
    pairs = {f"v of {d}, SFT on {group}": (f"{d}/round-1/skill", f"{d}/{name}")
             for d in results.domains
             for group, name in (("S", "round-1/sft"), ("T", "sft_t"))}  # fmt: skip
    controls = {f"SFT on S, SFT on T, {d}": (f"{d}/round-1/sft", f"{d}/sft_t")
                for d in results.domains}  # fmt: skip
    between = {}
    for one, other in combinations(results.domains, 2):
        between[f"v of {one}, v of {other}"] = f"{one}/round-1/skill", f"{other}/round-1/skill"
        between[f"SFT on {one}, SFT on {other}"] = f"{one}/sft_t", f"{other}/sft_t"
    tests: dict[str, dict[str, Spread]] = {weights: {} for weights in WEIGHTS.values()}
    rows: list[list[str]] = []
    sizes: dict[str, list[float]] = {part: [] for part in WEIGHTS}
    for name, (a, b) in (pairs | controls | between).items():
        for part in WEIGHTS:
            cosine, p = (results.pair(a, b, key, part) for key in ("cosine", "p"))
            if not cosine.values:  # RL changed nothing in any seed
                continue
            largest = max(map(abs, cosine.values))
            rms = fmean(value**2 for value in cosine.values) ** 0.5
            control = results.pair(a, b, "control_cosine", part).show("+.4f")
            seen = sum(value < 0.05 for value in p.values)
            rows.append([name, WEIGHTS[part], cosine.show("+.3f"), f"{rms:.3f}", f"{largest:.3f}",
                         control, f"{seen} of {len(p.values)}"])  # fmt: skip
            if name in pairs:
                tests[WEIGHTS[part]][name] = Spread(tuple(map(abs, cosine.values)))
                sizes[part].append(largest)
    if not sizes["overall"]:
        return Claim(title, "nearly orthogonal", (), "", "")
    sft = [results.pair(a, b, "cosine") for a, b in controls.values()]
    said = (
        f"the largest cosine of v and an SFT update is {max(sizes['overall']):.3f} in size over all"
        f" pairs and seeds, {max(sizes['layers']):.3f} in the layers alone, against"
        f" {fmean(c.mean for c in sft):.2f} on average between two SFT updates"
    )
    text = (
        "A pair's size is the mean of |cosine| over seeds: a mean with signs would let a seed of"
        " +.1 cancel one of -.1. Sizes lean to one side, for which changes of sign are somewhat"
        " too ready to reject: take a p near the level with care. *Layers*: without embeddings and"
        " the last norm. *Control*: a random vector in place of the first. *p < .05*: the seeds in"
        " which the cosine is more than chance gives, by the null that holds for the structure of"
        " the two deltas ([docs/orthogonality.md](orthogonality.md)); small, and no more than"
        " chance, are two questions. The SFT-SFT rows are the control for what two trainings from"
        " one base share anyway.\n\n"
    )
    heads = ["pair", "weights", "cosine", "rms", "largest", "control", "p < .05"]
    return Claim(title, "nearly orthogonal",
                 tuple(less(f"of {weights}", size, COSINE)
                       for weights, size in tests.items()), said,
                 text + table(heads, rows)
                 + "\n\nCosine by layer, v against the SFT delta of T, and SFT of S against SFT of"
                 " T:\n\n" + _by_layer(results)
                 + f"\n\n![cosine by layer and module]({results.pictures}layers.svg)",
                 )  # fmt: skip


def _by_layer(results: Results) -> str:
    rows: dict[str, list[str]] = {}
    heads = ["layer"]
    for domain in results.domains:
        for title, a in (
            ("RL, SFT", f"{domain}/round-1/skill"),
            ("SFT, SFT", f"{domain}/round-1/sft"),
        ):
            heads.append(f"{title}, {domain}")
            found = [find_pair(report, a, f"{domain}/sft_t")["layers"] for report in results.angles]
            for same in zip(*found, strict=True):
                cosines = (row["cosine"] for row in same)
                spread = Spread(tuple(value for value in cosines if value is not None))
                rows.setdefault(same[0]["name"], []).append(spread.show("+.3f"))
    return table(heads, [[name, *cells] for name, cells in rows.items()])


def target_rl(results: Results, completions: int) -> Claim:
    """RL on T itself against injection; `completions` were sampled and rewarded for the former."""
    gaps, rows = _gaps(results, "RL on the target", "lambda 1"), []
    for domain in gaps:
        times = [results.seconds.get(f"{domain}/{name}") for name in ("rl_t", "lambda_1")]
        shown = [results.show(domain, arm) for arm in ("lambda 1", "RL on the target")]
        rows.append([domain, *shown, f"{completions:,}"])
        if times[0] and times[1]:
            pairs = zip(times[0].values, times[1].values, strict=True)
            rows[-1].append(Spread(tuple(b / a for a, b in pairs)).show(".2%"))
    heads = ["target", "v injected", "RL on the target", "completions of RL"]
    timed = bool(rows) and all(len(row) > len(heads) for row in rows)
    text = (
        "What RL on the target itself gives, at the same number of steps, and what it costs for"
        " every new target; v is made once."
        + (" The time of apply is mostly its process's start." if timed else "")
        + " An upper bound is what injection does not pass by more than the margin.\n\n"
    )
    if timed:
        heads.append("time of apply / RL")
    for domain, gap in gaps.items():
        if passed := [str(seed) for seed, value in zip(results.seeds, gap.values, strict=True)
                      if value < -MARGIN]:  # fmt: skip
            text += (
                f"Injection passes RL on the target by more than the margin for {domain} in seed"
                f" {', '.join(passed)}. Where theta_sft_T answers"
                " nothing, GRPO may never meet a reward.\n\n"
            )
    tests = {f"{d}: RL on the target less + v": gap for d, gap in gaps.items()}
    return Claim("RL on the target is the upper bound", "not stated", tested(no_worse("", tests)),
                 f"RL on the target less injection is {_say(gaps)}",
                 text + table(heads, (row[: len(heads)] for row in rows)))  # fmt: skip


def other_domains(results: Results, note: str) -> Claim:
    """Skills on targets they do not come from; `note` says what differs between the domains."""
    rows, within, across = [], {}, {}
    for domain, other in permutations(results.domains, 2):
        if domain not in results.where("SFT only", "lambda 1", f"skill of {other}"):
            continue
        rows.append([domain, *(results.show(domain, arm) for arm in (
            "SFT only", "lambda 1", f"skill of {other}", "both skills"))])  # fmt: skip
        within[f"{domain}: + v less SFT only"] = _gap(results, domain, "lambda 1", "SFT only")
        across[domain] = _gap(results, domain, f"skill of {other}", "SFT only")
    heads = ["target", "SFT only", "own domain's skill", "other domain's skill", "both skills"]
    named = {f"{d}: + v of the other domain less SFT only": gap for d, gap in across.items()}
    return Claim("The skill transfers to other targets", "gains in all 20 tool categories",
                 tested(better("within a domain", within), better("across domains", named)),
                 f"the gain from the other domain's skill is {_say(across)}",
                 f"{note}\n\n{table(heads, rows)}")  # fmt: skip


def forgetting(results: Results, texts: str) -> Claim:
    """What injection costs of the base, measured on `texts`, said in words."""
    arms = ("SFT only", "lambda 1", "lambda 2", "lambda -1", "random", "shuffled",
            "pre-injection", "sequential", "RL on the target")  # fmt: skip
    domains = results.where(kl=("SFT only", "lambda 1"))
    rows = [[NAMES.get(arm, arm),
             *(results.show(f"{d} probe", arm, key) for key in ("kl", "perplexity")
               for d in domains)]
            for arm in arms if results.where(kl=(arm,))]  # fmt: skip
    more, noise = ({d: results.probe(d, "lambda 1", "kl") - results.probe(d, arm, "kl")
                    for d in domains if d in results.where(kl=(arm,))}
                   for arm in ("SFT only", "random"))  # fmt: skip
    worse = [f"about {d}" for d, gap in more.items() if gap.interval()[0] > 0]
    found = f"KL at lambda 1 less SFT only is {_say(more)} nats a token"
    if worse:
        found += f": injection does forget more of the base {' and '.join(worse)}"
    heads = ["model", *(f"{key}, {d}" for key in ("KL", "perplexity") for d in domains)]
    text = (
        f"Forward KL divergence from the base, nats a token, and perplexity, on {texts}. Against"
        f" noise of the same size, v at lambda 1: {_say(noise)}. The margin, {FORGETTING:g} nats a"
        f" token, is a perplexity that is {FORGETTING:.0%} higher.\n\n"
    )
    tests = {f"{d}: KL of + v less SFT only": gap for d, gap in more.items()}
    picture = f"![forgetting]({results.pictures}forgetting.svg)"
    return Claim("Injection forgets hardly more of the base", "not stated",
                 tested(less("", tests, FORGETTING)), found,
                 f"{text}{table(heads, rows)}\n\n{picture}")  # fmt: skip


def half_precision(results: Results, copies: Mapping[str, tuple[str, ...]], note: str) -> Claim:
    """Copies of v made of coarser checkpoints; `note` says what these are.

    `copies`: for the folder of a copy its title and the arms that it was added in, of which the
    first is tested.
    """
    found = {name: words for name, words in copies.items()
             if results.where("SFT only", "lambda 1", words[1])}  # fmt: skip
    measured = {name: _copy(results, name) for name in found}
    rows = [["v", "100%", "1", "1", *gain(results, "lambda 1")]]
    for name, (_, *arms) in found.items():
        rows += [[NAMES[arm], *measured[name], *gain(results, arm)]
                 for arm in arms if results.where(arm)]  # fmt: skip
    heads = ["vector", "values changed", "cosine to v", "norm, of v's",
             *gained(results)]  # fmt: skip
    parts = tested(*(
        equal(title, {f"{d}: this vector less v": gap
                      for d, gap in _gaps(results, arm, "lambda 1").items()})
        for title, arm, *_ in found.values()
    ))  # fmt: skip
    said = "; ".join(
        f"{title}: "
        + (f"{measured[name][0]} of the values change, " if results.copies else "")
        + f"{' and '.join(gain(results, arm)[1::2])} of the gain is kept"
        for name, (title, arm, *_) in found.items()
    )
    return Claim("A vector of bf16 checkpoints does as well", "the authors subtract in bf16",
                 parts, said, f"{note}\n\n{table(heads, rows)}")  # fmt: skip


def _copy(results: Results, name: str) -> list[str]:
    """Return the share of values changed, the cosine to v and the norm against v's of a copy."""
    pairs = [find_pair(report, "round-1/skill", f"copies/{name}")["overall"]
             for reports in results.copies.values() for report in reports]  # fmt: skip
    kept = [row for row in pairs if row["cosine"] is not None]
    if not kept:
        return ["-"] * 3
    changed, cosine, norm = (fmean(row[key] for row in kept)
                             for key in ("density_b", "cosine", "norm_ratio"))  # fmt: skip
    return [f"{changed:.0%}", f"{cosine:.3f}", f"{1 / norm:.2f}"]


def gained(results: Results) -> list[str]:
    """Return the heads of the columns that `gain` fills."""
    return [f"{what}, {d}" for d in results.domains for what in ("exact match", "gain kept")]


def gain(results: Results, arm: str) -> list[str]:
    """Return the accuracy and the share of v's gain that is kept, for every domain."""
    cells = []
    for d in results.domains:
        kept, whole = (_gaps(results, x, "SFT only").get(d) for x in (arm, "lambda 1"))
        share = f"{kept.mean / whole.mean:.0%}" if kept and whole and whole.mean else "-"
        cells += [results.show(d, arm), share]
    return cells


def _gaps(results: Results, arm: str, other: str) -> dict[str, Spread]:
    """Return one arm less another, for the domains that have both."""
    return {d: _gap(results, d, arm, other) for d in results.where(arm, other)}


def _gap(results: Results, domain: str, arm: str, other: str) -> Spread:
    return results.exact(domain, arm) - results.exact(domain, other)


def _say(spreads: dict[str, Spread]) -> str:
    return ", ".join(f"{spread.show_interval()} ({name})" for name, spread in spreads.items())


def tested(*parts: Part) -> tuple[Part, ...]:
    """Return the parts that have something to test."""
    return tuple(part for part in parts if part.tests)


WEIGHTS = {"overall": "all weights", "layers": "layers"}


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(lines)
