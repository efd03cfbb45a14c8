"""The ten claims of the paper, each with its numbers over seeds and a verdict.

Every number is read from what the stages wrote. The verdicts are computed, not written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from skillvec.recipes.mini.results import NAMES, Results, Spread, find_pair
from skillvec.recipes.mini.seed import DOMAINS, LAMBDAS, ROUNDS, SETTINGS

HOLDS, FAILS, UNCLEAR = "holds", "does not hold", "not clear"


# ---------------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Claim:
    """A claim, what the paper says, what is found here, and the evidence in Markdown."""

    title: str
    paper: str
    verdict: str
    found: str
    evidence: str


def knowledge_is_not_enough(results: Results) -> Claim:
    rows, gaps = [], []
    for domain in DOMAINS:
        told = results.probe(domain, "SFT only", "told")
        exact = results.exact(domain, "SFT only")
        before = results.probe(domain, "base", "told")
        gaps.append(told - exact)
        rows.append([domain, before.show(), told.show(), exact.show(),
                     results.exact(domain, "lambda 1").show()])  # fmt: skip
    heads = ["facts of T", "base can tell", "SFT can tell", "SFT answers", "SFT + v answers"]
    verdict = HOLDS if all(gap.above() for gap in gaps) else UNCLEAR
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
    return Claim("Knowledge is not enough", "SFT puts facts in, using them takes RL", verdict,
                 found, text + table(heads, rows))  # fmt: skip


def injection_lifts(results: Results) -> Claim:
    arms = ("base", "SFT only", "lambda 1", "random", "shuffled", "lambda -1")
    rows = [[NAMES.get(arm, arm), *(results.exact(d, arm).show() for d in DOMAINS)] for arm in arms]
    rows.append(
        ["SFT on S, asked about S", *(results.exact(d, "SFT on S").show() for d in DOMAINS)]
    )
    rows.append(["RL on S, asked about S", *(results.exact(d, "RL on S").show() for d in DOMAINS)])
    gains = {d: results.exact(d, "lambda 1") - results.exact(d, "SFT only") for d in DOMAINS}
    good = all(
        gains[d].above()
        and all(
            (results.exact(d, "lambda 1") - results.exact(d, noise)).above()
            for noise in ("random", "shuffled")
        )
        for d in DOMAINS
    )
    said = [f"{d} {gain.show('+.3f')}" for d, gain in gains.items()]
    against = {arm: ", ".join(
        (results.exact(d, arm) - results.exact(d, "SFT only")).show("+.3f") + f" ({d})"
        for d in DOMAINS) for arm in ("random", "shuffled", "lambda -1")}  # fmt: skip
    noises = "; ".join(f"{NAMES[arm]}: {gaps}" for arm, gaps in against.items())
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
                 "theta_sft_T + v beats theta_sft_T", HOLDS if good else UNCLEAR,
                 f"gain at lambda 1: {', '.join(said)}; of the random vector: {against['random']}",
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
    rows, lines, fine = [], [], []
    lams = sorted((*LAMBDAS, 0.0))
    for lam in lams:
        arm = f"lambda {lam:g}" if lam else "SFT only"
        rows.append([f"{lam:g}", *(results.exact(d, arm).show() for d in DOMAINS)])
    for domain in DOMAINS:
        best = max(LAMBDAS, key=lambda lam: results.exact(domain, f"lambda {lam:g}").mean)
        loss = results.exact(domain, f"lambda {best:g}") - results.exact(domain, "lambda 1")
        fine.append(loss.mean < 0.02 or not loss.above())
        lines.append(f"{domain}: best at {best:g}, lambda 1 loses {loss.show()}")
    return Claim("Lambda = 1 is a good choice", "lambda = 1 in every experiment",
                 HOLDS if all(fine) else FAILS, "; ".join(lines),
                 "![accuracy by lambda](images/lambda.svg)\n\n"
                 + table(["lambda", *DOMAINS], rows))  # fmt: skip


def rounds_help(results: Results) -> Claim:
    rows, verdicts, said = [], [], []
    for domain in DOMAINS:
        one = results.exact(domain, "lambda 1")
        for k in ROUNDS[domain]:
            more = results.exact(domain, f"K = {k}")
            rows.append([domain, f"{k}", more.show(), (more - one).show("+.3f")])
            said.append(f"K = {k}: {(more - one).show('+.3f')}")
            verdicts.append(_better(more - one))
        if ROUNDS[domain]:
            rows.insert(0, [domain, "1", one.show(), ""])
    text = (
        "The source is cut into K disjoint parts; each round has 1/K of the RL steps, so the"
        " budget is equal. Every round begins at the base, and RL at the round's SFT model plus"
        " the skill so far.\n\n"
    )
    return Claim("Two rounds of refinement beat one", "K = 2 beats K = 1", verdicts[0],
                 f"against K = 1, {'; '.join(said)}",
                 text + table(["target", "K", "exact match", "against K = 1"], rows))  # fmt: skip


def order_matters(results: Results) -> Claim:
    arms = ("lambda 1", "pre-injection", "sequential")
    rows = [[NAMES[arm], *(results.exact(d, arm).show() for d in DOMAINS)] for arm in arms]
    said, verdicts = [], []
    for arm in arms[1:]:
        gaps = [results.exact(d, "lambda 1") - results.exact(d, arm) for d in DOMAINS]
        whole = [_better(gap) for gap in gaps]
        verdicts.append(whole[0] if len(set(whole)) == 1 else UNCLEAR)
        said.append(f"{arm}: " + ", ".join(
            f"{gap.show('+.3f')} ({d})" for d, gap in zip(DOMAINS, gaps, strict=True)))  # fmt: skip
    same = verdicts[0] if len(set(verdicts)) == 1 else None
    verdict = same or f"{verdicts[1]} against sequential, {verdicts[0]} against pre-injection"
    text = (
        "*Post-hoc*: theta_sft_T + v. *Pre-injection*: v is added to the base, then SFT on T."
        " *Sequential*: SFT on T on top of theta_rl_S.\n\n"
    )
    return Claim("Post-hoc beats the other orders",
                 "post-hoc beats sequential training and pre-injection", verdict,
                 "post-hoc less " + "; less ".join(said),
                 text + table(["exact match on T", *DOMAINS], rows))  # fmt: skip


def nearly_orthogonal(results: Results) -> Claim:
    rows, cosines = [], []
    pairs = [(f"v of {d}, SFT on {group}", f"{d}/round-1/skill", f"{d}/{name}")
             for d in DOMAINS
             for group, name in (("S", "round-1/sft"), ("T", "sft_t"))]  # fmt: skip
    cosines = [results.pair(a, b, "cosine") for _, a, b in pairs]
    controls = [(f"SFT on S, SFT on T, {d}", f"{d}/round-1/sft", f"{d}/sft_t") for d in DOMAINS]
    between = [("v of people, v of apis", "people/round-1/skill", "apis/round-1/skill"),
               ("SFT on people, SFT on apis", "people/sft_t", "apis/sft_t")]  # fmt: skip
    for title, a, b in [*pairs, *controls, *between]:
        shown = [results.pair(a, b, key) for key in ("cosine", "z", "z_groups", "control_cosine")]
        rows.append([title, shown[0].show("+.3f"), shown[1].show("+.0f"), shown[2].show("+.1f"),
                     shown[3].show("+.4f")])  # fmt: skip
    layers = _by_layer(results)
    small = all(abs(cosine.mean) < 0.1 for cosine in cosines)
    chance = all(abs(results.pair(a, b, "z_groups").mean) < 3 for _, a, b in pairs)
    sft = fmean(results.pair(a, b, "cosine").mean for _, a, b in controls)
    found = (
        f"cosines of at most {max(abs(c.mean) for c in cosines):.3f} in size,"
        f" against {sft:.2f} between two SFT updates"
        + ("" if chance else "; small, and still more than chance gives")
    )
    text = (
        "z: against random directions; z over groups: against random signs of groups of weights,"
        " which does not assume equal magnitudes; control: the cosine with random signs"
        " (docs/orthogonality.md). The SFT-SFT rows are the control for what two trainings from"
        " one base share anyway.\n\n"
    )
    return Claim("The RL and the SFT update are nearly orthogonal", "nearly orthogonal",
                 HOLDS if small else FAILS, found,
                 text + table(["pair", "cosine", "z", "z over groups", "control"], rows)
                 + "\n\nCosine by layer, v against the SFT delta of T, and SFT of S against SFT of"
                 " T:\n\n" + layers + "\n\n![cosine by layer and module](images/layers.svg)",
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
    rows, gaps = [], []
    for domain in DOMAINS:
        upper, ours = results.exact(domain, "RL on the target"), results.exact(domain, "lambda 1")
        gaps.append(upper - ours)
        train = results.seconds[f"{domain}/rl_t"]
        inject = results.seconds[f"{domain}/lambda_1"]
        share = Spread(tuple(b / a for a, b in zip(train.values, inject.values, strict=True)))
        rows.append([domain, ours.show(), upper.show(), f"{_completions():,}", share.show(".2%")])
    heads = ["target", "v injected", "RL on the target", "completions of RL", "time of apply / RL"]
    said = ", ".join(f"{gap.show('+.3f')} ({d})" for d, gap in zip(DOMAINS, gaps, strict=True))
    text = (
        "What RL on the target itself gives, at the same number of steps, and what it costs for"
        " every new target; v is made once. The time of apply is mostly its process's start.\n\n"
    )
    verdict = HOLDS if all(not gap.below() for gap in gaps) else FAILS
    return Claim("RL on the target is the upper bound", "not stated", verdict,
                 f"RL on the target less injection: {said}", text + table(heads, rows))  # fmt: skip


def _completions() -> int:
    from skillvec.recipes.past import read_config

    rl = read_config(SETTINGS).rl
    return int(rl["max_steps"] * rl["per_device_train_batch_size"])


def other_domains(results: Results) -> Claim:
    rows, across = [], []
    for domain, other in (DOMAINS, DOMAINS[::-1]):
        alone = results.exact(domain, "SFT only")
        rows.append([domain, alone.show(), results.exact(domain, "lambda 1").show(),
                     results.exact(domain, f"skill of {other}").show(),
                     results.exact(domain, "both skills").show()])  # fmt: skip
        across.append(results.exact(domain, f"skill of {other}") - alone)
    within = [results.exact(d, "lambda 1") - results.exact(d, "SFT only") for d in DOMAINS]
    verdicts = [HOLDS if all(gap.above() for gap in gaps) else FAILS for gaps in (within, across)]
    verdict = f"{verdicts[0]} within a domain, {verdicts[1]} across domains"
    said = ", ".join(f"{gap.show('+.3f')} ({d})" for d, gap in zip(DOMAINS, across, strict=True))
    text = (
        "Calls learned on one set of APIs, used on another; and across: the skill of answering"
        " about people on APIs, which are asked for and called in words of their own.\n\n"
    )
    heads = ["target", "SFT only", "own domain's skill", "other domain's skill", "both skills"]
    return Claim("The skill transfers to other targets", "gains in all 20 tool categories",
                 verdict, f"gain from the other domain's skill: {said}",
                 text + table(heads, rows))  # fmt: skip


def forgetting(results: Results) -> Claim:
    arms = ("SFT only", "lambda 1", "lambda 2", "lambda -1", "random", "shuffled",
            "pre-injection", "sequential", "RL on the target")  # fmt: skip
    rows = [[NAMES.get(arm, arm),
             *(results.probe(d, arm, key).show() for key in ("kl", "perplexity") for d in DOMAINS)]
            for arm in arms]  # fmt: skip
    more = {d: results.probe(d, "lambda 1", "kl") - results.probe(d, "SFT only", "kl")
            for d in DOMAINS}  # fmt: skip
    noise = {d: results.probe(d, "lambda 1", "kl") - results.probe(d, "random", "kl")
             for d in DOMAINS}  # fmt: skip
    said = ", ".join(f"{gap.show('+.3f')} ({d})" for d, gap in more.items())
    against = ", ".join(f"{gap.show('+.3f')} ({d})" for d, gap in noise.items())
    worse = [gap.above() for gap in more.values()]
    verdict = FAILS if all(worse) else UNCLEAR if any(worse) else HOLDS
    heads = ["model", *(f"{key}, {d}" for key in ("KL", "perplexity") for d in DOMAINS)]
    text = (
        "Forward KL divergence from the base, nats a token, and perplexity, on the texts about the"
        " general population that the base was trained on. Against noise of the same size, v at"
        f" lambda 1: {against}.\n\n"
    )
    return Claim("Injection forgets no more of the base", "not stated", verdict,
                 f"KL at lambda 1 less SFT only: {said}",
                 f"{text}{table(heads, rows)}\n\n![forgetting](images/forgetting.svg)")  # fmt: skip


def half_precision(results: Results) -> Claim:
    arms = ("lambda 1", "bf16 vector", "all in bf16")
    full = results.exact("people", "lambda 1")
    rows = [[HALF[arm], results.exact("people", arm).show(),
             (results.exact("people", arm) - full).show("+.3f")] for arm in arms]  # fmt: skip
    overall = [report["pairs"][0]["overall"] for report in results.bf16]
    cosine = Spread(tuple(row["cosine"] for row in overall))
    density = Spread(tuple(row["density_b"] for row in overall))
    gap = results.exact("people", "bf16 vector") - full
    text = (
        f"Cosine of the two vectors {cosine.show('.4f')}; in bf16 {density.show('.1%')} of the"
        " weights change. The updates of this miniature are large (the learning rate of RL is 300"
        " times that of the paper's tool training): updates of 1e-6 a weight would mostly round"
        " away ([docs/orthogonality.md](orthogonality.md)).\n\n"
    )
    same = not gap.below() and not gap.above()
    return Claim("A vector of bf16 checkpoints does as well", "the authors subtract in bf16",
                 HOLDS if same else FAILS if gap.below() else UNCLEAR,
                 f"bf16 vector less fp32 vector: {gap.show('+.3f')}, cosine {cosine.mean:.3f}",
                 text + table(["people", "exact match", "against fp32"], rows))  # fmt: skip


def _better(gap: Spread) -> str:
    return HOLDS if gap.above() else FAILS if gap.below() else UNCLEAR


HALF = {
    "lambda 1": "fp32 vector on fp32 target",
    "bf16 vector": "vector of bf16 checkpoints on fp32 target",
    "all in bf16": "vector of bf16 checkpoints on bf16 target",
}
CLAIMS: tuple[Callable[[Results], Claim], ...] = (
    knowledge_is_not_enough, injection_lifts, lambda_curve, rounds_help, order_matters,
    nearly_orthogonal, target_rl, other_domains, forgetting, half_precision,
)  # fmt: skip


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(lines)
