"""Settings of trainings against TRL's own argument classes, before anything is trained.

Hides TrlParser, which takes any value of a configuration file that is no text as it stands: a list
where a number is expected, or `no` without quotation marks, fails hours later or never. Invariants:
the classes are those that the training itself fills, so what is unknown here is unknown there; no
accelerator is touched, and the process is left as it was. Not covered: tf32, DeepSpeed's own file,
and what a trainer refuses only when it sees the model.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import enum
import importlib
import io
import os
import types
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from skillvec.recipes.training import make_parser

OF_THE_PIPELINE = ("data", "model_name_or_path", "output_dir", "resume_from_checkpoint")
OF_THE_MACHINE = ("tf32", "deepspeed")


def classes_of(module: str) -> tuple[type, ...]:
    """Return the argument classes of a training module: rows, TRL's configuration, the model."""
    return tuple(importlib.import_module(module).dataclasses())


def defaults_of(module: str) -> dict[str, Any]:
    """Return what a training module sets in place of TRL's defaults."""
    return dict(getattr(importlib.import_module(module), "DEFAULTS", {}))


def names_of(classes: Sequence[type]) -> set[str]:
    """Return every key that the classes know, and TrlParser's own."""
    return {field.name for one in classes for field in dataclasses.fields(one)} | {"env"}


def nearest(name: str, names: set[str]) -> str:
    """Return "; did you mean `x`?" for the most similar name, or nothing."""
    found = difflib.get_close_matches(name, names, 1)
    return f"; did you mean `{found[0]}`?" if found else ""


def value_faults(classes: Sequence[type], settings: Mapping[str, Any]) -> dict[str, str]:
    """Return key -> what is wrong with its value, of the keys that the classes know."""
    import trl

    actions = {action.dest: action for action in trl.TrlParser(classes)._actions}
    hints = {name: hint for one in classes for name, hint in typing.get_type_hints(one).items()}
    found = {}
    for name, value in settings.items():
        if name in actions and name in hints:
            wanted = _misfit(actions[name], _kinds(hints[name]), value)
            if wanted:
                found[name] = f"expected {wanted}, found {value!r}"
                if isinstance(value, bool):
                    found[name] += " (YAML reads yes, no, on and off so: put it in quotation marks)"
    return found


def _kinds(hint: Any) -> list[Any]:
    """Return the members of a union, without their parameters but for a Literal."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for member in typing.get_args(hint) for kind in _kinds(member)]
    origin = typing.get_origin(hint)
    return [hint if origin in (None, typing.Literal) else origin]


def _misfit(action: argparse.Action, kinds: Sequence[Any], value: Any) -> str | None:
    """Return what is expected where a value does not fit, else None."""
    names = " or ".join(dict.fromkeys(_name(kind) for kind in kinds if kind is not type(None)))
    if action.choices is not None:
        names = " or ".join(map(str, action.choices))
    if value is None:
        return None if type(None) in kinds else names
    if isinstance(value, dict):
        return None if dict in kinds or Any in kinds else names
    if isinstance(value, list):
        whole = list in kinds and all(_converts(action, item) for item in value)
        return None if whole else names
    scalars = [kind for kind in kinds if kind not in (list, dict, type(None))]
    if not scalars and not (isinstance(value, str) and dict in kinds):
        return names
    if isinstance(value, str) and (dict in kinds or str in scalars):
        return None if action.choices is None or value in action.choices else names
    if any(kind is type(value) for kind in scalars):
        return None
    of_text = all(kind is str or _is_enum(kind) for kind in scalars)
    return (
        names if (of_text and not isinstance(value, str)) or not _converts(action, value) else None
    )


def _converts(action: argparse.Action, value: Any) -> bool:
    convert = action.type
    try:
        result = convert(str(value)) if callable(convert) else value
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return False
    return action.choices is None or result in action.choices


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    plain = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    plain |= {list: "a list", dict: "a mapping"}
    return plain.get(kind) or ("text" if _is_enum(kind) else str(getattr(kind, "__name__", kind)))


def contradiction(module: str, settings: Mapping[str, Any], processes: int) -> str | None:
    """Return why the settings do not go together in a training of so many processes, or None.

    The classes are built on the CPU. Whether there is a GPU for bf16 is asked without using it.
    """
    import torch

    rows, config, model = classes_of(module)
    members = {"world_size": property(lambda self: processes)}
    counted = type(config.__name__, (config,), members)  # not the processes of this pipeline: one
    kept = {name: value for name, value in settings.items() if name not in OF_THE_MACHINE}
    with _as_before():
        parser = make_parser((rows, counted, model), processes, defaults_of(module))
        parser.set_defaults_with_config(**kept | {"use_cpu": True})
        try:
            built = parser.parse_args_into_dataclasses(args=[], look_for_args_file=False)[1]
        except SystemExit:  # argparse: a value that its type does not take
            return None
        except Exception as error:  # each class raises what it likes
            return " ".join(str(error).split()) or repr(error)
    if built.bf16 and not settings.get("use_cpu") and not torch.accelerator.is_available():
        return (
            "bf16 needs a GPU, and there is none here; use_cpu: true trains on the CPU, bf16: false"
            " in fp32"
        )
    return None


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Take back what building a training configuration leaves in the process."""
    from accelerate.state import AcceleratorState

    environment = dict(os.environ)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(environment)
