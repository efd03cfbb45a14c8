"""PEFT LoRA adapters: what they add to a base model, as tensors of that model.

Hides PEFT's names, its scalings and the three shapes of its factors (linear, embedding, fused
experts). A delta is scaling * B A, made block by block where it is read, never held whole. Only
the base tells how a weight lies (`Conv1D` is turned, and the `fan_in_fan_out` that PEFT saves is
that of the last module) and which parameter a wrapped one is, so an adapter is fitted to it. On a
base that ties its head to its embeddings the effect is that of PEFT's merge: a module that is saved
whole parts the two, and factors of either are added to the one weight.

Refused by name: all whose effect is not base + scaling * B A (`NOT_A_SUM`, convolutions, every
other method of PEFT), initialisations that changed the base (`OTHER_BASE`), names and shapes that
do not fit the base or fit it in two ways.
"""

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import permutations
from math import comb, sqrt
from typing import Any, NamedTuple

from skillvec.errors import (
    FormatError,
    IncompatibleError,
    only_here,
    printable,
    up_to_five,
    up_to_five_each,
)
from skillvec.experts import (
    Place,
    fused_of,
    on_experts,
    place_of,
    under_each_other,
)
from skillvec.kernels import FLOATS, STORAGE_DTYPE
from skillvec.lowrank import (
    FIRST,
    Delta,
    Dora,
    LowRank,
    Pair,
    Row,
    RowsPut,
    Summed,
    Times,
    digest_of_row,
)
from skillvec.sources import Source, digest_values

MOST_RANK, MOST_ALPHA, MOST_NESTED = 1 << 20, 1e30, 4
MOST_SIGNS, MOST_REPEATS, MOST_STEPS = 400, 4, 10**10  # of patterns: PEFT's own are names
FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
MAGNITUDES, BIAS, ROWS = "lora_magnitude_vector", "lora_B.bias", "token_adapter"  # beside factors
MERGE = "merge it into its base (merge_and_unload, save_pretrained) and give the merged model"
UNMERGED = "it cannot be merged into weights, so there is no vector of it"
# what PEFT does not merge: tokens in place of weights, sums that depend on the input
UNMERGED_KINDS = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE",
    "ADAPTION_PROMPT", "POLY", "XLORA", "LILY", "SHADOW",
)  # fmt: skip
# nor these of LoRA; it adds up replicated layers, which share their weights, and gets another model
UNMERGED_KEYS = ("alora_invocation_tokens", "arrow_config", "layer_replication")
NOT_A_SUM = {  # keys of adapter_config.json that, if set, make something else of LoRA
    "alora_invocation_tokens": "activated LoRA holds for some tokens only",
    "layer_replication": "layers are replicated, and each copy has a sum of its own",
    "use_qalora": "QA-LoRA pools its inputs",
    "use_bdlora": "its factors are block-diagonal", "arrow_config": "Arrow routes tokens",
    "kasa_config": "KaSA truncates the base", "monteclora_config": "its factors are sampled",
    "velora_config": "VeLoRA keeps more than factors", "megatron_config": "layers of Megatron",
}  # fmt: skip
SAME_BASE = ("", "true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
OTHER_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
NOVEL = (bool, dict, list)
FLAGS = ("use_rslora", "fan_in_fan_out", "use_dora", "lora_bias")
EMBEDDINGS = ("embed_tokens", "lm_head")  # as PEFT calls them
KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "merge_weights",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip


class Settings(NamedTuple):
    """What adapter_config.json says of ranks and scalings, checked."""

    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rslora: bool
    turned: bool
    parameters: list[str]
    dora: bool = False
    biased: bool = False
    tokens: list[int] | dict[str, list[int]] | None = None

    def of(self, key: str) -> tuple[int, float]:
        """Return the rank and the scaling of a module, or of a parameter, by its name."""
        rank = next(_matching(self.rank_pattern, key), self.rank)
        alpha = next(_matching(self.alpha_pattern, key), self.alpha)
        return rank, alpha / (sqrt(rank) if self.rslora else rank)

    def doubt(self, keys: Iterable[str]) -> list[str]:
        """Say where several patterns give a module different alphas: PEFT saves them sorted.

        Of ranks the factors tell.
        """
        found = [key for key in keys if len({*_matching(self.alpha_pattern, key)}) > 1]
        if not found:
            return []
        more = f" and {len(found) - 1} more" if found[1:] else ""
        return [
            f"alpha_pattern: several patterns with different values match {found[0]}{more}: PEFT"
            " takes the first, and sorts them when it saves, so that it may have trained with"
            " another"
        ]


def _matching(patterns: Mapping[str, Any], key: str) -> Iterator[Any]:
    """Yield the values of the patterns that match a name as PEFT matches it."""
    return (value for p, value in patterns.items() if re.match(rf"(.*\.)?({p})$", key))


Where = tuple[str, int]  # a module, and the depth of a wrapper in it


class Effect(NamedTuple):
    """What an adapter does to a base, by names of the base: adds `deltas`, puts `whole` weights.

    `untied` maps heads that the base ties, and the adapter does not, to the embedding whose values
    they had; `warnings` are sentences for the user, `layout` says whose names the adapter has if
    not those of the base's files.
    """

    deltas: dict[str, Delta]
    whole: dict[str, Source]
    notes: list[str]
    untied: dict[str, str]
    warnings: list[str]
    layout: str = ""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, checked as far as it can be without its base.

    `whole` are weights that it brings (modules_to_save, resized embeddings, trained biases); of
    those, `saved` ends the names of modules that PEFT trains as copies beside the base's own.
    `tying` keeps what the base ties tied (ensure_weight_tying). `rows` are those that it puts into
    a weight, and their numbers (trainable_token_indices).
    """

    what: str
    base_ref: str | None
    revision: str | None
    whole: dict[str, Source]
    notes: list[str]
    pairs: dict[str, tuple[Pair, ...]]  # by module, the outermost wrapper first
    settings: Settings
    saved: tuple[str, ...] = ()
    tying: bool = False
    rows: Mapping[str, tuple[Source, list[int]]] = field(default_factory=dict)
    stacks: Mapping[str, Pair] = field(default_factory=dict)  # 3-D factors of all experts
    biases: str = "none"  # whose biases are trained, and so are saved whole: lora_only, all
    under: frozenset[str] = frozenset()  # weights under rows of theirs: the base's own
    classes: tuple[str, ...] = ()  # of the model that it was made on, where it says so

    def renamed(self, names: Mapping[str, str]) -> "Adapter":
        """Return the adapter under other names: `names` maps those of `shapes` to new ones."""
        pairs = {
            names.get(f"{module}.weight", f"{module}.weight").removesuffix(".weight"): pair
            for module, pair in self.pairs.items()
        }
        whole = {names.get(name, name): weight for name, weight in self.whole.items()}
        rows = {names.get(name, name): trained for name, trained in self.rows.items()}
        stacks = {
            names.get(f"{module}.weight", f"{module}.weight").removesuffix(".weight"): pair
            for module, pair in self.stacks.items()
        }
        under = frozenset(names.get(name, name) for name in self.under)
        return replace(self, pairs=pairs, whole=whole, rows=rows, stacks=stacks, under=under)

    def misfits(self, there: Mapping[str, Any], named: Mapping[str, str] = {}) -> list[str]:
        """Return the weights that a model of other names or shapes has not got, so or turned.

        `there` maps names to what has a shape, or is one; `named` other names for those here.
        """
        holders = {name.rpartition(".")[0] for name in there if self._wraps(name)}
        experts = {name.partition(".experts.")[0] for name in there if ".experts." in name}
        found = []
        for name in self.shapes:
            module, new = name.removesuffix(".weight"), named.get(name, name)
            held = there.get(new)
            shape = None if held is None else tuple(getattr(held, "shape", held))
            if name in self.whole or name in self.rows:
                fits = shape is not None  # perhaps with more rows, or some of them
            elif module in self.stacks:
                fits = new.partition(".experts.")[0] in experts
            else:
                pair = self.pairs[module][0]
                fits = shape in (pair.sides(False), pair.sides(True))
                fits = fits or new.removesuffix(".weight") in holders
            found += [] if fits else [name]
        return found

    @property
    def needs_base(self) -> bool:
        """Whether the values of its base decide what it adds."""
        dora = any(pair.magnitudes for pairs in self.pairs.values() for pair in pairs)
        return dora or bool(self.whole or self.rows)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights that it names, as far as it tells them itself."""
        outer = {f"{module}.weight": pairs[0] for module, pairs in self.pairs.items()}
        made: dict[str, tuple[int, ...]] = {}
        made |= {name: pair.sides(pair.embedding) for name, pair in outer.items()}
        made |= {name: rows.shape for name, (rows, _) in self.rows.items()}
        for module, pair in self.stacks.items():
            (a, _, inner), (b, out, _) = pair.A.shape, pair.B.shape
            made[f"{module}.weight"] = (max(a, b), out, inner)
        return made | {name: weight.shape for name, weight in self.whole.items()}

    @property
    def copies(self) -> list[str]:
        """The weights that PEFT trains as copies, so that the base's own stay what they are.

        PEFT copies a module whose name ends so, with all that is below it.
        """
        found = []
        for name in self.whole:
            parts = name.split(".")[:-1]
            above = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
            found += [name] if any(module.endswith(self.saved) for module in above) else []
        return found

    @property
    def deltas(self) -> dict[str, LowRank]:
        """What the config alone tells, where no base is at hand; weights may lie turned.

        Raises IncompatibleError where only the base can tell, FormatError for other ranks.
        """
        both = [name for name in self.whole if name.removesuffix(".weight") in self.pairs]
        held = {
            f"{next(iter(both), '')} whole too": both,
            "target_parameters": self.settings.parameters,
            "magnitudes of DoRA": self.settings.dora, "biases of factors": self.settings.biased,
            "rows of tokens": self.rows, "3-D factors of experts": self.stacks,
        }  # fmt: skip
        for what in (what for what, some in held.items() if some):
            raise IncompatibleError(
                f"{self.what}: has {what}: only the base tells what is added: give the base"
            )
        deltas = {}
        for module, (pair, *inner) in self.pairs.items():
            rank, scaling = self.settings.of(module)
            if pair.A.shape[0] != rank or inner:
                raise FormatError(f"{self.what}: {module}: {pair.A.shape[0]} ranks, config {rank}")
            turned, name = pair.embedding or self.settings.turned, f"{module}.weight"
            deltas[name] = pair.delta(name, pair.sides(turned), turned, scaling)
        return deltas

    def fitted(
        self,
        base: Mapping[str, Source],
        tied: Mapping[str, str] = {},
        model_type: str | None = None,
        turned_ones: Container[str] | None = None,
        guess: bool = True,
    ) -> Effect:
        """Return what the adapter does to a base, or to any model of its names and shapes.

        `tied` maps names that are one weight of the base: a head, perhaps in no file, to where its
        values lie. `model_type` is that of the base's config: of fused experts it may tell more
        than shapes do. `turned_ones` are the modules whose parameters lie in x out for PEFT, where
        that is known; else, with `guess`, what lies beside a square weight tells. Reads weights
        that were saved beside their delta: the base's own are left away.
        Raises IncompatibleError naming weights that the base lacks, that do not fit or fit in two
        ways, and ties that merging cannot part.
        """
        stored, base = base, dict(base) | {head: base[tied[head]] for head in tied}
        found = _Found(base, only_here(self.whole, base, "the adapter"), self.pairs)
        for module, stack in self.stacks.items():
            self._place(module, stack, found)
        for module, pairs in self._renamed(base):
            self._fit(module, pairs, found, turned_ones, guess)
        deltas, problems = found.deltas, found.problems
        self._put_together(found, model_type)
        put = self._rows_put(base, tied, problems)
        problems["without their biases"] = self._biases_lost(base)
        if any(problems.values()):
            raise self._unfit(problems, base)
        both = [n for n in self.whole if n in deltas or n in put or n in self.under]
        for name in both:
            if not _same(self.whole[name], base[name]):
                raise IncompatibleError(
                    f"{self.what}: {name}: a delta and a weight that is not the base's: {MERGE}"
                )
        kept = {name: weight for name, weight in self.whole.items() if name not in both} | put
        notes = [f"{name}: also saved whole, as it is in the base" for name in both]
        keys = dict.fromkeys(key for n in deltas for key in (n, n.removesuffix(".weight")))
        effect = Effect({**deltas}, kept, self.notes + notes, {}, self.settings.doubt(keys))
        parting = not self.tying and any(n in self.copies for n in (*tied, *tied.values()))
        for source in dict.fromkeys(tied.values()):
            heads = [head for head in tied if tied[head] == source]
            self._merge_tied(effect, source, heads, stored, parting)
        return effect

    def _fit(
        self, module: str, pairs: tuple[Pair, ...], found: "_Found",
        turned_ones: Container[str] | None, guess: bool,
    ) -> None:  # fmt: skip
        """Fit the factors of a module: to its weight, to parameters below it, to what holds it."""
        base, problems = found.base, found.problems
        name, pair = f"{module}.weight", pairs[0]
        weight = self.whole.get(name, base.get(name))
        if weight is None and len(pairs) == 1:
            place, fused = place_of(module), fused_of(module, base)
            if place is not None and found.held[place.experts]:
                self._place(module, pair, found)
                return
            if fused is not None and pair.magnitudes is pair.bias is None:
                found.rows[fused][module.rpartition(".")[2]] = module, pair
                return
        names = [n for n in found.held[module] if self._wraps(n)]
        if names:
            known = None if turned_ones is None else module in turned_ones
            ways = _ways(names, pairs, self.settings, base, known)
            found.deltas |= ways[0] if ways else {}
            if len(ways) != 1:
                said = f"{module}: {len(ways)} ways to fit its factors to {', '.join(names)}"
                problems["that fit in no one way"].append(said)
            return
        rank, scaling = self.settings.of(module)
        turned = pair.embedding or self.settings.turned
        if weight is None or len(pairs) > 1:
            problems["only in the adapter"].append(f"{name}: only in the adapter")
        elif pair.A.shape[0] != rank:
            said = f"{name}: factors of rank {pair.A.shape[0]}, config {rank}"
            problems["of another rank"].append(said)
        elif weight.shape == weight.shape[::-1] == pair.sides(False) and not pair.embedding:
            lies = found.is_turned(module, turned, guess)
            lies = lies if turned_ones is None else module in turned_ones
            if lies is None:
                said = (
                    f"{name}: square, and nothing tells whether it is a Conv1D, which lies turned"
                )
                problems["square"].append(said)
            else:
                found.deltas[name] = pair.merged(weight, name, lies, scaling)
        elif weight.shape == pair.sides(turned):
            found.deltas[name] = pair.merged(weight, name, turned, scaling)
        elif weight.shape == pair.sides(not turned) and not pair.embedding:
            found.deltas[name] = pair.merged(weight, name, not turned, scaling)
        else:
            shapes = f"adapter {list(pair.sides(turned))}, base {list(weight.shape)}"
            problems["of another shape"].append(f"{name}: {shapes}")
        if pair.bias is not None:
            bias = base.get(f"{module}.bias")
            if bias is None or bias.shape != pair.bias.shape:
                said = f"{module}.bias: a bias to add, and the base's layer has none such"
                problems["without a bias"].append(said)
            found.deltas[f"{module}.bias"] = Times(f"{module}.bias", pair.bias, scaling)

    def _put_together(self, found: "_Found", model_type: str | None) -> None:
        """Make the deltas of weights that hold several modules: experts, projections as rows."""
        for prefix, given in found.experts.items():
            try:
                found.deltas |= on_experts(prefix, given, found.base, model_type)
            except ValueError as error:
                found.problems["of experts"].append(str(error))
        for name, some in found.rows.items():
            try:
                made = {leaf: self._product(*pair) for leaf, pair in some.items()}
                found.deltas[name] = under_each_other(name, made, found.base[name].shape)
            except ValueError as error:
                found.problems["of fused weights"].append(str(error))

    def _place(self, module: str, pair: Pair, found: "_Found") -> None:
        """Sort the factors of experts by the module that holds them all in the base."""
        place, (rank, scaling) = place_of(module), self.settings.of(module)
        assert place is not None
        experts, problems = found.experts[place.experts], found.problems
        if pair.A.shape[-2] != rank:
            said = f"{module}: factors of rank {pair.A.shape[-2]}, config {rank}"
            problems["of another rank"].append(said)
        elif pair.magnitudes is not None or pair.bias is not None:
            problems["of experts"].append(f"{module}: DoRA or a bias of experts that are fused")
        elif place.number is None:
            experts[place] = pair.stacked(module, scaling)
        else:
            experts[place] = pair.delta(module, pair.sides(False), False, scaling)

    def _product(self, module: str, pair: Pair) -> LowRank:
        """Return out x in of one module; ValueError where its rank is not that of the config."""
        rank, scaling = self.settings.of(module)
        if pair.A.shape[0] != rank:
            raise ValueError(f"{module}: factors of rank {pair.A.shape[0]}, config {rank}")
        return pair.delta(module, pair.sides(False), False, scaling)

    def _renamed(self, base: Mapping[str, Source]) -> Iterable[tuple[str, tuple[Pair, ...]]]:
        """Yield modules and factors under the names of a base, where Tinker has others."""
        for module, pairs in self.pairs.items():
            found = [module, module.replace(".attn.", ".self_attn.")]
            found += ["lm_head"] if module.rpartition(".")[2] == "unembed_tokens" else []
            there = (name for name in found if f"{name}.weight" in base)
            yield next(there, module), pairs

    def _merge_tied(
        self,
        effect: Effect,
        source: str,
        heads: Sequence[str],
        stored: Mapping[str, Source],
        parting: bool,
    ) -> None:
        """Do to names that are one weight of the base what PEFT's merge does to it.

        Where any head is parted from what it is tied to, the config's switch unties all, and each
        has a tensor of its own; but only copies have values of their own.
        """
        if parting:
            effect.untied.update(dict.fromkeys(heads, source))
        group = [n for n in (source, *heads) if not parting or n not in self.copies]
        names = [name for name in group if parting or name == source or name in stored]
        added = [name for name in group if name in effect.deltas or name in self.rows]
        own = [name for name in group if added and name in effect.whole and name not in self.rows]
        for name in own:  # a state dict has the base's own weight under each of its names
            if _same(effect.whole[name], stored[source]):
                del effect.whole[name]
        wholes = [name for name in group if name in effect.whole]
        if any(name in self.rows for name in wholes):
            self._put_tied(effect, group, names)
            return
        weights = [effect.whole.pop(name) for name in wholes]
        summands = [effect.deltas.pop(name) for name in added]
        if weights and (added or len({digest_values(weight) for weight in weights}) > 1):
            raise self._two_things(group)
        if any(isinstance(summand, Dora) for summand in summands) and (self.tying or added[1:]):
            raise self._two_things(group)  # the second is scaled by what the first has made
        if self.tying and summands:  # each name has these factors, saved or not, and is merged
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
            what = "the same delta more than once" if self.tying else what
            effect.warnings.append(
                f"{group[0]}: the base ties {', '.join(group[1:])} to it, so PEFT's merge, which"
                f" this is, adds {what} to their one weight: that is not the model that was"
                " trained. On a copy of the base that stores both and ties neither it is"
            )

    def _two_things(self, group: Sequence[str]) -> IncompatibleError:
        return IncompatibleError(
            f"{self.what}: the base ties {' and '.join(group)}, and the adapter says two things"
            f" of the one weight: {MERGE}"
        )

    def _biases_lost(self, base: Mapping[str, Source]) -> list[str]:
        """Name the biases that were trained, as the config says, and are not in the adapter."""
        names = [f"{module}.bias" for module in self.pairs] if self.biases == "lora_only" else base
        trained = (name for name in names if self.biases != "none" and name.endswith(".bias"))
        lost = (name for name in trained if name in base and name not in self.whole)
        return [f"{name}: trained (bias: {self.biases}), and not in the adapter" for name in lost]

    def _rows_put(
        self, base: Mapping[str, Source], tied: Mapping[str, str], problems: dict[str, list[str]]
    ) -> dict[str, Source]:
        """Return the weights of a base with the adapter's rows in them."""
        put: dict[str, Source] = {}
        for name, (rows, numbers) in self.rows.items():
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
            if name.removesuffix(".weight") in self.pairs:
                problems["of two kinds"].append(f"{name}: rows of it are trained, and all of it")
        if isinstance(self.settings.tokens, list) and len({tied.get(n, n) for n in put}) > 1:
            problems["of tokens"] += [f"{n}: of which trained rows belong to one only" for n in put]
        return put

    def _put_tied(self, effect: Effect, group: Sequence[str], names: Sequence[str]) -> None:
        """Put rows into the one weight of several names, as PEFT's merge does."""
        wholes = {name: effect.whole.pop(name) for name in group if name in effect.whole}
        put = {name: weight for name, weight in wholes.items() if isinstance(weight, RowsPut)}
        if len(put) < len(wholes) or any(name in effect.deltas for name in group):
            raise self._two_things(group)
        rows: dict[int, Row] = {}
        for number, row in (pair for weight in put.values() for pair in weight.rows):
            if digest_of_row(rows.setdefault(number, row)) != digest_of_row(row):
                raise self._two_things(group)
        one = replace(next(iter(put.values())), rows=tuple(sorted(rows.items(), key=FIRST)))
        for name in names:
            effect.whole[name] = replace(one, name=name)
        if group[1:] and isinstance(self.settings.tokens, dict) and ([*put] != [group[0]]):
            effect.warnings.append(
                f"{group[0]}: the base ties {', '.join(group[1:])} to it, so PEFT's merge, which"
                f" this is, puts the rows of {' and of '.join(put)} into their one weight: that is"
                " not the model that was trained"
            )

    def _unfit(self, problems: dict[str, list[str]], base: Iterable[str]) -> IncompatibleError:
        """Return the error that names what does not fit, with advice that can be followed."""
        kinds = {kind for kind, lines in problems.items() if lines}
        if "only in the adapter" in kinds:  # names of the base that end alike tell why
            mine = {*self.whole, *self.rows, *(f"{module}.weight" for module in self.pairs)}
            ends = {name.removesuffix(".weight").rpartition(".")[2] for name in mine}
            alike = [name for name in base if ends & set(name.split("."))]
            problems |= only_here(alike or base, mine, "the base")
        if "without their biases" in kinds:
            advice = "take the adapter that PEFT saved, which holds what it trains"
        elif "without a bias" in kinds:
            advice = "PEFT cannot merge it either: lora_bias needs layers that have biases"
        elif "of another rank" in kinds:
            advice = (
                "its factors have other ranks than its config says, which PEFT does not load"
                " either: mend r and rank_pattern, and lora_alpha and alpha_pattern, by which they"
                " are scaled"
            )
        elif kinds <= {
            "that fit in no one way",
            "square",
            "of two kinds",
            "of tokens",
            "of experts",
            "of fused weights",
        }:
            advice = MERGE
        elif "only in the adapter" in kinds and self.settings.parameters:
            advice = f"was it made for another one, or for this one in another layout? then {MERGE}"
        else:
            advice = "was it made for another one?"
        return IncompatibleError(
            f"{self.what}: the adapter does not fit the base ({advice}):\n"
            + up_to_five_each(problems)
        )

    def _wraps(self, name: str) -> bool:
        return any(f".{name}".endswith(f".{target}") for target in self.settings.parameters)


class _Found:
    """What fitting an adapter to a base has found so far.

    `experts` and `rows` are factors that share a weight of the base, by that weight.
    """

    def __init__(
        self, base: Mapping[str, Source], problems: Mapping[str, list[str]],
        pairs: Mapping[str, tuple[Pair, ...]],
    ) -> None:  # fmt: skip
        self.base, self.pairs = base, pairs
        self.problems = defaultdict(list, problems)
        self.deltas: dict[str, Delta] = {}
        self.held: dict[str, list[str]] = defaultdict(list)  # by module: its parameters
        for name in base:
            self.held[name.rpartition(".")[0]].append(name)
        self.experts: dict[str, dict[Place, LowRank]] = defaultdict(dict)
        self.rows: dict[str, dict[str, tuple[str, Pair]]] = defaultdict(dict)

    def is_turned(self, module: str, said: bool, guess: bool) -> bool | None:
        """Return whether a module with a square weight keeps it turned, as Conv1D does.

        fan_in_fan_out, which is `said`, is that of the last module alone. Biases tell of a base
        without Conv1D: those of one are as long as its weight's last dimension. With one, what lies
        nearest to the module tells if it tells one thing, but that is a `guess`. None where
        nothing tells.
        """
        if True not in self._ways_near[""] and not said:
            return False
        near = module if guess else ""
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


def _ways(
    names: list[str], pairs: tuple[Pair, ...], settings: Settings, base: Mapping[str, Source],
    known: bool | None,
) -> list[dict[str, LowRank]]:  # fmt: skip
    """Return the ways in which nested wrappers fit the parameters of a module, all lying alike.

    PEFT nests them in the order in which the module declares them, which no file tells; `known`
    says whether they lie in x out for it.
    """
    found = []
    for turned in (False, True) if known is None else (known,):
        for order in permutations(names) if len(names) == len(pairs) <= MOST_NESTED else ():
            way = {}
            for name, pair in zip(order, pairs, strict=True):
                shape, (rank, scaling) = base[name].shape, settings.of(name)
                experts = shape[0] if len(shape) == 3 else 1
                lies = shape[-2:] == pair.sides(turned) and not (turned and experts == 1)
                if lies and pair.A.shape[0] == rank * experts:  # one expert is never turned
                    way[name] = pair.delta(name, shape, turned, scaling)
            found += [way] if len(way) == len(pairs) else []
    return found


def open_adapter(
    folder_name: str, config: Mapping[str, Any], tensors: Mapping[str, Source], what: str
) -> Adapter:
    """Return the adapter of a parsed adapter_config.json and the tensors of its weight file.

    Headers only. Raises FormatError for a broken adapter, IncompatibleError for what is not taken.
    """
    where = f"{folder_name}/adapter_config.json"
    if "peft_type" not in config and {"r", "lora_alpha"} <= {*config} and _is_raw(tensors):
        config = {**config, "peft_type": "LORA"}
    settings, notes = _settings(config, what, where)
    saved, tying = config.get("modules_to_save") or [], config.get("ensure_weight_tying") or False
    if not isinstance(saved, list) or not all(type(name) is str and name for name in saved):
        raise FormatError(f"{where}: modules_to_save: expected names, found {saved!r:.80}")
    if type(tying) is not bool:
        raise FormatError(
            f"{where}: ensure_weight_tying: expected true or false, found {tying!r:.80}"
        )
    tying = tying and _embeds(saved, config.get("target_modules"))
    bias = config.get("bias") or "none"
    if bias not in ("none", "all", "lora_only"):
        raise FormatError(f"{where}: bias: expected none, all or lora_only, found {bias!r:.80}")
    held: dict[Where, dict[str, Source]] = {}
    wholes: dict[str, Source] = {}
    tokens: dict[str, Source] = {}
    under: set[str] = set()
    for key, source in _each_once(tensors, what).items():
        module, factor = _parsed(key, source, what)
        name = re.sub(r"(\.token_adapter)?\.base_layer(?=\.|$)", "", module)
        group = wholes
        if not factor and ".token_adapter.base_layer." in key:
            under.add(name)
        if factor:
            # wrappers around the module itself: those in its name are of modules above it
            depth = (len(module) - len(re.sub(r"(\.base_layer)+$", "", module))) // len(
                ".base_layer"
            )
            group = held.setdefault((name, depth), {})
        if factor == ROWS:
            group, factor, name = tokens, "", f"{name}.weight"
        if (factor or name) in group and (factor or not _same(group[name], source)):
            raise FormatError(f"{what}: {key}: a second tensor for the same: two adapters in one?")
        group[factor or name] = source
    held = {where: group for where, group in held.items() if group}
    if not held and not tokens:
        raise FormatError(f"{what}: {folder_name}: no factors of LoRA in the adapter")
    stacks, held = _stacks(held, what, notes)
    pairs = _paired(held, settings, what)
    rows = _numbered(tokens, settings.tokens, what)
    longest = max(map(len, pairs), default=0)
    patterns = *settings.rank_pattern, *settings.alpha_pattern
    if len(pairs) * sum(_steps(pattern, longest) for pattern in patterns) > MOST_STEPS:
        raise FormatError(
            f"{what}: rank_pattern and alpha_pattern: too many wildcards for {len(pairs)} names of"
            f" up to {longest} characters: {MERGE}"
        )
    still = [name for name in (*pairs, *stacks) if not settings.alpha and not settings.of(name)[1]]
    if still:
        raise IncompatibleError(
            f"{where}: lora_alpha is 0, so that nothing is added. verl's model merger writes 0"
            " where it finds no lora_train_meta.json: write the lora_alpha of the training:\n"
            + up_to_five(still)
        )
    ref, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not all(t is None or (type(t) is str and t == printable(t)) for t in (ref, revision)):
        raise FormatError(
            f"{what}: base_model_name_or_path, revision: {ref!r:.80}, {revision!r:.80}"
        )
    said = config.get("auto_mapping")
    named = said.get("base_model_class") if isinstance(said, dict) else None
    return Adapter(
        what, ref or None, revision or None, wholes, notes, pairs, settings, tuple(saved), tying,
        rows, stacks, bias, frozenset(under), (named,) if isinstance(named, str) else (),
    )  # fmt: skip


def _is_raw(tensors: Mapping[str, Source]) -> bool:
    """Return whether tensors are named as Tinker names them, whose config may say r and alpha."""
    found = re.compile(r"\.(unembed_tokens|experts\.w[123])\.lora_[AB]\.weight$")
    return any(found.search(key) for key in tensors)


def _stacks(
    held: Mapping[Where, dict[str, Source]], what: str, notes: list[str]
) -> tuple[dict[str, Pair], dict[Where, dict[str, Source]]]:
    """Take the 3-D factors of all experts out of an adapter's; those that hold nothing are gone.

    Tinker writes empty ones for projections that a model does not have.
    """
    stacks, rest, problems = {}, {}, []
    for (module, depth), group in held.items():
        if not any(len(source.shape) == 3 for source in group.values()):
            rest[module, depth] = group
            continue
        shapes = [group[name].shape for name in FACTORS[:2] if name in group]
        if set(group) != {*FACTORS[:2]} or depth or {len(shape) for shape in shapes} != {3}:
            problems.append(f"{module}: 3-D factors without the other")
            continue
        (many, rank, _), (others, _, other) = shapes
        if not any(source.numel for source in group.values()):
            notes.append(f"{module}: empty factors, left out")
        elif rank != other or not (many == others or 1 in (many, others)) or many == others == 1:
            problems.append(f"{module}: A {list(shapes[0])}, B {list(shapes[1])}")
        else:
            stacks[module] = Pair(group[FACTORS[0]], group[FACTORS[1]], False)
    if problems:
        raise FormatError(f"{what}: factors that make no product:\n{up_to_five(problems)}")
    return stacks, rest


def _paired(
    held: Mapping[Where, Mapping[str, Source]], settings: Settings, what: str
) -> dict[str, tuple[Pair, ...]]:
    """Return the factors of every module, the outermost wrapper first; refuse what is no pair."""
    pairs: dict[str, tuple[Pair, ...]] = {}
    problems = []
    extra = {MAGNITUDES: settings.dora, BIAS: settings.biased}
    flags = {
        key: f"{flag} is {str(extra[key]).lower()}"
        for key, flag in ((MAGNITUDES, "use_dora"), (BIAS, "lora_bias"))
    }
    for (module, depth), group in sorted(held.items()):
        factors = [group[name] for name in FACTORS if name in group]
        odd = [key for key, said in extra.items() if said != (key in group)]
        if set(group) - {*extra} not in ({*FACTORS[:2]}, {*FACTORS[2:]}):
            problems.append(f"{module}: {', '.join(group)} without the other factor")
        elif factors[0].shape[0] != factors[1].shape[1]:
            problems.append(f"{module}: A {list(factors[0].shape)}, B {list(factors[1].shape)}")
        elif len(pairs.get(module, ())) != depth:
            problems.append(f"{module}: factors inside others that are not there")
        elif odd:
            said = "but" if odd[0] in group else "no"
            problems.append(f"{module}: {flags[odd[0]]}, {said} {odd[0]}")
        elif wrong := [
            key for key in extra if key in group and group[key].shape != factors[1].shape[:1]
        ]:
            shapes = f"{list(group[wrong[0]].shape)}, expected {list(factors[1].shape[:1])}"
            problems.append(f"{module}: {wrong[0]} {shapes}")
        else:
            extras = group.get(MAGNITUDES), group.get(BIAS)
            found = Pair(factors[0], factors[1], FACTORS[2] in group, *extras)
            pairs[module] = (*pairs.get(module, ()), found)
    if problems:
        raise FormatError(f"{what}: factors that make no product:\n{up_to_five(problems)}")
    return pairs


def _numbered(
    tokens: Mapping[str, Source], said: list[int] | dict[str, list[int]] | None, what: str
) -> dict[str, tuple[Source, list[int]]]:
    """Return the rows that an adapter trains with their numbers; FormatError where they differ."""
    rows = {}
    problems = []
    for name, source in tokens.items():
        module = name.removesuffix(".weight")  # PEFT matches the ends of its name
        fits = [said] if isinstance(said, list) else [
            numbers for end, numbers in (said or {}).items() if module.endswith(end)
        ]  # fmt: skip
        if not fits or any(numbers != fits[0] for numbers in fits):
            problems.append(f"{name}: {len(fits)} lists of trainable_token_indices for its rows")
        elif len(fits[0]) != source.shape[0]:
            problems.append(f"{name}: {source.shape[0]} rows, {len(fits[0])} numbers")
        else:
            rows[name] = (source, fits[0])
    if said and not tokens:
        problems.append("trainable_token_indices: no rows of tokens in the adapter")
    if problems:
        raise FormatError(f"{what}: rows of tokens:\n{up_to_five(problems)}")
    return rows


# names of torch's wrappers, which its own savers leave away
WRAPPERS = re.compile(
    r"^module\.(?=.*base_model\.)"
    r"|(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\."
)
NAMED = re.compile(  # what PEFT's layers call an adapter in a state dict that is saved as it is
    r"\.(?:lora_[AB]\.([^.]+)\.(?:weight|bias)|lora_embedding_[AB]\.([^.]+)"
    r"|trainable_tokens_delta\.([^.]+)|lora_magnitude_vector\.([^.]+)(?:\.weight)?)$"
)


def _each_once(tensors: Mapping[str, Source], what: str) -> dict[str, Source]:
    """Return the tensors of an adapter without the wrappers' own names for what it holds whole.

    Where it saves embeddings (of another length than its base's), PEFT writes a whole module three
    times: under its name, which it reads, as a copy, and as it was. A state dict has the last two.
    Raises FormatError where the factors are those of several adapters.
    """
    bare: dict[str, Source] = {}
    for key, source in tensors.items():
        if not _same(bare.setdefault(name := WRAPPERS.sub("", key), source), source):
            raise FormatError(f"{what}: {key}: a second tensor for {name}")
    tensors = bare
    found = [NAMED.search(key) for key in tensors]
    names = {next(filter(None, match.groups())) for match in found if match} - {"weight"}
    if len(names) > 1:
        raise FormatError(
            f"{what}: two adapters in one ({', '.join(sorted(names)):.200}): PEFT saves each in a"
            " folder of its own, and takes one"
        )
    kept: dict[str, Source] = {}
    keys: dict[str, str] = {}
    for key, source in tensors.items():
        module, wrapper, rest = key.partition(".modules_to_save.")
        first, _, inner = rest.partition(".")
        rest = inner if first in names else rest
        plain = f"{module}.{rest}" if wrapper else key
        if plain in kept and not _same(kept[plain], source):
            raise IncompatibleError(f"{what}: {max(key, keys[plain], key=len)}: another weight than"
                                    f" {min(key, keys[plain], key=len)}")  # fmt: skip
        kept[plain], keys[plain] = source, key
    for key in [key for key in kept if ".original_module." in key]:
        if key.replace(".original_module.", ".") in kept:
            del kept[key]
    return kept


def _same(one: Source, other: Source) -> bool:
    if one is other:
        return True
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and digest_values(one) == digest_values(other)


def _embeds(saved: Sequence[str], targets: Any) -> bool:
    """Return whether PEFT takes what an adapter trains for the embeddings, which it then ties.

    It looks at the last parts of names in lists, and whether a pattern is one of those names.
    """
    if any(name.rpartition(".")[2] in EMBEDDINGS for name in saved):
        return True
    if isinstance(targets, str):
        return _is_harmless(targets) and any(re.fullmatch(targets, name) for name in EMBEDDINGS)
    named = targets if isinstance(targets, list) else []
    return any(str(name).rpartition(".")[2] in EMBEDDINGS for name in named)


def _parsed(key: str, source: Source, what: str) -> tuple[str, str]:
    """Return the module and the kind of factor of a key, or the name and "" of a whole weight."""
    found = re.fullmatch(
        r"base_model\.model\.([^.]+(?:\.[^.]+)*?)(?:"
        r"\.(lora_[AB])(?:\.[^.]+)?\.weight|\.(lora_embedding_[AB])(?:\.[^.]+)?"
        r"|\.(lora_magnitude_vector)(?:\.[^.]+)??(?:\.weight)?|\.(lora_B)(?:\.[^.]+)?(\.bias)"
        r"|\.(token_adapter)\.trainable_tokens_delta(?:\.[^.]+)?)?", key
    )  # fmt: skip
    if not found:
        raise FormatError(f"{what}: {key}: expected a name that begins with base_model.model.")
    module, factor = found[1], "".join(part for part in found.groups()[1:] if part)
    bare = module.replace(".token_adapter.base_layer.", ".")
    if re.search(r"(^|\.)(lora_|token_adapter|original_module|modules_to_save)", bare):
        raise IncompatibleError(f"{what}: {key}: no tensor of LoRA that is known here: {MERGE}")
    if not factor:
        if source.dtype not in STORAGE_DTYPE:
            raise IncompatibleError(f"{what}: {key}: {source.dtype}: dequantise it first")
        return module, ""
    flat = factor in (MAGNITUDES, BIAS)
    place = place_of(module) if factor in FACTORS[:2] and len(source.shape) == 3 else None
    if source.dtype in FLOATS and place is not None and place.number is None:
        return module, factor
    if source.dtype not in FLOATS or len(source.shape) != 2 - flat or not source.numel:
        kind = "no matrix of floats" if not flat else "no list of floats"
        kind = f"a convolution: {MERGE}" if len(source.shape) > 2 else kind
        raise IncompatibleError(f"{what}: {key}: {source.dtype} {list(source.shape)}: {kind}")
    return module, factor


def _settings(config: Mapping[str, Any], what: str, where: str) -> tuple[Settings, list[str]]:
    """Check a config; return what scalings depend on, and what is worth saying of the rest."""
    kind = str(config.get("peft_type")).rpartition(".")[2]
    if kind != "LORA":
        advice = UNMERGED if kind in UNMERGED_KINDS else f"if PEFT loads it, {MERGE}"
        advice = advice if config.get("peft_type") else "PEFT does not load it either"
        raise IncompatibleError(f"{what}: peft_type {kind:.40}, expected LORA: {advice}")
    problems = [f"{key}: {why}" for key, why in NOT_A_SUM.items() if config.get(key)]
    advice = f" (if nothing else is said, {MERGE})" if problems else ""
    advice = f" ({UNMERGED})" if any(map(config.get, UNMERGED_KEYS)) else advice
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(OTHER_BASE):
        how = "save_pretrained(path_initial_model_for_weight_conversion=...) converts it"
        how = "merge it into the base that it was made with" if start == "loftq" else how
        problems.append(f"init_lora_weights {start:.40} changed the base: {how}")
    elif start not in SAME_BASE:
        problems.append(f"init_lora_weights {start:.40}: not known here")
    if problems:
        raise IncompatibleError(
            f"{what}: LoRA of a kind that is not taken{advice}:\n{up_to_five(problems)}"
        )

    def taken(key: str, value: Any, fits: bool, expected: str) -> Any:
        if not fits:
            raise FormatError(f"{where}: {key}: expected {expected}, found {value!r:.80}")
        return value

    def number(key: str, value: Any) -> Any:
        if key.startswith("r"):
            fits = type(value) is int and 0 < value <= MOST_RANK
            return taken(key, value, fits, f"a rank from 1 to {MOST_RANK}")
        fits = type(value) in (int, float) and abs(value) < MOST_ALPHA
        return float(taken(key, value, fits, f"a number below {MOST_ALPHA:g}"))

    def patterns(key: str) -> dict[str, Any]:
        held = taken(key, config.get(key) or {}, isinstance(config.get(key) or {}, dict), "a map")
        for pattern in held:
            expected = f"a short pattern of at most {MOST_REPEATS} repeats"
            taken(key, pattern, _is_harmless(pattern), expected)
        return {pattern: number(key, value) for pattern, value in held.items()}

    flags = {key: config.get(key) or False for key in FLAGS}
    for key, flag in flags.items():
        taken(key, flag, type(flag) is bool, "true or false")
    wrapped = config.get("target_parameters") or []
    listed = isinstance(wrapped, list) and all(type(name) is str and name for name in wrapped)
    taken("target_parameters", wrapped, listed, "a list of names")
    novel = [key for key in config if key not in KNOWN and key not in NOT_A_SUM and config[key]]
    # of another version of PEFT: switches and settings may change what is added, numbers hardly
    switches = [key for key in novel if key.startswith("use_") or isinstance(config[key], NOVEL)]
    if switches:
        version = config.get("peft_version")
        made = f", written by PEFT {version:.20}" if isinstance(version, str) else ""
        raise IncompatibleError(
            f"{where}{made}: not known here, and perhaps it changes what is added: with that PEFT"
            f" {MERGE}:\n" + up_to_five([f"{key}: {config[key]!r:.80}" for key in switches])
        )
    notes = [f"adapter_config.json: {key}: not known, ignored" for key in novel]
    r, alpha = number("r", config.get("r", 8)), number("lora_alpha", config.get("lora_alpha", 8))
    maps = patterns("rank_pattern"), patterns("alpha_pattern")
    rslora, turned, dora, biased = flags.values()
    tokens = config.get("trainable_token_indices")
    lists: list[Any] = list(tokens.values()) if isinstance(tokens, dict) else [tokens]
    for numbers in lists if tokens is not None else ():
        fits = isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
        fits = fits and len(dict.fromkeys(numbers)) == len(numbers)
        taken("trainable_token_indices", tokens, fits, "different rows, by number from 0")
    pairs = ("use_dora", "target_parameters"), ("lora_bias", "target_parameters")
    for one, other in (*pairs, ("use_dora", "lora_bias")):
        if config.get(one) and config.get(other):
            raise IncompatibleError(f"{what}: {one} with {other}, which PEFT does not load either")
    return Settings(r, alpha, *maps, rslora, turned, wrapped, dora, biased, tokens), notes


def _is_harmless(pattern: str) -> bool:
    """Return whether a text is a regular expression that cannot take very many steps."""
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError):
        return False
    repeats = len(re.findall(r"[*+{]", pattern))
    few = len(pattern) <= MOST_SIGNS and repeats <= MOST_REPEATS
    return few and not re.search(r"\)[*+{]", pattern)  # nor a group that is repeated


def _steps(pattern: str, length: int) -> int:
    """Return a bound on the ways in which a pattern can be tried on a name of a length."""
    repeats, forks = (len(re.findall(signs, pattern)) for signs in (r"[*+{]", r"[?|]"))
    return comb(length + 1, repeats + 1) << forks
