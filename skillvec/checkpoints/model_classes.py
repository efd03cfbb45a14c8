"""Classes of transformers: a model of a config.json without memory, its shapes and ties."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from skillvec.checkpoints.transformers_layouts import Shapes, converted, model_types
from skillvec.errors import needs
from skillvec.files.views import Index

COUNTS = r"(.*_)?(layers?|depths?|blocks)"  # keys of a config that count layers
MANY = 1024  # layers of a part of a model, of which the files may hold nothing


def need_model_classes(what: str) -> None:
    """Raise UsageError, which says what they are asked, where there are no classes of models.

    Called before what takes their errors for those of a config.
    """
    with needs("hf", what):
        import torch  # noqa: F401
        import transformers  # noqa: F401


def model_of(config: Mapping[str, Any], most_layers: int, name: str | None = None) -> Any:
    """Return the model of a config.json, without memory for its weights.

    It is of the class `name`, else of the first in `architectures`, else what transformers takes
    for language models. A class of a model within takes the config within. Raises ValueError where
    it has more than `most_layers` layers (a part of it, as an encoder, no fewer than MANY), so that
    it cannot keep us busy, and whatever transformers and its models raise on a config that is none
    of theirs.
    """
    import torch
    import transformers

    layers, most = max(_counted_layers(config), default=0), max(most_layers, MANY)
    if layers > most:
        raise ValueError(f"{layers} layers, but {most_layers} tensors")
    said = _decoded(config)
    said = {k: v for k, v in said.items() if k not in ("model_type", "quantization_config")}
    named = config.get("architectures")
    name = name or (named[0] if isinstance(named, list) and named else None)
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    made = transformers.AutoConfig.for_model(config["model_type"], **said)
    layers = _text_layers(made)
    if layers > most_layers:
        raise ValueError(f"{layers} layers, but {most_layers} tensors")
    with torch.device("meta"):
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            inner = (getattr(made, key) for key in getattr(made, "sub_configs", ()))
            wanted = kind.config_class or type(made)
            return kind(next((c for c in (made, *inner) if isinstance(c, wanted)), made))
        auto: Any = transformers.AutoModelForCausalLM
        return auto.from_config(made)


def _counted_layers(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield the numbers that a config.json, or one within it, gives of layers of any kind."""
    pending: list[tuple[bool, Any]] = [(False, config)]
    while pending:
        counts, value = pending.pop()
        if isinstance(value, Mapping):  # LXMERT counts its layers by what they do
            pending += [
                (bool(counts or re.fullmatch(COUNTS, str(key))), inner)
                for key, inner in value.items()
            ]
        elif isinstance(value, list):
            pending += [(counts, inner) for inner in value]
        elif counts and isinstance(value, int):
            yield value


def _text_layers(made: Any) -> int:
    """Return how many layers the language model of a config has, 0 where no number says it."""
    try:
        layers = getattr(made.get_text_config(), "num_hidden_layers", 0)
    except ValueError:  # it has several
        return 0
    return layers if isinstance(layers, int) else 0


class ModelClass(NamedTuple):
    """A class of transformers for a config.json: what a model of it holds in memory.

    `shapes` are those of its parameters and saved buffers; those of one module are in the order of
    their declaration, in which PEFT wraps them, the first innermost. `tied` says which are one
    (head -> embedding), `turned` are the modules whose weights lie in x out for PEFT (Conv1D,
    experts that say so), `fresh` makes the entries of the mapping by which it loads files (they
    hold state) and `saved` the names and shapes that it gives them in a file.
    """

    name: str
    shapes: dict[str, Index]
    tied: dict[str, str]
    turned: frozenset[str]
    fresh: Callable[[], list[Any]]
    saved: Callable[[], dict[str, Index]]

    def file_name(self, name: str) -> str | None:
        """Return the name that a tensor has in a file, None where it is not whole there."""
        made, _ = converted(self.saved(), self.fresh(), self.shapes)
        found = made.get(name)
        return found if isinstance(found, str) else None

    def loaded_names(self, names: Shapes) -> dict[str, str]:
        """Return what names in a file, perhaps of old, are called in memory, if whole there."""
        made, _ = converted(names, self.fresh(), self.shapes)
        return {file: name for name, file in made.items() if isinstance(file, str)}


def classes_of(
    config: Mapping[str, Any], most_layers: int, named: Sequence[str] = ()
) -> Iterator[ModelClass]:
    """Yield the classes as which transformers loads a config.json, the likely ones first.

    Those `named`, that of the config, those of its Auto classes for language, vision and text,
    encoder and decoder, the model without a head, and the language model within. Classes that do
    not take the config are left out; all are, where transformers knows none.
    """
    done = set()
    for name in _class_names(config, named):
        found = None
        with contextlib.suppress(Exception):  # whatever a model's code raises on such a config
            model = model_of(config, most_layers, name)
            if type(model).__name__ not in done:
                found = _described(model)
        if found is not None:
            done.add(found.name)
            yield found


def _class_names(config: Mapping[str, Any], named: Sequence[str]) -> list[str]:
    from transformers.models.auto import modeling_auto as auto

    own, *within = model_types(config) or [""]
    classes = config.get("architectures")
    found = [*named, *(classes if isinstance(classes, list) else ())]
    tables = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_MAPPING_NAMES,
    )  # fmt: skip
    found += [table.get(own) for table in tables]
    found += [auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) for kind in within]
    return list(dict.fromkeys(name for name in found if isinstance(name, str)))


def _described(model: Any) -> ModelClass:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.pytorch_utils import Conv1D

    held = model.state_dict()

    @cache
    def saved() -> dict[str, Index]:
        files = revert_weight_conversion(model, dict(held))
        return {name: tuple(tensor.shape) for name, tensor in files.items()}

    return ModelClass(
        type(model).__name__,
        {name: tuple(tensor.shape) for name, tensor in held.items()},
        dict(model.all_tied_weights_keys),
        frozenset(
            name
            for name, module in model.named_modules()
            if isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
        ),
        lambda: get_model_conversion_mapping(model),
        saved,
    )


def _decoded(value: Any) -> Any:
    """Return a config with infinities where transformers writes {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def tied_weights(config: Mapping[str, Any], most_layers: int) -> dict[str, str] | None:
    """Return the weights that the model of a config.json shares with another: head -> embedding.

    None where transformers makes no model of it; UsageError where it is missing.
    """
    need_model_classes("telling which weights the classes of models tie")
    try:
        return dict(model_of(config, most_layers).all_tied_weights_keys)
    except Exception:  # whatever a model's code raises on a config of others
        return None


def shapes_of(config: Mapping[str, Any], most_layers: int) -> dict[str, Index] | None:
    """Return the shapes of the weights of the model of a config.json, by name.

    None where transformers makes no model of it; UsageError where it is missing.
    """
    need_model_classes("telling the shapes of the weights that a config.json is of")
    try:
        made = model_of(config, most_layers).state_dict()
        return {name: tuple(tensor.shape) for name, tensor in made.items()}
    except Exception:  # whatever a model's code raises on a config of others
        return None


def ties(config: Mapping[str, Any]) -> tuple[bool, bool] | None:
    """Return whether transformers' config ties embeddings: of the model, and of one within it.

    None where it cannot tell; UsageError where it is missing.
    Its config class is made of the keys about that alone: no other decides, and a class may build
    lists as long as a number that someone wrote.
    """

    def kept(of: Mapping[str, Any], depth: int = 3) -> dict[str, Any]:
        return {
            key: kept(value, depth - 1) if isinstance(value, Mapping) else value
            for key, value in of.items()
            if (isinstance(value, Mapping) and depth and key.endswith(("_config", "coder")))
            or (key == "model_type" and isinstance(value, str))
            or ("tie" in key and (value is None or isinstance(value, bool)))
        }

    with needs("hf", "telling whether a class of configs ties the head to the embeddings"):
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    try:
        made = CONFIG_MAPPING[config["model_type"]].from_dict(kept(config))
    except Exception:  # another version, other code: whatever a config class raises
        return None
    within = [inner for inner in vars(made).values() if hasattr(inner, "to_diff_dict")]
    own, *inside = [bool(getattr(c, "tie_word_embeddings", False)) for c in (made, *within)]
    return own, any(inside)


def can_tie(name: str) -> bool | None:
    """Return whether a class of transformers has weights to tie; None where there is none so."""
    need_model_classes("telling whether a class of models has weights to tie")
    import transformers

    try:
        kind = getattr(transformers, name, None)
    except Exception:  # without what the class needs
        return None
    return None if kind is None else bool(getattr(kind, "_tied_weights_keys", None))


def likely_configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a config and, of one that is but a model type, what its classes may be.

    Of a stored vector's base no more than the type is known; mappings hang on classes, and on
    models within, too.
    """
    yield config
    own = config.get("model_type")
    if not isinstance(own, str) or "architectures" in config or len(model_types(config)) > 1:
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        inner = getattr(CONFIG_MAPPING[own], "sub_configs", {})
    except KeyError:
        return
    within = {key: {"model_type": getattr(kind, "model_type", "")} for key, kind in inner.items()}
    for name in _class_names({**config, **within}, ()):
        yield {**config, **within, "architectures": [name]}
