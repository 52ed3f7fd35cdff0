"""The disk cache: text entries under knobs.cache_dir(), addressed by kind and key.

An entry is a file `<kind>/<sha256 of key><suffix>` of three comment lines (format version, sha256
of the body, full key) and the body, so that a Python source stays importable. Files appear by
rename, so readers and concurrent writers never see half of one; what is damaged or belongs to
another key is removed and reported as absent; what another user owns or may write is never read.
Where the cache cannot be written, `put` falls back to the private folder of this process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import stat
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tracejit import knobs
from tracejit.records import dataclass
from tracejit.runtime.private import private_folder

VERSION = "tracejit cache 1"
SUFFIX = {"triton": ".py"}  # by kind; ".txt" for others
MAX_BYTES = 256 << 20
STALE_SECONDS = 3600.0  # a temporary file this old was left by a crash
SWEEP_EVERY = 64  # writes between two checks of the total size


_puts: Counter[Path] = Counter()  # of this process, by root
_warned: set[Path] = set()  # roots that were complained about: once is enough


def sha256(text: str) -> str:
    """Hex digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(*folders: str) -> str:
    """Hex digest of the sources in some folders of this package. It is part of an entry's key, so
    an entry made by other sources is never used."""
    return sha256(" ".join(map(_digest_of, folders)))


@functools.cache
def _digest_of(folder: str) -> str:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256(folder.encode())
    for path in sorted((package / folder).rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()


# ---- entries that come from elsewhere

Bodies = dict[tuple[str, str], str]  # by kind, and sha256 of the key
_provided: list[Bodies] = []
_noted: list[Bodies] = []


def provide(bodies: Bodies) -> Callable[[], None]:
    """Let all caches have these entries where their folders do not, until the function that is
    returned is called. Whoever calls this trusts them as much as the folder."""
    _provided.append(bodies)

    def over() -> None:
        _provided[:] = [other for other in _provided if other is not bodies]

    return over


@contextlib.contextmanager
def noting() -> Iterator[Bodies]:
    """All entries that are read or stored meanwhile, by any thread."""
    found: Bodies = {}
    _noted.append(found)
    try:
        yield found
    finally:
        _noted[:] = [other for other in _noted if other is not found]


def _note(kind: str, key: str, body: str) -> None:
    for found in tuple(_noted):
        found[kind, sha256(key)] = body


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the cache."""

    kind: str
    nbytes: int


class DiskCache:
    """Get and put text entries; safe among threads and processes that share the folder."""

    def __init__(self, root: Path | None = None, max_bytes: int = MAX_BYTES):
        self._root = root
        self.max_bytes = max_bytes

    @property
    def root(self) -> Path:
        """Where entries lie; follows the environment unless a root was given."""
        return self._root or knobs.cache_dir()

    def path(self, kind: str, key: str) -> Path:
        """The file of an entry, whether it exists or not."""
        return self.root / kind / (sha256(key) + SUFFIX.get(kind, ".txt"))

    def get(self, kind: str, key: str) -> str | None:
        """The body of an entry, or None where there is none that can be trusted."""
        body = self._stored(kind, key)
        if body is None and _provided:
            at = kind, sha256(key)
            body = next((given[at] for given in tuple(_provided) if at in given), None)
        if body is not None:
            _note(kind, key, body)
        return body

    def _stored(self, kind: str, key: str) -> str | None:
        path = self.path(kind, key)
        try:
            if not (self._trusted_folder(self.root) and self._trusted_folder(path.parent)):
                return None
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            with open(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not (stat.S_ISREG(status.st_mode) and self._trusted(status)):
                    return None
                content = file.read()
        except OSError:
            return None
        body = unpack(content, key)
        with contextlib.suppress(OSError):
            if body is None:
                path.unlink()
            else:
                os.utime(path)  # read just now: the last to be swept
        return body

    def put(self, kind: str, key: str, text: str) -> Path:
        """Store an entry and return a file that holds it."""
        return self.store(kind, key, text) or self._put_private(kind, key, text)

    def store(self, kind: str, key: str, text: str) -> Path | None:
        """Store an entry, and return its file; None where the cache cannot be written."""
        path = self.path(kind, key)
        _note(kind, key, text)
        if self._stored(kind, key) == text:
            return path
        try:
            for folder in (self.root, path.parent):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if not self._trusted_folder(folder):
                    return None
            write_atomically(path, pack(key, text))
        except OSError as error:
            self._warn(f"the cache folder {self.root} cannot be written ({error})")
            return None
        _puts[self.root] += 1
        if _puts[self.root] % SWEEP_EVERY == 1:
            self.sweep()
        return path

    def entries(self) -> list[Entry]:
        """What is stored, by kind."""
        found = []
        for path, status in _files(self.root):
            if not path.endswith(".tmp"):
                found.append(Entry(Path(path).parent.name, status.st_size))
        return found

    def sweep(self) -> None:
        """Remove what crashes left behind, and the least recently used beyond `max_bytes`. A time
        that is still to come, as after a clock was put back, tells nothing: such entries go first.
        """
        entries, now = [], time.time()
        for path, status in _files(self.root):
            when = status.st_mtime
            if path.endswith(".tmp"):
                if abs(now - when) > STALE_SECONDS:
                    _remove(path)
            else:
                entries.append((when if when < now + STALE_SECONDS else 0.0, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.max_bytes:
                return
            _remove(path)
            total -= size

    def _put_private(self, kind: str, key: str, text: str) -> Path:
        private = private_folder() / self.path(kind, key).name
        write_atomically(private, pack(key, text))
        return private

    def secret(self, name: str, *, create: bool = False) -> bytes | None:
        """32 random bytes that only this user can read, in a file of the folder: made once, if
        `create`; None where there are none that can be trusted."""
        path = self.root / name
        if create:
            with contextlib.suppress(OSError):
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
                if self._trusted_folder(self.root) and not path.exists():
                    write_atomically(path, secrets.token_bytes(32))
        try:
            if not self._trusted_folder(self.root):
                return None
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            with open(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                mine = stat.S_ISREG(status.st_mode) and self._trusted(status)
                found = file.read(33) if mine and not status.st_mode & 0o077 else b""
        except OSError:
            return None
        return found if len(found) == 32 else None

    def _trusted_folder(self, folder: Path) -> bool:
        """Whether only this user may write in a folder, and put another in its place by a link."""
        link = os.lstat(folder)
        other = stat.S_ISLNK(link.st_mode) and link.st_uid != os.getuid()
        return self._trusted(os.stat(folder), ours=not other)

    def _trusted(self, status: os.stat_result, *, ours: bool = True) -> bool:
        """Whether only this user may have written something."""
        if ours and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return True
        self._warn(
            f"the cache folder {self.root} has entries that other users own or may write; they "
            "are ignored. Set TRACEJIT_CACHE to a folder of your own, or chmod go-w it"
        )
        return False

    def _warn(self, text: str) -> None:
        if self.root not in _warned:
            _warned.add(self.root)
            warnings.warn(f"tracejit: {text}", RuntimeWarning, stacklevel=3)


def pack(key: str, body: str) -> bytes:
    """An entry's file: three comment lines and the body."""
    return f"# {VERSION}\n# body {sha256(body)}\n# key {json.dumps(key)}\n{body}".encode()


def unpack(content: bytes, key: str) -> str | None:
    """The body of a file written by `pack` for `key`, else None."""
    try:
        version, digest, found, body = content.decode().split("\n", 3)
    except ValueError:
        return None
    expected = (f"# {VERSION}", f"# body {sha256(body)}", f"# key {json.dumps(key)}")
    return body if (version, digest, found) == expected else None


def write_atomically(path: Path, *parts: bytes) -> None:
    """Let `path` appear, or change, all at once, with these parts one after another; readable and
    writable by its owner only."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.writelines(parts)
        os.replace(temporary, path)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)  # the name that the caller knows
        raise


# the files of this module, and nothing else that a folder may hold
_ENTRY = re.compile(r"[0-9a-f]{64}\.(txt|py)")
_TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp")


def _files(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """The entries and temporary files of a cache folder, and nothing else found there. Links are
    not followed."""
    for found in _scan(root):
        if not found.is_dir(follow_symlinks=False):
            if _TEMPORARY.fullmatch(found.name):
                yield from _with_status(found)
            continue
        for entry in _scan(found.path):
            if _ENTRY.fullmatch(entry.name) or _TEMPORARY.fullmatch(entry.name):
                yield from _with_status(entry)


def _with_status(entry: os.DirEntry) -> Iterator[tuple[str, os.stat_result]]:
    with contextlib.suppress(OSError):  # removed by another process just now
        yield entry.path, entry.stat(follow_symlinks=False)


def _scan(folder: str | Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _remove(path: str | Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
