"""What Python shows of an object: one line that says what it is, whatever its size.

Nothing is read for it. References come from whoever wrote the files: they are cut in the middle and
hold no line breaks.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from skillvec.analysis.wording import human_bytes, human_count, write_optional
from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.errors import printable
from skillvec.report import Folded, Report
from skillvec.vectors.displacement import Displacement
from skillvec.vectors.kinds import Adapted, Combined, Pair, Patched, Stored

MOST = 44  # characters of a reference
Facts = Mapping[str, Any]
# what a report has measured -> how it is said
NUMBERS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("claim", str),
    ("verified", lambda held: "holds" if held else "does not hold"),
    ("verdict", str),
    ("gain", lambda gain: f"realised gain {write_optional(gain)}"),
    ("norm", lambda norm: f"norm {norm:.5g}"),
    ("density", lambda share: f"{100 * share:.3g} % changed"),
    ("kept_energy", lambda share: f"keeps {100 * share:.3g} % of the squared norm"),
    ("nbytes", human_bytes),
)


def write_repr(held: object) -> str:
    """Return one line, of at most some 300 characters, for a vector, checkpoint or report."""
    for kind, say in KINDS.items():
        if isinstance(held, kind):
            return f"<{say(held)}>"
    raise TypeError(f"{type(held).__name__}: no line is known for it")


def cut(text: object, most: int = MOST) -> str:
    """Return text on one line, a long one without its middle; of TUNED::BASE both sides."""
    line = printable(" ".join(str(text).split()))
    if len(line) <= most:
        return line
    tuned, colons, base = line.partition("::")
    if colons and most >= 20:
        short = min(len(base), (most - 2) // 2)  # what one side does not need, the other gets
        left = cut(tuned, most - 2 - short)
        return f"{left}::{cut(base, most - 2 - len(left))}"
    head = most // 3
    return f"{line[:head]}…{line[head + 1 - most :]}"


def say_some(words: Iterable[str], most: int = 3) -> str:
    """Return the first words of a list, and how many more there are."""
    given = list(words)
    more = [f"{len(given) - most} more"] if len(given) > most else []
    return ", ".join([*given[:most], *more])


# ----------------------------------------------------------------------------------------- vectors


def _say_vector(vector: Displacement) -> str:
    factor = "" if vector.scale == 1 else f"{vector.scale:g} * "
    words = [f"SkillVector {factor}{name_vector(vector)}"]
    words += [cut(vector.dtypes)] if vector.dtypes else []
    if not vector.deltas:
        return f"{words[0]}: adds to the model that it meets"
    words.append(f"{len(vector.deltas)} tensors")
    words.append(f"{human_count(count_values(vector))} values")
    entries = vector.manifest.get("tensors")
    if entries is not None:
        changed = sum(entry["changed"] for entry in entries.values())
        words.append(f"{100 * changed / max(count_values(vector), 1):.3g} % changed")
    words.append(human_bytes(vector.stored.nbytes) if isinstance(vector, Stored) else "not stored")
    words += [said] if (said := say_exactness(vector)) else []
    return f"{words[0]}: {', '.join(words[1:])}"


def count_values(vector: Displacement) -> int:
    return sum(delta.spec.numel for delta in vector.deltas.values())


def name_vector(vector: Displacement) -> str:
    """Return what a vector is: its file, the models that it is of, or what it is made of."""
    manifest = vector.manifest
    tuned, base = manifest["tuned"], manifest["base"]
    if isinstance(vector, Adapted):
        on = f" on {cut(base['ref'])}" if vector.base is not None else ""
        return f"adapter {cut(manifest['parents'][0]['ref'])}{on}"
    if isinstance(vector, Patched) and tuned:
        return f"patch {cut(tuned['ref'])} of {cut(base['ref'])}"
    if isinstance(vector, Combined):
        return _name_sum(vector)
    models = f"{cut(tuned['ref'])} - {cut(base['ref'])}" if tuned else _say_made(vector)
    return models if isinstance(vector, Pair) else f"{cut(vector.ref)} ({models})"


def _say_made(vector: Displacement) -> str:
    """Return how a stored vector that is no difference was made: of an adapter, or of vectors."""
    made = vector.manifest["recipe"]
    count = len(vector.manifest["parents"])
    if made is None:
        return f"adapter on {cut(vector.manifest['base']['ref'])}"
    return f"{cut(made.get('op', 'linear'), 20)} of {count} vector{'' if count == 1 else 's'}"


def _name_sum(vector: Combined) -> str:
    """Return a combination as it is written, or its operator with the vectors."""
    recipe = vector.recipe
    names = [cut(share.vector, 32) for share in recipe.shares]
    weights = [share.weight for share in recipe.shares if isinstance(share.weight, float)]
    if recipe.op != "linear" or len(weights) < len(names):
        return f"{recipe.op} of {say_some(names)}"
    said = ""
    for weight, name in zip(weights[:3], names[:3], strict=True):
        factor = "" if abs(weight) == 1 else f"{abs(weight):g} * "
        said += f" {'-' if weight < 0 else '+'} {factor}{name}"
    said = said.removeprefix(" + ").strip() + (f" + {len(names) - 3} more" if names[3:] else "")
    return f"({said})" if vector.scale != 1 else said


def say_exactness(vector: Displacement) -> str:
    """Return what base + 1 * v restores of the tuned model, "" where there is none."""
    manifest = vector.manifest
    if vector.scale != 1:
        return ""
    if (exact := manifest.get("exactness")) is None:
        if isinstance(vector, Combined):
            return "lossy" if vector.recipe.op == "coarsen" else ""
        dtype = manifest.get("dtype", "auto")
        return "" if isinstance(vector, Adapted) else _say_dtype(dtype)
    if exact["claim"] == "lossy" and "kept" in manifest:
        return f"lossy, keeps {100 * manifest['kept']:.3g} % of the squared norm"
    unrestored = exact["unrestored"]
    return {
        "bitwise": "exact",
        "partial": f"exact but for {f'{unrestored} values' if unrestored else 'integers'}",
        "rounded": _say_dtype(manifest["dtype"]),
    }.get(exact["claim"], exact["claim"])


def _say_dtype(dtype: str) -> str:
    return "exact" if dtype == "auto" else f"rounded to {cut(dtype, 20)}"


# ----------------------------------------------------------------------------- models and manifests


def _say_checkpoint(model: Checkpoint) -> str:
    words = [cut(model.model_type, 20)] if model.model_type else []
    words += [f"{len(model)} tensors"]
    words += [f"{human_count(sum(spec.numel for spec in model.values()))} values"]
    words += [say_dtypes(model), human_bytes(model.nbytes), cut(model.format)]
    return f"Checkpoint {cut(model.ref)}: {', '.join(words)}"


def say_dtypes(model: Checkpoint) -> str:
    """Return the dtypes of a model; of several, each with its number of tensors."""
    dtypes = model.dtypes
    return say_some(dtypes if len(dtypes) == 1 else [f"{n} {name}" for name, n in dtypes.items()])


def _say_manifest(manifest: Folded) -> str:
    words = [cut(manifest.get("formula", "no formula"))]
    words += [f"schema {cut(manifest.get('schema'), 8)}"]
    if "tensors" in manifest:
        words += [f"{len(manifest['tensors'])} tensors", manifest["exactness"]["claim"]]
    return f"Manifest of {', '.join(words)}; a dict of {len(manifest)} keys"


# ----------------------------------------------------------------------------------------- reports


def _say_report(report: Report) -> str:
    facts = report.facts
    told = [say(facts) for key, say in MEASURED if key in facts][:1]
    numbers = [(say, facts[key]) for key, say in NUMBERS if facts.get(key) is not None]
    told += [] if told else [cut(say(value)) for say, value in numbers]
    counts = Counter(report.counts).most_common()
    told += [say_some(f"{n} {cut(status, 20)}" for status, n in counts)] if counts else []
    if where := next((facts[key] for key in ("url", "output", "path") if facts.get(key)), None):
        told.append(f"in {cut(where)}")
    if count := len(report.warnings):
        told.append(f"{count} warning{'' if count == 1 else 's'}")
    # what is free on the disk, only a dry run keeps
    dry = ", a dry run" if "nbytes_free" in report.now else ""
    return f"Report of {cut(report.verb, 20)}{dry}: {', '.join(told) or 'nothing yet'}"


def _say_norms(facts: Facts) -> str:
    """Return the vectors of a comparison, and between which numbers their cosines lie."""
    norms, cosines = facts["norms"], []
    if len(norms) == 1:
        row = norms[0]["overall"]
        return f"{cut(norms[0]['label'])}, norm {write_optional(row['norm'], '.5g')}"
    for pair in facts["pairs"]:
        cosine = pair["overall"]["cosine"]
        cosines += [] if cosine is None else [cosine]
    ends = [f"{x:+.4f}" for x in (min(cosines), max(cosines))] if cosines else ["unknown"]
    control = f", control {cut(facts['control'])}" if facts.get("control") else ""
    plural = "cosine" if len(facts["pairs"]) == 1 else "cosines"
    return f"{len(norms)} vectors, {plural} {' to '.join(dict.fromkeys(ends))}{control}"


def _say_points(facts: Facts) -> str:
    """Return the best point of a sweep beside the target."""
    metric, best = facts["metric"], facts["best"]
    said = f"{cut(metric)} at {len(facts['points'])} points"
    if best is None:
        return f"{said}, none could be compared"
    word = "better" if facts["found"] else "not clearly better"
    score = best["scores"][metric]["mean"]
    return f"{said}, best {score:.4g} at lambda {best['lam']:g}, {word} than the target's" + (
        f" {facts['target_score']:.4g}"
    )


def _say_search(facts: Facts) -> str:
    """Return whether a search has found anything, in how many trials."""
    trials = facts["trials"]
    word = "a better recipe" if facts["verdict"] == "found" else "nothing beyond noise"
    return f"{cut(facts['metric'])} in {trials['complete']} trials, {word} found"


MEASURED = (("norms", _say_norms), ("points", _say_points), ("trials", _say_search))
KINDS: dict[type, Callable[[Any], str]] = {
    Displacement: _say_vector, Checkpoint: _say_checkpoint, Report: _say_report,
    Folded: _say_manifest,
}  # fmt: skip
