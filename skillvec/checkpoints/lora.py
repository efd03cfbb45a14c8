"""PEFT LoRA adapters as they are in their files: factors by module, weights that are saved whole.

A delta is scaling * B A, made block by block where it is read, never held whole. What of it a base
takes up is found when the adapter is fitted to one (lora_fit). Wrappers of torch, names of adapters
and copies that PEFT writes twice are seen through. Refused by name: factors that make no product,
convolutions, rows without numbers.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from skillvec.checkpoints.lora_deltas import LowRank, Pair
from skillvec.checkpoints.lora_experts import parse_expert
from skillvec.checkpoints.lora_settings import MERGE, LoraSettings, read_settings
from skillvec.errors import FormatError, IncompatibleError, up_to_five
from skillvec.files.tensors import Source, digest_values
from skillvec.ops.kernels import FLOATS, STORAGE_DTYPE

FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
MAGNITUDES, BIAS, ROWS = "lora_magnitude_vector", "lora_B.bias", "token_adapter"  # beside factors
# names of torch's wrappers, which its own savers leave away
WRAPPERS = re.compile(
    r"^module\.(?=.*base_model\.)"
    r"|(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\."
)
NAMED = re.compile(  # what PEFT's layers call an adapter in a state dict that is saved as it is
    r"\.(?:lora_[AB]\.([^.]+)\.(?:weight|bias)|lora_embedding_[AB]\.([^.]+)"
    r"|trainable_tokens_delta\.([^.]+)|lora_magnitude_vector\.([^.]+)(?:\.weight)?)$"
)
Where = tuple[str, int]  # a module, and the depth of a wrapper in it


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, checked as far as it can be without its base.

    `whole` are weights that it brings (modules_to_save, resized embeddings, trained biases). `rows`
    are those that it puts into a weight, and their numbers (trainable_token_indices).
    """

    what: str
    whole: dict[str, Source]
    notes: list[str]
    pairs: dict[str, tuple[Pair, ...]]  # by module, the outermost wrapper first
    settings: LoraSettings
    rows: Mapping[str, tuple[Source, list[int]]] = field(default_factory=dict)
    stacks: Mapping[str, Pair] = field(default_factory=dict)  # 3-D factors of all experts
    under: frozenset[str] = frozenset()  # weights under rows of theirs: the base's own

    @property
    def base_ref(self) -> str | None:
        """The base that it was made for, as its config says."""
        return self.settings.base_ref

    @property
    def revision(self) -> str | None:
        """The revision of that base."""
        return self.settings.revision

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes of the model that it was made on, where its config says so."""
        return self.settings.classes

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
        holders = {name.rpartition(".")[0] for name in there if self.settings.wraps(name)}
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
            found += [name] if any(module.endswith(self.settings.saved) for module in above) else []
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


def open_adapter(
    folder_name: str, config: Mapping[str, Any], tensors: Mapping[str, Source], what: str
) -> Adapter:
    """Return the adapter of a parsed adapter_config.json and the tensors of its weight file.

    Headers only. Raises FormatError for a broken adapter, IncompatibleError for what is not taken.
    """
    where = f"{folder_name}/adapter_config.json"
    if "peft_type" not in config and {"r", "lora_alpha"} <= {*config} and _is_raw(tensors):
        config = {**config, "peft_type": "LORA"}
    settings, notes = read_settings(config, what, where)
    group = _sort(tensors, what)
    if not group.factors and not group.tokens:
        raise FormatError(f"{what}: {folder_name}: no factors of LoRA in the adapter")
    stacks, factors = _take_stacks(group.factors, what, notes)
    pairs = _pair_factors(factors, settings, what)
    rows = _number_rows(group.tokens, settings.tokens, what)
    settings.refuse_costly([*pairs], what)
    still = [name for name in (*pairs, *stacks) if not settings.alpha and not settings.of(name)[1]]
    if still:
        raise IncompatibleError(
            f"{where}: lora_alpha is 0, so that nothing is added. verl's model merger writes 0"
            " where it finds no lora_train_meta.json: write the lora_alpha of the training:\n"
            + up_to_five(still)
        )
    under = frozenset(group.under)
    return Adapter(what, group.whole, notes, pairs, settings, rows, stacks, under)


class _Sorted(NamedTuple):
    """The tensors of an adapter: factors by module and wrapper, weights, rows by weight.

    `under` are weights that lie under rows of theirs.
    """

    factors: dict[Where, dict[str, Source]]
    whole: dict[str, Source]
    tokens: dict[str, Source]
    under: set[str]


def _sort(tensors: Mapping[str, Source], what: str) -> _Sorted:
    """Sort the tensors of an adapter by what their names say."""
    factors: defaultdict[Where, dict[str, Source]] = defaultdict(dict)
    found = _Sorted(factors, {}, {}, set())
    for key, source in _unwrap_names(tensors, what).items():
        module, factor = _parse_name(key, source, what)
        name = re.sub(r"(\.token_adapter)?\.base_layer(?=\.|$)", "", module)
        group, kind = found.whole, name
        if factor == ROWS:
            group, factor, kind = found.tokens, "", f"{name}.weight"
        elif factor:
            # wrappers around the module itself: those in its name are of modules above it
            bare = re.sub(r"(\.base_layer)+$", "", module)
            group = factors[name, (len(module) - len(bare)) // len(".base_layer")]
            kind = factor
        elif ".token_adapter.base_layer." in key:
            found.under.add(name)
        if kind in group and (factor or not hold_same(group[kind], source)):
            raise FormatError(f"{what}: {key}: a second tensor for the same: two adapters in one?")
        group[kind] = source
    return found


def _is_raw(tensors: Mapping[str, Source]) -> bool:
    """Return whether tensors are named as Tinker names them, whose config may say r and alpha."""
    found = re.compile(r"\.(unembed_tokens|experts\.w[123])\.lora_[AB]\.weight$")
    return any(found.search(key) for key in tensors)


def _take_stacks(
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


def _pair_factors(
    held: Mapping[Where, Mapping[str, Source]], settings: LoraSettings, what: str
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


def _number_rows(
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


# ------------------------------------------------------------------------------------------ names


def _unwrap_names(tensors: Mapping[str, Source], what: str) -> dict[str, Source]:
    """Return the tensors of an adapter without the wrappers' own names for what it holds whole.

    Where it saves embeddings (of another length than its base's), PEFT writes a whole module three
    times: under its name, which it reads, as a copy, and as it was. A state dict has the last two.
    Raises FormatError where the factors are those of several adapters.
    """
    bare: dict[str, Source] = {}
    for key, source in tensors.items():
        if not hold_same(bare.setdefault(name := WRAPPERS.sub("", key), source), source):
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
        if plain in kept and not hold_same(kept[plain], source):
            raise IncompatibleError(f"{what}: {max(key, keys[plain], key=len)}: another weight than"
                                    f" {min(key, keys[plain], key=len)}")  # fmt: skip
        kept[plain], keys[plain] = source, key
    for key in [key for key in kept if ".original_module." in key]:
        if key.replace(".original_module.", ".") in kept:
            del kept[key]
    return kept


def hold_same(one: Source, other: Source) -> bool:
    """Return whether two sources hold the same bytes; reads them where they may."""
    if one is other:
        return True
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and digest_values(one) == digest_values(other)


def _parse_name(key: str, source: Source, what: str) -> tuple[str, str]:
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
    place = parse_expert(module) if factor in FACTORS[:2] and len(source.shape) == 3 else None
    if source.dtype in FLOATS and place is not None and place.number is None:
        return module, factor
    if source.dtype not in FLOATS or len(source.shape) != 2 - flat or not source.numel:
        kind = "no matrix of floats" if not flat else "no list of floats"
        kind = f"a convolution: {MERGE}" if len(source.shape) > 2 else kind
        raise IncompatibleError(f"{what}: {key}: {source.dtype} {list(source.shape)}: {kind}")
    return module, factor
