"""transformers' registry of checkpoint layouts, run on names and shapes instead of tensors.

Hides transformers' conversion objects: which of them a config.json names, how they rename, and
what their operations make, as views. `between` turns two sets of such views, of what is there and
of what is wanted, into views of the wanted tensors over those that are there. Taken are operations
that stack, join, cut and transpose whole tensors; those that reorder rows inside a tensor (rotary
permutations, interleaving) and those for many tensors to many are refused by name. The classes of
models are asked here, too: `model_of` makes one without its weights, `tied_weights` says which are
one.
"""

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

from skillvec.errors import needs
from skillvec.sources import Box, Index, View, concatenate, row_major, stack

Shapes = Mapping[str, Index]
NESTED = 16  # configs within a config that are looked at
PAIRS = 1 << 16  # pairs of boxes of one tensor, beyond which it is not taken apart
COUNTS = re.compile(r"(.*_)?(layers?|depths?|blocks)")  # keys of a config that count layers
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
                (bool(counts or COUNTS.fullmatch(str(key))), inner) for key, inner in value.items()
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


def all_of(source: str, shape: Index) -> View:
    """Return a view of all of a tensor; it has a box also where there are no values."""
    return View(shape, (Box((0,) * len(shape), shape, source, 0, row_major(shape)),))


def model_types(config: Mapping[str, Any]) -> list[str]:
    """Return the model types that a config and those within it name, its own first."""
    nested, at = [config], 0
    while at < len(nested) < NESTED:
        nested += [inner for inner in nested[at].values() if isinstance(inner, Mapping)]
        at += 1
    found = [inner.get("model_type") for inner in nested[:NESTED]]
    return list(dict.fromkeys(kind for kind in found if isinstance(kind, str)))


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


def mapping_of(config: Mapping[str, Any]) -> tuple[str, Callable[[], list[Any]]]:
    """Return the names in the registry that a config leads to, and what makes their entries anew.

    In transformers' order: of the class or else the model type, the base model, the models within,
    names of old. Entries hold state, so each use takes new ones. Raises ImportError before
    transformers 5.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    entries_of: Callable[[str], list[Any] | None] = get_checkpoint_conversion_mapping
    own, *within = model_types(config) or [""]
    classes = config.get("architectures")
    classes = [c for c in classes if isinstance(c, str)] if isinstance(classes, list) else []
    base = str(MODEL_MAPPING_NAMES.get(own))

    def fresh() -> list[Any]:
        of_class = [entry for name in classes for entry in entries_of(name) or ()]
        of_base = entries_of(base) or (of_class and entries_of(own)) or []
        for entry in of_base:  # its patterns begin below the base model
            entry.scope_prefix, entry.base_model_prefix = "", "model"
        inner = [entry for name in within for entry in entries_of(name) or ()]
        old = entries_of("legacy") or []
        return [*(of_class or entries_of(own) or []), *of_base, *inner, *old]

    known = [name for name in (*classes, own, base, *within) if entries_of(name) is not None]
    return ", ".join(dict.fromkeys(known)), fresh


def converted(
    shapes: Shapes, mapping: list[Any], expected: Shapes
) -> tuple[dict[str, View | str], dict[str, str]]:
    """Return what a mapping makes of tensors, and what it refuses.

    The first is new name -> the old name, or a view over old ones; the second is reason -> a name
    that is not made. `expected` holds the shapes on the other side, where these decide.
    """
    renamings = [entry for entry in mapping if not hasattr(entry, "operations")]
    converters = [entry for entry in mapping if hasattr(entry, "operations")]
    made: list[tuple[str, View | str]] = []
    groups: dict[tuple[str, int], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(shapes):
        key, by, pattern = name, -1, None
        try:
            for entry in renamings:
                key, _ = entry.rename_source_key(key)
            while pattern is None and by + 1 < len(converters):
                by += 1
                key, pattern = converters[by].rename_source_key(key)
        except ValueError:  # a number in the name is none, or too long
            continue
        if pattern is None:
            made.append((key, name))
        else:
            groups[key, by][pattern].append(name)
    refused: dict[str, str] = {}
    for (key, by), parts in groups.items():
        try:
            made += _operated(converters[by], parts, key, shapes, expected)
        except ValueError as error:
            refused.setdefault(str(error), key)
    times = Counter(name for name, _ in made)
    return {name: how for name, how in made if times[name] == 1}, refused


def _runs(name: str) -> list[str]:
    return re.findall(r"[0-9]+|[^0-9]+", name)


def _order(name: str) -> list[tuple[int, int, str]]:
    """Sort numbers by value and before text, as transformers does."""
    runs = ((run, run.lstrip("0")) for run in _runs(name))
    return [(0, len(n), n) if run[0] in "0123456789" else (1, 0, run) for run, n in runs]


def _counted(names: Sequence[str]) -> bool:
    """Return whether names are the same but for one number that counts from 0."""
    runs = [_runs(name) for name in names]
    if len(names) == 1 or len({len(run) for run in runs}) > 1:
        return len(names) == 1
    varying = [column for column in zip(*runs, strict=True) if len(set(column)) > 1]
    counted = [str(i) for i in range(len(names))]
    return len(varying) == 1 and [n.lstrip("0") or "0" for n in varying[0]] == counted


def _operated(
    converter: Any, parts: Mapping[str, list[str]], key: str, shapes: Shapes, expected: Shapes
) -> list[tuple[str, View | str]]:
    """Return the names and views that a converter makes; ValueError where it cannot be followed."""
    targets = converter.target_patterns
    head, found, tail = key.partition(targets[0])
    made = [head + target + tail for target in targets]
    if not found:
        raise ValueError(f"it has no {targets[0]!r} in its name")
    columns: list[list[View]] = []
    for pattern in converter.source_patterns:  # their order is that of joining
        if pattern in parts:
            ordered = sorted(parts[pattern], key=_order)
            if not _counted(ordered):
                raise ValueError(f"the tensors {pattern!r} are not numbered from 0 on")
            columns.append([all_of(name, shapes[name]) for name in ordered])
    for op in converter.operations:
        kind, dim, first = type(op).__name__, getattr(op, "dim", 0), columns[0][0]
        alone = len(columns) == len(columns[0]) == 1
        dims = {dim, getattr(op, "dim0", 0), getattr(op, "dim1", 0)}
        if kind == "MergeModulelist" and dim == 0:
            columns = [[stack(views)] for views in columns]
        elif not all(0 <= d < len(first.shape) for d in dims):
            raise ValueError(f"{op} of a tensor of shape {list(first.shape)}")
        elif kind == "Concatenate":
            columns = [[concatenate([view for views in columns for view in views], dim)]]
        elif kind == "Transpose" and alone:
            turned = first.transpose(op.dim0, op.dim1)
            if not op.check_dims or expected.get(made[0]) == turned.shape != first.shape:
                columns = [[turned]]
        elif kind in ("Chunk", "Split") and alone and not getattr(op, "num_shards_attribute", None):
            sizes = [-(-first.shape[dim] // len(made))] * len(made)
            if kind == "Split":
                sizes = [(*expected.get(name, ()), *[0] * dim, 0)[dim] for name in made]
            most = first.shape[dim]  # as torch cuts: the last pieces may be shorter
            ends = [min(sum(sizes[:i]), most) for i in range(len(made) + 1)]
            if ends[-1] != most or (kind == "Split" and sum(sizes) != most):
                raise ValueError(f"{op} does not fit a tensor of shape {list(first.shape)}")
            columns = [[first.slice(dim, begin, end)] for begin, end in pairwise(ends)]
        else:
            raise ValueError(f"the operation {kind} is not taken")
    if len(columns) != len(made) or any(len(views) != 1 for views in columns):
        raise ValueError(f"{converter.operations} do not make {len(made)} of it")
    return [(name, views[0]) for name, views in zip(made, columns, strict=True)]


def between(there: View, wanted: View, shapes: Shapes) -> list[tuple[str, Box]]:
    """Say of one tensor, as made of those there and as of wanted ones, how these come from those.

    `shapes` are those of the wanted tensors. Returns boxes of each; they do not cover it where the
    two differ in shape or are of too many boxes.
    """
    found: list[tuple[str, Box]] = []
    if there.shape != wanted.shape:
        return found
    twins = {(box.offset, box.sizes): box for box in there.boxes}
    many = len(there.boxes) * len(wanted.boxes) > PAIRS
    for box in wanted.boxes:
        twin, part = twins.get((box.offset, box.sizes)), there
        if twin is not None and 0 not in box.sizes:
            part = there._replace(boxes=(twin._replace(offset=(0,) * len(twin.offset)),))
        elif many:
            continue
        else:
            for dim, (begin, numel) in enumerate(zip(box.offset, box.sizes, strict=True)):
                part = part.slice(dim, begin, begin + numel)
        for piece in part.boxes:
            found.append((box.source, _placed(piece, box, shapes[box.source])))
    return found


def _placed(piece: Box, box: Box, shape: Index) -> Box:
    """Return a piece of a box that is read from a tensor of `shape` as a box of that tensor.

    Dimensions are told by their strides: whatever whole tensors go through, those stay the same.
    """
    strides = row_major(shape)
    start = box.start + sum(o * s for o, s in zip(piece.offset, box.strides, strict=True))
    offset = tuple(start // max(s, 1) % max(n, 1) for s, n in zip(strides, shape, strict=True))
    sizes, steps = [1] * len(shape), [0] * len(shape)
    for numel, stride, step in zip(piece.sizes, box.strides, piece.strides, strict=True):
        if numel != 1:
            dim = next(i for i, s in enumerate(strides) if s == stride and shape[i] > 1)
            sizes[dim], steps[dim] = numel, step
    return Box(offset, tuple(sizes), piece.source, piece.start, tuple(steps))
