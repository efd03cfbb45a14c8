"""A patch on its base: in which layout its names are, and what it makes of the base's tensors.

A sender names what it holds: tensors of the checkpoint, or of the model in memory, whose experts
may be one tensor and whose head may be the embedding. Hides the search for the layout.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

from skillvec.checkpoints.align import Layout, layouts_of
from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.layouts import Bridge, viewed_specs
from skillvec.checkpoints.patch import Patch
from skillvec.checkpoints.patch_lists import Listing
from skillvec.checkpoints.renaming import moves, numbered
from skillvec.checkpoints.ties import find_tied, is_said_tied, same_bytes, under_name
from skillvec.errors import IncompatibleError, only_here, up_to_five, up_to_five_each
from skillvec.files.header import TensorSpec
from skillvec.files.tensors import Source, Viewed, digest_values

TURNED = 3  # dimensions from which on a tensor in memory may be a transposed one of the files


class _Naming(NamedTuple):
    """A layout (None: the files) that has all tensors of a patch, and what it calls them."""

    layout: Layout | None
    model: Mapping[str, Source]
    names: Mapping[str, str]


def touched_by(patch: Patch, base: Checkpoint) -> tuple[dict[str, Source], dict[str, str]]:
    """Return the tensors of a base that a patch changes, changed, and notes on how they were found.

    Its names may be those of the files, of the model that transformers makes of them in memory, or
    of its own files. Raises IncompatibleError where they are of none of these, or of two of them
    that do not mean the same values, FormatError for lists that are broken.
    """
    problems = patch.problems(base)
    if patch.family not in (None, base.family_digest):
        for naming in _find_namings(patch, base, layouts_of(base), False):
            if naming.layout and naming.layout.model.family_digest == patch.family:
                return _with_twins(patch, base, *_seen_back(patch, base, naming))
        raise _refusal(patch, base, problems, "was made for a model of another shape than")
    if not problems and not _may_be_turned(patch, base):
        return _with_twins(patch, base, patch.laid_over(base), {})
    layouts = list(layouts_of(base))
    for moved in (False, True):
        namings = list(_find_namings(patch, base, layouts, moved))
        if namings:
            _refuse_two_meanings(patch, namings)
            return _with_twins(patch, base, *_seen_back(patch, base, namings[0]))
    raise _refusal(patch, base, problems, "does not fit")


def _refusal(
    patch: Patch, base: Checkpoint, problems: Mapping[str, list[str]], what: str
) -> IncompatibleError:
    if "not in the base" in problems:
        problems = {**problems, **only_here(base, patch.listings, "the base")}
    names = f":\n{up_to_five_each(problems)}" if problems else ""
    return IncompatibleError(f"patch {patch.ref} {what} {base.ref}{names}")


def _may_be_turned(patch: Patch, base: Checkpoint) -> bool:
    """Return whether the files alone do not tell which values of a tensor are listed."""
    named = [name for name, one in patch.listings.items() if one.shape is None and one.numel]
    return patch.family is None and any(len(base[name].shape) >= TURNED for name in named)


def _find_namings(
    patch: Patch, base: Checkpoint, layouts: Iterable[Layout], moved: bool
) -> Iterator[_Naming]:
    """Yield the layouts that have all tensors of a patch, `moved` to another prefix or as they are.

    Weights that are one may stand under either name, or under both.
    """
    for layout in (None, *layouts):
        model: Mapping[str, Source] = base if layout is None else layout.model
        tied = {} if layout is None else layout.tied
        own = {name: name for name in patch.listings}
        ways: list[dict[str, str]] = [{}]
        if moved:
            ways = list(moves(own, [*model, *tied]))
        found = [_untied(patch, model, tied, own | way) for way in ways]
        found = [names for names in found if not patch.problems(model, names)]
        if len(found) == 1:
            yield _Naming(layout, model, found[0])


def _untied(
    patch: Patch, model: Mapping[str, Source], tied: Mapping[str, str], names: Mapping[str, str]
) -> dict[str, str]:
    """Return names with the embedding in place of a head that is one with it.

    Heads that are listed otherwise than their embedding keep their name, which no model has.
    """
    found, senders = dict(names), {new: name for name, new in names.items()}
    for head, source in tied.items():
        if head in senders and head not in model:
            pair = [patch.listings[senders[end]] for end in (head, source) if end in senders]
            if len({tuple(_digests(listing)) for listing in pair}) == 1:
                found[senders[head]] = source
    return found


def _digests(listing: Listing) -> Iterator[str | None]:
    for listed in listing.lists:
        for spec in (listed.indices, listed.values):
            yield None if spec is None else digest_values(spec)


def _refuse_two_meanings(patch: Patch, namings: list[_Naming]) -> None:
    """Raise IncompatibleError where a list means other values in one layout than in another."""
    wrong = []
    for name, listing in patch.listings.items():
        meant = [naming.model[naming.names[name]] for naming in namings]
        for naming, spec in zip(namings[1:], meant[1:], strict=True):
            if listing.numel and _what(spec) != _what(meant[0]):
                where = [f"{list(s.shape)} in {f.layout.label if f.layout else 'the files'}"
                         for f, s in ((namings[0], meant[0]), (naming, spec))]  # fmt: skip
                wrong.append(f"{name}: {' and '.join(where)}")
                break
    if wrong:
        raise IncompatibleError(
            f"patch {patch.ref}: lists that two layouts read differently, and nothing says which is"
            f" meant (a form with shapes does: vllm, verl):\n{up_to_five(wrong)}"
        )


def _what(source: Source) -> Any:
    """Return what tells sources apart, whatever their names."""
    if isinstance(source, TensorSpec):
        return source._replace(name="")
    return source.view if isinstance(source, Viewed) else source


def _with_twins(
    patch: Patch, base: Checkpoint, touched: dict[str, Source], notes: dict[str, str]
) -> tuple[dict[str, Source], dict[str, str]]:
    """Return what a patch changes in a base, with the tied copies that it does not list.

    A base that ties its head may store it beside the embedding, and others of the same values; what
    changes one of such copies changes all. Raises IncompatibleError where two are listed otherwise.
    """
    if base.ties_embeddings is False or not base.config:
        return touched, notes
    made, told = dict(touched), dict(notes)
    for name in touched:
        for twin in [] if numbered(name) else find_tied(base, name):
            listed = twin in touched or twin in patch.listings
            if listed or not (base.ties_embeddings or is_said_tied(base, name, twin)):
                continue
            if twin in made and not same_bytes(made[twin], touched[name]):
                raise IncompatibleError(
                    f"patch {patch.ref}: {twin}: one weight with {name} and with another tensor, of"
                    " which the patch has different lists: list it, too"
                )
            made.setdefault(twin, under_name(touched[name], twin))
            told.setdefault(twin, f"tied: patched as {name}")
    return made, told


def _seen_back(
    patch: Patch, base: Checkpoint, naming: _Naming
) -> tuple[dict[str, Source], dict[str, str]]:
    """Return what a patch under the names of another layout changes in the files' own."""
    laid, layout = patch.laid_over(naming.model, naming.names), naming.layout
    if layout is None:
        notes = {new: f"patched as {name}" for name, new in naming.names.items() if name != new}
        return laid, {name: note for name, note in notes.items() if name in laid}
    views = {
        name: view for name, view in layout.back.items()
        if any(source in laid for source in view.sources)
    }  # fmt: skip
    used: Counter[str] = Counter()
    for view in views.values():
        for box in view.boxes:
            used[box.source] += prod(box.sizes)
    lost = [f"{n}: {used[n]} of {s.numel} values" for n, s in laid.items() if used[n] != s.numel]
    if lost:
        raise IncompatibleError(
            f"patch {patch.ref}: its names are those of {layout.label}, of which"
            f" {base.ref} does not hold all values:\n{up_to_five(lost)}"
        )
    found = viewed_specs(Bridge(views, {}, {}, [], {}, []), {**layout.model, **laid})
    notes = {
        name: f"patched as {', '.join(s for s in view.sources if s in laid)} of {layout.label}"
        for name, view in views.items() if isinstance(found[name], Viewed)
    }  # fmt: skip
    return found, notes
