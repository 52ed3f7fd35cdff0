"""Files that are no saved step, made of ones that are: by damage, and with malice.

`damaged` changes bytes of a file; `hostile` changes what its entries say and writes checksums and
digests that agree, as somebody would who wants the file to be believed.
"""

from __future__ import annotations

import io
import json
import random
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tracejit.errors import TracejitError
from tracejit.ir.graph import Graph, Node, Result, Value, Write
from tracejit.ir.ops import OPS, Op
from tracejit.ir.text import parse
from tracejit.saved import archive, manifest, objects

Entries = dict[str, bytes]
_NUMBER = re.compile(rb"\d+")
_TOKEN = re.compile(rb"[A-Za-z_]\w*|\d+|[^\sA-Za-z_0-9]")
_ODD = (
    *(None, True, -1, 0, 1, 2, 7, 1 << 31, 1 << 47, 1 << 63, 10**30, 0.5, 1e308, "nan", "", "x"),
    *("../../x", "/etc/passwd", "%0", "%99", "__class__", "{value.__class__}", "é" * 5, "a" * 500),
    *([], {}, [[]], [0], [-1, 0], ["tensor", 0], ["state", "w"], {"tensor": 0}, {"float": "inf"}),
)


def entries_of(content: bytes) -> Entries:
    return archive.read(io.BytesIO(content))


def file_of(entries: Entries, folder: Path, *, digests: bool = True) -> bytes:
    """A file of these entries, whose manifest has their digests if it is one that can."""
    if digests:
        try:
            said = json.loads(entries[manifest.MANIFEST])
            others = {name: x for name, x in entries.items() if name != manifest.MANIFEST}
            listed = {name: x for name, x in others.items() if name != objects.SIGNATURE}
            said["entries"] = {name: manifest._digest(x) for name, x in listed.items()}
            entries = {manifest.MANIFEST: json.dumps(said).encode(), **others}
        except (ValueError, TypeError, KeyError):
            pass
    path = folder / "made"
    archive.write(path, entries)
    return path.read_bytes()


# ---- damage


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The file with some bytes changed, missing, doubled or moved."""
    made = bytearray(content)
    at = rng.randrange(len(made))
    if rng.random() < 0.3:  # the records at the end say where everything is
        at = max(0, len(made) - 1 - rng.randrange(400))
    stop = min(len(made), at + rng.choice((1, 2, 8, 100, 5000)))
    match rng.randrange(7):
        case 0:
            made[at] ^= 1 << rng.randrange(8)
        case 1:
            made[at:stop] = bytes(stop - at)
        case 2:
            made[at:stop] = rng.randbytes(stop - at)
        case 3:
            del made[at:]
        case 4:
            del made[at:stop]
        case 5:
            made[at:at] = made[at:stop]
        case 6:
            other = rng.randrange(len(made))
            made[at:stop], made[other : other + 8] = made[other : other + 8], made[at:stop]
    return bytes(made)


# ---- malice


def hostile(entries: Entries, rng: random.Random) -> Entries:
    """Entries of which some say something else."""
    made = dict(entries)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        change = rng.choice((_manifest, _manifest, _text, _text, _graph, _graph, _tensors, _swap))
        change(made, rng)
    return made


def _manifest(entries: Entries, rng: random.Random) -> None:
    """Another value somewhere in the manifest."""
    try:
        root = json.loads(entries[manifest.MANIFEST])
    except (ValueError, KeyError):
        return
    places: list[tuple[object, object]] = []

    def walk(x: object) -> None:
        for key in x if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ():
            places.append((x, key))
            walk(x[key])

    walk({k: x for k, x in root.items() if k != "entries"})
    holder, key = rng.choice(places)
    match rng.randrange(5):
        case 0:
            holder[key] = rng.choice(_ODD)
        case 1:
            other, at = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[at]))
        case 2:
            del holder[key]
        case 3 if isinstance(holder, list):
            holder.insert(key, holder[key])
        case 3 | 4:
            x = holder[key]
            whole = isinstance(x, int) and not isinstance(x, bool)
            holder[key] = x + rng.choice((-1, 1, 64)) if whole else rng.choice(_ODD)
    entries[manifest.MANIFEST] = json.dumps(root).encode()


def _text(entries: Entries, rng: random.Random) -> None:
    """Another line, word or number in a text of a plan."""
    names = [name for name in entries if name.startswith("plans/")]
    if not names:
        return
    name = rng.choice(names)
    text = entries[name]
    lines = text.split(b"\n")
    i = rng.randrange(len(lines))
    match rng.randrange(8):
        case 0:
            del lines[i]
        case 1:
            lines.insert(i, rng.choice(lines))
        case 2:
            j = rng.randrange(len(lines))
            lines[i], lines[j] = lines[j], lines[i]
        case 3 | 4:
            number = b"%d" % rng.choice((0, 1, 2, 3, 5, 8, 64, 100, 1 << 40, 1 << 70))
            found = [*_NUMBER.finditer(lines[i])]
            if found:
                lines[i] = _put(lines[i], rng.choice(found), number)
        case 5 | 6:
            found, others = [*_TOKEN.finditer(lines[i])], _TOKEN.findall(text)
            if found and others:
                lines[i] = _put(lines[i], rng.choice(found), rng.choice(others))
        case 7:
            odd = rng.choice(
                (b"(" * 5000, b"\0", b"\xff\xfe", b"*/ int x; /*", b"-" * 90_000, b"}")
            )
            lines[i] += odd
    entries[name] = b"\n".join(lines)


def _graph(entries: Entries, rng: random.Random) -> None:
    """Another operand, primitive or attribute somewhere in a graph, with types that follow."""
    names = [name for name in entries if name.endswith(("graph.txt", "checks.txt"))]
    if not names:
        return
    name = rng.choice(names)
    try:
        graph = parse(entries[name].decode())
        entries[name] = str(_changed(graph, rng)).encode()
    except (TracejitError, ValueError, KeyError, IndexError, AssertionError, SyntaxError):
        return


def _changed(graph: Graph, rng: random.Random) -> Graph:
    """A graph with another node; the types of what comes after it are inferred anew."""
    at = rng.randrange(len(graph.nodes))
    known = {p.value: p.value for p in graph.params}
    nodes = []
    for i, node in enumerate(graph.nodes):
        args = tuple(known[a] if isinstance(a, Value) else a for a in node.args)
        op, attrs = node.op, node.attrs
        if i == at:
            op, args, attrs = _another(op, args, attrs, [*known.values()], rng)
        types = tuple(a.type if isinstance(a, Value) else a for a in args)
        known[node.out] = Value(node.out.id, op.result_type(types, dict(attrs)))
        nodes.append(Node(op, args, attrs, (known[node.out],), node.where))
    results = tuple(Result(known[r.value], r.strides) for r in graph.results)
    writes = tuple(Write(w.target, known[w.value]) for w in graph.writes)
    return Graph(graph.name, graph.params, tuple(nodes), results, writes)


def _another(op: Op, args: tuple, attrs: tuple, values: list[Value], rng: random.Random) -> tuple:
    match rng.randrange(3):
        case 0 if args:
            k = rng.randrange(len(args))
            new = rng.choice([*values, 0, 3, -1, 1e30, True])
            return op, (*args[:k], new, *args[k + 1 :]), attrs
        case 1 if attrs:
            k = rng.randrange(len(attrs))
            name, value = attrs[k]
            return op, args, (*attrs[:k], (name, _number_changed(value, rng)), *attrs[k + 1 :])
    others = [o for o in OPS.values() if o.family == op.family and len(o.vjp) == len(op.vjp)]
    return rng.choice(others), args, attrs


def _number_changed(value: object, rng: random.Random) -> object:
    if isinstance(value, tuple) and value:
        k = rng.randrange(len(value))
        return (*value[:k], _number_changed(value[k], rng), *value[k + 1 :])
    if type(value) is int:
        return rng.choice((value + 1, value - 1, 0, 2 * value, -value, 1 << 40))
    return not value if type(value) is bool else value


def _put(line: bytes, at: re.Match[bytes], new: bytes) -> bytes:
    return line[: at.start()] + new + line[at.end() :]


def _tensors(entries: Entries, rng: random.Random) -> None:
    """Another header of the tensors."""
    name = rng.choice((manifest.STATE, manifest.GENERATORS))
    content = entries.get(name, b"")
    if len(content) < 8:
        return
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = content[8 : 8 + length], content[8 + length :]
    match rng.randrange(4):
        case 0:
            found = [*_NUMBER.finditer(header)]
            if found:
                number = b"%d" % rng.choice((0, 1, 1 << 20, 1 << 45, 1 << 64, 10**50))
                header = _put(header, rng.choice(found), number)
        case 1:
            kinds = (b"F64", b"F32", b"BF16", b"I64", b"BOOL", b"F8_E5M2")
            header = header.replace(rng.choice(kinds), rng.choice(kinds))
        case 2:
            rest = rest[: rng.randrange(len(rest) + 1)] + rng.randbytes(rng.choice((0, 8)))
        case 3:
            length = rng.choice((0, 1 << 40, (1 << 64) - 1))
            entries[name] = struct.pack("<Q", length) + header + rest
            return
    entries[name] = struct.pack("<Q", len(header)) + header + rest


def _swap(entries: Entries, rng: random.Random) -> None:
    """Entries that are missing, exchanged, or named otherwise."""
    a, b = rng.choice([*entries]), rng.choice([*entries])
    match rng.randrange(4):
        case 0:
            entries[a], entries[b] = entries[b], entries[a]
        case 1:
            del entries[a]
        case 2:
            entries[rng.choice(("plans/9/graph.txt", "more.txt", "shown/a.txt"))] = entries[a]
        case 3:
            entries[a] = entries[a] * rng.choice((0, 2))


def zip_files(entries: Entries) -> Iterator[tuple[str, bytes]]:
    """What other programs that write zip files could make, each with what is wrong with it."""
    import zipfile

    def written(names: dict[str, bytes], **options: object) -> bytes:
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w", **options) as file:
            for name, content in names.items():
                file.writestr(name, content)
        return made.getvalue()

    yield "another program's", written(entries)
    yield "compressed", written(entries, compression=zipfile.ZIP_DEFLATED)
    bomb = {**entries, "bomb.txt": bytes(50 << 20)}
    yield "a bomb", written(bomb, compression=zipfile.ZIP_DEFLATED)
    for name in ("../x.txt", "/tmp/x.txt", "a\\b.txt", "a/../../x.txt", "x", "", "A.txt", "é.txt"):
        yield f"an entry {name!r}", _of_records({**entries, name: b"x"})
    yield "two of a name", _of_records([*entries.items(), ("state.safetensors", b"")])
    for size in (1 << 31, 1 << 40, 1 << 63):
        yield f"an entry of {size} bytes", _of_records(entries, sizes={"state.safetensors": size})
        yield f"{size} entries", _of_records(entries, count=size)
        yield f"a directory at {size}", _of_records(entries, start=size)


def _of_records(
    entries: Entries | list[tuple[str, bytes]],
    sizes: dict[str, int] | None = None,
    count: int | None = None,
    start: int | None = None,
) -> bytes:
    """A file of our own records, which say what they are told."""
    pairs = [*entries.items()] if isinstance(entries, dict) else entries
    parts, directory, at = [], [], 0
    for name, content in pairs:
        size = (sizes or {}).get(name, len(content))
        entry = archive._Entry(name, zlib.crc32(content), size, at)
        parts += [archive._local(entry), content]
        directory.append(archive._central(entry))
        at += len(parts[-2]) + len(content)
    listed = b"".join(directory)
    where = at if start is None else start
    tail = archive._tail(len(pairs) if count is None else count, where, len(listed))
    return b"".join([*parts, listed, tail])


# ---- what a load does besides

_seen: list[str] | None = None
_WRITING = ("w", "a", "x", "+")
_EVENTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class")
_EVENTS += ("ctypes.dlopen", "socket.connect", "os.remove", "os.rename", "os.mkdir", "os.rmdir")


def _hook(event: str, args: tuple) -> None:
    if _seen is None:
        return
    if event == "open":
        mode, flags = args[1], args[2]
        if mode is None:
            writes = isinstance(flags, int) and flags & 3
        else:
            writes = any(x in mode for x in _WRITING)
        if writes:
            _seen.append(f"opens {args[0]} to write")
    elif event in _EVENTS:
        _seen.append(f"{event} {args[:1]}")


_watching: list[Callable] = []


@contextmanager
def deeds() -> Iterator[list[str]]:
    """What is written, started or unpickled meanwhile."""
    global _seen
    if not _watching:
        sys.addaudithook(_hook)  # for good
        _watching.append(_hook)
    _seen = found = []
    try:
        yield found
    finally:
        _seen = None
