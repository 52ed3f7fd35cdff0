"""The container of a saved step: a zip file of one strict form, which any unzip opens.

    name → bytes, in order  →  write  →  a file  →  read  →  name → bytes

Entries are stored, not compressed, so a file takes as much memory as it is long. Every byte of it
is determined by the names and contents of the entries: `read` makes the records anew and compares,
so that no damage goes unnoticed and no other program's reading of the file can differ. Sizes are in
64-bit fields (zip64) throughout. Nothing is ever extracted: names are only names.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from tracejit.records import dataclass
from tracejit.runtime.cache import write_atomically

MOST_ENTRIES = 100_000
_NAME = re.compile(r"[a-z0-9_]+(?:/[a-z0-9_]+)*\.[a-z]+", re.ASCII)
_LONGEST_NAME = 200

_VERSION, _TIME, _DATE = 45, 0, 0x21  # zip64; 1980-01-01, the first day that there is
_FULL = 0xFFFFFFFF  # the size is in the extra field
_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_LOCAL_SIZES = struct.Struct("<HHQQ")
_CENTRAL_SIZES = struct.Struct("<HHQQQ")
_END64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR = struct.Struct("<IIQI")
_END = struct.Struct("<IHHHHIIH")
_TAIL = _END64.size + _LOCATOR.size + _END.size


class Damaged(ValueError):
    """What is wrong with the bytes of a file."""


@dataclass(frozen=True)
class _Entry:
    name: str
    crc: int
    size: int
    start: int  # of its local record

    @property
    def data(self) -> int:
        """Where its bytes start."""
        return self.start + _LOCAL.size + len(self.name) + _LOCAL_SIZES.size

    @property
    def end(self) -> int:
        return self.data + self.size


def _local(e: _Entry) -> bytes:
    name = e.name.encode()
    lengths = len(name), _LOCAL_SIZES.size
    head = _LOCAL.pack(0x04034B50, _VERSION, 0, 0, _TIME, _DATE, e.crc, _FULL, _FULL, *lengths)
    return head + name + _LOCAL_SIZES.pack(1, 16, e.size, e.size)


def _central(e: _Entry) -> bytes:
    name = e.name.encode()
    versions, lengths = (_VERSION, _VERSION), (len(name), _CENTRAL_SIZES.size, 0)
    head = _CENTRAL.pack(
        *(0x02014B50, *versions, 0, 0, _TIME, _DATE, e.crc, _FULL, _FULL),
        *(*lengths, 0, 0, 0, _FULL),
    )
    return head + name + _CENTRAL_SIZES.pack(1, 24, e.size, e.size, e.start)


def _tail(count: int, start: int, size: int) -> bytes:
    """The records at the end, of a central directory that starts at `start`."""
    end64 = _END64.pack(
        0x06064B50, _END64.size - 12, _VERSION, _VERSION, 0, 0, count, count, size, start
    )
    locator = _LOCATOR.pack(0x07064B50, 0, start + size, 1)
    end = _END.pack(0x06054B50, 0, 0, 0xFFFF, 0xFFFF, _FULL, _FULL, 0)
    return end64 + locator + end


def write(path: Path, entries: Mapping[str, bytes]) -> None:
    """Write a file; it appears all at once, as a whole. Raises OSError."""
    parts, directory, at = [], [], 0
    for name, content in entries.items():
        entry = _Entry(_checked(name), zlib.crc32(content), len(content), at)
        parts += [_local(entry), content]
        directory.append(_central(entry))
        at = entry.end
    listed = b"".join(directory)
    write_atomically(path, *parts, listed, _tail(len(entries), at, len(listed)))


def read(file: BinaryIO) -> dict[str, bytes]:
    """The entries of a file that `write` has written. Raises Damaged for any other, and OSError."""
    length = file.seek(0, 2)
    if length < _TAIL:
        raise Damaged("it is too short for a zip file")
    tail = _bytes(file, length - _TAIL, _TAIL)
    count, _, size, start = _END64.unpack(tail[: _END64.size])[6:]
    if start + size + _TAIL != length or tail != _tail(count, start, size):
        raise Damaged("its end is not that of a file which tracejit has written, or is cut off")
    if count > MOST_ENTRIES:
        raise Damaged(f"it has {count} entries, which is more than {MOST_ENTRIES}")
    entries = _directory(_bytes(file, start, size), count)
    if (entries[-1].end if entries else 0) != start:
        raise Damaged("its entries do not fill it")
    found: dict[str, bytes] = {}
    for entry in entries:
        record = _local(entry)
        if _bytes(file, entry.start, len(record)) != record:
            raise Damaged(f"the record of {entry.name} is not the one that the directory has")
        content = _bytes(file, entry.data, entry.size)
        if zlib.crc32(content) != entry.crc:
            raise Damaged(f"{entry.name} is damaged: its checksum is another one")
        found[entry.name] = content
    return found


def _directory(records: bytes, count: int) -> list[_Entry]:
    """The entries of a central directory, each of which starts where the one before ends."""
    found: list[_Entry] = []
    names: set[str] = set()
    at = 0
    for _ in range(count):
        head = records[at : at + _CENTRAL.size]
        if len(head) < _CENTRAL.size:
            raise Damaged("its directory is cut off")
        fields = _CENTRAL.unpack(head)
        crc, length = fields[7], fields[10]
        name = records[at + _CENTRAL.size : at + _CENTRAL.size + length].decode("ascii", "replace")
        sizes = records[at + _CENTRAL.size + length :][: _CENTRAL_SIZES.size]
        if len(sizes) < _CENTRAL_SIZES.size:
            raise Damaged("its directory is cut off")
        entry = _Entry(_checked(name), crc, *_CENTRAL_SIZES.unpack(sizes)[3:])
        record = _central(entry)
        if records[at : at + len(record)] != record:
            raise Damaged(f"the directory's record of {name!r} is of another form than tracejit's")
        if entry.start != (found[-1].end if found else 0):
            raise Damaged(f"{name} does not start where the entry before it ends")
        if name in names:
            raise Damaged(f"two entries are named {name}")
        names.add(name)
        found.append(entry)
        at += len(record)
    if at != len(records):
        raise Damaged("its directory has more than its entries")
    return found


def _checked(name: str) -> str:
    if len(name) > _LONGEST_NAME or _NAME.fullmatch(name) is None:
        raise Damaged(f"an entry is named {name[:50]!r}, which is no name of a saved step's")
    return name


def _bytes(file: BinaryIO, start: int, size: int) -> bytes:
    """Some bytes of a file. A size is within the file by now."""
    file.seek(start)
    found = file.read(size)
    if len(found) != size:
        raise Damaged("it is cut off")
    return found
