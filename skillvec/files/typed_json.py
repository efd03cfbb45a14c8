"""JSON of others, checked against the types that annotations name."""

import re
from collections.abc import Callable
from functools import cache
from types import UnionType
from typing import Annotated, Any, NotRequired, Union, get_args, get_origin, get_type_hints

PLAIN = (str, int, float)
Where = Any  # a name, or where something stands and its place in there: joined for errors alone
Check = Callable[[Any, Where], None]  # of a value that stands somewhere


def check_json(value: Any, kind: Any, where: str) -> None:
    """Raise TypeError where `value`, as JSON gives it, is not of the type `kind`.

    That is a class of keys (TypedDict), list[X], dict[str, X], a plain type, unions of these, or
    one with what its values have to be: Annotated with a pattern or a range, of a list with a type
    for each item, with ... where others check it.
    """
    _check_of(kind)(value, where)


@cache
def _check_of(kind: Any) -> Check:
    """Return what checks values of a type: looked up once, not for each of 100,000 tensors."""
    origin, given = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value, where: None
    if origin is NotRequired:
        return _check_of(given[0])
    if origin is Annotated:
        return _check_annotated(given[1])
    if origin in (Union, UnionType) and given[0] not in PLAIN:
        check = _check_of(given[0])
        return lambda value, where: None if value is None else check(value, where)
    if origin is list:
        return _check_list(_check_of(given[0]))
    if origin is dict:
        return _check_dict(_check_of(given[1]))
    if hasattr(kind, "__required_keys__"):
        return _check_keys(kind)
    if kind is bool:
        return _check_that("true or false", lambda value: type(value) is bool)
    name = getattr(kind, "__name__", str(kind))
    return _check_that(name, lambda v: isinstance(v, kind) and v is not True and v is not False)


def _check_that(expected: str, fits: Callable[[Any], bool]) -> Check:
    def check(value: Any, where: Where) -> None:
        if not fits(value):
            raise TypeError(f"{_said(where)}: expected {expected}, found {str(value)[:40]!r}")

    return check


def _said(where: Where) -> str:
    if isinstance(where, str):
        return where
    outer, key = where
    return _said(outer) + (f"[{key}]" if isinstance(key, int) else f".{key}")


_is_list = _check_that("a list", lambda value: isinstance(value, list))
_is_object = _check_that("an object", lambda value: isinstance(value, dict))


def _check_annotated(allowed: Any) -> Check:
    if isinstance(allowed, re.Pattern):
        match = allowed.fullmatch
        return _check_that(
            "a digest of 32 hex digits", lambda v: isinstance(v, str) and match(v) is not None
        )
    if isinstance(allowed, range):
        return _check_that(f"a number in {allowed}", lambda v: type(v) is int and v in allowed)
    if not isinstance(allowed, tuple):
        return _check_of(Any)
    checks = list(map(_check_of, allowed))
    is_pair = _check_that("a pair", lambda v: isinstance(v, list) and len(v) == len(checks))

    def check(value: Any, where: Where) -> None:
        is_pair(value, where)
        for i, item in enumerate(value):
            checks[i](item, (where, i))

    return check


def _check_list(check_item: Check) -> Check:
    def check(value: Any, where: Where) -> None:
        _is_list(value, where)
        for i, item in enumerate(value):
            check_item(item, (where, i))

    return check


def _check_dict(check_item: Check) -> Check:
    def check(value: Any, where: Where) -> None:
        _is_object(value, where)
        for key, item in value.items():
            check_item(item, (where, key))

    return check


def _check_keys(kind: Any) -> Check:
    hints = get_type_hints(kind, include_extras=True).items()
    keys = [(key, _check_of(hint), key in kind.__required_keys__) for key, hint in hints]

    def check(value: Any, where: Where) -> None:
        _is_object(value, where)
        for key, check_value, required in keys:
            if key in value:
                check_value(value[key], (where, key))
            elif required:
                raise TypeError(f"{_said(where)}: {key} is missing")

    return check
