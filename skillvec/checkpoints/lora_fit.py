"""Which weights of a base the factors of an adapter meet, and what they add to them.

Only the base tells how a weight lies (`Conv1D` is turned, and the `fan_in_fan_out` that PEFT saves
is that of the last module) and which parameter a wrapped one is. Refused by name: names and shapes
that do not fit the base, or fit it in two ways.
"""

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import permutations

from skillvec.checkpoints.lora import Adapter, hold_same
from skillvec.checkpoints.lora_deltas import LoraDelta, LowRank, Pair, Times
from skillvec.checkpoints.lora_experts import (
    ExpertModule,
    fused_of,
    on_experts,
    parse_expert,
    under_each_other,
)
from skillvec.checkpoints.lora_settings import MERGE
from skillvec.checkpoints.lora_ties import AdapterEffect, merge_tied, put_rows
from skillvec.errors import IncompatibleError, only_here, up_to_five_each
from skillvec.files.tensors import Source

MOST_NESTED = 4
# what does not fit, and no base or setting would mend it
UNMENDED = {
    "that fit in no one way", "square", "of two kinds", "of tokens", "of experts",
    "of fused weights",
}  # fmt: skip


def fit_adapter(
    adapter: Adapter,
    base: Mapping[str, Source],
    tied: Mapping[str, str] = {},
    model_type: str | None = None,
    turned_ones: Container[str] | None = None,
    guess: bool = True,
) -> AdapterEffect:
    """Return what an adapter does to a base, or to any model of its names and shapes.

    `tied` maps names that are one weight of the base: a head, perhaps in no file, to where its
    values lie. `model_type` is that of the base's config: of fused experts it may tell more
    than shapes do. `turned_ones` are the modules whose parameters lie in x out for PEFT, where
    that is known; else, with `guess`, what lies beside a square weight tells. Reads weights
    that were saved beside their delta: the base's own are left away.
    Raises IncompatibleError naming weights that the base lacks, that do not fit or fit in two
    ways, and ties that merging cannot part.
    """
    stored, base = base, dict(base) | {head: base[tied[head]] for head in tied}
    fit = _Fit(adapter, base, turned_ones, guess)
    for module, stack in adapter.stacks.items():
        fit.place(module, stack)
    for module, pairs in _under_base_names(adapter, base):
        fit.fit_module(module, pairs)
    fit.put_together(model_type)
    put = put_rows(adapter, base, tied, fit.problems)
    fit.problems["without their biases"] = _biases_lost(adapter, base)
    if any(fit.problems.values()):
        raise _misfit_error(adapter, fit.problems, base)
    both = [n for n in adapter.whole if n in fit.deltas or n in put or n in adapter.under]
    for name in both:
        if not hold_same(adapter.whole[name], base[name]):
            raise IncompatibleError(
                f"{adapter.what}: {name}: a delta and a weight that is not the base's: {MERGE}"
            )
    kept = {name: weight for name, weight in adapter.whole.items() if name not in both} | put
    notes = [f"{name}: also saved whole, as it is in the base" for name in both]
    keys = dict.fromkeys(key for n in fit.deltas for key in (n, n.removesuffix(".weight")))
    warnings = adapter.settings.doubt(keys)
    effect = AdapterEffect({**fit.deltas}, kept, adapter.notes + notes, {}, warnings)
    merge_tied(adapter, effect, tied, stored)
    return effect


class _Fit:
    """What fitting an adapter to a base has found so far, with `problems` by kind.

    `held` are the parameters of a module; `experts` and `rows` are factors that share a weight of
    the base, by that weight.
    """

    def __init__(
        self, adapter: Adapter, base: Mapping[str, Source], turned_ones: Container[str] | None,
        guess: bool,
    ) -> None:  # fmt: skip
        self.base, self.pairs, self.settings = base, adapter.pairs, adapter.settings
        self.whole, self.turned_ones, self.guess = adapter.whole, turned_ones, guess
        self.problems: dict[str, list[str]] = defaultdict(
            list, only_here(adapter.whole, base, "the adapter")
        )
        self.deltas: dict[str, LoraDelta] = {}
        self.held: dict[str, list[str]] = defaultdict(list)
        for name in base:
            self.held[name.rpartition(".")[0]].append(name)
        self.experts: dict[str, dict[ExpertModule, LowRank]] = defaultdict(dict)
        self.rows: dict[str, dict[str, tuple[str, Pair]]] = defaultdict(dict)

    def fit_module(self, module: str, pairs: tuple[Pair, ...]) -> None:
        """Fit the factors of a module: to its weight, to parameters below it, to what holds it."""
        name, pair = f"{module}.weight", pairs[0]
        weight = self.whole.get(name, self.base.get(name))
        if weight is None and len(pairs) == 1 and self._shares(module, pair):
            return
        if names := [n for n in self.held[module] if self.settings.wraps(n)]:
            self._fit_parameters(module, names, pairs)
            return
        if weight is None or len(pairs) > 1:
            self.problems["only in the adapter"].append(f"{name}: only in the adapter")
        else:
            self._fit_weight(module, pair, weight)
        if pair.bias is not None:
            self._add_bias(module, pair.bias)

    def _shares(self, module: str, pair: Pair) -> bool:
        """Keep factors for later whose weight the base holds together with those of others."""
        expert, fused = parse_expert(module), fused_of(module, self.base)
        if expert is not None and self.held[expert.experts]:
            self.place(module, pair)
            return True
        if fused is not None and pair.magnitudes is pair.bias is None:
            self.rows[fused][module.rpartition(".")[2]] = module, pair
            return True
        return False

    def _fit_parameters(self, module: str, names: list[str], pairs: tuple[Pair, ...]) -> None:
        known = None if self.turned_ones is None else module in self.turned_ones
        ways = self._ways(names, pairs, known)
        self.deltas |= ways[0] if ways else {}
        if len(ways) != 1:
            said = f"{module}: {len(ways)} ways to fit its factors to {', '.join(names)}"
            self.problems["that fit in no one way"].append(said)

    def _fit_weight(self, module: str, pair: Pair, weight: Source) -> None:
        name, (rank, scaling) = f"{module}.weight", self.settings.of(module)
        turned = pair.embedding or self.settings.turned
        lies: bool | None = turned
        if pair.A.shape[0] != rank:
            said = f"{name}: factors of rank {pair.A.shape[0]}, config {rank}"
            self.problems["of another rank"].append(said)
            return
        if weight.shape == weight.shape[::-1] == pair.sides(False) and not pair.embedding:
            lies = self.is_turned(module, turned)
        elif weight.shape != pair.sides(turned):
            lies = not turned
            if weight.shape != pair.sides(lies) or pair.embedding:
                shapes = f"adapter {list(pair.sides(turned))}, base {list(weight.shape)}"
                self.problems["of another shape"].append(f"{name}: {shapes}")
                return
        if lies is None:
            said = f"{name}: square, and nothing tells whether it is a Conv1D, which lies turned"
            self.problems["square"].append(said)
        else:
            self.deltas[name] = pair.merged(weight, name, lies, scaling)

    def _add_bias(self, module: str, added: Source) -> None:
        name = f"{module}.bias"
        bias = self.base.get(name)
        if bias is None or bias.shape != added.shape:
            said = f"{name}: a bias to add, and the base's layer has none such"
            self.problems["without a bias"].append(said)
        self.deltas[name] = Times(name, added, self.settings.of(module)[1])

    def _ways(
        self, names: list[str], pairs: tuple[Pair, ...], known: bool | None
    ) -> list[dict[str, LowRank]]:
        """Return the ways in which nested wrappers fit the parameters of a module, lying alike.

        PEFT nests them in the order in which the module declares them, which no file tells; `known`
        says whether they lie in x out for it.
        """
        found = []
        for turned in (False, True) if known is None else (known,):
            for order in permutations(names) if len(names) == len(pairs) <= MOST_NESTED else ():
                way = {}
                for name, pair in zip(order, pairs, strict=True):
                    shape, (rank, scaling) = self.base[name].shape, self.settings.of(name)
                    experts = shape[0] if len(shape) == 3 else 1
                    lies = shape[-2:] == pair.sides(turned) and not (turned and experts == 1)
                    if lies and pair.A.shape[0] == rank * experts:  # one expert is never turned
                        way[name] = pair.delta(name, shape, turned, scaling)
                found += [way] if len(way) == len(pairs) else []
        return found

    def place(self, module: str, pair: Pair) -> None:
        """Sort the factors of experts by the module that holds them all in the base."""
        expert, (rank, scaling) = parse_expert(module), self.settings.of(module)
        assert expert is not None
        experts, problems = self.experts[expert.experts], self.problems
        if pair.A.shape[-2] != rank:
            said = f"{module}: factors of rank {pair.A.shape[-2]}, config {rank}"
            problems["of another rank"].append(said)
        elif pair.magnitudes is not None or pair.bias is not None:
            problems["of experts"].append(f"{module}: DoRA or a bias of experts that are fused")
        elif expert.number is None:
            experts[expert] = pair.stacked(module, scaling)
        else:
            experts[expert] = pair.delta(module, pair.sides(False), False, scaling)

    def put_together(self, model_type: str | None) -> None:
        """Make the deltas of weights that hold several modules: experts, projections as rows."""
        for prefix, given in self.experts.items():
            try:
                self.deltas |= on_experts(prefix, given, self.base, model_type)
            except ValueError as error:
                self.problems["of experts"].append(str(error))
        for name, some in self.rows.items():
            try:
                made = {leaf: self._product(*pair) for leaf, pair in some.items()}
                self.deltas[name] = under_each_other(name, made, self.base[name].shape)
            except ValueError as error:
                self.problems["of fused weights"].append(str(error))

    def _product(self, module: str, pair: Pair) -> LowRank:
        """Return out x in of one module; ValueError where its rank is not that of the config."""
        rank, scaling = self.settings.of(module)
        if pair.A.shape[0] != rank:
            raise ValueError(f"{module}: factors of rank {pair.A.shape[0]}, config {rank}")
        return pair.delta(module, pair.sides(False), False, scaling)

    def is_turned(self, module: str, said: bool) -> bool | None:
        """Return whether a module with a square weight keeps it turned, as Conv1D does.

        fan_in_fan_out, which is `said`, is that of the last module alone. Biases tell of a base
        without Conv1D: those of one are as long as its weight's last dimension. With one, what lies
        nearest to the module tells if it tells one thing, but that is a guess. None where nothing
        tells.
        """
        if self.turned_ones is not None:
            return module in self.turned_ones
        if True not in self._ways_near[""] and not said:
            return False
        near = module if self.guess else ""
        while near:
            near = near.rpartition(".")[0]
            if ways := self._ways_near.get(near):
                return next(iter(ways)) if len(ways) == 1 else None
        return None

    @cached_property
    def _ways_near(self) -> dict[str, set[bool]]:
        """Which ways weights lie that are not square, by what is above them.

        Of a weight with factors these tell, of others their bias.
        """
        found: dict[str, set[bool]] = defaultdict(set)
        for name, spec in self.base.items():
            module, _, last = name.rpartition(".")
            sides = spec.shape
            if last != "weight" or len(sides) != 2 or sides[0] == sides[1]:
                continue
            bias, pairs = self.base.get(f"{module}.bias"), self.pairs.get(module)
            if pairs and not pairs[0].embedding:
                way = sides == pairs[0].sides(True)
            elif bias is not None and bias.shape in (sides[:1], sides[1:]):
                way = bias.shape == sides[1:]
            else:
                continue
            while module:
                module = module.rpartition(".")[0]
                found[module].add(way)
        return found


def _under_base_names(
    adapter: Adapter, base: Mapping[str, Source]
) -> Iterator[tuple[str, tuple[Pair, ...]]]:
    """Yield modules and factors under the names of a base, where Tinker has others."""
    for module, pairs in adapter.pairs.items():
        found = [module, module.replace(".attn.", ".self_attn.")]
        found += ["lm_head"] if module.rpartition(".")[2] == "unembed_tokens" else []
        there = (name for name in found if f"{name}.weight" in base)
        yield next(there, module), pairs


def _biases_lost(adapter: Adapter, base: Mapping[str, Source]) -> list[str]:
    """Name the biases that were trained, as the config says, and are not in the adapter."""
    kind = adapter.settings.biases
    names = [f"{module}.bias" for module in adapter.pairs] if kind == "lora_only" else base
    trained = (name for name in names if kind != "none" and name.endswith(".bias"))
    lost = (name for name in trained if name in base and name not in adapter.whole)
    return [f"{name}: trained (bias: {kind}), and not in the adapter" for name in lost]


def _misfit_error(
    adapter: Adapter, problems: dict[str, list[str]], base: Iterable[str]
) -> IncompatibleError:
    """Return the error that names what does not fit, with advice that can be followed."""
    kinds = {kind for kind, lines in problems.items() if lines}
    if "only in the adapter" in kinds:  # names of the base that end alike tell why
        modules = (f"{module}.weight" for module in adapter.pairs)
        mine = {*adapter.whole, *adapter.rows, *modules}
        ends = {name.removesuffix(".weight").rpartition(".")[2] for name in mine}
        alike = [name for name in base if ends & set(name.split("."))]
        problems |= only_here(alike or base, mine, "the base")
    return IncompatibleError(
        f"{adapter.what}: the adapter does not fit the base ({_advice(adapter, kinds)}):\n"
        + up_to_five_each(problems)
    )


def _advice(adapter: Adapter, kinds: set[str]) -> str:
    if "without their biases" in kinds:
        return "take the adapter that PEFT saved, which holds what it trains"
    if "without a bias" in kinds:
        return "PEFT cannot merge it either: lora_bias needs layers that have biases"
    if "of another rank" in kinds:
        return (
            "its factors have other ranks than its config says, which PEFT does not load either:"
            " mend r and rank_pattern, and lora_alpha and alpha_pattern, by which they are scaled"
        )
    if kinds <= UNMENDED:
        return MERGE
    if "only in the adapter" in kinds and adapter.settings.parameters:
        return f"was it made for another one, or for this one in another layout? then {MERGE}"
    return "was it made for another one?"
