"""Files that are damaged, or made to do harm: each is an error of ours, and nothing happens."""

from __future__ import annotations

import io
import json
import random
import resource
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import tracejit
from support.saved_files import damaged, deeds, entries_of, file_of, hostile, zip_files
from support.saved_steps import FILES, STEPS, rich
from support.scope import WHOLE
from tracejit.errors import SavedFileError, TracejitError
from tracejit.saved import archive
from tracejit.saved.tensors import pack, unpack

OLD = Path(__file__).parent / "golden" / "saved"
COUNT = 6000 if WHOLE else 150
MOST_SECONDS = 10.0  # of the processor, for one file of at most a few hundred kilobytes
MOST_MEMORY = 400 << 10  # KiB


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[tuple[bytes, tuple]]:
    """Files of small steps that have everything between them, and arguments of calls."""
    folder, found = tmp_path_factory.mktemp("files"), []
    for make in FILES:
        case = make()
        step = tracejit.compile(case.step, backend="numpy")
        for i in range(4 * case.kinds):
            step(*case.args(i))
        step.save(folder / "a.step", objects=make is FILES[0])
        found.append(((folder / "a.step").read_bytes(), case.args(0)))
    return found


def outcome(content: bytes, path: Path, args: tuple, backend: str = "numpy") -> str:
    """What comes of loading a file and calling the step. Anything but our errors is raised."""
    path.write_bytes(content)
    started = time.process_time()
    with deeds() as seen:
        try:
            step = tracejit.load(path, backend=backend)
        except SavedFileError as error:
            assert str(path) in str(error) and len(str(error)) < 2000
            step = None
    assert not seen, seen
    assert time.process_time() - started < MOST_SECONDS
    if step is None:
        return "refused"
    try:
        step(*args)
    except TracejitError:
        return "refused in a call"
    except (
        RuntimeError,
        MemoryError,
        ArithmeticError,
        ValueError,
        LookupError,
        TypeError,
    ) as error:
        return f"raised by {type(error).__name__}"
    return "ran"


def test_damage_is_noticed(files, tmp_path):
    """Every byte counts: there is no damage of which a load says nothing."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rng = random.Random(1)
    for _ in range(COUNT // 2):
        content, args = rng.choice(files)
        bad = damaged(content, rng)
        if bad != content:
            assert outcome(bad, tmp_path / "a.step", args) == "refused"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY
    assert [p.name for p in tmp_path.iterdir()] == ["a.step"]


def test_malice_does_no_harm(files, tmp_path):
    """With checksums that agree: what is still a step may run, as no more than that."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rng, found = random.Random(2), Counter()
    backend = "auto" if WHOLE else "numpy"
    for _ in range(COUNT // 2):
        content, args = rng.choice(files)
        bad = file_of(hostile(entries_of(content), rng), tmp_path)
        found[outcome(bad, tmp_path / "a.step", args, backend)] += 1
    assert found["refused"] > COUNT // 4, found
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY
    assert {p.name for p in tmp_path.iterdir()} == {"a.step", "made"}


def test_other_zip_files(files, tmp_path):
    content, args = files[0]
    entries = entries_of(content)
    assert outcome(file_of(entries, tmp_path), tmp_path / "a.step", args) == "ran"
    for what, bad in zip_files(entries):
        assert outcome(bad, tmp_path / "a.step", args) == "refused", what
    for bad in (b"", b"PK", b"x" * 1000, content[:-1], content + b"x", content + content):
        assert outcome(bad, tmp_path / "a.step", args) == "refused"


def test_versions(files, tmp_path):
    content, args = files[0]
    entries = entries_of(content)
    said = json.loads(entries["manifest.json"])
    for version, why in (
        ([1, 4], "version 1.4 of the format, and this tracejit reads up to 1.3"),
        ([2, 0], "version 2.0"),
        ([0, 9], "no version 0.9"),
        ([1], "a list of 2"),
        ("1.0", "a list of 2"),
        (None, "a list"),
    ):
        changed = {**entries, "manifest.json": json.dumps({**said, "version": version}).encode()}
        (tmp_path / "a.step").write_bytes(file_of(changed, tmp_path))
        with pytest.raises(SavedFileError, match=why):
            tracejit.load(tmp_path / "a.step")


OLD_FILES = ["1.0_two_layers", "1.0_deciding", "1.0_rich", "1.1_scheduled", "1.1_selecting"]
OLD_FILES += ["1.2_noting", "1.3_recurrent"]


@pytest.mark.parametrize("file", OLD_FILES)
def test_old_files_load(file, tmp_path):
    """What earlier versions have written; such files are added with a version, and never written
    anew. That of `selecting` has objects of another machine."""
    name = file.partition("_")[2]
    case = STEPS[name]() if name in STEPS else rich()
    loaded = tracejit.load(OLD / f"{file}.step", backend="numpy")
    assert ("not used" in loaded.objects) is (name == "selecting")
    if name == "rich":  # draws, which machines make in their own ways
        loss, (calls, *_) = loaded(*case.args(0))
        assert loss.requires_grad and calls == 5
        loss.backward()
    elif name == "recurrent":
        assert all(torch.isfinite(loaded(*case.args(i))) for i in range(3))
    else:
        expected = json.loads((OLD / f"{file}.json").read_text())
        returned = [loaded(*case.args(i)) for i in range(len(expected))]
        found = [float(x["loss"] if name == "two_layers" else x[0]) for x in returned]
        assert found == pytest.approx(expected, rel=1e-9)
    loaded.save(tmp_path / "a.step")
    assert tracejit.load(tmp_path / "a.step").numbers == loaded.numbers


def test_the_records_of_a_file():
    """Every flipped bit of a small file is noticed by the container itself."""
    path = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "write_atomically", lambda _, *parts: path.writelines(parts))
        archive.write(Path("a"), {"manifest.json": b"{}", "a/b.txt": b"abc"})
    content = path.getvalue()
    assert archive.read(io.BytesIO(content)) == {"manifest.json": b"{}", "a/b.txt": b"abc"}
    for i in range(8 * len(content)):
        bad = bytearray(content)
        bad[i // 8] ^= 1 << i % 8
        with pytest.raises(archive.Damaged):
            archive.read(io.BytesIO(bad))


def test_tensors_of_all_kinds():
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {
        "turned": torch.randn(3, 4).t(),
        "number": torch.tensor(3),
        "empty": torch.zeros(0, 2),
        "low": torch.ones(3, dtype=torch.bfloat16),
        "truth": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    content = pack(tensors)
    for found in (unpack(content), safetensors.load(content)):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], x) for name, x in tensors.items())
    assert unpack(safetensors.save({"x": torch.ones(2)}))["x"].tolist() == [1, 1]


def test_tensors_of_any_layout_are_packed():
    """As the columns of others, of one element with a stride, of none."""
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"columns": whole[:, 1:3].T, "one": whole[:1, ::2][:, :1].squeeze(0)}
    tensors |= {
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(2.0),
        "strided": whole[0, ::3][:1],
    }
    found = unpack(pack(tensors))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
