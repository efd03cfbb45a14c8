"""What config.json says of the weights beside it, said anew where a run writes other weights.

Hides where transformers looks: for a dtype, under two names, outside and in the configs within; for
tied embeddings, outside and in the text part; for quantisation. What is still true stays as it is.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from skillvec.files.header import ITEMSIZE

NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
SAID = {name: dtype for dtype, name in NAMES.items()}
SAID |= {"half": "F16", "float": "F32", "double": "F64"}  # torch has these as well
DTYPE_KEYS = ("dtype", "torch_dtype")  # the first that is not null counts
TIE_KEYS = ("tie_word_embeddings", "tie_embedding")
QUANTISATION = "quantization_config"
QUANTISED = (QUANTISATION, "quantization")  # the second of mlx, which writes both
DEPTH = 16  # configs within configs, beyond which nobody looks


def _within(
    config: Mapping[str, Any], change: Callable[[dict[str, Any]], None], depth: int = DEPTH
) -> dict[str, Any]:
    """Return a config with `change` made to it and to every config within it."""
    copy = dict(config)
    for key, value in config.items() if depth else ():
        if isinstance(value, dict) and key != QUANTISATION:
            copy[key] = _within(value, change, depth - 1)
    change(copy)
    return copy


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without what it says of quantisation."""

    def change(part: dict[str, Any]) -> None:
        for key in QUANTISED:
            part.pop(key, None)

    return _within(config, change)


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that ties no weights, also where a class ties them unless told otherwise."""

    def change(part: dict[str, Any]) -> None:
        part.update({key: False for key in TIE_KEYS if key in part})
        if isinstance(part.get("text_config"), dict):  # some classes take its word for the whole
            part["text_config"]["tie_word_embeddings"] = False

    return _within(config, change) | {"tie_word_embeddings": False}


class Written(NamedTuple):
    """The float dtypes of an output: (read, written) of its tensors; read is "" where one is asked.

    `is_new` of weights that lay in no file that transformers loads, so that no config is of them.
    """

    dtypes: frozenset[tuple[str, str]]
    is_new: bool = False

    @property
    def after(self) -> set[str]:
        return {after for _, after in self.dtypes}

    @property
    def converted(self) -> set[str]:
        return {after for before, after in self.dtypes if before != after}

    def named(self, said: str | None) -> str:
        """Return the name of the dtype that loses no bits where `said` was said before, or nothing.

        That is the widest of the tensors that have it and of those that were converted: others were
        wider before, and are the exceptions they were. Of all, where none has it.
        """
        held = self.converted | {said} if said in self.after and not self.is_new else self.after
        if {"BF16", "F16"} <= held:  # neither holds the other
            held = held | {"F32"}
        return NAMES[max(held, key=lambda dtype: ITEMSIZE[dtype or ""])]


def retyped(part: dict[str, Any], written: Written) -> None:
    """Make true what a config, or the metadata of an index, says of dtypes."""
    for key in DTYPE_KEYS:
        said = SAID.get(part[key]) if isinstance(part.get(key), str) else None
        if said is not None and written.named(said) != NAMES[said]:
            part[key] = written.named(said)


def retyped_config(config: Mapping[str, Any], written: Written) -> dict[str, Any]:
    """Return a config whose dtypes are those of the weights, so that loading them loses no bits.

    Where it says none, transformers goes by one tensor, so it is said if they differ.
    """
    made = _within(config, lambda part: retyped(part, written))
    key, said = _said(config)
    if said is None and len(written.after) > 1:
        made[key] = written.named(None)
    elif isinstance(said, dict) or (isinstance(said, str) and said not in SAID):
        main = SAID.get(_main(said))
        if main is None or written.named(main) != NAMES[main]:
            made[key] = written.named(main)
    return made


def is_of(config: Mapping[str, Any], written: Written) -> bool:
    """Return whether a config says no dtype, or one that some of the weights have."""
    _, said = _said(config)
    return said is None or SAID.get(_main(said)) in written.after


def _main(said: Any) -> str:
    """Return the dtype that transformers takes for all where it is said by part."""
    return str(said.get("", "float32") if isinstance(said, dict) else said)


def _said(config: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the key and the value that transformers takes for the dtype."""
    key = next((key for key in DTYPE_KEYS if config.get(key) is not None), DTYPE_KEYS[0])
    return key, config.get(key)
