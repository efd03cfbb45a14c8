"""Categories of ToolBench: which are learnt from, which are asked, and how one is divided.

Hides the counting. Invariants: the parts of a category share no tool and no query; a query whose
APIs come from several categories belongs to none. Refuses categories that have nothing to train on
or to ask, with the counts of all.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

from skillvec.recipes.toolbench.apis import Item


def by_category_of(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Return the queries of each category, each query once; those of several are left out."""
    found: dict[str, list[Item]] = {}
    for item in {(item.query, item.category): item for item in items}.values():
        if item.category is not None:
            found.setdefault(item.category, []).append(item)
    return found


def choose_targets(
    source: str,
    named: Sequence[str],
    count: int,
    train: Mapping[str, Sequence[Item]],
    ask: Mapping[str, Sequence[Item]],
) -> list[str]:
    """Return the named categories, or the `count` with most queries to ask, without the source.

    Raises ValueError for a source or targets without queries, named twice, or too few.
    """
    known = ", ".join(f"{name} {len(ask.get(name, []))}" for name in sorted(train))
    if source not in train:
        raise ValueError(f"source {source!r}: no such category; queries by category: {known}")
    most = Counter({name: len(items) for name, items in ask.items()}).most_common()
    chosen = list(named) or [name for name, _ in most if name != source and name in train][:count]
    wanted = len(named) or count
    absent = [name for name in chosen if name not in train or name not in ask]
    if absent or source in chosen:
        shown = ", ".join(absent[:5]) or source
        raise ValueError(f"targets: {len(absent) or 1} cannot be used: {shown}; expected "
                         f"categories with queries, other than the source: {known}")  # fmt: skip
    if wanted < 1 or len(set(chosen)) < wanted:
        raise ValueError(f"targets: expected {wanted} different ones, found {len(set(chosen))}; "
                         f"queries by category: {known}")  # fmt: skip
    return chosen


def split_parts(
    items: Sequence[Item], parts: int, rng: random.Random
) -> tuple[list[list[Item]], int]:
    """Split by tools, about even in queries; return parts and how many queries span several."""
    counts = Counter(tool for item in items for tool in item.tools)
    tools = sorted(counts)
    rng.shuffle(tools)
    sizes, part_of = [0] * parts, {}
    for tool in sorted(tools, key=lambda name: -counts[name]):
        part_of[tool] = sizes.index(min(sizes))
        sizes[part_of[tool]] += counts[tool]
    divided: list[list[Item]] = [[] for _ in range(parts)]
    spanning = 0
    for item in items:
        found = {part_of[tool] for tool in item.tools}
        if len(found) == 1:
            divided[found.pop()].append(item)
        else:
            spanning += 1
    return divided, spanning
