"""Where the cache cannot be written, or is not ours: no home, a full disk, folders of others."""

from __future__ import annotations

import os
import resource
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import tracejit
from support.children import forked
from support.small_training import Training, near, states_of_eager
from tracejit import knobs
from tracejit.runtime import c_compiler, private
from tracejit.runtime.cache import DiskCache

CALLS = 4
NOBODY = 65534
rooted = pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")


def trained(prepare: Callable[[], object], **options: object) -> tuple[bool, list[str]]:
    """In a child: whether a few calls are right after this, and the warnings."""
    right = states_of_eager(CALLS)[-1]

    def child() -> tuple[bool, list[str]]:
        private._held = None
        os.environ.pop("XDG_CACHE_HOME", None)
        prepare()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            training = Training()
            step = tracejit.compile(training.step, **({"backend": "c"} | options))
            for _ in range(CALLS):
                step()
        texts = [str(x.message) for x in said if "tracejit" in str(x.message)]
        if private._held is not None:
            private._remove(private._held)
        return near(training.state(), right), texts

    return forked(child).result()


def become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


@pytest.fixture
def open_folder():
    """A folder that other users reach."""
    with tempfile.TemporaryDirectory(prefix="robust-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        (Path(folder) / "tmp").mkdir()
        (Path(folder) / "tmp").chmod(0o1777)
        yield Path(folder)


# ---- homes


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("TRACEJIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    shared = Path(tempfile.gettempdir()) / f"tracejit-{os.getuid()}"
    for home, right in (
        (str(tmp_path), tmp_path / ".cache" / "tracejit"),
        ("", shared),
        ("relative/home", shared),
    ):
        monkeypatch.setenv("HOME", home)
        assert knobs.cache_dir() == right
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without an entry
    assert knobs.cache_dir() == shared
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert knobs.cache_dir() == shared
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert knobs.cache_dir() == tmp_path / "xdg" / "tracejit"


@rooted
@pytest.mark.parametrize("home", ["read-only", "missing", "none"])
@pytest.mark.sweep(0.34)
def test_a_user_whose_home_cannot_be_written(home, open_folder):
    """With the rights of a user that is not root: one warning at most, and no file but in the
    temporary folder."""

    def prepare() -> None:
        os.environ.pop("TRACEJIT_CACHE", None)
        os.environ.pop("HOME", None)
        tempfile.tempdir = str(open_folder / "tmp")
        if home != "none":
            os.environ["HOME"] = str(open_folder / ("" if home == "read-only" else "missing"))
        become_nobody()
        if home == "none":
            os.path.expanduser = lambda path: path

    good, said = trained(prepare)
    assert good and len(said) == (0 if home == "none" else 1), said
    assert all("cannot be written" in text for text in said)
    assert [x.name for x in open_folder.iterdir()] == ["tmp"]
    left = [x.name for x in (open_folder / "tmp").iterdir() if x.name.startswith("tracejit")]
    assert left == ([f"tracejit-{NOBODY}"] if home == "none" else [])


@rooted
@pytest.mark.parametrize("how", ["theirs", "anybody's", "their link", "a file", "their library"])
@pytest.mark.sweep(0.34)
def test_a_cache_that_others_may_write(how, open_folder):
    """It is not read, not written, and said once; the step runs."""
    cache, mine = open_folder / "cache", open_folder / "mine"

    def fill() -> None:
        os.environ["TRACEJIT_CACHE"] = str(mine if how == "their link" else cache)

    if how != "a file":
        assert trained(fill)[0]
    if how in ("theirs", "their library"):
        for path in (cache, *cache.rglob("*")) if how == "theirs" else cache.glob("c/*"):
            os.chown(path, NOBODY, NOBODY)
    elif how == "anybody's":
        (cache / "c").chmod(0o777)
    elif how == "their link":
        cache.symlink_to(mine)
        os.chown(cache, NOBODY, NOBODY, follow_symlinks=False)
    else:
        cache.write_text("in the way")
    before = {path: path.stat() for path in sorted(open_folder.rglob("*"))}
    good, said = trained(lambda: os.environ.update(TRACEJIT_CACHE=str(cache)))
    assert good and len(said) == 1, said
    assert ("cannot be written" if how == "a file" else "other users own") in said[0]
    if how in ("theirs", "their link", "a file"):
        assert {path: path.stat() for path in sorted(open_folder.rglob("*"))} == before


@pytest.mark.parametrize("damage", ["cut", "other bytes", "another's", "link", "folder"])
@pytest.mark.sweep(0.34)
def test_damaged_entries_of_each_kind(damage, tmp_path):
    """All entries of a step at once; none is believed, and the step runs and is stored anew."""

    def prepare() -> None:
        os.environ["TRACEJIT_CACHE"] = str(tmp_path / "cache")

    assert trained(prepare)[0]
    entries = [x for x in (tmp_path / "cache").rglob("*") if x.is_file()]
    assert {x.parent.name for x in entries} >= {"c", "cpu", "kernel", "plan"}
    contents = {x: x.read_bytes() for x in entries}
    for i, path in enumerate(entries):
        whole = contents[path]
        path.unlink()
        if damage == "cut":
            path.write_bytes(whole[: len(whole) * 2 // 3])
        elif damage == "other bytes":
            path.write_bytes(whole[:-40] + b"#" * 40)
        elif damage == "another's":
            path.write_bytes(contents[entries[i - 1]])
        elif damage == "link":
            (tmp_path / f"moved{i}").write_bytes(whole)
            path.symlink_to(tmp_path / f"moved{i}")
        else:
            path.mkdir()
    good, said = trained(prepare)
    assert good
    assert bool(said) == (damage == "folder"), said  # else the entry is replaced, in silence
    if damage == "link":
        assert all((tmp_path / f"moved{i}").exists() for i in range(len(entries)))


# ---- full disks


def test_libraries_come_from_memory_where_no_file_can_be_loaded(monkeypatch):
    """Two of them, which the loader must not take for one."""
    monkeypatch.setattr(c_compiler, "private_folder", lambda: Path("/proc/no/such/folder"))
    compile_c = c_compiler.compile_c
    with pytest.raises(c_compiler.CannotCompile, match="Make room"):
        compile_c(c_compiler.find_compiler(), "int f(void) { return 1; }")
    monkeypatch.undo()
    codes = [
        compile_c(c_compiler.find_compiler(), f"int f(void) {{ return {n}; }}") for n in (1, 2)
    ]
    monkeypatch.setattr(c_compiler, "private_folder", lambda: Path("/proc/no/such/folder"))
    assert [c_compiler._opened(code).f() for code in codes] == [1, 2]


def test_files_that_may_not_grow(tmp_path):
    """A limit on the size of files stops the cache, and the compiler with it: a call says so, or
    runs eagerly; without the limit the step compiles."""
    right = states_of_eager(CALLS)[-1]

    def child() -> tuple[str, list[str], bool]:
        os.environ["TRACEJIT_CACHE"] = str(tmp_path / "cache")
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        training = Training()
        before = training.state()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                tracejit.compile(training.step, backend="c", on_unsupported="raise")()
                raised = ""
            except c_compiler.CannotCompile as error:
                raised = str(error)
            same, training.calls = training.state()[1:] == before[1:], 0
            step = tracejit.compile(training.step, backend="c", on_unsupported="eager")
            step()
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        for _ in range(CALLS - 1):
            step()
        texts = [str(x.message) for x in said if "tracejit" in str(x.message)]
        return raised, texts, same and near(training.state(), right) and step.stats.compiles > 0

    raised, said, good = forked(child).result()
    assert "Make room" in raised and good
    assert any("runs eagerly" in text for text in said) and len(said) <= 2, said


def mounted(folder: Path) -> bool:
    """Whether a small file system could be put there, in a namespace of this process's own."""
    import ctypes

    libc, new_namespace, private_mounts = (
        ctypes.CDLL(None, use_errno=True),
        0x20000,
        1 << 18 | 16384,
    )
    if libc.unshare(new_namespace) or libc.mount(b"none", b"/", None, private_mounts, None):
        return False
    at = os.fsencode(folder)
    return not libc.mount(b"tmpfs", at, b"tmpfs", 0, b"size=64k")


def test_a_full_disk(tmp_path):
    """A file system of 64 KiB under the cache: what fits is used, nothing half is left."""
    folder = tmp_path / "small"
    folder.mkdir()
    right = states_of_eager(CALLS)[-1]

    def child() -> tuple | None:
        if not mounted(folder):
            return None
        os.environ["TRACEJIT_CACHE"] = str(folder / "cache")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            training = Training()
            step = tracejit.compile(training.step, backend="c", on_unsupported="raise")
            for _ in range(CALLS):
                step()
        left = [x.name for x in folder.rglob("*.tmp")]
        texts = [str(x.message) for x in said if "tracejit" in str(x.message)]
        return near(training.state(), right), left, texts

    found = forked(child).result()
    if found is None:
        pytest.skip("may not mount a file system")
    good, left, said = found
    assert good and not left
    assert len(said) == 1 and "No space left" in said[0], said


@pytest.mark.parametrize("failing", ["open", "write", "replace", "mkdir", "utime", "unlink"])
def test_an_error_of_the_system_at_each_operation(failing, tmp_path, monkeypatch):
    """Of the cache: an entry is stored or not, and no error comes out."""
    from tracejit.runtime import cache as cache_module

    cache = DiskCache(tmp_path / "cache")

    def fails(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", str(args[0]))

    class Full:
        def __init__(self, descriptor: int, how: str):
            self.descriptor = descriptor

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            os.close(self.descriptor)

        writelines = read = staticmethod(fails)

    if failing == "write":
        monkeypatch.setattr(cache_module, "open", Full, raising=False)
    else:
        monkeypatch.setattr(Path if failing == "mkdir" else os, failing, fails)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        stored = cache.store("plan", "key", "text")
        found = cache.get("plan", "key")
        cache.sweep()
    assert found in ("text", None) and len(said) == (stored is None)
    monkeypatch.undo()
    assert cache.store("plan", "key", "text") and cache.get("plan", "key") == "text"
    if failing != "unlink":
        assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_compiler_that_dies_is_not_taken_for_a_fault_of_ours(monkeypatch, tmp_path):
    """Killed, or out of memory or room: it says whose fault it is."""
    for text in ("kill -9 $$", "echo 'ld: final link failed: No space left on device' >&2; exit 1"):
        script = tmp_path / "cc"
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o700)
        with pytest.raises(c_compiler.CannotCompile, match="Make room"):
            c_compiler.compile_c((str(script),), "int x;")
    script.write_text("#!/bin/sh\necho 'x.c:1: error: expected' >&2; exit 1\n")
    with pytest.raises(c_compiler.CompilationFailed):
        c_compiler.compile_c((str(script),), "int x;")
    assert subprocess.run(["true"]).returncode == 0
