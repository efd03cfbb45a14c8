"""Two checkpoints that are to be subtracted: which tensors give deltas, and what is refused.

Reads headers, and bytes of what stands on one side only or is no float. What the manifest says of
tuned - base before its data is read is said here.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.fingerprint import ModelFacts
from skillvec.checkpoints.opening import explain_factors, explain_placeholders, find_placeholders
from skillvec.checkpoints.ties import MAX_TIED, find_tied
from skillvec.checkpoints.unread import INTEGERS, may_be_weight, unexplained
from skillvec.errors import IncompatibleError, up_to_five_each
from skillvec.files.file import digest_bytes
from skillvec.files.tensors import Source, digest_values
from skillvec.ops.kernels import FLOATS, STORAGE_DTYPE
from skillvec.vectors.idle import recomputed
from skillvec.vectors.manifest import SCHEMA, Manifest, Selection, TensorSide, Training
from skillvec.vectors.reader import SIDE
from skillvec.vectors.recipe import is_selected, refuse_idle_globs


class Sorted(NamedTuple):
    """The names of two checkpoints: those that give `deltas`, and what is said of all others.

    `computed` are tensors that models compute and one side lacks, with a note: excluded as well.
    """

    deltas: list[str]
    integers: dict[str, TensorSide]
    tied: dict[str, str]
    excluded: list[str]
    computed: dict[str, str]


def sort_names(
    tuned: Checkpoint, base: Checkpoint, chosen: Selection, skipped: Mapping[str, str],
    hints: Sequence[str],
) -> Sorted:  # fmt: skip
    """Sort the names of two checkpoints into deltas, integers, tied and excluded, or refuse."""
    include, exclude = chosen["include"], chosen["exclude"]
    names = list(dict.fromkeys((*base, *tuned)))
    refuse_idle_globs(names, include, exclude)

    def is_taken(name: str) -> bool:
        return name not in skipped and is_selected(name, include, exclude)

    alone = [name for name in names if name not in tuned or name not in base]
    computed = _computed(tuned, base, filter(is_taken, alone))
    excluded = [name for name in names if not is_taken(name)]
    found = Sorted([], {}, {}, [*excluded, *computed], computed)
    few = sum(name not in computed for name in alone) <= MAX_TIED
    unread = unexplained(tuned) | unexplained(base)
    problems: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if name in computed or not is_taken(name):
            continue
        if name in SIDE:
            said = f"{name}: this name is reserved for the vector file"
            problems["of reserved names"].append(said)
        elif name in unread:
            problems["unread"].append(f"{unread[name].text}: nothing says how to read it")
        elif name in tuned and name in base:
            for kind, said in _sort_shared(found, name, tuned[name], base[name]):
                problems[kind].append(said)
        else:
            here, there = (tuned, base) if name in tuned else (base, tuned)
            twin = _stored_twin(here, there, name, is_taken) if few else None
            if twin is not None:
                found.tied[name] = twin
            else:
                kind = f"only in {here.ref}"
                said = f"{name} {list(here[name].shape)}: {kind}{_tied_hint(here, name)}"
                problems[kind].append(said)
    if problems:
        raise _mismatch(tuned, base, found.excluded, problems, hints)
    if not found.deltas:
        raise IncompatibleError(f"{tuned.ref} and {base.ref}: no tensor is left to subtract")
    return found


def _computed(tuned: Checkpoint, base: Checkpoint, alone: Iterable[str]) -> dict[str, str]:
    """Return the tensors of one side that models compute themselves, with notes."""
    found = {}
    for name in alone:
        side = tuned if name in tuned else base
        if kind := recomputed(side[name]):
            found[name] = f"{kind}, which the model computes: only in {side.ref}"
    return found


def _stored_twin(
    here: Checkpoint, there: Checkpoint, name: str, is_taken: Callable[[str], bool]
) -> str | None:
    """Return the tensor of both sides that holds what only one side stores as `name`, too."""
    twins = find_tied(here, name, there) if there.ties_embeddings is not False else []
    return next(filter(is_taken, twins), None)


def _tied_hint(here: Checkpoint, name: str) -> str:
    if here.ties_embeddings and name.endswith("lm_head.weight"):
        return " (tied by its config, but its bytes are those of no other tensor)"
    return ""


def _sort_shared(
    found: Sorted, name: str, tuned: Source, base: Source
) -> Iterator[tuple[str, str]]:
    """Put a name of both sides where it belongs, or yield why it belongs nowhere."""
    dtypes = tuned.dtype, base.dtype
    if tuned.shape != base.shape:
        shapes = f"{list(tuned.shape)}, base {list(base.shape)}"
        yield "of different shapes", f"{name}: tuned {shapes}"
    elif dtypes[0] in FLOATS and dtypes[1] in FLOATS:
        found.deltas.append(name)
    elif dtypes[0] != dtypes[1]:
        yield "of different dtypes", f"{name}: tuned is {dtypes[0]}, base is {dtypes[1]}"
    elif not _codes_differ(tuned, base):
        found.integers[name] = [dtypes[0], None]
    else:
        yield (
            "of integers",
            (
                f"{name} {dtypes[0]} {list(base.shape)}:"
                f" {'integers' if dtypes[0] in INTEGERS else 'values'} that differ, and"
                " nothing says that they are no weights"
            ),
        )


def _mismatch(
    tuned: Checkpoint, base: Checkpoint, excluded: Sequence[str],
    problems: Mapping[str, list[str]], hints: Sequence[str],
) -> IncompatibleError:  # fmt: skip
    for side, other in ((tuned, base), (base, tuned)):
        wanted = set(side) - set(other) - set(excluded)
        if told := explain_factors(side, sorted(wanted)):
            return IncompatibleError(told)
        sizes = {n: other[n].shape for n in find_placeholders(side) if n in other}
        if empty := [n for n in find_placeholders(side) if sizes.get(n) != (0,)]:
            return IncompatibleError(explain_placeholders(side, empty))
    return IncompatibleError(
        f"{tuned.ref} and {base.ref} do not match (--exclude GLOB leaves tensors out):\n"
        + "\n".join([up_to_five_each(problems), *hints])
    )


def _codes_differ(tuned: Source, base: Source) -> bool:
    """Return whether what may be a weight, or the codes of one, differs: no side tensor may.

    Those are integers, and complex numbers, of which no delta is made.
    """
    codes = tuned.dtype not in STORAGE_DTYPE
    codes = codes or (tuned.dtype in INTEGERS and may_be_weight(base.name, base))
    return codes and digest_values(tuned) != digest_values(base)


def announce_pair(
    tuned: ModelFacts | None, base: ModelFacts, dtype: str, found: Sorted, chosen: Selection
) -> Manifest:
    """Return what the manifest of tuned - base says before its data is read."""
    probes = [tuned and tuned["probe"], base["probe"], dtype, *found.excluded]
    told = [*probes, *(chosen[key] for key in ("rename", "rows") if key in chosen)]
    said: Manifest = {
        "kind": "vector",
        "schema": SCHEMA,
        "formula": "tuned - base",
        "identity": digest_bytes(json.dumps(told).encode()),
        "base": base,
        "tuned": tuned,
        "parents": [],
        "recipe": None,
        "training": Training(method=None, notes=None),
        "license": None,
        "equal": found.integers,
        "tied": found.tied,
        "excluded": found.excluded,
        "include": chosen["include"],
        "exclude": chosen["exclude"],
    }
    said.update(chosen)  # type: ignore[typeddict-item]  # with what stands only where it is given
    said["dtype"] = dtype
    return said
