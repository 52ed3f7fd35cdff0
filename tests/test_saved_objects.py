"""Compiled objects in a saved step: whose are used, and that all others are made anew."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tracejit
from support.saved_files import entries_of, file_of
from tracejit.errors import SavedFileError
from tracejit.runtime import c_compiler
from tracejit.saved import manifest
from tracejit.saved.loaded import LoadedStep

X = torch.arange(12.0).view(3, 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path, list]:
    """A file with objects, the cache of who made it, and what two calls return."""
    folder = tmp_path_factory.mktemp("objects")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACEJIT_CACHE", str(folder / "cache"))
        w = torch.ones(4, 2).requires_grad_()

        @tracejit.compile(backend="c")
        def step(x):
            w.grad = None
            loss = F.softplus(x @ w).pow(2).mean()
            loss.backward()
            with torch.no_grad():
                w.sub_(w.grad, alpha=0.1)
            norm = w.norm()
            return loss.item(), (norm / 2 if norm > 0 else norm).item()

        for _ in range(4):
            step(X)
        step.save(folder / "a.step", objects=True)
        return folder / "a.step", folder / "cache", [step(X), step(X + 1)]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty cache, as on another machine, and how often the compiler has run: `runs`."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    monkeypatch.setenv("TRACEJIT_CACHE", str(cache))
    return cache


@pytest.fixture
def runs(monkeypatch) -> list:
    """What is compiled meanwhile."""
    seen, compile_c = [], c_compiler.compile_c

    def counted(command, source, flags=c_compiler.FLAGS, *kind):
        if "tj_pool" not in source:
            seen.append(source)
        return compile_c(command, source, flags, *kind)

    monkeypatch.setattr(c_compiler, "compile_c", counted)
    return seen


def called(loaded: LoadedStep, expected: list) -> None:
    assert [loaded(X), loaded(X + 1)] == expected


def signed_by_me(made: tuple, cache: Path) -> None:
    """The key of who made the file is this user's here too."""
    shutil.copy(made[1] / "signing.key", cache / "signing.key")


def test_objects_of_ones_own_are_used(made, elsewhere, runs):
    signed_by_me(made, elsewhere)
    loaded = tracejit.load(made[0], backend="c")
    assert "may be used" in loaded.objects and "not used" not in loaded.objects
    called(loaded, made[2])
    assert not runs


def test_they_are_not_there_when_the_step_has_gone(made, elsewhere, runs):
    signed_by_me(made, elsewhere)
    loaded = tracejit.load(made[0], backend="c")
    del loaded
    called(tracejit.load(made[0], backend="c"), made[2])
    assert not runs
    bare = tracejit.load(_without_signature(made[0], elsewhere.parent), backend="c")
    called(bare, made[2])
    assert runs


def _without_signature(path: Path, folder: Path) -> Path:
    entries = entries_of(path.read_bytes())
    del entries["signature.txt"]
    (folder / "bare.step").write_bytes(file_of(entries, folder, digests=False))
    return folder / "bare.step"


@pytest.mark.parametrize("key", ["none", "foreign", "short", "readable", "a link"])
def test_objects_of_others_are_not(key, made, elsewhere, runs):
    """The step is compiled from its graphs, as for any file."""
    at = elsewhere / "signing.key"
    if key == "foreign":
        at.write_bytes(bytes(32))
        at.chmod(0o600)
    elif key == "a link":
        at.symlink_to(made[1] / "signing.key")
    elif key != "none":
        at.write_bytes((made[1] / "signing.key").read_bytes()[: 16 if key == "short" else 32])
        at.chmod(0o644 if key == "readable" else 0o600)
    loaded = tracejit.load(made[0], backend="c")
    why = "signed by another key" if key == "foreign" else "no key in the cache directory"
    assert f"not used: it is {why}" in loaded.objects or f"there is {why}" in loaded.objects
    called(loaded, made[2])
    assert runs


def test_objects_that_the_caller_trusts(made, elsewhere, runs):
    loaded = tracejit.load(_without_signature(made[0], elsewhere.parent), backend="c", trust=True)
    called(loaded, made[2])
    assert not runs


def test_a_changed_object_is_not_used(made, elsewhere, runs, tmp_path):
    """One changed byte makes another file; with digests that agree, one that nobody has signed."""
    signed_by_me(made, elsewhere)
    entries = entries_of(made[0].read_bytes())
    name = next(name for name in entries if name.endswith(".so"))
    changed = entries[name][:-1] + bytes([entries[name][-1] ^ 1])
    bad = {**entries, name: changed}
    path = tmp_path / "b.step"
    path.write_bytes(file_of(bad, tmp_path, digests=False))
    with pytest.raises(SavedFileError, match=f"{name} is another one"):
        tracejit.load(path)
    signature = bad.pop("signature.txt")
    content = entries_of(file_of(bad, tmp_path))
    path.write_bytes(file_of({**content, "signature.txt": signature}, tmp_path, digests=False))
    loaded = tracejit.load(path, backend="c")
    assert "signed by another key" in loaded.objects
    called(loaded, made[2])
    assert runs


def test_objects_for_another_machine(made, elsewhere, runs, monkeypatch):
    """Another CPU, or other flags: they are not found, and kernels are compiled."""
    signed_by_me(made, elsewhere)
    model, features = c_compiler.cpu()
    monkeypatch.setattr(c_compiler, "cpu", lambda: (model, features - {"avx512f"} | {"x"}))
    loaded = tracejit.load(made[0], backend="c")
    assert loaded(X) == pytest.approx(made[2][0], rel=1e-6)
    assert runs
    runs.clear()
    monkeypatch.setattr(c_compiler, "FLAGS", ("-O1", *c_compiler.FLAGS[1:]))
    loaded = tracejit.load(made[0], backend="c")
    assert loaded(X) == pytest.approx(made[2][0], rel=1e-6)
    assert runs


def test_what_lists_other_objects_than_it_has(made, elsewhere, tmp_path):
    entries = entries_of(made[0].read_bytes())
    said = json.loads(entries[manifest.MANIFEST])
    first = said["objects"][0]
    for wrong in (
        [first, first],
        said["objects"][1:],
        [["triton", *first[1:]]],
        [[first[0], "../x", first[2]]],
        [[first[0], first[1], "objects/../a.txt"]],
        {},
    ):
        bad = {**entries, manifest.MANIFEST: json.dumps({**said, "objects": wrong}).encode()}
        (tmp_path / "b.step").write_bytes(file_of(bad, tmp_path))
        for trust in (False, True):
            with pytest.raises(SavedFileError):
                tracejit.load(tmp_path / "b.step", trust=trust)


def test_the_key(made):
    key = made[1] / "signing.key"
    assert key.stat().st_mode & 0o777 == 0o600 and key.stat().st_uid == os.getuid()
    assert len(key.read_bytes()) == 32


def test_a_step_that_is_saved_again(made, elsewhere, runs, tmp_path):
    """Objects are for who asks for them; they are signed by whoever saves."""
    loaded = tracejit.load(made[0], backend="c")
    loaded.save(tmp_path / "b.step")
    assert "signature.txt" not in entries_of((tmp_path / "b.step").read_bytes())
    loaded.save(tmp_path / "b.step", objects=True)
    runs.clear()
    again = tracejit.load(tmp_path / "b.step", backend="c")
    assert "may be used" in again.objects
    for name in ("c", "kernel", "plan", "cpu"):
        shutil.rmtree(elsewhere / name)
    called(again, made[2])
    assert not runs
