"""The ten claims of the paper: what is tested for each, and its numbers over seeds.

Every number is read from what the stages wrote. The verdicts follow from the tests by the rules of
recipes/mini/rules.py, which run over all claims together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from skillvec.recipes.mini.results import NAMES, Results, find_pair
from skillvec.recipes.mini.rules import (
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
from skillvec.recipes.mini.seed import BITS, DOMAINS, LAMBDAS, SETTINGS, TWICE


@dataclass(frozen=True)
class Claim:
    """A claim, what the paper says, what is tested, what is found, the evidence in Markdown."""

    title: str
    paper: str
    parts: tuple[Part, ...]
    found: str
    evidence: str


def knowledge_is_not_enough(results: Results) -> Claim:
    rows, gaps = [], {}
    for domain in DOMAINS:
        told = results.probe(domain, "SFT only", "told")
        exact = results.exact(domain, "SFT only")
        before = results.probe(domain, "base", "told")
        gaps[f"{domain}: told less answered"] = told - exact
        rows.append([domain, before.show(), told.show(), exact.show(),
                     results.exact(domain, "lambda 1").show()])  # fmt: skip
    heads = ["facts of T", "base can tell", "SFT can tell", "SFT answers", "SFT + v answers"]
    found = "after SFT " + "; ".join(
        f"{results.probe(d, 'SFT only', 'told').mean:.0%} of the facts about {d} are in the model,"
        f" {results.exact(d, 'SFT only').mean:.0%} are answered"
        for d in DOMAINS
    )
    text = (
        "*Can tell*: the value is the likeliest, among all values of its attribute, to end a"
        " sentence of the kind that SFT showed. *Answers*: the closed-book question is answered"
        " exactly. The difference is knowledge that is there and is not used.\n\n"
    )
    return Claim("Knowledge is not enough", "SFT puts facts in, using them takes RL",
                 (better("", gaps),), found, text + table(heads, rows))  # fmt: skip


def injection_lifts(results: Results) -> Claim:
    arms = ("base", "SFT only", "lambda 1", "random", "shuffled", "lambda -1")
    rows = [[NAMES.get(arm, arm), *(results.exact(d, arm).show() for d in DOMAINS)] for arm in arms]
    for arm in ("SFT on S", "RL on S"):
        cells = (results.exact(d, arm).show() for d in DOMAINS)
        rows.append([f"{arm}, asked about S", *cells])
    parts = (
        better(title, {f"{d}: + v less {NAMES.get(arm, arm)}": _gap(results, d, "lambda 1", arm)
                       for d in DOMAINS for arm in others})
        for title, others in (("over SFT only", ("SFT only",)),
                              ("over noise of its size", ("random", "shuffled")))
    )  # fmt: skip
    gains = {d: _gap(results, d, "lambda 1", "SFT only") for d in DOMAINS}
    noises = "; ".join(
        f"{NAMES[arm]}: " + _say({d: _gap(results, d, arm, "SFT only") for d in DOMAINS})
        for arm in ("random", "shuffled", "lambda -1")
    )
    text = (
        "v comes from RL on S alone; T is asked about. The random vector has the norm of v in"
        " every tensor, the shuffled one its very values in random places. Against SFT only, seed"
        f" by seed: {noises}. Where SFT only is near 0, nothing can lower it.\n\n"
    )
    every = [[str(seed), *(f"{results.exact(d, arm).values[i]:.3f}" for d in DOMAINS
                           for arm in ("SFT only", "lambda 1"))]
             for i, seed in enumerate(results.seeds)]  # fmt: skip
    heads = ["seed", *(f"{d}, {arm}" for d in DOMAINS for arm in ("SFT only", "+ v"))]
    text += _nothing_learnt(results)
    return Claim("Post-hoc injection lifts a target that RL never saw",
                 "theta_sft_T + v beats theta_sft_T", tuple(parts),
                 f"the gain at lambda 1 is {_say(gains)}",
                 f"{text}{table(['exact match on T', *DOMAINS], rows)}\n\n{table(heads, every)}",
                 )  # fmt: skip


def _nothing_learnt(results: Results) -> str:
    said = [f"{domain} in seed {', '.join(map(str, seeds))}"
            for domain in DOMAINS if (seeds := results.empty(domain))]  # fmt: skip
    if not said:
        return ""
    return (
        f"RL learnt nothing about {'; '.join(said)}: GRPO never met a reward (SFT on S answers"
        " nothing exactly) and v is zero. Such a seed counts like all others; only angles, which"
        " a zero vector does not have, leave it out.\n\n"
    )


def lambda_curve(results: Results) -> Claim:
    arms = {lam: f"lambda {lam:g}" if lam else "SFT only" for lam in sorted((*LAMBDAS, 0.0))}
    rows, lines = [], []
    for lam, arm in arms.items():
        cells = [results.exact(d, arm).show() for d in DOMAINS]
        gaps = {d: _gap(results, d, "lambda 1", arm) for d in DOMAINS}
        rows.append(
            [
                f"{lam:g}",
                *cells,
                *(gap.show_interval() if lam != 1 else "" for gap in gaps.values()),
            ]
        )
    for domain in DOMAINS:
        best = max(LAMBDAS, key=lambda lam: results.exact(domain, f"lambda {lam:g}").mean)
        gap = _gap(results, domain, "lambda 1", f"lambda {best:g}")
        less_best = f", lambda 1 less that is {gap.show_interval()}" if best != 1 else ""
        lines.append(f"{domain} are answered best at {best:g}{less_best}")
    parts = (
        no_worse(title, {f"{d}: lambda 1 less {lam:g}": _gap(results, d, "lambda 1", arms[lam])
                         for d in DOMAINS for lam in others})
        for title, others in (("against smaller lambdas", (0.5, 0.75)),
                              ("against larger lambdas", (1.25, 1.5)))
    )  # fmt: skip
    text = (
        "The neighbours of 1 are tested, and not the best lambda alone, which would be chosen from"
        " the same seeds that judge it.\n\n![accuracy by lambda](images/lambda.svg)\n\n"
    )
    heads = ["lambda", *DOMAINS, *(f"lambda 1 less this, {d}" for d in DOMAINS)]
    return Claim("Lambda = 1 is a good choice", "lambda = 1 in every experiment",
                 tuple(parts), "; ".join(lines), text + table(heads, rows))  # fmt: skip


def rounds_help(results: Results) -> Claim:
    once, twice = results.exact("people", "lambda 1"), results.exact("people", f"K = 1, {TWICE}")
    gaps = {
        "at equal steps": results.exact("people", "K = 2") - once,
        f"at {TWICE}, for both": results.exact("people", f"K = 2, {TWICE}") - twice,
        "with all steps in each round": results.exact("people", f"K = 2, {TWICE}") - once,
    }
    arms = {"K = 1": "lambda 1"} | {arm: arm for arm in ("K = 2", f"K = 1, {TWICE}",
                                                         f"K = 2, {TWICE}")}  # fmt: skip
    rows = [[title, results.exact("people", arm).show(),
             (results.exact("people", arm) - once).show_interval() if title != "K = 1" else ""]
            for title, arm in arms.items()]  # fmt: skip
    text = (
        "The source is cut into two disjoint parts. Every round begins at the base, and RL at the"
        " round's SFT model plus the skill so far. *At equal steps* each round has half of the RL"
        f" steps. With all steps in each round there are {TWICE}, so beside K = 1 stands a K = 1"
        " that trained as long: its RL went on for as many steps again.\n\n"
    )
    said = "; ".join(f"{title} {gap.show_interval()}" for title, gap in gaps.items())
    return Claim("Two rounds of refinement beat one", "K = 2 beats K = 1",
                 tuple(better(title, {"people: K = 2 less K = 1": gap})
                       for title, gap in gaps.items()),
                 f"K = 2 less K = 1: {said}",
                 text + table(["people", "exact match", "less K = 1"], rows))  # fmt: skip


def order_matters(results: Results) -> Claim:
    arms = ("lambda 1", "pre-injection", "sequential")
    rows = [[NAMES[arm], *(results.exact(d, arm).show() for d in DOMAINS)] for arm in arms]
    gaps = {arm: {d: _gap(results, d, "lambda 1", arm) for d in DOMAINS} for arm in arms[1:]}
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
                 text + table(["exact match on T", *DOMAINS], rows))  # fmt: skip


def nearly_orthogonal(results: Results) -> Claim:
    pairs = {f"v of {d}, SFT on {group}": (f"{d}/round-1/skill", f"{d}/{name}")
             for d in DOMAINS
             for group, name in (("S", "round-1/sft"), ("T", "sft_t"))}  # fmt: skip
    controls = {f"SFT on S, SFT on T, {d}": (f"{d}/round-1/sft", f"{d}/sft_t") for d in DOMAINS}
    between = {"v of people, v of apis": ("people/round-1/skill", "apis/round-1/skill"),
               "SFT on people, SFT on apis": ("people/sft_t", "apis/sft_t")}  # fmt: skip
    tests: dict[str, dict[str, Spread]] = {title: {} for title in WEIGHTS.values()}
    rows: list[list[str]] = []
    sizes: dict[str, list[float]] = {part: [] for part in WEIGHTS}
    for title, (a, b) in (pairs | controls | between).items():
        for part in WEIGHTS:
            cosine, p = (results.pair(a, b, key, part) for key in ("cosine", "p"))
            largest = max(map(abs, cosine.values))
            rms = fmean(value**2 for value in cosine.values) ** 0.5
            control = results.pair(a, b, "control_cosine", part).show("+.4f")
            seen = sum(value < 0.05 for value in p.values)
            rows.append([title, WEIGHTS[part], cosine.show("+.3f"), f"{rms:.3f}", f"{largest:.3f}",
                         control, f"{seen} of {len(p.values)}"])  # fmt: skip
            if title in pairs:
                tests[WEIGHTS[part]][title] = Spread(tuple(map(abs, cosine.values)))
                sizes[part].append(largest)
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
    return Claim("The RL and the SFT update are nearly orthogonal", "nearly orthogonal",
                 tuple(less(f"of {weights}", size, COSINE)
                       for weights, size in tests.items()), said,
                 text + table(heads, rows)
                 + "\n\nCosine by layer, v against the SFT delta of T, and SFT of S against SFT of"
                 " T:\n\n" + _by_layer(results)
                 + "\n\n![cosine by layer and module](images/layers.svg)",
                 )  # fmt: skip


def _by_layer(results: Results) -> str:
    rows: dict[str, list[str]] = {}
    heads = ["layer"]
    for domain in DOMAINS:
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


def target_rl(results: Results) -> Claim:
    rows, gaps = [], {}
    for domain in DOMAINS:
        upper, ours = results.exact(domain, "RL on the target"), results.exact(domain, "lambda 1")
        gaps[domain] = upper - ours
        train = results.seconds[f"{domain}/rl_t"]
        inject = results.seconds[f"{domain}/lambda_1"]
        share = Spread(tuple(b / a for a, b in zip(train.values, inject.values, strict=True)))
        rows.append([domain, ours.show(), upper.show(), f"{_completions():,}", share.show(".2%")])
    heads = ["target", "v injected", "RL on the target", "completions of RL", "time of apply / RL"]
    text = (
        "What RL on the target itself gives, at the same number of steps, and what it costs for"
        " every new target; v is made once. The time of apply is mostly its process's start. An"
        " upper bound is what injection does not pass by more than the margin.\n\n"
    )
    for domain, gap in gaps.items():
        if passed := [str(seed) for seed, value in zip(results.seeds, gap.values, strict=True)
                      if value < -MARGIN]:  # fmt: skip
            text += (
                f"Injection passes RL on the target by more than the margin for {domain} in seed"
                f" {', '.join(passed)}. Where theta_sft_T answers"
                " nothing, GRPO may never meet a reward.\n\n"
            )
    tests = {f"{d}: RL on the target less + v": gap for d, gap in gaps.items()}
    return Claim("RL on the target is the upper bound", "not stated", (no_worse("", tests),),
                 f"RL on the target less injection is {_say(gaps)}",
                 text + table(heads, rows))  # fmt: skip


def _completions() -> int:
    from skillvec.recipes.past import read_config

    rl = read_config(SETTINGS).rl
    return int(rl["max_steps"] * rl["per_device_train_batch_size"])


def other_domains(results: Results) -> Claim:
    rows, within, across = [], {}, {}
    for domain, other in (DOMAINS, DOMAINS[::-1]):
        alone = results.exact(domain, "SFT only")
        rows.append([domain, alone.show(), results.exact(domain, "lambda 1").show(),
                     results.exact(domain, f"skill of {other}").show(),
                     results.exact(domain, "both skills").show()])  # fmt: skip
        within[f"{domain}: + v less SFT only"] = results.exact(domain, "lambda 1") - alone
        across[domain] = results.exact(domain, f"skill of {other}") - alone
    text = (
        "Calls learned on one set of APIs, used on another; and across: the skill of answering"
        " about people on APIs, which are asked for and called in words of their own.\n\n"
    )
    heads = ["target", "SFT only", "own domain's skill", "other domain's skill", "both skills"]
    named = {f"{d}: + v of the other domain less SFT only": gap for d, gap in across.items()}
    return Claim("The skill transfers to other targets", "gains in all 20 tool categories",
                 (better("within a domain", within), better("across domains", named)),
                 f"the gain from the other domain's skill is {_say(across)}",
                 text + table(heads, rows))  # fmt: skip


def forgetting(results: Results) -> Claim:
    arms = ("SFT only", "lambda 1", "lambda 2", "lambda -1", "random", "shuffled",
            "pre-injection", "sequential", "RL on the target")  # fmt: skip
    rows = [[NAMES.get(arm, arm),
             *(results.probe(d, arm, key).show() for key in ("kl", "perplexity") for d in DOMAINS)]
            for arm in arms]  # fmt: skip
    more, noise = ({d: results.probe(d, "lambda 1", "kl") - results.probe(d, arm, "kl")
                    for d in DOMAINS} for arm in ("SFT only", "random"))  # fmt: skip
    worse = [f"about {d}" for d, gap in more.items() if gap.interval()[0] > 0]
    found = f"KL at lambda 1 less SFT only is {_say(more)} nats a token"
    if worse:
        found += f": injection does forget more of the base {' and '.join(worse)}"
    heads = ["model", *(f"{key}, {d}" for key in ("KL", "perplexity") for d in DOMAINS)]
    text = (
        "Forward KL divergence from the base, nats a token, and perplexity, on the texts about the"
        " general population that the base was trained on. Against noise of the same size, v at"
        f" lambda 1: {_say(noise)}. The margin, {FORGETTING:g} nats a token, is a perplexity that"
        f" is {FORGETTING:.0%} higher.\n\n"
    )
    tests = {f"{d}: KL of + v less SFT only": gap for d, gap in more.items()}
    return Claim("Injection forgets hardly more of the base", "not stated",
                 (less("", tests, FORGETTING),), found,
                 f"{text}{table(heads, rows)}\n\n![forgetting](images/forgetting.svg)")  # fmt: skip


def half_precision(results: Results) -> Claim:
    copies = {name: _copy(results, name) for name in COPIES}
    rows = [["v", "100%", "1", "1", *_gain(results, "lambda 1")]]
    for name, (_, *arms) in COPIES.items():
        rows += [[NAMES[arm], *copies[name], *_gain(results, arm)] for arm in arms]
    text = (
        "The updates of this miniature are large (the learning rate of RL is 300 times that of the"
        " paper's tool training), so bf16, which has 7 bits of mantissa, rounds little away."
        " Where the authors train, most changes of a bf16 model are lost"
        " ([docs/orthogonality.md](orthogonality.md)); to see what that costs, theta_rl_S and"
        " theta_sft_S are rounded to so few bits that as many are lost here, before one is taken"
        " from the other, and the difference is added to the fp32 target. Values changed, cosine"
        " and norm are means over seeds of both domains.\n\n"
    )
    heads = ["vector", "values changed", "cosine to v", "norm, of v's",
             *GAINED]  # fmt: skip
    parts = (
        equal(
            title, {f"{d}: this vector less v": _gap(results, d, arm, "lambda 1") for d in DOMAINS}
        )
        for title, arm, *_ in COPIES.values()
    )
    said = "; ".join(
        f"{title}: {copies[name][0]} of the values change,"
        f" {' and '.join(_gain(results, arm)[1::2])} of the gain is kept"
        for name, (title, arm, *_) in COPIES.items()
    )
    return Claim("A vector of bf16 checkpoints does as well", "the authors subtract in bf16",
                 tuple(parts), said,
                 text + table(heads, rows))  # fmt: skip


def what_carries(results: Results) -> str:
    """Return the text about parts of v and its low-rank copies, which no claim is about."""
    rows = [["v", "100%", *_gain(results, "lambda 1")]]
    for arm in ("layers", "embeddings", "rank 4", "rank 1", "residual"):
        shares = [results.share(d, arm).mean for d in DOMAINS]
        rows.append([NAMES[arm], " / ".join(f"{share:.0%}" for share in shares),
                     *_gain(results, arm)])  # fmt: skip
    heads = ["added to theta_sft_T", f"squared norm of v, {' / '.join(DOMAINS)}",
             *GAINED]  # fmt: skip
    return table(heads, rows)


def _copy(results: Results, name: str) -> list[str]:
    """Return the share of values changed, the cosine to v and the norm against v's of a copy."""
    pairs = [find_pair(report, "round-1/skill", f"copies/{name}")["overall"]
             for reports in results.copies.values() for report in reports]  # fmt: skip
    kept = [row for row in pairs if row["cosine"] is not None]
    changed, cosine, norm = (fmean(row[key] for row in kept)
                             for key in ("density_b", "cosine", "norm_ratio"))  # fmt: skip
    return [f"{changed:.0%}", f"{cosine:.3f}", f"{1 / norm:.2f}"]


def _gain(results: Results, arm: str) -> list[str]:
    """Return the accuracy and the share of v's gain that is kept, for every domain."""
    cells = []
    for d in DOMAINS:
        gain, whole = (_gap(results, d, x, "SFT only").mean for x in (arm, "lambda 1"))
        cells += [results.exact(d, arm).show(), f"{gain / whole:.0%}" if whole else "-"]
    return cells


def _gap(results: Results, domain: str, arm: str, other: str) -> Spread:
    return results.exact(domain, arm) - results.exact(domain, other)


def _say(spreads: dict[str, Spread]) -> str:
    return ", ".join(f"{spread.show_interval()} ({name})" for name, spread in spreads.items())


WEIGHTS = {"overall": "all weights", "layers": "layers"}
GAINED = [f"{what}, {d}" for d in DOMAINS for what in ("exact match", "gain kept")]
COPIES = {  # folder: title, and the arms that it was added in
    "bf16": ("in bf16", "bf16 vector", "all in bf16"),
    **{f"bits-{bits}": (f"in {bits} bit{'s' * (bits != 1)} of mantissa", f"bits {bits}")
       for bits in BITS},
}  # fmt: skip
CLAIMS: tuple[Callable[[Results], Claim], ...] = (
    knowledge_is_not_enough, injection_lifts, lambda_curve, rounds_help, order_matters,
    nearly_orthogonal, target_rl, other_domains, forgetting, half_precision,
)  # fmt: skip


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(lines)
