"""What the safetensors package finds in a written file: the proof that others can read it."""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from skillvec.errors import OutputError, SkillvecError, up_to_five
from skillvec.files.file import local_path, remote_of
from skillvec.files.header import TensorSpec, encode_header


def refuse_misread(
    path: str,
    layout: Iterable[tuple[str, str, tuple[int, ...]]],
    error: type[SkillvecError] = OutputError,
) -> None:
    """Raise `error` where the safetensors package does not find the tensors of `layout` in a file.

    `layout` holds (name, dtype, shape); the package's own reader opens the file, and reads no more
    than its header. A dtype that this version of it does not know is no fault of the file: then
    nothing is said.
    """
    from safetensors import SafetensorError, safe_open

    expected = {name: (dtype, list(shape)) for name, dtype, shape in layout}
    try:
        with safe_open(path, framework="numpy") as file:  # which needs no torch
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    except SafetensorError as problem:
        if all(_is_known_dtype(dtype) for dtype in {dtype for dtype, _ in expected.values()}):
            raise error(f"{path}: the safetensors package cannot open it: {problem}") from None
        return
    if found != expected:
        pairs = {name: (expected.get(name), found.get(name)) for name in expected | found}
        wrong = [
            f"{name}: expected {_described(one)}, found {_described(other)}"
            for name, (one, other) in pairs.items()
            if one != other
        ]
        raise error(f"{path}: the safetensors package reads other tensors:\n{up_to_five(wrong)}")


def _described(entry: tuple[str, list[int]] | None) -> str:
    return "nothing" if entry is None else f"{entry[0]} {entry[1]}"


def _is_known_dtype(dtype: str) -> bool:
    """Return whether the installed safetensors package has a dtype, by an empty tensor of it."""
    library: Any = import_module("safetensors")
    try:
        library.deserialize(encode_header([("empty", dtype, (0,))], {}))
    except library.SafetensorError:
        return False
    return True


def refuse_misread_files(specs: Iterable[TensorSpec], error: type[SkillvecError]) -> None:
    """Raise `error` as `refuse_misread` does for the files of this disk that tensors lie in."""
    layouts: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {}
    for spec in specs:
        remote = remote_of(spec.path)
        if remote is None or remote.local is not None:
            layouts.setdefault(local_path(spec.path), []).append(spec[:3])
    for path, layout in layouts.items():
        refuse_misread(path, layout, error)
