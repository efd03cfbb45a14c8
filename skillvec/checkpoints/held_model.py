"""Which deltas an adapter can hold, and what PEFT calls them: asked of the base's model class.

Hides the names of the model that PEFT will load (`Held.views`: transformers' own mapping from files
to memory, on the meta device), which modules and parameters take factors there, which modules are
saved whole, and how PEFT matches names: by their ends. What it would match beside what is meant is
left out or refused by name. Nothing here reads values, but for two tied tensors of a base that
stores both.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.layouts import Bridge, viewed_specs
from skillvec.checkpoints.model_classes import model_of, need_model_classes
from skillvec.checkpoints.ties import same_bytes
from skillvec.checkpoints.transformers_layouts import all_of, converted, drop_partial
from skillvec.errors import IncompatibleError, UsageError, up_to_five
from skillvec.files.tensors import Source
from skillvec.files.views import Index, View

NOT_FOUND = "not found"  # status of names that the model does not have
LEFT_OUT = "left out"
EMBEDDINGS = ("embed_tokens", "lm_head")  # names by which PEFT knows a tie
# PEFT takes these ends of target_modules for experts of a release that kept them one by one, and
# looks for the fused parameter instead: such layers are named by their parameter
FORMER = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
# PEFT gives no factors to these, whose kernels read their weights themselves
NO_FACTORS = dict.fromkeys(
    ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), ("conv1d", "out_proj")
)
# what PEFT saves whole beside the adapter, asked or not
HEADS = {
    "SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}  # fmt: skip


class Hold(NamedTuple):
    """How an adapter holds the delta of a weight: why not, else as factors or whole.

    `place` is the module of the factors, or the parameter where PEFT wraps that (`kind`: linear,
    embedding, parameter, whole); `turned` says that factors are those of the transpose.
    """

    why: str = ""
    status: str = "held"
    kind: str = "linear"
    place: str = ""
    turned: bool = False

    @property
    def has_factors(self) -> bool:
        return not self.why and self.kind != "whole"


def _left(why: str) -> Hold:
    return Hold(why, LEFT_OUT)


class Held:
    """The model of a base as transformers holds it, without its weights.

    `weights` are its parameters and saved buffers on the meta device, by all their names.
    """

    def __init__(self, base: Checkpoint) -> None:
        self.base, self.model = base, _model_of(base)
        self.modules = dict(self.model.named_modules())
        self._kinds = {name: _kind(module) for name, module in self.modules.items()}
        self.weights = dict(self.model.state_dict(keep_vars=True))
        self._views = self.views({name: tuple(spec.shape) for name, spec in base.items()})
        self.tied = self._tied()

    def views(self, files: Mapping[str, Index]) -> dict[str, View]:
        """Return weights in memory as views over tensors under the names of files.

        A tensor of which only a part would go somewhere goes nowhere.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping

        known = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        made, _ = converted(files, get_model_conversion_mapping(self.model), known)
        found = {}
        for name, how in made.items():
            if isinstance(how, str) and name not in known:
                name = how if how in known else self._prefixed(name)
            if name in known:
                found[name] = how if isinstance(how, View) else all_of(how, files[how])
        return drop_partial(found, files)

    def _prefixed(self, name: str) -> str:
        """Return a name with the prefix of the model without its head, or without it, as loading
        does."""
        prefix = f"{self.model.base_model_prefix}."
        return name.removeprefix(prefix) if name.startswith(prefix) else prefix + name

    def _tied(self) -> dict[str, tuple[str, ...]]:
        """Return the names of weights that are one -> all of them.

        Where the base stores two that differ, transformers does not tie them.
        """
        groups: dict[int, list[str]] = defaultdict(list)
        for name, weight in self.weights.items():
            groups[id(weight)].append(name)
        one = {name: group for group in groups.values() for name in group}
        for head, source in self.model.all_tied_weights_keys.items():
            if head in one and source in one and one[head] is not one[source]:
                one[source] += one[head]
                one |= dict.fromkeys(one[head], one[source])
        stored = self.sources(name for name, group in one.items() if len(group) > 1)
        found = {}
        for name, group in one.items():
            there = [stored[other] for other in group if other in stored]
            if len(group) > 1 and all(same_bytes(there[0], other) for other in there[1:]):
                found[name] = tuple(group)
        return found

    def sources(self, names: Iterable[str]) -> dict[str, Source]:
        """Return the base's tensors by these names of the model, as far as it stores them."""
        views = {name: self._views[name] for name in names if name in self._views}
        return viewed_specs(Bridge(views, {}, {}, [], {}, []), self.base)

    def made_of(self, name: str) -> str:
        """Return the weight that is made of a tensor of the base and of others, "" for none."""
        made = (whole for whole, view in self._views.items() if name in view.sources)
        return next(made, "")

    @property
    def task(self) -> str | None:
        """PEFT's task of the class, None where it has none for it."""
        from transformers.models.auto import modeling_auto as auto

        name, kind = type(self.model).__name__, self.model.config.model_type
        if name.endswith("ForCausalLM"):
            return "CAUSAL_LM"
        tables: dict[str, Mapping[str, Any]] = {
            "CAUSAL_LM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            "SEQ_2_SEQ_LM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
            "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            "TOKEN_CLS": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
            "QUESTION_ANS": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
            "FEATURE_EXTRACTION": auto.MODEL_MAPPING_NAMES,
        }
        fits = (task for task, table in tables.items() if table.get(kind) == name)
        task = next(fits, None)
        return None if task == "FEATURE_EXTRACTION" and "For" in name else task

    # ------------------------------------------------------------------------------ what is whole

    def whole_modules(self, asked: Sequence[str]) -> list[str]:
        """Return the modules that PEFT saves whole: those that are asked for, and heads of tasks.

        Of tied ones all are. Raises UsageError for names of no module, or of what cannot be saved.
        """
        names = [name for name, _ in self.model.named_modules(remove_duplicate=False) if name]
        found = set()
        for name in asked:
            matched = [full for full in names if _ends(full, name)]
            if not matched:
                last = name.rpartition(".")[2]
                alike = [full for full in names if last and last in full.rpartition(".")[2]]
                raise UsageError(
                    f"save_module {name}: no module of {type(self.model).__name__} is called so"
                    + (f": is one of these meant?\n{up_to_five(alike)}" if alike else "")
                )
            found.update(matched)
        heads = HEADS.get(self.task or "", ())
        found.update(name for name in names if name.endswith(heads) and heads)
        for name in [name for name in self.tied if _within(name, found)]:
            found.update(other.rpartition(".")[0] for other in self.tied[name])
        # PEFT goes by the ends of names, with no regard for dots
        found.update(name for name in names if found and name.endswith(tuple(found)))
        outer = [name for name in names if name in found and not _within(name, found)]
        for name in outer:
            kind = type(self.model.get_submodule(name)).__name__
            if kind in ("ModuleList", "ModuleDict"):
                raise UsageError(
                    f"save_module {name}: a {kind}, which PEFT does not save: name what is in it"
                )
        return outer

    def within(self, modules: Iterable[str]) -> list[str]:
        """Return the names of all weights of modules."""
        inside = set(modules)
        return [name for name in self.weights if _within(name, inside)]

    # --------------------------------------------------------------------------- what has factors

    def hold(self, name: str, shape: Index, saved: Sequence[str], embed_lora: bool) -> Hold:
        """Say how the delta of a weight is held, where `saved` modules are saved whole."""
        module, _, leaf = name.rpartition(".")
        kind, owner = "parameter", self.modules.get(module)
        if name in self.weights and _within(name, set(saved)):
            return Hold(status="whole", kind="whole")
        if not 2 <= len(shape) <= 3:
            return _left(f"{len(shape)} dimensions, a matrix has 2")
        if name not in self.weights:
            if fused := self.made_of(name):
                return _left(f"of {fused}, of which the vector has a part")
            return Hold(f"no module of {self.base.model_type} has it", NOT_FOUND)
        if any(re.match(rf"(^|.*\.){other}($|\..*)", module) for other in saved):
            return _left("PEFT takes its name for a module that is saved whole")
        if name in self.tied:
            return self._hold_tied(name, embed_lora)
        last = module.rpartition(".")[2]
        if last in NO_FACTORS.get(self.model.config.model_type, ()):
            return _left(f"PEFT gives no factors to it in this model: --save-module {last}")
        if leaf == "weight" and len(shape) == 2:
            kind = self._kinds.get(module, "parameter")
        if kind == "embedding":
            return Hold(kind=kind, place=module, turned=True) if embed_lora else _left(
                "an embedding"
            )  # fmt: skip
        if kind in ("linear", "turned") and last not in self._former():
            return Hold(place=module, turned=kind == "turned")
        return self._hold_parameter(name, shape, owner)

    def _former(self) -> tuple[str, ...]:
        from transformers import conversion_mapping

        kind = self.model.config.model_type
        former = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
        return FORMER.get({**former, "mixtral": "mixtral"}.get(kind, ""), ())  # as PEFT looks it up

    def _hold_tied(self, name: str, embed_lora: bool) -> Hold:
        """Factors of one of several names go into the one weight, as PEFT merges them.

        Those of an embedding if asked for, and of a linear layer that all of its names are (in
        blocks that layers share).
        """
        modules = [other.rpartition(".")[0] for other in self.tied[name]]
        there = [module for module in modules if module in self._kinds]
        kinds = [self._kinds[module] for module in there]
        if embed_lora and "embedding" in kinds:
            return Hold(kind="embedding", place=there[kinds.index("embedding")], turned=True)
        if set(kinds) in ({"linear"}, {"turned"}) and there[0].rpartition(".")[2] not in (
            *self._former(), *NO_FACTORS.get(self.model.config.model_type, ())
        ):  # fmt: skip
            return Hold(place=there[0], turned=kinds[0] == "turned")
        return _left("tied: a delta would change the other weight too")

    def _hold_parameter(self, name: str, shape: Index, owner: Any) -> Hold:
        """Experts in one parameter, and matrices of modules that are not linear layers."""
        from torch import nn

        module, _, leaf = name.rpartition(".")
        turned = len(shape) == 3 and bool(getattr(owner, "is_transposed", False))
        kind = f"weight of a {type(owner).__name__}" if leaf == "weight" else "parameter"
        convolution = isinstance(owner, nn.modules.conv._ConvNd)
        if (
            convolution
            or leaf.endswith("bias")
            or (len(shape) == 2 and not leaf.endswith("weight"))
        ):
            return _left(f"the {kind}, not of a linear module")
        if not module:
            return _left("a parameter of the model itself, which PEFT does not wrap")
        if len(shape) == 3 and min(shape) == 1:
            return _left(f"{list(shape)}, no stack of matrices")
        if "turned" in self._kinds.values():
            return _left(f"the {kind}, which PEFT does not wrap beside layers that lie turned")
        if any(p.dim() > 1 for _, below in owner.named_children() for p in below.parameters()):
            return _left(f"the {kind}, and PEFT merges nothing below a module that it wraps")
        if any(_ends(other, name) and other != name for other in self.weights):
            return _left(f"the {kind}, whose name PEFT takes for that of others too")
        return Hold(kind="parameter", place=name, turned=turned)

    # -------------------------------------------------------------------------- how PEFT names it

    def keys(self, places: Iterable[str]) -> dict[str, str]:
        """Return what PEFT calls the factors of modules and parameters, before `.lora_A`.

        It nests the wrappers of a module's parameters in the order of their declaration.
        """
        held = set(places)
        wraps: dict[str, list[str]] = defaultdict(list)
        for name in self.weights:
            if name in held:
                wraps[name.rpartition(".")[0]].append(name)
        keys = {}
        for place in held:
            module = place.rpartition(".")[0] if place in self.weights else place
            behind = wraps[module][wraps[module].index(place) + 1 :] if place != module else ()
            keys[place] = f"base_model.model.{module}" + ".base_layer" * len(behind)
        return keys

    def as_loaded(self, held: Mapping[str, Hold]) -> dict[str, Hold]:
        """Return how deltas are held, without the factors that PEFT loads under other names."""
        found, missed = dict(held), {"": ""}
        while missed:  # which wrappers lie within others changes with each that is left out
            factors = {hold.place: hold for hold in found.values() if hold.has_factors}
            missed = self._renamed_by_peft(factors)
            for name, hold in found.items():
                if hold.has_factors and hold.place in missed:
                    module = hold.place if hold.kind != "parameter" else name.rpartition(".")[0]
                    found[name] = _left(
                        f"PEFT loads its factors as those of {missed[hold.place]}, by transformers'"
                        f" renamings of old names: --save-module {module} holds it"
                    )
        return found

    def _renamed_by_peft(self, factors: Mapping[str, Hold]) -> dict[str, str]:
        """Return the modules of which PEFT does not find the factors -> where it looks instead.

        It runs transformers' renamings of files over the keys of an adapter, though these are of
        memory, and takes back what only takes a prefix away. Not all renamings leave such names be.
        """
        from transformers import conversion_mapping as registry
        from transformers.core_model_loading import (
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        entries_of: Callable[[str], Any] = registry.get_checkpoint_conversion_mapping
        if entries_of(self.model.config.model_type) is None:
            return {}
        renamings = [
            WeightRenaming("base_model.model.model.", "model."),
            WeightRenaming("base_model.model.", ""),
            WeightRenaming(r"(lora_[^\.]*)", r"\1.default"),
        ]
        entries = registry.get_model_conversion_mapping(self.model)
        renamings += [entry for entry in entries if isinstance(entry, WeightRenaming)]
        ends = {"embedding": "lora_embedding_A"}
        places = {
            f"{key}.{ends.get(factors[place].kind, 'lora_A.weight')}": place
            for place, key in self.keys(factors).items()
        }
        found = {}
        for key in sorted(places, key=dot_natural_key):  # some renamings wait for an earlier key
            renamed, _ = rename_source_key(key, renamings, [])
            renamed = "".join(renamed.rsplit(".default", 1))
            if not key.endswith(renamed) and f"base_model.model.{renamed}" != key:
                found[places[key]] = renamed.partition(".lora_")[0]
        return found

    def stays_tied(self, saved: Sequence[str], untied: Mapping[str, str]) -> bool:
        """Return whether PEFT can keep an embedding and its head one weight, both saved whole."""
        ends = {name: name.rpartition(".")[2] for name in saved}
        found = [self.tied[f"{name}.weight"] for name in saved if f"{name}.weight" in self.tied]
        return (
            any(end in EMBEDDINGS for end in ends.values())
            and bool(found)
            and not any(set(group) & set(untied) for group in found)
        )

    def beside(self, modules: Iterable[str]) -> list[str]:
        """Return the modules that PEFT would match by the names of others, which end theirs."""
        named = set(modules)

        def ends(name: str) -> bool:
            parts = name.split(".")
            return any(".".join(parts[i:]) in named for i in range(1, len(parts)))

        return [name for name in self.modules if name not in named and ends(name)]


def _kind(module: Any) -> str:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds = {nn.Linear: "linear", Conv1D: "turned", nn.Embedding: "embedding"}
    return next((kind for of, kind in kinds.items() if isinstance(module, of)), "parameter")


def _ends(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")


def _within(name: str, modules: set[str]) -> bool:
    """Return whether a name lies below one of the modules."""
    parts = name.split(".")
    return any(".".join(parts[:i]) in modules for i in range(1, len(parts)))


def _model_of(base: Checkpoint) -> Any:
    """Return the model of the base's config, without memory for its weights."""
    where = f"{base.ref}: config.json (it tells linear weights from others)"
    if base.model_type is None:
        raise IncompatibleError(f"{where}: has no model_type, or is not there")
    need_model_classes(f"{where}: making the model of it")
    try:
        return model_of(base.config, len(base))
    except Exception as error:  # whatever a model's code raises on a config of others
        problem = str(error).partition(". ")[0][:200]  # it goes on to list every model there is
        raise IncompatibleError(f"{where}: transformers makes no model of it: {problem}") from None
