"""Every number that a report says of a vector or a pair: one row each, and nowhere else.

The terminal, the page with its tooltips and explanations, its figures along the layers, the columns
of report.csv and the tables of docs/orthogonality.md read it. A new number is computed beside the
others (`vector_row`, `pair_row`) and gets a row here. Rows stand in the order in which they are
read; report.json and report.csv keep the order in which they are computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

SPREAD = 1.96  # standard deviations on either side: 95 %


@dataclass(frozen=True)
class Statistic:
    """A number: `key` in report.json and report.csv, `title` for people, `form`, `meaning`.

    `form` is a format specification, "%" for a share at three digits, "word" for what is no number
    or "list" for several. `meaning` is a formula or words, with a and b the values of two vectors,
    v those of one and n their number; `chance` is what unrelated directions give. `shown` names
    where it stands beside report.json and report.csv: "answer" (with the few that carry it), "page"
    (with the numbers of a vector or a pair), "rows" (a column that is shown at first), "lines" (a
    figure along the layers), "screen" (the terminal, if verbose). `plain` says in a sentence what
    one of "answer" means.
    """

    key: str
    title: str
    form: str
    meaning: str
    chance: str = ""
    shown: str = "page"
    plain: str = ""


ANGLE = (
    Statistic("numel", "values", ",d", "number of values n", "", "page rows"),
    Statistic("cosine", "cosine", "+.3g", "⟨a, b⟩ / (|a| |b|): 1 same direction, −1 opposite",
              "0, spread as below", "answer page rows screen",
              "How far two updates point the same way: 1 is the same direction, 0 a right angle, −1"
              " the opposite direction. Updates that have nothing to do with each other come out"
              " near 0, but not at 0."),
    Statistic("cosine_sd", "by chance", ".2g",
              "standard deviation of the cosine under the null that holds, `null`", "",
              "page screen"),
    Statistic("z", "z", "+.1f", "cosine / cosine_sd: the cosine over its spread by that null",
              "N(0, 1)", "answer page rows screen",
              "How many standard deviations the cosine is away from 0, if the updates had nothing"
              " to do with each other. Within ±2 is what chance gives."),
    Statistic("p", "p", ".2g",
              "how often a z as far from 0 comes by chance, two-sided; with many values small"
              " relations are clear too: then the size of the cosine matters", "uniform",
              "page rows screen"),
    Statistic("null", "null", "word",
              "which null holds: groups, unless another has a variance that is larger by more than"
              " chance, and then the largest", "", "page rows screen"),
    Statistic("z_groups", "z, groups", "+.1f",
              "S / √ΣT², T the inner product over a group of neighbouring values, S their sum:"
              " holds for sparse deltas and unequal magnitudes",
              "N(0, 1), if each T has an even chance of either sign", "page"),
    Statistic("z_rows", "z, rows", "+.1f",
              "S / √ΣT², T the inner product over a row as it is stored, or over a slice across the"
              " hidden axis if these vary more", "N(0, 1), if each T has an even chance of either"
              " sign", "page"),
    Statistic("z_channels", "z, channels", "+.1f",
              "S / √ΣT², T the inner product over a channel of the hidden axis, of all tensors"
              " together", "N(0, 1), if each T has an even chance of either sign", "page"),
    Statistic("z_rotation", "z, rotation", "+.1f",
              "S √h / |M|, M the h x h sum of A'B over tensors: a is rotated at random on the"
              " hidden axis of h channels, alike in all tensors",
              "N(0, 1), if no direction of that axis is marked", "page"),
    Statistic("z_isotropic", "z, isotropic", "+.1f",
              "cosine · √n: the cosine over its spread for unrelated isotropic directions",
              "N(0, 1), if all directions of all values are alike"),
    Statistic("p_isotropic", "p, isotropic", ".2g",
              "P(|cosine| as large), two-sided: cosine² follows Beta(1/2, (n−1)/2)",
              "uniform, if isotropic"),
    Statistic("cosine_se", "se", ".2g",
              "√(sum over tensors of G/(G−1) (ΣT² − S²/G)) / (|a| |b|), T of groups, G their"
              " number: its spread where groups are independent, not that of a new training run",
              "the spread that the data show", ""),
    Statistic("cosine_mean", "mean of matrices", "+.3g",
              "mean of the cosines of matrices, each counting as one", "0", "page"),
    Statistic("cosine_mean_se", "its se", ".2g",
              "their standard deviation over the root of their number", "", "page"),
    Statistic("rare_share", "matrices of p < .05", "%", "share of matrices with p < .05", "5 %",
              "page"),
    Statistic("norm_a", "norm A", ".3g", "|a|", "", "rows"),
    Statistic("norm_b", "norm B", ".3g", "|b|", "", "rows"),
    Statistic("norm_ratio", "|A| / |B|", ".3g",
              "|a| / |b|, which a cosine hides: SFT updates are some 30 times longer than RL's"
              " (arXiv 2605.00610)", "", "answer page rows screen",
              "How long the first update is beside the second. Where both are added, the longer one"
              " decides more."),
)  # fmt: skip
CONTROL = (
    Statistic("control_cosine", "control cosine", "+.3g",
              "cosine with another vector, or a random one, in place of a: a pair is worth talking"
              " about where it stands clear of its control", "", "answer page rows screen",
              "The cosine with a stand-in for the first update that knows nothing of its skill. A"
              " relation is worth believing where the cosine is far from this one."),
    Statistic("control_z", "control z", "+.1f",
              "z of another vector, by the null that holds for it; of a random one over cosine_sd",
              "", "page rows"),
)  # fmt: skip
SUPPORT = (
    Statistic("density_a", "density A", "%",
              "N_a / n: share of values of a that are not 0. RL changes 5-30 % in bf16"
              " (arXiv 2505.11711), an artefact of bf16 (arXiv 2509.04259)", "", "page rows"),
    Statistic("density_b", "density B", "%", "N_b / n", "", "page rows"),
    Statistic("jaccard", "Jaccard", ".3g",
              "N_ab / (N_a + N_b − N_ab): values changed by both over values changed by either",
              "depends on the densities: see lift", "page rows"),
    Statistic("lift", "lift", ".3g",
              "N_ab / sum over tensors of N_a N_b / n: shared values over what chance gives. Large"
              " weights absorb small changes of both alike, so bf16 alone lifts it over 1",
              "1; at most 1 / the larger density", "answer page rows screen",
              "How many times as many weights both updates change as chance would have it: 1 is"
              " chance, 2 is twice as many."),
    Statistic("lift_weights", "lift given weights", ".3g",
              "N_ab / sum over tensors and exponents e of the weights of N_a,e N_b,e / n_e: what is"
              " shared beyond what rounding lets through at such weights. Where the tuned models"
              " have 16 bits and weights are known", "1", "answer page rows screen",
              "How many times as many weights both updates change as chance would have it, after"
              " the size of the weights is allowed for, since rounding to 16 bits hides small"
              " changes of large weights. 1 is chance."),
    Statistic("overlap_z", "overlap z", "+.1f",
              "r / √(the largest of H, H + E and R + C − Q): r the excess of N_ab over the chance"
              " of `lift_weights`, H its variance where values are independent, E what rows and"
              " columns of unequal densities add, R and C the squares of r summed up by rows and by"
              " channels, Q by values", "N(0, 1); null for dense ones", "page rows"),
    Statistic("p_overlap", "p of overlap", ".2g", "P(|overlap z| as large), two-sided", "uniform",
              "page rows"),
    Statistic("overlap_z_weights", "overlap z given weights", "+.1f",
              "r / √H, H = sum over tensors and exponents of N_a N_b (n − N_a)(n − N_b) /"
              " (n² (n − 1))", "N(0, 1), if values of one exponent change independently", ""),
    Statistic("overlap_z_plain", "overlap z, plain", "+.1f",
              "(N_ab − chance) / √(sum of N_a N_b (n − N_a)(n − N_b) / (n² (n − 1))), chance as in"
              " lift", "N(0, 1), if all values change independently", ""),
    Statistic("sign_agreement", "equal signs", "%", "share of N_ab with equal signs", "1/2",
              "page rows screen"),
    Statistic("sign_z", "sign z", "+.1f",
              "(2 equal − N_ab) / √(the larger of N_ab and R + C − N_ab), R and C the squares of"
              " equal minus opposite signs by rows and by channels", "N(0, 1)", "page rows"),
    Statistic("sign_z_plain", "sign z, plain", "+.1f", "(2 equal − N_ab) / √N_ab",
              "N(0, 1), if values are independent", ""),
    Statistic("along", "along", "%",
              "sum over tensors t of ⟨a, b⟩_t² / |b_t|², over |a|²: share of a's energy along b's"
              " own direction", "mean of 1/n_t, weighted by a's energy", ""),
    Statistic("on_support_a", "A on support of B", "%", "share of |a|² where b is not 0",
              "about density_b", ""),
    Statistic("conflict_a", "conflict A", "%",
              "share of |a|² where b has the opposite sign", "half of on_support_a", ""),
    Statistic("on_support_b", "B on support of A", "%", "share of |b|² where a is not 0",
              "about density_a", ""),
    Statistic("conflict_b", "conflict B", "%",
              "share of |b|² where a has the opposite sign", "half of on_support_b", ""),
)  # fmt: skip
PAIR_SUBSPACE = (
    Statistic("overlap_left", "overlap left", ".3g",
              "mean squared cosine of the principal angles of U_a and U_b, K leading left singular"
              " vectors each: 1 the same", "K/m in an m x n matrix", "page screen"),
    Statistic("overlap_right", "overlap right", ".3g", "the same of V_a and V_b", "K/n"),
    Statistic("overlap_left_z", "overlap left z", "+.1f",
              "(K · overlap left − K²/m) / √(2 K² (m−K)² / (m² (m−1) (m+2))); of a group, the sum"
              " over matrices over the root of the sum", "N(0, 1), if directions are isotropic",
              "page rows screen"),
    Statistic("overlap_right_z", "overlap right z", "+.1f", "the same of overlap right", "N(0, 1)",
              "page rows"),
    Statistic("overlap_chance", "overlap by chance", ".3g", "(K/m + K/n) / 2", "", "page"),
    Statistic("a_in_b", "A in B", "%", "|U_bᵀ A V_b|² / |A|²: share of A's energy inside",
              "in_chance", "answer page screen",
              "The share of the first update that lies in the K strongest directions of the"
              " second."),
    Statistic("b_in_a", "B in A", "%", "|U_aᵀ B V_a|² / |B|²", "in_chance", "page screen"),
    Statistic("in_chance", "inside by chance", "%", "K² / (mn)", "", "page screen"),
    Statistic("interference", "interference", ".3g",
              "sum of |entries| of (UᵀU − I) S (VᵀV − I), U = [U_a U_b] and so on"
              " (TSV, arXiv 2412.00081), in units of the weights"),
    Statistic("interference_share", "interference share", ".3g",
              "the same over the sum of the singular values",
              "about .8 K^1.5 / √(mn); 1 for the same singular vectors", ""),
    Statistic("sar_a", "SAR A", ".3g",
              "|U_c U_cᵀ A| / |A|, U_c of a + b (subspace alignment ratio, arXiv 2502.04959, at"
              " this K)", "above √(K/m), as a is part of a + b", "page"),
    Statistic("sar_b", "SAR B", ".3g", "|U_c U_cᵀ B| / |B|", "", "page"),
    Statistic("cosine_spikes", "cosine of spikes", "+.3g",
              "cosine of the low-rank parts: the `spikes` of a and those of b, at most K each", "0",
              "page screen"),
    Statistic("cosine_rest", "cosine of rests", "+.3g",
              "cosine of what is left of a and b without them", "0", "page screen"),
    Statistic("spikes_share", "⟨a, b⟩ in spikes", "%",
              "the inner product of the low-rank parts over that of the matrices: above 100 % or"
              " below 0 where parts cancel"),
    Statistic("rest_share", "⟨a, b⟩ in rests", "%",
              "the same of the rests; what is missing to 1 is between a part of one and the rest of"
              " the other"),
    Statistic("angles_left", "angles left", "list",
              "principal angles of U_a and U_b in degrees (Bjorck and Golub 1973)", "towards 90",
              ""),
    Statistic("angles_right", "angles right", "list", "principal angles of V_a and V_b",
              "towards 90", ""),
)  # fmt: skip
PAIR_OUTPUTS = (
    Statistic("cosine_outputs", "cosine of outputs", "+.3g",
              "tr(A C B') / √(tr(A C A') tr(B C B')): the cosine of A x and B x over the inputs x"
              " of all modules; in a group sums over its matrices are divided",
              "0, if the updates know nothing of each other", "answer page rows screen",
              "How far both updates move the outputs of the modules the same way, on the inputs of"
              " the calibration text."),
    Statistic("cka_outputs", "CKA of outputs", ".3g",
              "|A K B'|² / (|A K A'| |B K B'|), K = C − E[x] E[x]' (linear CKA, arXiv 1905.00414):"
              " 1 where A x and B x differ by a rotation and a factor; in a group the mean over"
              " matrices, weighted by √(tr(A C A') tr(B C B'))",
              "above 0, as a few directions hold most of K", "page rows screen"),
)  # fmt: skip
VECTOR = (
    Statistic("numel", "values", ",d", "number of values n", "", "page rows"),
    Statistic("norm", "norm", ".4g", "|v| = √Σv²", "", "answer page rows screen",
              "The length of the whole update: the root of the sum of its squared values."),
    Statistic("rms", "rms", ".3g", "|v| / √n: root mean square of the values", "",
              "answer page rows lines screen",
              "The size of a typical change of one value. Layers and modules of any number of"
              " values can be compared by it."),
    Statistic("energy_share", "energy share", "%", "share of the energy of the whole vector", "",
              "rows screen"),
    Statistic("density", "density", "%", "share of values that are not 0", "",
              "answer page rows lines screen",
              "The share of the values that the update changes at all. Updates in bf16 leave many"
              " values as they are, because rounding hides small changes."),
    Statistic("steps", "steps", "list",
              "counts of changed values by |v| / step, at the edges `step_edges`; below the first,"
              " ..., from the last on. A step is the distance of neighbouring 16-bit"
              " numbers at the weight", "", ""),
    Statistic("below_half_step", "below ½ step", "%",
              "share of changed values with |v| below half a step, which vanish where a sum is"
              " rounded", "", "answer page rows",
              "The share of the changes that are smaller than half the distance between two 16-bit"
              " numbers at that weight: adding them to a 16-bit model does nothing."),
    Statistic("absorbed", "absorbed", "%",
              "share of changed values that rounding takes back: r(w + v) = r(w)", "",
              "page rows"),
    Statistic("kept_gain", "kept gain", ".3f", "with a = r(w + v) − r(w): ⟨a, v⟩ / |v|²"),
    Statistic("kept_cosine", "kept cosine", ".3f", "the cosine of that a and v", "",
              "page rows"),
)  # fmt: skip
VECTOR_SUBSPACE = (
    Statistic("stable_rank", "stable rank", ".3g", "|V|² / s_1²", "", "answer page",
              "How many directions of equal strength the update of a matrix amounts to: 1 is a"
              " single direction."),
    Statistic("spikes", "spikes", ".3g",
              "number of singular values above the noise: 1.15 (square) to 1.41 (Gavish and Donoho"
              " 2014) times the largest one of this matrix with the signs of its values drawn anew,"
              " which is σ (√m + √n) (Marchenko and Pastur) for independent values",
              "0"),
    Statistic("spike_energy", "spike energy", "%", "share of |v|² in the spikes", "0"),
    Statistic("effective_rank", "effective rank", ".3g",
              "exp(entropy of s / Σs) (Roy and Vetterli 2007), estimated where the SVD is"
              " randomised; of a high rank a low-rank copy keeps little of the squared norm, which"
              " need not be little of the effect"),
    Statistic("effective_rank_error", "effective rank error", ".2g",
              "0 where exact, else the standard error of that estimate; the largest in a group",
              "", ""),
    Statistic("top_energy", "top energy", "%", "share of |v|² in the K leading directions", "",
              "page lines"),
    Statistic("energy_in_w", "energy in W", "%",
              "share of |v|² inside W's leading subspaces, W from `--against`",
              "K² / (mn); RL avoids them (arXiv 2511.08567)", "page lines"),
    Statistic("svd_error", "SVD error", ".2g", "the residual of this matrix; the largest in a"
              " group", "", ""),
)  # fmt: skip
VECTOR_OUTPUTS = (
    Statistic("energy_active", "energy, active", "%",
              "share of |v|² in the leading eigenvectors of C that hold 90 % of its trace",
              "active_chance", "page lines"),
    Statistic("active_chance", "active by chance", "%",
              "k / n, k the number of these eigenvectors, weighted by |v|²", "", "page"),
    Statistic("gain_outputs", "gain of outputs", ".3g",
              "tr(V C V') / (|V|² tr(C) / n): mean square of V x over what inputs of the same size"
              " in every direction alike would give", "1", "answer page lines",
              "How much more the update moves outputs on the calibration text than on inputs of the"
              " same size without any structure: 1 is no more."),
)  # fmt: skip
FORECAST = (
    Statistic("along", "along B", "%", "`along` of the pair as a whole"),
    Statistic("on_support", "on B's support", "%", "`on_support_a` of it"),
    Statistic("conflict", "conflict", "%", "`conflict_a` of it; in a layer, of that layer"),
    Statistic("in_subspace", "in B's subspace", "%", "`a_in_b` of it"),
    Statistic("share", "share", "%", "of a layer: the part of all of a's energy that lies along b"
              " in it", "", ""),
)  # fmt: skip

PAIRS = ANGLE + CONTROL + SUPPORT + PAIR_SUBSPACE + PAIR_OUTPUTS
VECTORS = VECTOR + VECTOR_SUBSPACE + VECTOR_OUTPUTS
SECTIONS = {  # as docs/orthogonality.md and the page part them
    "Angle and its chance level": ANGLE + CONTROL,
    "Supports, signs and energy": SUPPORT,
    "One vector": VECTOR,
    "Subspaces": PAIR_SUBSPACE + VECTOR_SUBSPACE,
    "Outputs on calibration inputs": PAIR_OUTPUTS + VECTOR_OUTPUTS,
    "The forecast": FORECAST,
}

Table = Sequence[Statistic]


def select_shown(table: Table, place: str) -> list[Statistic]:
    """Return the numbers that stand in a place, in their order."""
    return [number for number in table if place in number.shown.split()]


def select_known(table: Table, rows: Sequence[Mapping[str, Any]]) -> list[Statistic]:
    """Return the numbers that at least one of the rows has."""
    return [number for number in table if any(row.get(number.key) is not None for row in rows)]


def pick(table: Table, *keys: str) -> list[Statistic]:
    """Return the numbers of these keys, in the order of the keys."""
    by_key = {number.key: number for number in table}
    return [by_key[key] for key in keys]


def write_number(value: Any, form: str) -> str:
    """Return a number as a person reads it, "-" for none."""
    if form == "word":
        return value or "-"
    if value is None or not isfinite(value):
        return "-"
    if form == "%":
        return f"{100 * value:.3g} %"
    return format(int(value) if form.endswith("d") else value, form)


def typeset(text: str) -> str:
    """Return a written number with a true minus, and a dash for none."""
    return "–" if text == "-" else text.replace("-", "−")


def write_numbers(row: Mapping[str, Any], table: Table) -> list[str]:
    """Return the numbers of a row as a person reads them; of a p that fp64 cannot hold its end."""
    return [
        "< 1e-300" if number.key in ("p", "p_isotropic", "p_overlap") and row.get(number.key) == 0
        else write_number(row.get(number.key), number.form)
        for number in table
    ]  # fmt: skip


def write_spread(row: Mapping[str, Any]) -> str:
    """Return the half-width of the interval that holds 95 % of what chance makes of a cosine.

    At most 1, which no cosine is beyond.
    """
    deviation = row.get("cosine_sd")
    return write_number(None if deviation is None else min(SPREAD * deviation, 1.0), ".2g")
