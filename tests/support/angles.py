"""Every number of an orthogonality report, from whole tensors in float64. No skillvec in here.

    python tests/support/angles.py report.json [--against W] [--vector LABEL=TUNED::BASE ...]

computes again what a written report says, from the TUNED::BASE pairs that its labels name (or that
--vector gives for other labels), prints the largest deviation in every column in units of what
rounding explains, and exits 1 where one is larger than that.
"""

import argparse
import json
import re
import sys
from functools import lru_cache
from itertools import pairwise
from math import ceil, erfc, floor, inf, isclose, log2, sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
import supports
import torch
from safetensors.torch import load_file

EDGES = [0.25, 0.5, 1, 2, 4, 8, 16, 32]
LEVELS = ("tensors", "layers", "kinds", "modules", "parts", "overall")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
GRIDS = {torch.bfloat16: (8, -126), torch.float16: (11, -14)}  # bits, least normal exponent
SUMS = ("excess", "spread", "parts")  # of a pair of matrices, which add up
LONGEST = 1 << 16  # a channel axis
KNOWN = 128  # channels up to which skillvec's rotations are exact


class Side(NamedTuple):
    """A vector: its values by tensor name, the weights that it was added to, if they are known."""

    values: dict[str, np.ndarray]
    weights: dict[str, torch.Tensor] | None = None
    thresholded: bool = False  # the tuned side is kept in 16 bits


# --------------------------------------------------------------------------------------- loading


def load(path: str | Path) -> dict[str, torch.Tensor]:
    """Return all float tensors of a file or of a folder's safetensors files."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    tensors = {name: t for file in files for name, t in load_file(file).items()}
    return {name: t for name, t in tensors.items() if t.dtype in FLOATS}


def difference(tuned: torch.Tensor, base: torch.Tensor) -> np.ndarray:
    """Return tuned - base as it is stored: rounded to fp32 unless one is fp64, 0 if not finite."""
    with np.errstate(invalid="ignore"):
        exact = tuned.double().numpy() - base.double().numpy()
    exact = np.where(np.isfinite(exact), exact, 0.0)
    if torch.float64 in (tuned.dtype, base.dtype):
        return exact
    return exact.astype(np.float32).astype(np.float64)


def side(tuned: str | Path, base: str | Path) -> Side:
    """Return tuned - base over the names that both have."""
    right, left = load(tuned), load(base)
    names = [name for name in left if name in right]
    halves = any(right[name].dtype in GRIDS for name in names)
    return Side({name: difference(right[name], left[name]) for name in names}, left, halves)


# ---------------------------------------------------------------------------------- names, grids


def split(name: str) -> tuple[str, str, str]:
    """Return layer, kind and module of a tensor's name."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            rest = ["*" if p.isdecimal() else p for p in parts[i + 1 :]]
            return ".".join(parts[: i + 1]), ".".join(rest), rest[0] if rest else ""
    return "", name, ".".join(parts[:-1]) or name


def groups_of(names: list[str]) -> dict[tuple[str, str], list[str]]:
    """Return (level, name of the row) -> the tensors in it."""
    groups: dict[tuple[str, str], list[str]] = {("overall", ""): list(names)}
    for name in names:
        layer, kind, module = split(name)
        for key in (("tensors", name), ("layers", layer or "(no layer)"), ("kinds", kind),
                    ("modules", module), ("parts", "layers" if layer else "outside")):  # fmt: skip
            groups.setdefault(key, []).append(name)
    return groups


def step_at(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return the distance of neighbours in a 16-bit format at the magnitude of x."""
    bits, least = GRIDS[dtype]
    exponent = np.frexp(np.where(x == 0, 2.0**-1000, x.astype(np.float64)))[1] - 1
    return np.ldexp(1.0, np.maximum(exponent, least) - bits + 1)


def to_grid(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Round to a 16-bit format, nearest, ties to even."""
    step = step_at(x, dtype)
    return np.rint(x / step) * step


def products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the inner products over groups of neighbouring values."""
    n = a.size
    g = 1 if n < 2048 else min(1024, 2 ** floor(log2(n / 1024)))
    padded = np.zeros(ceil(n / g) * g)
    padded[:n] = a * b
    return padded.reshape(-1, g).sum(axis=1)


def beta_p(cosine: float, n: float) -> float:
    """Return P(|cos| >= |cosine|) of a random direction in n dimensions.

    The angle from the equator has a density proportional to cos(angle)^(n - 2).
    """
    if n == 1 or abs(cosine) >= 1:
        return 1.0 if n == 1 else 0.0
    top = min(np.pi / 2, 40 / sqrt(n))
    masses = []
    for begin in (min(np.arcsin(abs(cosine)), top), 0.0):
        angle = np.linspace(begin, top, 4001)
        height = np.maximum(np.cos(angle), 0.0) ** (n - 2)
        masses.append(float(np.trapezoid(height, angle)))
    return masses[0] / masses[1]


# ----------------------------------------------------------------------------------------- nulls


def hidden_axis(shapes: list[tuple[int, ...]]) -> int:
    """Return the size that most tensors have as an axis; of as many, what more of them end in."""
    sizes = {size for shape in shapes for size in shape if 1 < size <= LONGEST}
    if not sizes:
        return 0
    ends = [shape[-1] for shape in shapes if shape]
    return max(sizes, key=lambda s: (sum(s in shape for shape in shapes), ends.count(s), s))


def as_matrix(x: np.ndarray, hidden: int) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """Return a tensor as blocks x rows x columns, and which of these may be its channels."""
    x = x.squeeze()
    if x.ndim > 3 and x.shape[-1] != hidden:
        x = x.reshape(x.shape[0], -1)
    if x.ndim == 3 and x.shape[0] == hidden and hidden not in x.shape[1:]:
        x = x.reshape(hidden, -1)
    if x.ndim < 2 and x.size > LONGEST:
        x = np.append(x, np.zeros(-x.size % 1024)).reshape(-1, 1024)
        return x[None], [("columns", 0)]
    ndim, x = x.ndim, x.reshape(-1, *((1,) * max(0, 2 - x.ndim)), *x.shape[-2:])
    places = [("columns", x.shape[2])] + ([("rows", x.shape[1])] if ndim > 1 else [])
    axes = [place for place in places if place[1] == hidden]
    if axes:
        return x, axes
    shorter = places[0] if x.shape[2] <= LONGEST else min(places, key=lambda place: place[1])
    return x, [(shorter[0], 0)]


def by_channels(x: np.ndarray, place: str) -> np.ndarray:
    """Return a tensor as slices x channels."""
    turned = x.swapaxes(1, 2) if place == "rows" else x
    return turned.reshape(-1, turned.shape[2])


def units(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the products of rows; of one row its mean, and each value off the mean."""
    if len(a) > 1:
        return (a * b).sum(axis=1)
    means = a.mean(), b.mean()
    return np.append((a - means[0]) * (b - means[1]), means[0] * means[1] * a.size)


def spreads(names: list[str], one: Side, other: Side, hidden: int) -> dict:
    """Return the variances of the inner product under the nulls of rows, channels, rotations."""
    stored, across, own, turned = [np.zeros(0)], [np.zeros(0)], [np.zeros(0)], []
    shared: list[tuple[np.ndarray, np.ndarray]] = []
    most = 0
    for name in names:
        if not one.values[name].size:
            continue
        (a, axes), (b, _) = (as_matrix(side.values[name], hidden) for side in (one, other))
        stored.append(units(*(x.reshape(-1, x.shape[2]) for x in (a, b))))
        sides = [(by_channels(a, place), by_channels(b, place)) for place, _ in axes]
        slices = [units(x, y) if a.shape[:2] == (1, 1) else (x * y).sum(axis=1) for x, y in sides]
        across.append(max(slices, key=lambda t: float(t @ t)))
        rows_have_more = len(sides) > 1 and turn(*sides[1])[0] > 1.001 * turn(*sides[0])[0]
        x, y = sides[rows_have_more]
        most = max(most, x.shape[1])
        if axes[0][1]:
            shared.append((x, y))
        else:
            own.append((x * y).sum(axis=0))
            turned.append(turn(x, y))
    if shared:
        x, y = (np.concatenate(side) for side in zip(*shared, strict=True))
        own.append((x * y).sum(axis=0))
        turned.append(turn(x, y))
    rows = max((np.concatenate(t) for t in (stored, across)), key=lambda t: float(t @ t))
    variance = sum(v for v, _ in turned)
    doubt = sum(v * v / rank for v, rank in turned)
    return {"rows": rows, "channels": np.concatenate(own), "rotation": variance,
            "rank": variance**2 / doubt if doubt else 1.0, "exact": most <= KNOWN}  # fmt: skip


def turn(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return the variance of tr(R M) over rotations R of M = X'Y, and |M|^4 / |M'M|^2.

    Its squared singular values are the eigenvalues of XX' YY'.
    """
    return _turn(x.astype(np.float64).tobytes(), y.astype(np.float64).tobytes(), x.shape)


@lru_cache(1024)  # a tensor stands in a row of every level
def _turn(one: bytes, other: bytes, shape: tuple[int, int]) -> tuple[float, float]:
    x, y = (np.frombuffer(side).reshape(shape) for side in (one, other))
    if len(x) < x.shape[1]:
        squares = np.linalg.eigvals((x @ x.T) @ (y @ y.T)).real.clip(0)
    else:
        squares = np.linalg.svd(x.T @ y, compute_uv=False) ** 2
    whole = float(squares.sum())
    return whole / x.shape[1], whole**2 / float((squares**2).sum()) if whole else 1.0


def judged(dot: float, groups: np.ndarray, shared: int, spread: dict) -> dict:
    """Return the null that holds with its z and p, and the z of each."""
    variances = {"groups": float(groups @ groups), "rotation": spread["rotation"]}
    counts = {"groups": min(groups.size, shared)}
    for null in ("rows", "channels"):
        t = spread[null]
        variances[null], counts[null] = float(t @ t), int(np.count_nonzero(t))
    larger = [null for null in variances
              if variances[null] > limit(spread["rank"]) * variances["groups"]]  # fmt: skip
    if {"rotation", "channels"} <= {*larger}:
        ahead = variances["channels"] / variances["rotation"]
        clear = ahead > limit(max(counts["channels"] / 4, 1))
        larger.remove("rotation" if clear else "channels")
    null = max(larger, key=variances.__getitem__, default="groups")
    found = {f"z_{n}": dot / sqrt(v) if v else None for n, v in variances.items()}
    found["exact"] = spread["exact"]
    z, p = found[f"z_{null}"], None
    if z is None:
        return found | {"z": None, "p": None, "null": None, "deviation": None}
    if null == "rotation":
        p = erfc(abs(z) / sqrt(2))
    else:
        count = counts[null]
        p = max(beta_p(min(1.0, abs(z) / sqrt(count)), count), 2.0 ** (1 - count))
    return found | {"z": z, "p": p, "null": null, "deviation": sqrt(variances[null])}


def limit(degrees: float) -> float:
    """Return the 95 % quantile of chi^2 over its degrees of freedom, as Wilson and Hilferty do."""
    return (1 - 2 / (9 * degrees) + 1.6449 * sqrt(2 / (9 * degrees))) ** 3


# --------------------------------------------------------------------------------- pairs of them


def strata_of(w: torch.Tensor) -> np.ndarray:
    """Return the exponent of each weight on its 16-bit grid, with .5 for a power of two."""
    dtype = w.dtype if w.dtype in GRIDS else torch.bfloat16
    fraction, exponent = np.frexp(to_grid(w.double().numpy().ravel(), dtype))
    return exponent + 0.5 * (np.abs(fraction) == 0.5) + 1000.0 * (fraction == 0)


def pair_row(
    names: list[str], one: Side, other: Side, hidden: int, weights: dict | None = None
) -> dict:
    """Return the row of a pair of vectors over some tensors (all but control and subspaces).

    By the exponents of `weights` supports are compared where rounding decided both.
    """
    numel = shared = n_a = n_b = agree = 0
    dot = sq_a = sq_b = variance = chance = overlap_var = along = 0.0
    given, given_var, is_given, is_known, overlaps = 0.0, 0.0, False, True, []
    is_rounded = one.thresholded and other.thresholded
    met = {"conflict_a": 0.0, "on_support_a": 0.0, "conflict_b": 0.0, "on_support_b": 0.0}
    all_t = [np.zeros(0)]
    for name in names:
        a, b = one.values[name].ravel(), other.values[name].ravel()
        n = a.size
        if n == 0:
            continue
        t = products(a, b)
        all_t.append(t)
        s = float(t.sum())
        numel, dot = numel + n, dot + s
        sq_a, sq_b = sq_a + float(a @ a), sq_b + float(b @ b)
        spread = float(((t - t.mean()) ** 2).sum())
        variance += s * s if t.size == 1 else t.size / (t.size - 1) * spread
        in_a, in_b = int(np.count_nonzero(a)), int(np.count_nonzero(b))
        both = (a != 0) & (b != 0)
        n_a, n_b, shared = n_a + in_a, n_b + in_b, shared + int(both.sum())
        agree += int((both & ((a > 0) == (b > 0))).sum())
        signs = both * np.where((a > 0) == (b > 0), 1, -1)
        held = supports.Overlap(a != 0, b != 0, signs, np.zeros(n, int))
        plain = supports.expected(held)
        chance, overlap_var = chance + plain[0], overlap_var + plain[1]
        if weights is None and is_rounded and plain[1]:
            is_known = False
        if weights is not None and is_rounded:
            numbers = np.unique(strata_of(weights[name]), return_inverse=True)[1].ravel()
            is_given, held = True, held._replace(strata=numbers)
        given, given_var = (
            sum(of) for of in zip((given, given_var), supports.expected(held), strict=True)
        )
        shape = one.values[name].shape
        overlaps.append(supports.Overlap(*(side.reshape(shape) for side in held)))
        if float(b @ b) > 0:
            along += s * s / float(b @ b)
        opposite = (a > 0) & (b < 0) | (a < 0) & (b > 0)
        met["conflict_a"] += float((a[opposite] ** 2).sum())
        met["conflict_b"] += float((b[opposite] ** 2).sum())
        met["on_support_a"] += float((a[both] ** 2).sum())
        met["on_support_b"] += float((b[both] ** 2).sum())
    spread = supports.variances(overlaps, hidden) if overlaps else np.zeros(2)
    is_judged = given_var and is_known
    norms = sqrt(sq_a), sqrt(sq_b)
    cosine = dot / (norms[0] * norms[1]) if sq_a and sq_b else None
    known = judged(dot, np.concatenate(all_t), shared, spreads(names, one, other, hidden))
    deviation, is_exact = known.pop("deviation"), known.pop("exact")
    row = {
        "numel": numel,
        "cosine": cosine,
        "cosine_se": None if cosine is None else sqrt(max(variance, 0)) / (norms[0] * norms[1]),
        "cosine_sd": deviation / (norms[0] * norms[1]) if deviation is not None else None,
        **known,
        "z_isotropic": None if cosine is None else cosine * sqrt(numel),
        "p_isotropic": None if cosine is None else beta_p(cosine, numel),
        "norm_a": norms[0],
        "norm_b": norms[1],
        "norm_ratio": norms[0] / norms[1] if sq_b else None,
        "density_a": n_a / numel if numel else None,
        "density_b": n_b / numel if numel else None,
        "jaccard": shared / (n_a + n_b - shared) if n_a + n_b else None,
        "lift": shared / chance if chance else None,
        "lift_weights": shared / given if is_given and given else None,
        "overlap_z": (shared - given) / sqrt(spread[0]) if is_judged else None,
        "p_overlap": erfc(abs(shared - given) / sqrt(2 * spread[0])) if is_judged else None,
        "overlap_z_weights": (shared - given) / sqrt(given_var) if is_given and given_var else None,
        "overlap_z_plain": (shared - chance) / sqrt(overlap_var) if overlap_var else None,
        "sign_agreement": agree / shared if shared else None,
        "sign_z": (2 * agree - shared) / sqrt(spread[1]) if shared else None,
        "sign_z_plain": (2 * agree - shared) / sqrt(shared) if shared else None,
        "along": along / sq_a if sq_a else None,
    }
    if not is_exact:  # rotations are estimated, and what hangs on them
        for key in ("z", "p", "null", "cosine_sd"):
            del row[key]
    for key, value in met.items():
        total = sq_a if key.endswith("_a") else sq_b
        row[key] = value / total if total else None
    return row


def pair_spectrum(a: np.ndarray, b: np.ndarray, k: int) -> dict:
    """Return the subspace numbers of two matrices from their full SVDs."""
    m, n = a.shape
    k = min(k, m, n)
    (ua, sa, va), (ub, sb, vb), (uc, _, _) = (svd(x) for x in (a, b, a + b))
    ua, va, ub, vb, uc = ua[:, :k], va[:, :k], ub[:, :k], vb[:, :k], uc[:, :k]
    left, right = np.hstack([ua, ub]), np.hstack([va, vb])
    eye = np.eye(2 * k)
    middle = np.diag(np.concatenate([sa[:k], sb[:k]]))
    clash = (left.T @ left - eye) @ middle @ (right.T @ right - eye)
    energy_a, energy_b = float((a**2).sum()), float((b**2).sum())
    shared = [float(((one.T @ other) ** 2).sum()) for one, other in ((ua, ub), (va, vb))]
    return {
        "overlap_left": shared[0] / k,
        "overlap_right": shared[1] / k,
        "excess": [tr - k * k / size for tr, size in zip(shared, (m, n), strict=True)],
        "spread": [
            2 * k * k * (size - k) ** 2 / (size**2 * (size - 1) * (size + 2)) for size in (m, n)
        ],
        "overlap_chance": (k / m + k / n) / 2,
        "parts": parts_of(a, b, k),
        "angles_left": principal_angles(ua, ub),
        "angles_right": principal_angles(va, vb),
        "a_in_b": float(((ub.T @ a @ vb) ** 2).sum()) / energy_a,
        "b_in_a": float(((ua.T @ b @ va) ** 2).sum()) / energy_b,
        "in_chance": k * k / (m * n),
        "interference": float(np.abs(clash).sum()),
        "interference_share": float(np.abs(clash).sum() / middle.sum()),
        "sar_a": sqrt(float(((uc.T @ a) ** 2).sum()) / energy_a),
        "sar_b": sqrt(float(((uc.T @ b) ** 2).sum()) / energy_b),
    }


def is_matrix(values: np.ndarray) -> bool:
    return values.ndim == 2 and min(values.shape) > 1


def svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u, s, vt.T


def principal_angles(one: np.ndarray, other: np.ndarray) -> list[float]:
    """Return the angles between two subspaces in degrees, smallest first."""
    cosines = np.linalg.svd(one.T @ other, compute_uv=False)
    return [float(x) for x in np.degrees(np.arccos(np.minimum(cosines, 1.0)))]


# -------------------------------------------------------------------------------- vectors alone


def vector_row(names: list[str], vector: Side, weights: dict | None, whole: float) -> dict:
    """Return the row of one vector over some tensors; `whole` is the squared norm of all."""
    numel = changed = 0
    known = absorbed = below = 0
    energy = kept_dot = kept_sq = known_sq = 0.0
    steps = np.zeros(len(EDGES) + 1)
    for name in names:
        v = vector.values[name].ravel()
        numel, changed = numel + v.size, changed + int(np.count_nonzero(v))
        energy += float(v @ v)
        if weights is None or name not in weights:
            continue
        dtype = weights[name].dtype if weights[name].dtype in GRIDS else torch.bfloat16
        w, v = weights[name].float().numpy().ravel(), v.astype(np.float32)
        w, v = w[v != 0], v[v != 0]
        held, moved = to_grid(w, dtype), to_grid(w + v, dtype)  # the sum in fp32
        kept, size = moved - held, np.abs(v) / step_at(held, dtype)
        v = v.astype(np.float64)
        for i, (low, high) in enumerate(pairwise([0.0, *EDGES, inf])):
            steps[i] += np.count_nonzero((size >= low) & (size < high))
        known, below = known + v.size, below + int(np.count_nonzero(size < 0.5))
        absorbed += int(np.count_nonzero(kept == 0))
        kept_dot += float(kept @ v)
        kept_sq += float(kept @ kept)
        known_sq += float(v @ v)
    return {
        "numel": numel,
        "norm": sqrt(energy),
        "rms": sqrt(energy / numel) if numel else None,
        "energy_share": energy / whole if whole else None,
        "density": changed / numel if numel else None,
        "steps": [float(count) for count in steps] if known else None,
        "below_half_step": below / known if known else None,
        "absorbed": absorbed / known if known else None,
        "kept_gain": kept_dot / known_sq if known_sq else None,
        "kept_cosine": kept_dot / sqrt(kept_sq * known_sq) if kept_sq * known_sq else None,
    }


def vector_spectrum(v: np.ndarray, w: np.ndarray | None, k: int) -> dict:
    """Return the spectral numbers of one matrix from its full SVD."""
    k = min(k, *v.shape)
    _, s, _ = svd(v)
    spikes = count_spikes(v, k)
    share = s[s > 0] / s.sum()
    row = {
        "stable_rank": float((s**2).sum() / s[0] ** 2),
        "effective_rank": float(np.exp(-(share * np.log(share)).sum())),
        "top_energy": float((s[:k] ** 2).sum() / (s**2).sum()),
        "energy_in_w": None,
    }
    if spikes is not None:
        row |= {"spikes": spikes, "spike_energy": float((s[:spikes] ** 2).sum() / (s**2).sum())}
    if w is not None:
        u, _, right = svd(w)
        inside = u[:, :k].T @ v @ right[:, :k]
        row["energy_in_w"] = float((inside**2).sum() / (v**2).sum())
    return row


def count_spikes(v: np.ndarray, k: int) -> int | None:
    """Return how many singular values are above the noise, which drawing all signs anew leaves.

    The K leading ones are taken out to see weaker ones. None where one is close to the threshold.
    """
    rng, beta, count, short = np.random.default_rng(0), min(v.shape) / max(v.shape), 0, min(v.shape)
    best = sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + sqrt(beta**2 + 14 * beta + 1)))
    u, s, right = svd(v)
    while True:
        out = min(count, k)
        rest = v - (u[:, :out] * s[:out]) @ right[:, :out].T
        drawn = (rest * rng.choice([-1.0, 1.0], v.shape) for _ in range(max(1, 128 // short)))
        edge = best / (1 + sqrt(beta)) * max(np.linalg.norm(matrix, 2) for matrix in drawn)
        room = 0.15 if v.size < 4096 else 0.05
        if (np.abs(s / edge - 1) < room).any():
            return None
        found = int((s > edge).sum())
        if found <= count:
            return count
        count = found


def parts_of(a: np.ndarray, b: np.ndarray, k: int) -> dict | None:
    """Return what adds up of low-rank parts and of rests; None where their ranks are not clear."""
    counts = count_spikes(a, k), count_spikes(b, k)
    if None in counts:
        return None
    low = []
    for matrix, count in zip((a, b), counts, strict=True):
        u, s, v = svd(matrix)
        low.append((u[:, : min(count, k)] * s[: min(count, k)]) @ v[:, : min(count, k)].T)
    sums = {"product": float((a * b).sum())}
    for part, (one, other) in (("spikes", low), ("rest", (a - low[0], b - low[1]))):
        sums[part] = float((one * other).sum())
        for side, whole, values in (("a", a, one), ("b", b, other)):
            sums[f"{part}_{side}"] = float((values**2).sum())
            sums[f"square_{side}"] = float((whole**2).sum())
    return sums


def part_numbers(held: list[dict]) -> dict:
    """Return cosines and shares of the low-rank parts and of the rests of some matrices."""
    sums = {key: sum(one[key] for one in held) for key in held[0]}
    row = {}
    for part, share in (("spikes", "spikes_share"), ("rest", "rest_share")):
        clear = all(sums[f"{part}_{side}"] > 1e-6 * sums[f"square_{side}"] for side in "ab")
        size = sqrt(sums[f"{part}_a"] * sums[f"{part}_b"])
        row[f"cosine_{part}"] = sums[part] / size if clear else None
        row[share] = sums[part] / sums["product"] if clear and sums["product"] else None
    return row


def mean_of(rows: list[tuple[float, dict]]) -> dict:
    """Return means of rows of numbers (not of lists), weighted by energy."""
    keys = [key for key in (rows[0][1] if rows else {})
            if not key.startswith("angles") and key not in SUMS
            and all(key in row for _, row in rows)]  # fmt: skip
    found = {}
    for key in keys:
        held = [(weight, row[key]) for weight, row in rows if row[key] is not None]
        total = sum(weight for weight, _ in held)
        found[key] = sum(weight * value for weight, value in held) / total if total else None
    return found


# ---------------------------------------------------------------------------------- whole reports


def norms_of(vector: Side, names: list[str], against: dict | None, k: int | None = None) -> dict:
    """Return (level, name) -> the expected row of one vector."""
    whole = sum(float((vector.values[name] ** 2).sum()) for name in names)
    spectra = {}
    for name in names if k else ():
        v = vector.values[name]
        if is_matrix(v) and v.any():
            w = against[name].double().numpy() if against else None
            spectra[name] = float((v**2).sum()), vector_spectrum(v, w, k)
    rows = {}
    for key, members in groups_of(names).items():
        rows[key] = vector_row(members, vector, against or vector.weights, whole)
        rows[key] |= mean_of([spectra[name] for name in members if name in spectra])
    return rows


def pair_of(one: Side, other: Side, names: list[str], k: int | None = None,
            control: Side | None = None, against: dict | None = None) -> dict:  # fmt: skip
    """Return (level, name) -> the expected row of a pair."""
    spectra, matrices = {}, {}
    hidden = hidden_axis([one.values[name].shape for name in names if one.values[name].size])
    for name in names:
        a, b = one.values[name], other.values[name]
        if is_matrix(a) and a.any() and b.any():
            matrices[name] = pair_row([name], one, other, hidden)
            if k:
                spectra[name] = float((a**2).sum()), float((b**2).sum()), pair_spectrum(a, b, k)
    rows = {}
    for key, members in groups_of(names).items():
        weights = against or other.weights or one.weights
        rows[key] = pair_row(members, one, other, hidden, weights)
        held = [spectra[name] for name in members if name in spectra]
        by_a, by_b = (mean_of([(h[i], h[2]) for h in held]) for i in (0, 1))
        rows[key] |= mean_of([(sqrt(h[0] * h[1]), h[2]) for h in held])  # of both alike
        rows[key] |= {column: by_a[column] for column in ("a_in_b", "sar_a") if held}
        rows[key] |= {column: by_b[column] for column in ("b_in_a", "sar_b") if held}
        if key[0] == "tensors" and held:
            rows[key] |= {k: v for k, v in held[0][2].items() if k not in SUMS}
        if held and all(h[2]["parts"] for h in held):
            rows[key] |= part_numbers([h[2]["parts"] for h in held])
        for at, name in enumerate(("overlap_left_z", "overlap_right_z") if held else ()):
            excess, spread = (sum(h[2][of][at] for h in held) for of in ("excess", "spread"))
            rows[key][name] = excess / sqrt(spread) if spread else None
        if key[0] != "tensors":
            rows[key] |= means([matrices[name] for name in members if name in matrices])
        if control is not None:
            instead = pair_row(members, control, other, hidden)
            rows[key] |= {f"control_{of}": instead[of] for of in ("cosine", "z") if of in instead}
    return rows


def means(rows: list[dict]) -> dict:
    """Return what matrices show that count one by one."""
    if len(rows) < 2:
        return dict.fromkeys(("cosine_mean", "cosine_mean_se", "rare_share"))
    cosines = np.array([row["cosine"] for row in rows])
    found = {"cosine_mean": float(cosines.mean()),
             "cosine_mean_se": float(cosines.std(ddof=1)) / sqrt(len(rows))}  # fmt: skip
    if all("p" in row for row in rows):
        rare = [row["p"] is not None and row["p"] < 0.05 for row in rows]
        found["rare_share"] = float(np.mean(rare))
    return found


def rows_in(entry: dict) -> dict:
    """Return (level, name) -> row of a pair or of a vector in a report."""
    found = {("overall", ""): entry["overall"]}
    for level in LEVELS[:-1]:
        found |= {(level, row["name"]): row for row in entry[level]}
    return found


def expected(report: dict, sides: dict[str, Side], against: dict | None = None) -> list:
    """Return (what, rows of the report, rows computed here) for its vectors and pairs."""
    names = [row["name"] for row in report["norms"][0]["tensors"]]
    k = report["subspace"]["k"] if report.get("subspace") else None
    found = []
    for entry in report["norms"]:
        vector = sides[entry["label"]]
        found.append((entry["label"], rows_in(entry), norms_of(vector, names, against, k)))
    for pair in report["pairs"]:
        control = sides.get(pair["control"] or "")
        rows = pair_of(sides[pair["a"]], sides[pair["b"]], names, k, control, against)
        found.append((f"{pair['a']} | {pair['b']}", rows_in(pair), rows))
    return found


EXACT = {"numel", "steps", "density", "density_a", "density_b", "jaccard", "lift", "lift_weights",
         "overlap_z_weights", "overlap_z_plain", "sign_agreement", "sign_z", "sign_z_plain",
         "spikes", "below_half_step", "absorbed", "overlap_chance", "in_chance"}  # fmt: skip
SPECTRAL = {"stable_rank", "effective_rank", "interference", "interference_share", "overlap_left",
            "overlap_right", "a_in_b", "b_in_a", "sar_a", "sar_b", "top_energy", "energy_in_w",
            "spike_energy", "angles_left", "angles_right"}  # fmt: skip


def tolerance(key: str, row: dict, report: dict) -> float:
    """Return what rounding may do to a number: sums of fp32 products are good to 3e-7 of the norms.

    Vectors of randomised decompositions turn as far as their error and the gaps let them.
    """
    value = row[key] if isinstance(row[key], float) else 0.0
    size, root = abs(value), sqrt(row["numel"])
    if key in ("overlap_z", "p_overlap"):  # scores are in units of 2^-30
        return 1e-8 * (1 + size)
    if key in EXACT:
        return 1e-9 * (1 + size)
    randomised = report["subspace"] and report["subspace"]["randomised"]
    if key in ("overlap_left_z", "overlap_right_z"):
        return (3.0 if randomised else 1e-3) * max(1, size)
    if key in ("spikes_share", "rest_share", "cosine_spikes", "cosine_rest"):
        return (2e-2 if randomised else 1e-4) * max(1, size)
    if key in SPECTRAL:
        degrees = 100 if key.startswith("angles") else 1
        return (2e-2 if randomised else 1e-5) * degrees * max(1, size)
    if key == "z_isotropic":
        return 2e-6 * root
    if key == "z_rotation" and "z" not in row:
        return 0.5 * (1 + size)  # estimated
    if key == "p_isotropic":
        return 2e-6 * root + 1e-6
    if key in ("z", "p", "control_z") or key.startswith("z_"):
        return 1e-4 * (1 + size) + 2e-6 * max(1 / row["cosine_se"] if row["cosine_se"] else 0, root)
    if key == "cosine_sd":
        return 1e-4 * size
    return 2e-6 * size if key.startswith("norm") or key == "rms" else 3e-6


def deviations(report: dict, sides: dict[str, Side], against: dict | None = None) -> dict:
    """Return column -> (largest deviation over its tolerance, where, found, expected).

    A row or column that the report lacks, and a null where there is a number, deviate by infinity.
    """
    worst: dict[str, tuple] = {}
    for what, found, computed in expected(report, sides, against):
        for key in sorted({*found, *computed}):
            if key not in found or key not in computed:
                worst["row"] = (inf, (what, *key), key in found, key in computed)
                continue
            for column, value in computed[key].items():
                there = found[key].get(column, "missing")
                allowed = tolerance(column, computed[key], report)
                ratio = apart(there, value, allowed)
                if ratio >= worst.get(column, (-1.0,))[0]:
                    worst[column] = (ratio, (what, *key), there, value)
    return worst


def apart(found: object, value: object, allowed: float) -> float:
    """Return how far two numbers or lists are from each other, in units of `allowed`."""
    if found is None or value is None or isinstance(found, str):
        return 0.0 if found == value else inf
    if isinstance(value, list):
        if len(found) != len(value):
            return inf
        return max((apart(x, y, allowed) for x, y in zip(found, value, strict=True)), default=0.0)
    if isclose(found, value, rel_tol=1e-12):
        return 0.0
    return abs(found - value) / allowed if allowed else inf


def main(arguments: list[str]) -> int:
    """Print the largest deviation of every column of a written report; return 1 if one is large."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report")
    parser.add_argument("--against", help="where the weights W are, if the report's path moved")
    parser.add_argument("--vector", action="append", default=[], metavar="LABEL=TUNED::BASE")
    given = parser.parse_args(arguments)
    report = json.loads(Path(given.report).read_text())
    places = dict(item.split("=", 1) for item in given.vector)
    sides = {}
    for label in {*report["vectors"], report["control"]} - {None, "random"}:
        factor, ref = re.fullmatch(r"(?:([-+.\de]+)\*)?(.*)", label).groups()
        tuned, _, base = places.get(label, ref).partition("::")
        made = side(tuned, base)
        scaled = {name: float(factor or 1) * v for name, v in made.values.items()}
        sides[label] = Side(scaled, made.weights if "::" in label else None, made.thresholded)
    against = given.against or report["against"]
    worst = deviations(report, sides, load(against) if against else None)
    for column, (ratio, where, found, value) in sorted(worst.items()):
        seen = "" if isinstance(value, list) else f": {found}, here {value}"
        print(f"{column:18} {ratio:9.2g} of what rounding explains, {' / '.join(where)}{seen}")
    return int(any(ratio > 1 for ratio, *_ in worst.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
