"""The disk cache when processes are killed, run at once, and when the clock is changed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import tracejit
from support.children import forked
from support.small_training import Training, near, states_of_eager
from tracejit.runtime import cache as cache_module
from tracejit.runtime import private
from tracejit.runtime.cache import STALE_SECONDS, DiskCache

KIND, KEY, TEXT = "plan", "some key", "some text\n" * 1000
CALLS = 4
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.utime", "os.rmdir", "shutil.rmtree")


class Killed:
    """Ends this process by SIGKILL before the n-th operation on files below a folder; a write is
    half done by then. Counts them, and never ends, where n is 0."""

    def __init__(self, below: Path, n: int):
        self.below, self.n, self.count = str(below), n, 0
        sys.addaudithook(self.heard)
        cache_module.open = self.opened

    def heard(self, event: str, args: tuple) -> None:
        if event in OPERATIONS and str(args[0]).startswith(self.below):
            self.next()

    def next(self, first: Callable[[], object] = lambda: None) -> None:
        self.count += 1
        if self.count == self.n:
            first()
            os.kill(os.getpid(), signal.SIGKILL)

    def opened(self, descriptor: int, how: str):
        file = open(descriptor, how)  # noqa: SIM115
        if how != "wb":
            return file
        return _Halved(file, self)


class _Halved:
    def __init__(self, file, killed: Killed):
        self.file, self.killed = file, killed

    def __enter__(self) -> _Halved:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def writelines(self, parts: tuple[bytes, ...]) -> None:
        content = b"".join(parts)

        def half() -> None:
            self.file.write(content[: len(content) // 2])
            self.file.flush()

        self.killed.next(half)
        self.file.write(content)


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def private_folders(folder: Path) -> list[Path]:
    return [x for x in folder.iterdir() if x.name.startswith(private.PREFIX)]


def aged(folder: Path) -> None:
    """As if two hours went by."""
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):
            os.utime(path, (time.time() - 2 * STALE_SECONDS,) * 2)


def put_and_die(root: Path, n: int) -> Callable[[], int]:
    def action() -> int:
        killed = Killed(root, n)
        DiskCache(root).put(KIND, KEY, TEXT)
        DiskCache(root).secret("key", create=True)
        return killed.count

    return action


def test_an_entry_is_whole_or_absent_wherever_its_writer_is_killed(tmp_path):
    """At each operation of the system in turn; what is left does not add up."""
    count = forked(put_and_die(tmp_path / "counted", 0)).result()
    assert count >= 10, count  # two folders, two files: made, written, renamed, read
    root = tmp_path / "cache"
    for n in range(1, count + 1):
        for fresh in (True, False):
            if fresh and root.exists():
                for path in files_below(root):
                    path.unlink()
            outcome = forked(put_and_die(root, n))
            assert outcome.code in (-signal.SIGKILL, 0), outcome.text
            cache = DiskCache(root)
            assert cache.get(KIND, KEY) in (TEXT, None)
            assert cache.secret("key") is None or len(cache.secret("key")) == 32
            assert len([x for x in files_below(root) if x.suffix == ".tmp"]) <= 1
            cache.put(KIND, KEY, TEXT)
            assert cache.get(KIND, KEY) == TEXT
            aged(root)
            cache.sweep()
            assert [x for x in files_below(root) if x.name != "key"] == [cache.path(KIND, KEY)]


def train(folder: Path, n: int = 0) -> Callable[[], tuple[int, list[float]]]:
    """A few compiled calls with a cache and a temporary folder of one's own."""

    def action() -> tuple[int, list[float]]:
        os.environ["TRACEJIT_CACHE"] = str(folder / "cache")
        tempfile.tempdir = str(folder / "tmp")
        (folder / "tmp").mkdir(exist_ok=True, parents=True)
        killed = Killed(folder, n)
        training = Training()
        step = tracejit.compile(training.step, backend="c")
        for _ in range(CALLS):
            step()
        private._remove(private._held)  # as at the end of an ordinary process
        return killed.count, training.state()

    return action


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> tuple[int, int, int]:
    """How many operations a first run makes, how many files it leaves, and libraries of these."""
    folder = tmp_path_factory.mktemp("known")
    right = states_of_eager(CALLS)[-1]  # before the fork: what torch imports is there then
    count, state = forked(train(folder)).result()
    assert near(state, right)
    assert not private_folders(folder / "tmp")
    return count, len(files_below(folder / "cache")), len(files_below(folder / "cache/c"))


PARTS = 40


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.sweep(4)
def test_a_step_runs_after_a_process_that_was_killed_while_it_compiled(part, known, tmp_path):
    count, files, libraries = known
    n = 1 + part * count // PARTS
    assert forked(train(tmp_path, n)).code in (-signal.SIGKILL, 0)
    there = len(files_below(tmp_path / "cache/c"))
    aged(tmp_path)
    _, state = forked(train(tmp_path)).result()
    assert near(state, states_of_eager(CALLS)[-1])
    assert not private_folders(tmp_path / "tmp")  # what was left is gone
    left, built = (files_below(tmp_path / place) for place in ("cache", "cache/c"))
    assert all(x.suffix == ".txt" for x in left), left
    assert len(left) - len(built) == files - libraries
    # kernels of which no entry said yet in which library they are share others now
    assert len(built) <= libraries + there
    forked(train(tmp_path)).result()
    assert files_below(tmp_path / "cache") == left


@pytest.mark.slow
def test_processes_that_are_killed_again_and_again_leave_no_more(known, tmp_path):
    """At random moments, most of them inside the C compiler."""
    for i in range(30):
        with contextlib.suppress(AssertionError):
            forked(train(tmp_path), deadline=0.05 + 0.03 * i)
    forked(train(tmp_path)).result()
    assert not private_folders(tmp_path / "tmp")
    aged(tmp_path)
    forked(train(tmp_path)).result()
    DiskCache(tmp_path / "cache").sweep()
    assert not [x for x in files_below(tmp_path / "cache") if x.suffix == ".tmp"]


@pytest.mark.parametrize("processes", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_processes_at_once_with_one_empty_cache(processes, known, tmp_path):
    """All are right and equal; entries are no more than processes times those of one, and a later
    process finds all it needs."""
    _, files, _ = known
    gates, children = os.pipe(), []
    for i in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                os.close(gates[1])
                os.read(gates[0], 1)  # until all are there
                _, state = train(tmp_path)()
                (tmp_path / f"state{i}").write_text(repr(state))
                code = 0
            os._exit(code)
        children.append(child)
    os.close(gates[0])
    os.close(gates[1])
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * processes
    states = {(tmp_path / f"state{i}").read_text() for i in range(processes)}
    assert len(states) == 1 and near(eval(states.pop()), states_of_eager(CALLS)[-1])
    found = files_below(tmp_path / "cache")
    assert all(x.suffix == ".txt" for x in found)
    assert files <= len(found) <= files * processes
    print(f"{processes} processes: {len(found)} entries, one: {files}")
    forked(train(tmp_path)).result()
    assert files_below(tmp_path / "cache") == found


# ---- clocks


@pytest.mark.parametrize("shift", [-3 * STALE_SECONDS, 3 * STALE_SECONDS, 30 * 365 * 86400.0])
def test_a_clock_that_is_changed(shift, tmp_path, monkeypatch):
    """Entries are read whatever their time says; new ones stay, and so does what is being written
    if its time is near; the size is bounded."""
    cache = DiskCache(tmp_path / "cache", max_bytes=5000)
    old = [cache.put(KIND, f"old {i}", "#" * 800) for i in range(4)]
    left = cache.root / KIND / f".{old[0].name}.1.0123abcd.tmp"
    left.write_text("half of an entry")
    now = time.time()
    monkeypatch.setattr(cache_module.time, "time", lambda: now + shift)
    assert all(cache.get(KIND, f"old {i}") is not None for i in range(4))
    for path in old:  # utime takes the real clock
        os.utime(path, (now, now))
    for i in range(8):
        path = cache.put(KIND, f"new {i}", "#" * 800)
        os.utime(path, (now + shift + i, now + shift + i))
    cache.sweep()
    assert sum(x.stat().st_size for x in files_below(cache.root)) <= 5000
    assert not left.exists()
    assert cache.get(KIND, "new 7") is not None  # not the first to go: those of another time are
    assert cache.get(KIND, "old 0") is None


def test_no_other_files_are_swept(tmp_path):
    """A folder of the user's own, with files in it, that is made a cache."""
    root = tmp_path / "projects"
    mine = [root / "kit" / "setup.py", root / "kit" / "notes.txt", root / "kit" / ".draft.tmp"]
    (root / "kit").mkdir(parents=True, mode=0o700)
    root.chmod(0o700)
    for path in mine:
        path.write_text("mine")
    aged(root)
    cache = DiskCache(root, max_bytes=100)
    for i in range(3):
        cache.put("kit", f"key {i}", "#" * 800)
    cache.sweep()
    assert files_below(root) == sorted(mine)


# ---- the private folder


def test_private_folders_of_processes_that_live_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(private, "_held", None)
    mine = private.private_folder()
    assert forked(lambda: private.private_folder() != mine and os.listdir(mine)).result()
    assert forked(lambda: os.kill(os.getpid(), signal.SIGKILL)).code == -signal.SIGKILL
    left = [x for x in tmp_path.iterdir() if x != mine]
    assert len(left) == 1  # of the child, which ran no exit handler
    foreign = tmp_path / f"{private.PREFIX}link"
    foreign.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    private.remove_left()
    assert sorted(tmp_path.iterdir()) == sorted([mine, foreign, tmp_path / "elsewhere"])
    held = private._held
    private._remove(held)
    again = private.private_folder()  # somebody has removed it: another one is made
    assert again != mine and again.is_dir()
    private._remove(private._held)
