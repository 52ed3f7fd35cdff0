"""The disk cache: round trips, damage, foreign owners, crashes, concurrent writers, its bound."""

import importlib.util
import multiprocessing
import os
import stat
import threading
import time

import pytest

from tracejit.runtime import cache as cache_module
from tracejit.runtime.cache import STALE_SECONDS, DiskCache

KIND, KEY, TEXT = "triton", "kernel(…)\nieee", '"""A module."""\n\nx = "ä"\n'


@pytest.fixture
def cache(tmp_path):
    return DiskCache(tmp_path / "cache")


def test_round_trip(cache):
    assert cache.get(KIND, KEY) is None
    path = cache.put(KIND, KEY, TEXT)
    assert cache.get(KIND, KEY) == TEXT
    assert cache.get(KIND, KEY + "x") is None and cache.get("other", KEY) is None
    assert DiskCache(cache.root).get(KIND, KEY) == TEXT
    assert path == cache.path(KIND, KEY) == cache.put(KIND, KEY, TEXT)
    assert cache.path("other", KEY).suffix == ".txt"


def test_root_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path / "here"))
    assert DiskCache().put(KIND, KEY, TEXT).is_relative_to(tmp_path / "here")


def test_entry_is_an_importable_module(cache):
    path = cache.put(KIND, KEY, TEXT)
    spec = importlib.util.spec_from_file_location("entry", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.x == "ä" and module.__doc__ == "A module."


def test_only_the_owner_may_read(cache):
    path = cache.put(KIND, KEY, TEXT)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(cache.root.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content + b"\n",
        lambda content: content.replace(b"x =", b"y ="),
        lambda content: content.replace(b"cache 1", b"cache 0"),
        lambda content: b"\xff\xfe" + content,
    ],
)
def test_damaged_entry_is_removed_and_rebuilt(cache, damage):
    path = cache.put(KIND, KEY, TEXT)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get(KIND, KEY) is None
    assert not path.exists()
    cache.put(KIND, KEY, TEXT)
    assert cache.get(KIND, KEY) == TEXT


def test_put_replaces_a_damaged_entry(cache):
    path = cache.put(KIND, KEY, TEXT)
    path.write_bytes(b"garbage")
    assert cache.put(KIND, KEY, TEXT) == path and cache.get(KIND, KEY) == TEXT


def test_entry_of_another_key_is_not_trusted(cache):
    path = cache.put(KIND, KEY, TEXT)
    cache.put(KIND, "other", "x = 2\n").replace(path)
    assert cache.get(KIND, KEY) is None and not path.exists()


@pytest.mark.parametrize("part", ["file", "folder", "root"])
def test_what_others_may_write_is_ignored(cache, part):
    path = cache.put(KIND, KEY, TEXT)
    {"file": path, "folder": path.parent, "root": cache.root}[part].chmod(0o777)
    with pytest.warns(RuntimeWarning, match="other users own or may write"):
        assert cache.get(KIND, KEY) is None
    assert cache.get(KIND, KEY) is None  # no second warning: warnings are errors here
    assert path.exists()
    stored = cache.put(KIND, KEY, TEXT)
    assert stored.read_text().endswith(TEXT)
    assert (stored == path) == (part == "file")


def test_what_others_own_is_ignored(cache, monkeypatch):
    cache.put(KIND, KEY, TEXT)
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    with pytest.warns(RuntimeWarning, match="other users own"):
        assert cache.get(KIND, KEY) is None


def test_link_is_not_followed(cache, tmp_path):
    path = cache.put(KIND, KEY, TEXT)
    moved = path.replace(tmp_path / "elsewhere.py")
    path.symlink_to(moved)
    assert cache.get(KIND, KEY) is None


def test_unusable_folder_falls_back_to_a_private_one(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = DiskCache(tmp_path / "file" / "cache")
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        path = cache.put(KIND, KEY, TEXT)
    assert path.read_text().endswith(TEXT)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert cache.put(KIND, KEY, TEXT) == path  # and without a second warning
    assert cache.get(KIND, KEY) is None


def test_full_disk_falls_back_and_leaves_nothing(cache, monkeypatch):
    replace = os.replace

    def full(source, target):
        if target.is_relative_to(cache.root):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        path = cache.put(KIND, KEY, TEXT)
    assert path.read_text().endswith(TEXT)
    assert not list(cache.root.rglob("*.*"))


def test_sweep_removes_old_leftovers_only(cache):
    folder = cache.put(KIND, KEY, TEXT).parent
    old, new = folder / ".a.txt.1.00c0ffee.tmp", folder / ".b.txt.2.00c0ffee.tmp"
    foreign = folder / "notes.md"
    for file in (old, new, foreign):
        file.write_text("half of an entry")
    long_ago = time.time() - STALE_SECONDS - 60
    for file in (old, foreign):
        os.utime(file, (long_ago, long_ago))
    cache.sweep()
    assert not old.exists() and new.exists() and foreign.exists()
    assert cache.get(KIND, KEY) == TEXT


def test_least_recently_used_goes_first(tmp_path):
    cache = DiskCache(tmp_path / "cache", max_bytes=3000)
    paths = [cache.put(KIND, f"key {i}", "#" * 800) for i in range(4)]
    for age, path in enumerate(reversed(paths)):
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    assert cache.get(KIND, "key 0") is not None  # used just now
    cache.sweep()
    assert [path.exists() for path in paths] == [True, False, True, True]


def test_size_is_checked_while_writing(tmp_path):
    cache = DiskCache(tmp_path / "cache", max_bytes=10_000)
    for i in range(200):
        cache.put(KIND, f"key {i}", "#" * 800)
    total = sum(path.stat().st_size for path in cache.root.rglob("*.py"))
    assert total < 10_000 + cache_module.SWEEP_EVERY * 1_100


def hammer(root, worker, rounds):
    """Write and read the same few entries; return how often a wrong body was seen."""
    cache, wrong = DiskCache(root), 0
    for i in range(rounds):
        key = f"key {(i + worker) % 5}"
        body = key * 1000
        cache.put(KIND, key, body)
        wrong += cache.get(KIND, key) not in (body, None)
    return wrong


def test_concurrent_threads(cache):
    results = []
    threads = [
        threading.Thread(target=lambda w=w: results.append(hammer(cache.root, w, 50)))
        for w in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [0] * 6
    check_five_entries(cache)


def test_concurrent_processes(cache):
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        results = pool.starmap(hammer, [(cache.root, worker, 50) for worker in range(3)])
    assert results == [0] * 3
    check_five_entries(cache)


def check_five_entries(cache):
    files = sorted(path for path in (cache.root / KIND).iterdir())
    assert files == sorted(cache.path(KIND, f"key {i}") for i in range(5))
    assert all(cache.get(KIND, f"key {i}") == f"key {i}" * 1000 for i in range(5))


def crash_in_the_middle(root):
    """Die after half of an entry was written."""
    cache = DiskCache(root)
    cache_module.os.replace = lambda source, target: os._exit(9)
    cache.put(KIND, KEY, TEXT)


def test_crash_in_the_middle_leaves_no_entry(cache):
    process = multiprocessing.get_context("spawn").Process(
        target=crash_in_the_middle, args=(cache.root,)
    )
    process.start()
    process.join()
    assert process.exitcode == 9
    assert cache.get(KIND, KEY) is None
    cache.put(KIND, KEY, TEXT)
    assert cache.get(KIND, KEY) == TEXT
    leftovers = list((cache.root / KIND).glob(".*.tmp"))
    assert len(leftovers) == 1
    os.utime(leftovers[0], (0, 0))
    cache.sweep()
    assert not leftovers[0].exists()
