"""A function of the user's that evaluates a model in memory.

It is called with model and tokenizer, and with `split` where it has such a parameter. Its
attributes `metrics` and `splits` say what it gives, where it has them. It should leave no thread
behind that works on the model, end no process by os._exit, and let pass what it does not know how
to handle (no `except BaseException`), which may be the end of its time. Hides how it is found and
which arguments it takes.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from types import CodeType, FunctionType, MethodType
from typing import Any

from skillvec.errors import UsageError
from skillvec.files.file import digest_bytes
from skillvec.trials.scores import HALVES, Function, Scores, read_scores, refuse_split


class FunctionEvaluator:
    """`module:function` of the folder of this run or of an installed package, or a function itself.

    Raises UsageError for a module that cannot be imported, and options that the function does not
    take.
    """

    takes_folder = False
    needs_tokenizer = False

    def __init__(
        self, module: str, function: str | Function, options: Mapping[str, Any] = {}
    ) -> None:
        if isinstance(function, str):
            self._function = import_function(module, function)
        else:
            self._function = function
            inner = _inner(function)
            module = getattr(inner, "__module__", module)
            function = getattr(inner, "__qualname__", type(function).__name__)
        self._name = f"{module}:{function}"
        self._options = dict(options)
        kinds = (
            inspect.iscoroutinefunction,
            inspect.isgeneratorfunction,
            inspect.isasyncgenfunction,
        )
        called = (self._function, getattr(self._function, "__call__", None))  # noqa: B004 its own
        if any(is_kind(one) for is_kind in kinds for one in called):
            raise UsageError(
                f"{self._name} is async or a generator: expected a function that returns scores"
            )
        try:
            self._signature = inspect.signature(self._function)
        except ValueError as error:  # of a builtin
            raise UsageError(f"{self._name}: expected a function of Python: {error}") from None
        self._takes_split = "split" in self._signature.parameters
        self._refuse_arguments()
        self.splits = self._names("splits") or (HALVES if self._takes_split else ())
        if self.splits and not self._takes_split:
            raise UsageError(f"{self._name} says that it has splits, but takes no `split`")
        self.metrics = self._names("metrics") or None
        digest = _source_digest(module, self._function)
        if "<" in self._name or not isinstance(self._function, FunctionType):
            digest = digest_bytes(f"{digest} {_describe(self._function)}".encode())[:16]
        self.spec = spelled(self._name, options, digest)

    def _names(self, attribute: str) -> tuple[str, ...]:
        names = getattr(self._function, attribute, ())
        is_list = isinstance(names, Iterable) and not isinstance(names, str)
        if not is_list or not all(isinstance(name, str) for name in names):
            raise UsageError(f"{self._name}: its `{attribute}` should be a list of names")
        return tuple(names)

    def _refuse_arguments(self) -> None:
        """Refuse options that the function does not take, and a function of other arguments."""
        signature = self._signature
        given = self._options | ({"split": HALVES[0]} if self._takes_split else {})
        named = {
            one.name: one.default
            for one in list(signature.parameters.values())[2:]
            if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY) and one.name != "split"
        }
        takes_any = any(one.kind is one.VAR_KEYWORD for one in signature.parameters.values())
        if unknown := [name for name in self._options if name not in named and not takes_any]:
            raise UsageError(
                f"--eval-option {unknown[0]}: {self._name} takes {', '.join(named) or 'no options'}"
            )
        try:
            signature.bind(None, None, **given)
        except TypeError as error:
            raise UsageError(
                f"{self._name}: expected a function of (model, tokenizer) and options: {error}"
            ) from None

    def check(self, target: str) -> None:
        """Accept every target: what a function needs, it knows alone."""

    def evaluate(self, model: Any, tokenizer: Any, split: str) -> Scores:
        """Call the function; ScoreError where it does not return scores."""
        refuse_split(split, self.splits, self._name)
        given = self._options | ({"split": split} if self._takes_split else {})
        return read_scores(self._function(model, tokenizer, **given))


def import_function(module: str, function: str) -> Callable[..., Any]:
    """Return a function by name; modules of the folder of this run come first, as for `python -m`.

    Raises UsageError, also for whatever the module raises while it is imported.
    """
    here = os.getcwd()
    if not {here, ""} & {*sys.path}:
        sys.path.insert(0, here)
    try:
        found = import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever a module of the user's raises
        said = f"{type(error).__name__}: {error}"
        if module.endswith(".py"):
            said = f"name a module, as {os.path.basename(module)[:-3]}:{function}, and no file"
        raise UsageError(f"--eval {module}:{function}: cannot be imported: {said}") from None
    if not callable(found):
        raise UsageError(f"--eval {module}:{function}: expected a function, found {found!r:.100}")
    function_found: Callable[..., Any] = found
    return function_found


def spelled(name: str, options: Mapping[str, Any], digest: str = "") -> str:
    """Return how a journal knows an evaluator: name, options and a digest of what it reads."""
    words = [name, *(f"{key}={options[key]}" for key in sorted(options))]
    return " ".join(words) + (f" ({digest})" if digest else "")


def _source_digest(module: str, function: Function) -> str:
    """Return a digest of a module's file: points of another function are not comparable.

    What a notebook defines is in no file: its own text then, or its code where that is lost.
    """
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or not os.path.isfile(file):
        try:
            return digest_bytes(inspect.getsource(function).encode())[:16]
        except (OSError, TypeError):
            return digest_bytes(_describe(function).encode())[:16]
    with open(file, "rb") as source:
        return digest_bytes(source.read())[:16]


def _inner(function: Any) -> Any:
    """Return the function that a partial calls."""
    return _inner(function.func) if isinstance(function, partial) else function


def _describe(held: Any, depth: int = 8) -> str:
    """Return what tells two functions apart that share a name and a file.

    Lambdas and functions in functions by their code and the values that they took along, partials
    by what they fix, methods and callable objects by the values of their object. Of what is no
    number, text or container, such as a model, its type alone, and so of what refers to itself.
    """
    if held is None or isinstance(held, str | bytes | int | float):
        return repr(held)
    parts: list[Any] = []
    if isinstance(held, FunctionType):
        taken = inspect.getclosurevars(held).nonlocals
        parts = [held.__code__, held.__defaults__, held.__kwdefaults__, taken]
    elif isinstance(held, CodeType):
        parts = [held.co_code, held.co_names, held.co_consts]
    elif isinstance(held, partial):
        parts = [held.func, held.args, held.keywords]
    elif isinstance(held, MethodType):
        parts = [held.__func__, getattr(held.__self__, "__dict__", None)]
    elif isinstance(held, Mapping):
        parts = [*held.items()]
    elif isinstance(held, tuple | list):
        parts = [*held]
    elif depth == 8:  # an object that is called
        parts = [type(held).__call__, getattr(held, "__dict__", None)]
    said = [_describe(part, depth - 1) for part in parts] if depth else []
    return f"{type(held).__qualname__}({', '.join(said)})"
