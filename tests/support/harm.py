"""How files are harmed, and the guard that runs while they are read.

Each `harm_*` takes a `Random`, which may be hypothesis's own, and bytes of one format. `guarded`
turns a hang, an open outside the folder, a socket and a process into exceptions that no reader
catches. What is put in is small and does nothing wherever it is read: the limits of readers are
lowered instead, those of skillvec by the tests, those of the interpreter by `lowered`.
"""

import contextlib
import io
import json
import os
import pickletools
import signal
import struct
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from skillvec.files.header import tensor_nbytes
from skillvec.vectors.reader import BLOCKS

SECONDS = 20  # a case that takes longer is a hang
Tensors = list[tuple[str, Any, Any, bytes]]  # name, dtype, shape, bytes; in file order

# ------------------------------------------------------------------------------------ the guard


class Escape(BaseException):
    """What no file may lead to: a file outside the folder, a socket, a process."""


class Hang(BaseException):
    """A case that took too long."""


_inside: list[str] = []  # what may be read while a case runs; empty: nobody looks
_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
              "socket.connect", "socket.getaddrinfo", "pickle.find_class")  # fmt: skip
_CODE = tuple(os.path.realpath(place) for place in (sys.prefix, sys.base_prefix, *sys.path))


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _inside:
        return
    if event in _FORBIDDEN:
        raise Escape(f"{event} {args!r:.200}")
    if event in ("open", "os.listdir", "os.scandir") and isinstance(args[0], str | bytes):
        path = os.path.realpath(os.fsdecode(args[0]))
        if not path.startswith((*_inside, *_CODE, "/proc/", "/sys/", "/dev/")):
            raise Escape(f"{event} {path!r:.200}")


_installed: list[bool] = []


@contextlib.contextmanager
def guarded(folder: Path, seconds: float = SECONDS, looks: bool = True) -> Iterator[None]:
    """Raise Hang or Escape out of what runs inside; `looks` says whether opens are watched."""
    if not _installed:
        sys.addaudithook(_audit)
        _installed.append(True)

    def late(*_: object) -> None:
        raise Hang(f"over {seconds} seconds")

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _inside.append(os.path.realpath(folder) if looks else os.sep)
    try:
        yield
    finally:
        _inside.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


NESTED, DIGITS = "[" * 300, "9" * 700  # beyond what `lowered` leaves


@contextlib.contextmanager
def lowered(calls: int = 400, digits: int = 640) -> Iterator[None]:
    """Let calls nest only so much deeper, and numbers have only so many digits.

    JSON is read by Python's own scanner: that in C has a limit of its own from 3.12 on.
    """
    depth, frame = 0, sys._getframe()
    while frame := frame.f_back:
        depth += 1
    before = sys.getrecursionlimit(), sys.get_int_max_str_digits()
    scanner = json.scanner  # type: ignore[attr-defined]
    with (
        mock.patch.object(scanner, "make_scanner", scanner.py_make_scanner),
        mock.patch.object(json, "_default_decoder", json.JSONDecoder()),
    ):
        sys.setrecursionlimit(depth + calls)
        sys.set_int_max_str_digits(digits)
        try:
            yield
        finally:
            sys.setrecursionlimit(before[0])
            sys.set_int_max_str_digits(before[1])


# -------------------------------------------------------------------------------- harm to bytes

NUMBERS = [0, 1, 2, 7, 8, 255, 1 << 15, 1 << 31, (1 << 32) - 1, 1 << 60, (1 << 63) - 1, 1 << 64]


def harm_bytes(rng: Random, data: bytes) -> bytes:
    """Flip, cut, repeat and overwrite here and there."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        kind, size = rng.randrange(6), rng.choice((1, 2, 4, 8, 40))
        if kind == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            number = rng.choice(NUMBERS) & (1 << 8 * min(size, 8)) - 1
            content[at : at + min(size, 8)] = number.to_bytes(min(size, 8), "little")
        elif kind == 2:
            del content[at : at + size]
        elif kind == 3:
            content[at:at] = content[at : at + size]
        elif kind == 4:
            content[at:at] = bytes(rng.choice((0, 34, 123, 255)) for _ in range(size))
        elif rng.randrange(4) == 0:
            del content[at:]
    return bytes(content)


class Pairs(list):  # type: ignore[type-arg]
    """A JSON object as pairs, so that a key can stand twice."""


class Raw(str):
    """A piece of JSON text as it is."""


VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 3, 1 << 31, 1 << 53, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 70),
    Raw("9" * 40), Raw("1e400"), Raw("-1e400"), Raw("NaN"), Raw("Infinity"), Raw("-0"), 0.5,
    1e300, "", ".", "..", "../x", "/nowhere/x", "a/b", "~nobody/x", "a\0b", Raw('"\\ud800"'),
    "\u2028", "x" * 500, "F32", "BF16", "U8", "F4", "zero", "dense", "sparse", "packed", "0" * 32,
    "org/name", "hf://org/name", "w.values", BLOCKS, "__metadata__",
    Raw("[[[[]]]]"), Raw('{"a":{"a":1}}'), Raw("[[[["),
    [], Pairs(), [[]], [1 << 31] * 3, [0, 1 << 31], [1] * 70, "*", "(", ".*", "a?b?", "(?i)x",
    "layers.0", "model.layers.0.self_attn.q_proj.weight",
]  # fmt: skip


def _nodes(tree: Any) -> list[tuple[Any, Any]]:
    """Return every place of a tree: a container and an index in it."""
    found = []
    for i, item in enumerate(tree):
        found.append((tree, i))
        value = item[1] if isinstance(tree, Pairs) else item
        if isinstance(value, list):
            found += _nodes(value)
    return found


def json_text(tree: Any) -> str:
    if isinstance(tree, Raw):
        return tree
    if isinstance(tree, Pairs):
        return "{" + ",".join(f"{json_text(k)}:{json_text(v)}" for k, v in tree) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(json_text, tree)) + "]"
    return json.dumps(tree, ensure_ascii=False)


def harm_json(rng: Random, data: bytes) -> bytes:
    """Change values, keys and shapes of a JSON text; where it is none, its bytes."""
    try:
        tree = json.loads(data, object_pairs_hook=Pairs)
        nodes = _nodes([tree])
    except (ValueError, RecursionError):
        return harm_bytes(rng, data)
    if rng.randrange(10) == 0:
        return harm_bytes(rng, data)
    root = [tree]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        nodes = _nodes(root)
        held, i = rng.choice(nodes)
        if i >= len(held):
            continue
        other, j = rng.choice(nodes)
        pairs = isinstance(held, Pairs)
        value = held[i][1] if pairs else held[i]
        kind = rng.randrange(8)
        if kind == 0 and held is not root:
            del held[i]
            continue
        if kind == 1 and held is not root:
            held.insert(i, held[i])
            continue
        if kind == 2 and pairs:
            key = rng.choice(VALUES)
            held[i] = (key if isinstance(key, str) else "x", value)
            continue
        if kind == 3 and j < len(other):
            value = other[j][1] if isinstance(other, Pairs) else other[j]
            value = json.loads("null") if isinstance(value, list) else value
        elif kind == 4 and type(value) is int:
            value = rng.choice((value + 1, value - 1, -value, value * 2, float(value)))
        elif kind == 5 and type(value) is str:
            value = rng.choice((value[:-1], value + "x", value.upper(), value * 2, value[::-1]))
        elif kind == 6:
            value = [value]
        else:
            value = rng.choice(VALUES)
        held[i] = (held[i][0], value) if pairs else value
    try:
        return json_text(root[0]).encode("utf-8", "surrogatepass")
    except RecursionError:
        return harm_bytes(rng, data)


def split(data: bytes) -> tuple[dict[str, str], Tensors]:
    """Take a valid safetensors file apart."""
    (nbytes,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + nbytes])
    metadata = header.pop("__metadata__", {})
    tensors = []
    for name, spec in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = (8 + nbytes + offset for offset in spec["data_offsets"])
        tensors.append((name, spec["dtype"], spec["shape"], data[begin:end]))
    return metadata, tensors


def join(metadata: Any, tensors: Tensors) -> bytes:
    """Put a file together, true or not."""
    pairs, at = Pairs([("__metadata__", Pairs(metadata.items()))]), 0
    for name, dtype, shape, content in tensors:
        pairs.append((name, Pairs([("dtype", dtype), ("shape", shape),
                                   ("data_offsets", [at, at + len(content)])])))  # fmt: skip
        at += len(content)
    header = json_text(pairs).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header)) + header + b"".join(t[3] for t in tensors)


def harm_tensors(rng: Random, tensors: Tensors) -> Tensors:
    """Change tensors so that the file keeps the rules of safetensors, mostly."""
    made = list(tensors)
    for _ in range(rng.choice((1, 1, 2))):
        if not made:
            break
        i, j = rng.randrange(len(made)), rng.randrange(len(made))
        name, dtype, shape, content = made[i]
        kind = rng.randrange(8)
        if kind == 0:
            del made[i]
        elif kind == 1:
            made[i] = (made[j][0] + rng.choice(("", ".x", ".values", ".indices")), *made[i][1:])
        elif kind == 2:
            made[i] = (name, dtype, rng.choice(([len(content)], [], [1, *shape], [0], [*shape, 1],
                                                shape[::-1], [1] * 70)), content)  # fmt: skip
        elif kind == 3:
            dtype = rng.choice(("BF16", "F16", "F32", "F64", "U8", "I64", "I32", "F8_E4M3", "BOOL"))
            with contextlib.suppress(ValueError, TypeError):
                nbytes = tensor_nbytes(dtype, tuple(shape))
                if nbytes < 1 << 20:
                    content = (content * (nbytes // max(len(content), 1) + 1))[:nbytes]
            made[i] = (name, dtype, shape, content)
        elif kind == 4 and shape:
            dim = rng.randrange(len(shape))
            shape = [*shape[:dim], max(0, shape[dim] + rng.choice((-1, 1, 8))), *shape[dim + 1 :]]
            with contextlib.suppress(ValueError, TypeError):
                nbytes = tensor_nbytes(dtype, tuple(shape))
                if nbytes < 1 << 20:
                    content = content[:nbytes].ljust(nbytes, b"\0")
            made[i] = (name, dtype, shape, content)
        elif kind == 5:
            made[i] = (name, *made[j][1:])
        else:
            made[i] = (name, dtype, shape, harm_bytes(rng, content) if rng.randrange(3) == 0
                       else bytes(harm_in_place(rng, content)))  # fmt: skip
    return made


def harm_in_place(rng: Random, content: bytes) -> bytearray:
    """Overwrite integers and bits; the length stays."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3) if changed else 0):
        at = rng.randrange(len(changed))
        if rng.randrange(2):
            changed[at] ^= 1 << rng.randrange(8)
        else:
            at -= at % 4
            number = (rng.choice(NUMBERS) & 0xFFFFFFFF).to_bytes(4, "little")
            changed[at : at + 4] = number[: len(changed) - at]
    return changed


def harm_file(rng: Random, data: bytes) -> bytes:
    """Change a safetensors file: its header's text, its tensors, or its bytes."""
    kind = rng.randrange(8)
    try:
        metadata, tensors = split(data)
        (nbytes,) = struct.unpack("<Q", data[:8])
        if kind < 4:
            return join(metadata, harm_tensors(rng, tensors))
        if kind < 7:
            header = harm_json(rng, data[8 : 8 + nbytes].rstrip())
            length = len(header) + (0 if rng.randrange(8) else rng.choice((-8, -1, 1, 8, 1 << 15)))
            length = max(length, 0)
            return struct.pack("<Q", length) + header + data[8 + nbytes :]
    except Exception:  # what an earlier harm left is no file
        pass
    return harm_bytes(rng, data)


def harm_pickle(rng: Random, data: bytes) -> bytes:
    """Change a pickle word by word."""
    try:
        words = list(pickletools.genops(data))
    except Exception:
        return harm_bytes(rng, data)
    ends = [at for _, _, at in words[1:]] + [len(data)]
    pieces = [data[at:end] for (_, _, at), end in zip(words, ends, strict=True)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        i, j = rng.randrange(len(pieces)), rng.randrange(len(pieces))
        kind = rng.randrange(7)
        name = pickletools.code2op.get(chr(pieces[i][0])) if pieces[i] else None
        if kind == 0:
            del pieces[i]
            if not pieces:
                return b""
        elif kind == 1:
            pieces.insert(i, pieces[j])
        elif kind == 2:
            pieces[i], pieces[j] = pieces[j], pieces[i]
        elif kind == 3 and name is not None and name.name in ("BININT", "BININT1", "BININT2"):
            number = rng.choice((0, 1, -1, 127, 1 << 20, (1 << 31) - 1, -(1 << 31)))
            pieces[i] = b"J" + struct.pack("<i", number)
        elif kind == 4 and name is not None and name.name == "GLOBAL":
            pieces[i] = rng.choice(GLOBALS)
        elif kind == 5:
            pieces[i] = rng.choice(WORDS)
        else:
            pieces[i] = harm_bytes(rng, pieces[i])
    return b"".join(pieces)


# what a pickle may name: on the list or not, none of them does anything where it is called
GLOBALS = [b"cmath\nsqrt\n", b"cbuiltins\nlen\n", b"ccollections\nCounter\n",
           b"c__builtin__\ngetattr\n",
           b"ctorch\nSize\n", b"cbuiltins\nset\n", b"ccollections\nOrderedDict\n",
           b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n",
           b"ctorch._utils\n_rebuild_parameter\n", b"c_codecs\nencode\n", b"cskillvec\nmath.sqrt\n",
           b"ctorch\nadd\n", b"ctorch.distributed.x\ny\n", b"cnumpy\nsqrt\n"]  # fmt: skip
WORDS = [b"(", b"l", b"t", b"R", b"b", b"]", b"}", b")", b"0", b"2", b"a", b"e", b"s", b"u", b"N",
         b"\x81", b"Q", b"\x93", b"\x94", b"\x85", b"\x87", b"h\x00", b"h\x01", b"i", b"o", b".",
         b"\x8a\x01\x7f", b"X\x04\x00\x00\x00math", b"\x8c\x04math"]  # fmt: skip


def harm_archive(rng: Random, data: bytes) -> bytes:
    """Change what torch.save wrote: the pickle in the archive, a record, or bytes of the zip."""
    if rng.randrange(4) == 0:
        return harm_bytes(rng, data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    except Exception:
        return harm_bytes(rng, data)
    if not records:
        return harm_bytes(rng, data)
    made, method = io.BytesIO(), zipfile.ZIP_STORED
    if rng.randrange(20) == 0:
        method = zipfile.ZIP_DEFLATED
    chosen = rng.randrange(len(records)) if rng.randrange(4) == 0 else -1
    with warnings.catch_warnings(), zipfile.ZipFile(made, "w", method) as archive:
        warnings.simplefilter("ignore")
        for i, (name, content) in enumerate(records):
            if i == chosen:
                kind = rng.randrange(4)
                if kind == 0:
                    continue
                name = rng.choice((name, "y/x", "x/data.pkl", records[0][0]))
                content = harm_bytes(rng, content)
            elif chosen < 0 and name.endswith("data.pkl"):
                content = harm_pickle(rng, content)
            archive.writestr(name, content)
    return made.getvalue()


def harm_text(rng: Random, data: bytes) -> bytes:
    """Change lines of a text, and put in what YAML and Markdown have to offer."""
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        kind = rng.randrange(7)
        if kind == 0:
            lines[i] = harm_bytes(rng, lines[i])
        elif kind == 1:
            lines.insert(i, lines[j])
        elif kind == 2 and len(lines) > 1:
            del lines[i]
        elif kind == 3:
            indent = rng.choice((b"", b"  ", b"    ", b"- ", b"\t"))
            lines[i] = indent + lines[i].strip()
        elif kind == 4:
            head, colon, _ = lines[i].partition(b":")
            lines[i] = head + (colon or b":") + b" " + rng.choice(YAML)
        elif kind == 5:
            value = rng.choice(VALUES)
            with contextlib.suppress(UnicodeEncodeError):
                lines[i] = lines[i].partition(b":")[0] + b": " + json_text(value).encode()
        else:
            lines.insert(i, rng.choice(YAML))
    return b"\n".join(lines)


YAML = [b"&a [x]", b"*a", b"<<: {op: x}", b"!!python/tuple [x]", b"!!binary x",
        b"1:30:20", b"0x_", b".inf", b".nan", b"1e3", b"0o17", b"2001-01-01", b"? [a]\n: b", b"|",
        b">\n  x", b"---", b"...", b"%YAML 1.1", b"[[[[", b"{{{{", b"{a: {a: ", b"'", b'"',
        b"<!-- skillvec:begin -->", b"<!-- skillvec:end -->", b"<!-- skillvec:begin", b"\xff",
        b"\xef\xbb\xbf", b"\x00", b"\xc2\x85", b"license: mit", b"license: [mit]", b"tags: 3",
        b"model-index: 7", b"9" * 40, b"- a\n- b", b"~", b"= x", b"!!set {a}"]  # fmt: skip
