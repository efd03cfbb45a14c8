"""Pickles of PyTorch as addresses: object trees in which every tensor is a place in a file.

Hides the pickle language, and what torch calls by which names. Nothing that a pickle names is
imported or called. Its words are gone through first (`check_words`): only those that pickles of
weights have, and only as many as a bounded tree takes. Then Python's own unpickler makes the tree,
and finds a stand-in for every global: of a short list inert records (`Record`) and addresses
(`Stored`), of any other name a record too, for which the pickle is refused. torch is not needed.
Every address is checked to lie in its storage. Refused: sparse, quantised and conjugated tensors,
tensors that repeat values.
"""

import io
import pickle
import re
import reprlib
import sys
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from skillvec.errors import FormatError, IncompatibleError, SkillvecError, up_to_five
from skillvec.files.header import ITEMSIZE, MAX_DIMENSIONS, MAX_SIZE, TensorSpec
from skillvec.files.tensors import Source, Viewed
from skillvec.files.views import Box, Index, View, row_major

MAX_PICKLE_NBYTES = 1 << 29  # the tree alone, without data: real ones take a few hundred KB
MAX_TREE_NBYTES = 1 << 33  # of what is made of one in memory, at most; what is shared counts again
MAX_NESTED = 200  # tuples and objects in each other: Python's hash of deeper ones has no bound
MAX_ARGUMENTS = 16  # of a function that another one is said to call

ADVICE = "load it with the library that wrote it and save the weights as safetensors"

DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16",
    "torch.bfloat16": "BF16", "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ", "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
    "torch.float8_e8m0fnu": "F8_E8M0", "torch.complex64": "C64", "torch.bool": "BOOL",
    "torch.uint8": "U8", "torch.int8": "I8", "torch.uint16": "U16", "torch.int16": "I16",
    "torch.uint32": "U32", "torch.int32": "I32", "torch.uint64": "U64", "torch.int64": "I64",
}  # fmt: skip
STORAGES = {
    "torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16", "torch.ComplexFloatStorage": "C64",
    "torch.BoolStorage": "BOOL", "torch.ByteStorage": "U8", "torch.CharStorage": "I8",
    "torch.ShortStorage": "I16", "torch.IntStorage": "I32", "torch.LongStorage": "I64",
    "torch.storage.UntypedStorage": "U8",
}  # fmt: skip
# named in files of training runs; kept as records, never imported, so none of them can do anything
INERT = {
    *DTYPES, *STORAGES, "torch.Tensor", "torch.nn.parameter.Parameter", "torch.device",
    "_io.BytesIO",
    "torch.serialization._get_layout", "argparse.Namespace", "collections.defaultdict",
    "builtins.bytearray", "builtins.complex", "builtins.int", "builtins.list", "builtins.dict",
    "builtins.set",
}  # fmt: skip
INERT_PACKAGES = ("torch.distributed.", "deepspeed.", "numpy.", "pathlib.", "datetime.")


class Record:
    """An object of a pickle that was not made: the name of its class, arguments and state."""

    name = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any) -> Any:
        self = super().__new__(cls)
        self.args = args
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def __setstate__(self, state: Any) -> None:
        slots = isinstance(state, tuple) and len(state) == 2 and state[0] is None
        self.state = state[1] if slots else state

    def get(self, field: str, position: int = -1) -> Any:
        """Return a field of its state: a dict, or a sequence where `position` is given."""
        if isinstance(self.state, dict) and field in self.state:
            return self.state[field]
        values = self.args if self.state is None else self.state
        if isinstance(values, tuple | list) and 0 <= position < len(values):
            return values[position]
        raise FormatError(f"a pickled {self.name} has no {field}")


class Stored(NamedTuple):
    """A tensor of a pickle: value (i, j, ..) lies at byte start + itemsize * (strides . (i, j)).

    A named tuple, because no word of a pickle can change one.
    """

    dtype: str
    shape: Index
    strides: Index
    path: str
    start: int

    def span(self, name: str) -> TensorSpec:
        """Return the bytes from its first to its last value as a flat tensor."""
        steps = zip(self.shape, self.strides, strict=True)
        values = 1 + sum((n - 1) * stride for n, stride in steps) if prod(self.shape) else 0
        nbytes = values * ITEMSIZE[self.dtype]
        return TensorSpec(name, self.dtype, (values,), self.path, self.start, nbytes)

    def box(self, name: str, offset: Index) -> Box:
        """Return it as the part at `offset` of a larger tensor."""
        return Box(offset, self.shape, self.span(name), 0, self.strides)

    def source(self, name: str) -> Source:
        """Return it as a source: bytes of the file where it is contiguous, else a view of them."""
        steps = zip(self.shape, self.strides, row_major(self.shape), strict=True)
        if not prod(self.shape) or all(n == 1 or a == b for n, a, b in steps):
            return self.span(name)._replace(shape=self.shape)
        return Viewed(name, self.dtype, View(self.shape, (self.box(name, (0,) * len(self.shape)),)))


class Storage(NamedTuple):
    dtype: str
    path: str
    start: int
    nbytes: int


def brief(value: Any) -> str:
    """Return what to say of a value of a tree in little room, however much it holds."""
    return reprlib.repr(value)[:80]


class _Ordered(dict[Any, Any]):
    """Stands for an OrderedDict; its attributes, such as the `_metadata` of a module, are left."""

    __slots__ = ()

    def __repr__(self) -> str:  # of its items it could be any size
        return f"OrderedDict of {len(self)}"

    def __setstate__(self, state: Any) -> None:
        pass


class _Refused(NamedTuple):
    """Stands in a tree for what was refused, so that the error can say where that is."""

    error: SkillvecError


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Stored:
    """Return a checked address; `rest` is requires_grad, hooks and perhaps flags.

    The stride of a dimension of size 1 says nothing and becomes 0.
    """
    if not isinstance(storage, Storage) or any(rest[2:3]):
        raise IncompatibleError(f"a tensor without plain values: {brief(rest)}; {ADVICE}")
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or (
        len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS
        or any(type(n) is not int or not 0 <= n <= MAX_SIZE for n in (offset, *shape, *strides))
    ):  # fmt: skip
        raise FormatError(f"a tensor of shape {brief(shape)}, strides {brief(strides)}")
    strides = tuple(0 if n == 1 else stride for n, stride in zip(shape, strides, strict=True))
    before = offset * ITEMSIZE[storage.dtype]
    made = Stored(storage.dtype, shape, strides, storage.path, storage.start + before)
    if before + made.span("").nbytes > storage.nbytes:
        raise FormatError(
            f"a tensor of shape {list(shape)}, strides {list(strides)} from value {offset} on does"
            f" not lie in its storage of {storage.nbytes} bytes"
        )
    if prod(shape) * ITEMSIZE[storage.dtype] > storage.nbytes:
        raise IncompatibleError(f"a tensor of {list(shape)} that repeats values: {ADVICE}")
    return made


def _tensor_of_dtype(storage: Any, *rest: Any) -> Stored:
    """Return the address of a tensor that says its dtype itself, behind the hooks."""
    dtype = DTYPES.get(getattr(rest[5], "name", ""))
    if dtype is None or not isinstance(storage, Storage):
        raise IncompatibleError(f"a tensor of {getattr(rest[5], 'name', 'no dtype')}: {ADVICE}")
    return _tensor(storage._replace(dtype=dtype), *rest[:5], *rest[6:])


def _subclass(make: Any, kind: Any, args: Any, state: Any) -> Any:
    """Return a tensor of a subclass or with attributes: a record of it, or the tensor itself."""
    if not getattr(make, "name", "").startswith("torch._utils.") or len(args) > MAX_ARGUMENTS:
        raise FormatError(f"a tensor made by {brief(make)} of {brief(args)}")
    made = make(*args)
    if isinstance(made, Record):
        made.__setstate__(state)
    return made


def _size(sizes: Any = ()) -> tuple[int, ...]:
    """Return a shape; of anything longer a few bytes could make any number of copies."""
    if len(sizes) > MAX_DIMENSIONS:
        raise FormatError(f"a torch.Size of {len(sizes)} dimensions")
    if any(type(n) is not int for n in sizes):
        raise FormatError(f"a torch.Size of {brief(sizes)}")
    return tuple(sizes)


def _ordered(*args: Any) -> _Ordered:
    """Return an empty one, as pickles of Python 3 begin it; a copy of another could be any size."""
    if args:
        raise FormatError("an OrderedDict made of another object")
    return _Ordered()


def _encode(text: str, encoding: str) -> bytes:
    """Return bytes that protocol 2 writes as text; any other codec could blow them up."""
    if encoding != "latin1":
        raise FormatError(f"bytes encoded as {brief(encoding)}")
    return text.encode("latin1")


def _nested(kind: Any, name: str) -> Any:
    """Return the class that a nested class stands in: its objects are recorded as of that one."""
    if not isinstance(kind, type) or not issubclass(kind, Record):
        raise FormatError(f"{brief(name)} of {brief(kind)}")
    return kind


MAKERS: dict[str, Callable[..., Any]] = {
    "builtins.getattr": _nested,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
    "torch._utils._rebuild_wrapper_subclass": lambda kind, *args: kind(*args),
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered,
    "_codecs.encode": _encode,
}


class _Unpickler(pickle.Unpickler):
    """Python's unpickler, which finds stand-ins alone: nothing is imported, no foreign code run.

    `unknown` are the names that are not taken, `refused` what none could be made of, in order.
    """

    def __init__(self, raw: bytes, storage: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(raw), encoding="utf-8")
        self.storage = storage
        self.stand_ins: dict[str, type[Record]] = {}
        self.unknown: set[str] = set()
        self.refused: list[_Refused] = []

    def find_class(self, module: str, name: str) -> Any:
        name = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_.]{1,200}", name):
            raise FormatError(f"a global called {name[:80]!r}")
        if name not in INERT and name not in MAKERS and not name.startswith(INERT_PACKAGES):
            self.unknown.add(name)
        if name not in self.stand_ins:
            body: dict[str, Any] = {"__module__": "skillvec", "name": name}
            if name in MAKERS:
                body["__new__"] = lambda cls, *args: self.made(MAKERS[name], *args)
            self.stand_ins[name] = type(name, (Record,), body)
        return self.stand_ins[name]

    def persistent_load(self, pid: Any) -> Any:
        if self.storage is None:
            raise FormatError("a pickle that refers to storages outside of it")
        return self.made(self.storage, pid)

    def made(self, make: Callable[..., Any], *args: Any) -> Any:
        """Return what a function makes, or what stands for what it refuses."""
        try:
            return make(*args)
        except SkillvecError as error:
            self.refused.append(_Refused(error))
            return self.refused[-1]


def load_pickle(raw: bytes, where: str, storage: Callable[[Any], Any] | None = None) -> Any:
    """Return the object tree of a pickle, protocols 2 to 5, as `load_archive` does.

    `where` names the file in errors; `storage` turns torch's persistent ids into storages.
    """
    tree: Any = None
    broken: Exception | None = None
    unpickler: _Unpickler | None = None
    try:
        unpickler = _Unpickler(check_words(raw), storage)
        tree = unpickler.load()
    except Exception as error:  # hostile input makes the unpickler fail in any way
        broken = error
    refused = unpickler.refused[:1] if unpickler else []
    if unpickler and unpickler.unknown:
        raise IncompatibleError(
            f"{where}: the pickle names objects that are not taken (nothing was run):\n"
            f"{up_to_five(sorted(unpickler.unknown))}\n{ADVICE}"
        )
    if refused:
        broken = refused[0].error
    if isinstance(broken, SkillvecError):
        text = str(broken)
        if not text.startswith(where):
            text = ": ".join([where, *_key_of(tree, refused), text])
        raise type(broken)(text)
    if broken is not None:
        raise FormatError(f"{where}: not a readable pickle: {str(broken)[:200]!r}")
    return tree


def _key_of(tree: Any, wanted: list[_Refused]) -> list[str]:
    """Return the key nearest above the first of `wanted` in a tree, if there is one."""
    left: list[tuple[list[str], Any]] = [([], tree)]
    seen: set[int] = set()
    while left and wanted:
        above, value = left.pop()
        if value is wanted[0]:
            return above
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            left += [([f"{k[:200]!r}"] if type(k) is str else above, v) for k, v in value.items()]
        elif isinstance(value, list | tuple):
            left += [(above, item) for item in value]
        elif isinstance(value, Record):
            left += [(above, value.args), (above, value.state)]
    return []


ATOM = (32, 0)  # bytes and depth of what is neither text nor made of others
TEXTS = ("SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
NOTES = ("BINPUT", "LONG_BINPUT", "MEMOIZE")
# the words that are taken, and how many bytes of memory one may take beside its argument
WORDS = dict.fromkeys(
    ("PROTO", "STOP", "MARK", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE",
     "BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "EMPTY_TUPLE", "APPENDS"), 16,
) | dict.fromkeys(TEXTS, 120) | dict.fromkeys(NOTES, 120) | {
    "FRAME": 64, "EMPTY_LIST": 88, "EMPTY_DICT": 96, "EMPTY_SET": 248, "TUPLE": 170, "TUPLE1": 170,
    "TUPLE2": 170, "TUPLE3": 170, "APPEND": 64, "SETITEM": 184, "SETITEMS": 184, "BUILD": 120,
    "REDUCE": 600, "NEWOBJ": 400, "BINPERSID": 400, "GLOBAL": 2600, "STACK_GLOBAL": 2600,
}  # fmt: skip


def check_words(raw: bytes) -> bytes:
    """Return a pickle without its frames, which could hide words from one who reads by them.

    Goes through its words with a stack of what they make: the bytes that values which never change
    take, written out, and how deep they are nested. What is fetched again counts again, because
    hashes, names and texts are made of all of it. Raises FormatError for a pickle that could take
    more than it may, ValueError for a broken one.
    """
    import pickletools

    if len(raw) > MAX_PICKLE_NBYTES:
        raise FormatError(f"a pickle over the cap of {MAX_PICKLE_NBYTES} bytes")
    stack, marks, memo = [ATOM][:0], list[int](), dict[int, tuple[int, int]]()
    total, highest, made = 0, 0, ""  # bytes, place in the memo, last word that is no note in it
    frames = list[int]()
    argument: Any
    at: Any
    for opcode, argument, at in pickletools.genops(raw):
        word = opcode.name
        if word not in WORDS:
            raise FormatError(f"the word {word}, which pickles of weights do not have: {ADVICE}")
        if (word in ("REDUCE", "NEWOBJ") and "TUPLE" not in made) or (
            word == "BUILD" and made.endswith(("GET", "REDUCE", "NEWOBJ", "PERSID"))
        ):  # a pickler's arguments and states are new; copies of old ones would take any room
            raise FormatError("arguments or a state that were made elsewhere in the pickle")
        nbytes = 0 if argument is None else sys.getsizeof(argument)
        if word in NOTES:
            place = len(memo) if argument is None else argument
            memo[place], nbytes = stack[-1], 16 * max(0, place - highest)  # a table of all places
            highest = max(highest, place)
        elif word == "MARK":
            marks.append(len(stack))
        elif word in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
            nbytes = stack[-1][0]
        elif word in TEXTS:
            stack.append((nbytes, 0))
        elif word == "FRAME":
            frames.append(at)
        else:
            marked = pickletools.markobject in opcode.stack_before
            begin = marks.pop() if marked else len(stack)
            begin -= len(opcode.stack_before) - 2 * marked
            if begin < (marks[-1] if marks else 0):
                raise ValueError(f"{word} of what is not there")
            parts = stack[begin:]
            del stack[begin:]
            if word.startswith(("APPEND", "SETITEM")):
                nbytes = (16 if "APPEND" in word else 64) * len(parts)
                stack.append(parts[0])
            elif parts and opcode.stack_after:
                nbytes += 16 * len(parts)
                depth = 1 + max(depth for _, depth in parts)
                stack.append((nbytes + sum(size for size, _ in parts), depth))
                if depth > MAX_NESTED:
                    raise FormatError(f"objects in each other, more than {MAX_NESTED} deep")
            elif opcode.stack_after:
                stack.append(ATOM)
        made = made if word in NOTES or word == "FRAME" else word
        total += WORDS[word] + nbytes
        if total > MAX_TREE_NBYTES:
            raise FormatError(f"a pickle that unfolds to more than {MAX_TREE_NBYTES} bytes")
    begins, ends = [0, *(at + 9 for at in frames)], [*frames, len(raw)]
    return b"".join(map(raw.__getitem__, map(slice, begins, ends))) if frames else raw
