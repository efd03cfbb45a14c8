"""What an adapter does to a base, and what PEFT's merge does to weights that the base ties.

On a base that ties its head to its embeddings the effect is that of PEFT's merge: a module that is
saved whole parts the two, and factors, or rows, of either are put into the one weight. Refused:
what says two things of the one weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from skillvec.checkpoints.lora import Adapter, hold_same
from skillvec.checkpoints.lora_deltas import (
    FIRST,
    Dora,
    LoraDelta,
    Row,
    RowsPut,
    Summed,
    digest_of_row,
)
from skillvec.checkpoints.lora_settings import MERGE
from skillvec.errors import IncompatibleError
from skillvec.files.tensors import Source, digest_values


class AdapterEffect(NamedTuple):
    """What an adapter does to a base, by names of the base: adds `deltas`, puts `whole` weights.

    `untied` maps heads that the base ties, and the adapter does not, to the embedding whose values
    they had; `warnings` are sentences for the user, `layout` says whose names the adapter has if
    not those of the base's files.
    """

    deltas: dict[str, LoraDelta]
    whole: dict[str, Source]
    notes: list[str]
    untied: dict[str, str]
    warnings: list[str]
    layout: str = ""


def put_rows(
    adapter: Adapter, base: Mapping[str, Source], tied: Mapping[str, str],
    problems: dict[str, list[str]],
) -> dict[str, Source]:  # fmt: skip
    """Return the weights of a base with the adapter's rows in them; add what is wrong by kind."""
    put: dict[str, Source] = {}
    for name, (rows, numbers) in adapter.rows.items():
        weight = base.get(name)
        if weight is None:
            problems["only in the adapter"].append(f"{name}: only in the adapter")
        elif len(weight.shape) != 2 or weight.shape[1:] != rows.shape[1:]:
            said = f"{name}: adapter {list(rows.shape)}, base {list(weight.shape)}"
            problems["of another shape"].append(said)
        elif numbers and max(numbers) >= weight.shape[0]:
            said = f"{name}: row {max(numbers)} is trained, and the base has {weight.shape[0]}"
            problems["of rows that are not there"].append(said)
        else:
            places = [(number, Row(rows, at)) for at, number in enumerate(numbers)]
            put[name] = RowsPut(name, weight, tuple(sorted(places, key=FIRST)))
        if name.removesuffix(".weight") in adapter.pairs:
            problems["of two kinds"].append(f"{name}: rows of it are trained, and all of it")
    if isinstance(adapter.settings.tokens, list) and len({tied.get(n, n) for n in put}) > 1:
        problems["of tokens"] += [f"{n}: of which trained rows belong to one only" for n in put]
    return put


def merge_tied(
    adapter: Adapter, effect: AdapterEffect, tied: Mapping[str, str], stored: Mapping[str, Source]
) -> None:
    """Do to all names that are one weight of the base what PEFT's merge does to it.

    `tied` maps heads to where their values lie, `stored` are the weights that the base has.
    """
    copies = adapter.copies
    parting = not adapter.settings.tying and any(n in copies for n in (*tied, *tied.values()))
    for source in dict.fromkeys(tied.values()):
        heads = [head for head in tied if tied[head] == source]
        if parting:
            effect.untied.update(dict.fromkeys(heads, source))
        group = [n for n in (source, *heads) if not parting or n not in copies]
        names = [name for name in group if parting or name == source or name in stored]
        _merge_group(adapter, effect, group, names, stored[source])


def _merge_group(
    adapter: Adapter, effect: AdapterEffect, group: Sequence[str], names: Sequence[str],
    weight: Source,
) -> None:  # fmt: skip
    """Give `names` the one value of a group of tied ones, of which the base has `weight`.

    Where any head is parted from what it is tied to, the config's switch unties all, and each
    has a tensor of its own; but only copies have values of their own.
    """
    added = [name for name in group if name in effect.deltas or name in adapter.rows]
    own = [name for name in group if added and name in effect.whole and name not in adapter.rows]
    for name in own:  # a state dict has the base's own weight under each of its names
        if hold_same(effect.whole[name], weight):
            del effect.whole[name]
    wholes = [name for name in group if name in effect.whole]
    if any(name in adapter.rows for name in wholes):
        _put_tied(adapter, effect, group, names)
        return
    tying = adapter.settings.tying
    weights = [effect.whole.pop(name) for name in wholes]
    summands = [effect.deltas.pop(name) for name in added]
    if weights and (added or len({digest_values(weight) for weight in weights}) > 1):
        raise _two_things(adapter, group)
    if any(isinstance(summand, Dora) for summand in summands) and (
        adapter.settings.tying or added[1:]
    ):
        raise _two_things(adapter, group)  # the second is scaled by what the first has made
    if (
        adapter.settings.tying and summands
    ):  # each name has these factors, saved or not, and is merged
        summands += summands[:1] * (len(group) - len(summands))
    for name in names:
        if weights:
            effect.whole[name] = weights[0]
        elif len(summands) == 1:
            effect.deltas[name] = replace(summands[0], name=name)
        elif summands:
            effect.deltas[name] = Summed(name, tuple(summands))
    if summands and group[1:]:
        what = f"the delta of {added[0]}" if len(summands) == 1 else "the deltas of both"
        what = "the same delta more than once" if tying else what
        effect.warnings.append(
            f"{group[0]}: the base ties {', '.join(group[1:])} to it, so PEFT's merge, which"
            f" this is, adds {what} to their one weight: that is not the model that was"
            " trained. On a copy of the base that stores both and ties neither it is"
        )


def _put_tied(
    adapter: Adapter, effect: AdapterEffect, group: Sequence[str], names: Sequence[str]
) -> None:
    """Put rows into the one weight of several names, as PEFT's merge does."""
    wholes = {name: effect.whole.pop(name) for name in group if name in effect.whole}
    put = {name: weight for name, weight in wholes.items() if isinstance(weight, RowsPut)}
    if len(put) < len(wholes) or any(name in effect.deltas for name in group):
        raise _two_things(adapter, group)
    rows: dict[int, Row] = {}
    for number, row in (pair for weight in put.values() for pair in weight.rows):
        if digest_of_row(rows.setdefault(number, row)) != digest_of_row(row):
            raise _two_things(adapter, group)
    one = replace(next(iter(put.values())), rows=tuple(sorted(rows.items(), key=FIRST)))
    for name in names:
        effect.whole[name] = replace(one, name=name)
    if group[1:] and isinstance(adapter.settings.tokens, dict) and ([*put] != [group[0]]):
        effect.warnings.append(
            f"{group[0]}: the base ties {', '.join(group[1:])} to it, so PEFT's merge, which"
            f" this is, puts the rows of {' and of '.join(put)} into their one weight: that is"
            " not the model that was trained"
        )


def _two_things(adapter: Adapter, group: Sequence[str]) -> IncompatibleError:
    return IncompatibleError(
        f"{adapter.what}: the base ties {' and '.join(group)}, and the adapter says two things"
        f" of the one weight: {MERGE}"
    )
