"""Parameters of merge methods: what each does, and which values it takes."""

from skillvec.ops.merge_counts import Parameters

PARAMETERS = {  # what each does, and the values it takes
    "density": ("the fraction to keep; 1 keeps everything", "above 0, at most 1"),
    "density_of": ("of which values density and gamma are fractions, and which are ranked",
                   "nonzero or all"),
    "gamma": ("the fraction of the largest to drop", "at least 0, and with density at most 1"),
    "epsilon": ("half the range of the probabilities; no effect at density 1",
                "at least 0, density - epsilon above 0 and density + epsilon at most 1"),
    "scope": ("what has one threshold, projection or angle: each tensor, or the whole vector",
              "tensor or vector, the same for all vectors"),
    "threshold": ("the largest |v_i| that counts as no change", "at least 0"),
    "fisher": ("the file with the F_i of a vector", "a file for each vector"),
    "fisher_digest": ("the digest of that file; another file is refused", "text"),
    "floor": ("the least value of F_i", "at least 0"),
    "normalize": ("divide by the sum of |w_i|; only the ratios of the weights matter then",
                  "true or false, the same for all vectors"),
    "rank": ("how many directions of each matrix; where energy is above 0, energy decides",
             "a whole number; of spectral at least 1, unless energy is above 0"),
    "bits": ("how many stored bits of mantissa are kept; 23 keeps all", "a whole number, 0 to 23"),
    "energy": ("take the fewest directions that hold this share of the squared norm (spectral) or"
               " of the trace (project); given a rank alone it is 0", "at least 0, at most 1"),
    "part": ("what is taken of each matrix", "head, residual or whole"),
    "rescale": ("give each part the norm of the matrix it was taken from", "true or false"),
    "others": ("what is done with tensors of one dimension: keep, drop, or split, which puts all"
               " of them into the head and nothing into the residual", "keep, drop or split"),
    "moments": ("the file of second moments of inputs", "a path, from where skillvec runs"),
    "moments_digest": ("the digest of that file: filled in, and if given, checked",
                       "32 hex digits, or nothing"),
}  # fmt: skip
CHOICES = {"density_of": ("nonzero", "all"), "scope": ("tensor", "vector"),
           "part": ("head", "residual", "whole"), "others": ("keep", "drop", "split")}  # fmt: skip


def accepts(name: str, found: Parameters) -> bool:
    """Return whether a value of the right type is in its range; density comes before the others."""
    value = found[name]
    if name == "rank":
        least = 0 if found.get("energy", 1) or "moments" in found else 1
        return bool(value >= least)
    if name == "bits":
        return bool(0 <= value <= 23)
    if name == "energy":
        return bool(0 <= value <= 1)
    if name == "moments":
        return bool(value)
    if not isinstance(value, float):
        return value != "" if name == "fisher" else value in CHOICES.get(name, (value,))
    density = found.get("density", 1)
    if name == "density":
        return 0 < value <= 1
    if name == "gamma":
        return value >= 0 and bool(density + value <= 1)
    return value >= 0 and (density == 1 or (value < density and density + value <= 1))
