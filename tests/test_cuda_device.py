"""The CUDA side of the seam without a GPU: torch's runtime and Triton's are stand-ins that record.

What is proven here is small: that each function of the seam is there, and calls what it should. The
order of calls is the fake device's to prove, and the rest a real GPU's (test_gpu.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tracejit
from benchmarks.launch_cost import StillDevice
from tracejit.errors import BackendUnavailable, LaunchError
from tracejit.ir.process_groups import HOST, Started
from tracejit.runtime import cuda_device as module
from tracejit.runtime.cuda_device import CudaDevice
from tracejit.runtime.device import Device, LoadedKernel
from tracejit.runtime.fake_device import FakeDevice
from tracejit.runtime.select import FAKES
from tracejit.runtime.target_device import TargetDevice
from tracejit.runtime.triton_executor import TritonExecutor

SEAM = [name for name, x in vars(Device).items() if inspect.isfunction(x) and name[0] != "_"]


OF_INSTANCES = {  # functions that a class gives to its instances, or does not need
    CudaDevice: {"here", "current_stream"},
    FakeDevice: set(),
    StillDevice: {"here", "current_stream", "capturing", "download", "clock", "communicate"},
    TargetDevice: {"current_stream", "capturing", "clock"},
}


def functions(device: type) -> dict[str, list[str]]:
    """The functions of the seam that a class has, with their parameters."""
    found = {name: getattr(device, name, None) for name in SEAM}
    return {name: [*inspect.signature(x).parameters][1:] for name, x in found.items() if x}


@pytest.mark.parametrize("device", [CudaDevice, FakeDevice, StillDevice, TargetDevice])
def test_the_seam_is_whole(device):
    asked, has = functions(Device), functions(device)
    for name, parameters in has.items():
        assert parameters == asked[name] or device is StillDevice, name
    missing = asked.keys() - has.keys()
    assert missing <= OF_INSTANCES[device]


class Runtime:
    """Stands for torch's CUDA runtime: two devices, of which one is current."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.current, self.streams, self.capturing, self.log = 0, {0: 70, 1: 71}, set(), []
        for name, value in {
            "_cuda_getDevice": lambda: self.current,
            "_cuda_getCurrentRawStream": lambda number: self.streams[number],
            "_cuda_isCurrentStreamCapturing": lambda: self.current in self.capturing,
        }.items():
            monkeypatch.setattr(torch._C, name, value, raising=False)
        monkeypatch.setattr(torch.cuda, "device", self.on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing=False: Event(self.log))
        properties = SimpleNamespace(
            name="a GPU",
            major=9,
            minor=0,
            multi_processor_count=132,
            shared_memory_per_block_optin=1,
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(self, 90))
        monkeypatch.setattr(torch.cuda, "stream", self.on_stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Recorded(self))

    @contextlib.contextmanager
    def on(self, number: int):
        before, self.current = self.current, number
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def on_stream(self, stream: Stream):
        before, self.streams[0] = self.streams[0], stream.handle
        try:
            yield
        finally:
            self.streams[0] = before


class Stream:
    def __init__(self, runtime: Runtime, handle: int):
        self.runtime, self.handle = runtime, handle

    def wait_stream(self, other: Stream) -> None:
        self.runtime.log.append(f"{self.handle} waits for {other.handle}")

    def wait_event(self, event: Event) -> None:
        self.runtime.log.append(f"{self.handle} waits for an event")


class Recorded:
    """Stands for torch's CUDAGraph."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        self.runtime.log.append(f"capture of {self.runtime.streams[0]} ({capture_error_mode})")
        self.runtime.capturing = {0}

    def capture_end(self) -> None:
        self.runtime.log.append("end")
        self.runtime.capturing = set()

    def replay(self) -> None:
        self.runtime.log.append(f"replay on {self.runtime.streams[0]}")


class Event:
    def __init__(self, log: list[str]):
        self.log = log

    def record(self, stream: str) -> None:
        self.log.append(f"event on {stream}")

    def synchronize(self) -> None:
        self.log.append("the host waits")

    def elapsed_time(self, other: Event) -> float:
        return 2.0


@pytest.fixture
def runtime(monkeypatch) -> Runtime:
    return Runtime(monkeypatch)


def test_what_is_asked_of_the_runtime(runtime):
    device = CudaDevice(1)
    assert (device.name, device.current_stream(), device.here()) == ("cuda:1", 71, 0)
    runtime.capturing = {1}
    assert device.capturing() and not CudaDevice(0).capturing() and runtime.current == 0
    with device.entered():
        assert device.here() == 1 and device.capturing()
    found = device.properties()
    assert (found.name, found.arch, found.multiprocessors) == ("a GPU", 90, 132)


def test_events_stand_on_the_current_stream_of_their_device(runtime):
    event = CudaDevice(1).event()
    event.wait()  # was never recorded
    assert not runtime.log
    event.record()
    event.wait()
    assert runtime.log == ["event on stream of cuda:1", "the host waits"]
    clock = CudaDevice(0).clock()
    for _ in range(3):
        clock.mark()
    assert clock.seconds() == [0.002, 0.002]


def test_a_stream_beside_is_in_order_with_others_by_events_alone(runtime, monkeypatch):
    device = CudaDevice(0)
    current = lambda device: Stream(runtime, runtime.streams[0])  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(Event, "record", lambda self, stream: None)
    before, behind = device.event(), device.event()
    behind.hold()  # was never recorded
    before.record()
    for _ in range(2):
        with device.beside():
            assert device.current_stream() == 90
            before.hold()
            behind.record()
        behind.hold()
    assert runtime.log == ["90 waits for an event", "70 waits for an event"] * 2


@pytest.fixture
def on_the_cpu(runtime, monkeypatch):
    """A backend of the CUDA device, whose memory is the CPU's and whose launches are recorded."""
    device, launches = CudaDevice(0), []
    device._device = torch.device("cpu")
    monkeypatch.setattr(device, "pinned", device.allocate, raising=False)

    def load(launch: object, pointers: object) -> LoadedKernel:
        run = lambda *given: launches.append((runtime.current, given))  # noqa: E731
        return LoadedKernel(run, launch.source.name, None)

    monkeypatch.setattr(module, "load_kernel", load)
    executor = TritonExecutor("cuda on the cpu", device_of=lambda name: device)
    monkeypatch.setitem(FAKES, "cuda on the cpu", lambda precision: executor)
    return SimpleNamespace(device=device, launches=launches, backend="cuda on the cpu")


def test_a_step_is_launched_on_the_current_stream(runtime, on_the_cpu):
    x = torch.randn(50_000)
    step = tracejit.compile(lambda scale: (x * scale).sum(), backend=on_the_cpu.backend)
    for call in range(6):
        runtime.streams[0], runtime.current = 70 + call % 2, call % 2
        step(2.0)
    assert step.stats.replays >= 2
    assert [(number, given[3]) for number, given in on_the_cpu.launches] == [
        (0, 70 + call % 2) for call in range(6)
    ]
    (pointer,) = {given[9] for _, given in on_the_cpu.launches}
    assert pointer == x.data_ptr()
    works = [given[12] for _, given in on_the_cpu.launches]
    assert works[0::2] == works[:1] * 3 and works[1::2] == works[1:2] * 3 and works[0] != works[1]


def test_numbers_are_copied_once_and_read_back(runtime, on_the_cpu):
    x = torch.randn(30)
    step = tracejit.compile(lambda scale: (x * scale).sum().item(), backend=on_the_cpu.backend)
    runtime.log.clear()
    for call in range(8):
        step(2.0 + call // 4)
    records = [line for line in runtime.log if line.startswith("event")]
    assert step.stats.replays and len(records) < 8 * 2


def test_a_step_becomes_a_graph_of_torchs(runtime, on_the_cpu, monkeypatch):
    """It is captured on a stream of its own, between two waits; the update runs on a copy there."""
    w = torch.full((30,), 3.0)
    current = lambda device: Stream(runtime, runtime.streams[0])  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    duplicated = []

    def tensor_at(memory: object, device: torch.device) -> torch.Tensor:
        found = memory.__cuda_array_interface__
        duplicated.append((found["data"][0], found["shape"]))
        content = bytearray(ctypes.string_at(*duplicated[-1][:1], *found["shape"]))
        return torch.frombuffer(content, dtype=torch.uint8)

    monkeypatch.setattr(torch, "as_tensor", tensor_at)
    monkeypatch.setattr(Event, "record", lambda self, stream: None)

    def step() -> None:
        w.mul_(2.0)

    compiled = tracejit.compile(step, backend=on_the_cpu.backend, require_graph=True)
    for _ in range(10):
        before = len(on_the_cpu.launches)
        compiled()
        if runtime.log:
            break
    assert runtime.log == [
        *("90 waits for 70", "capture of 90 (thread_local)", "end", "70 waits for 90"),
        "replay on 70",
    ]
    assert duplicated == [(w.data_ptr(), (120,))]
    warm, captured = [given for _, given in on_the_cpu.launches[before:]]
    assert warm[3] == captured[3] == 90
    assert captured[9] == w.data_ptr() and warm[9] != w.data_ptr()
    compiled()
    assert runtime.log[-1] == "replay on 70" and len(on_the_cpu.launches) == before + 2


def test_a_capture_that_fails_is_ended(runtime):
    def fails() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        CudaDevice(0).graph_of(fails)
    assert runtime.log[-1] == "end" and not runtime.capturing


def test_a_failed_launch_says_where(on_the_cpu, monkeypatch):
    def load(launch: object, pointers: object) -> LoadedKernel:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(module, "load_kernel", load)
    step = tracejit.compile(lambda: torch.ones(3) * 2, backend=on_the_cpu.backend)
    with pytest.raises(LaunchError, match="could not be loaded on a GPU: RuntimeError: no kernel"):
        step()


def test_what_is_no_gpu_of_nvidias_is_refused(monkeypatch):
    module.cuda_device.cache_clear()
    with pytest.raises(BackendUnavailable, match="there is no CUDA device"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        module.cuda_device("cuda:0")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(BackendUnavailable, match="AMD"):
        module.cuda_device("cuda:0")


@pytest.mark.slow
def test_tritons_own_launcher_takes_what_it_is_given(tmp_path):
    """The C code that Triton compiles for launches, over a stub of libcuda."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    support = Path(__file__).parent / "support"
    library = str(tmp_path / "libcuda.so.1")
    flags = ["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", library]
    subprocess.run([compiler, *flags, str(support / "stub_cuda.c")], check=True)
    (tmp_path / "libcuda.so").symlink_to(library)
    paths = dict.fromkeys(("TRITON_LIBCUDA_PATH", "LD_LIBRARY_PATH"), str(tmp_path))
    done = subprocess.run(
        [sys.executable, str(support / "real_launcher.py")],
        env={**os.environ, **paths, "TRITON_CACHE_DIR": str(tmp_path / "triton")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *launches, last = done.stdout.splitlines()
    _, w, x, y, replays = last.split()
    assert int(replays) >= 2 and len(launches) == 5  # both kernels side by side
    found = [line.split() for line in launches]
    assert all(words[3] == "0x77" for words in found)
    first, second = found[-1][5:]
    assert first != second and {first, second} < {w, x, y}


def test_collectives_are_begun_on_the_device(runtime, monkeypatch):
    """With tensors of its memory, whatever device the thread is on."""
    memory = torch.zeros(8, dtype=torch.float32)
    monkeypatch.setattr(torch, "as_tensor", lambda x, device: _host_bytes(x))
    device, seen = CudaDevice(1), []

    def begin(space):
        seen.append(device.here())
        place = memory.data_ptr(), 16
        space.tensor(place, torch.float32).copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        space.copy(memory.data_ptr() + 16, place)
        assert space.of_barrier == {"device_ids": [1], "device": torch.device("cuda", 1)}
        return Started("all_reduce", None, ())

    begun = device.communicate("all_reduce", begin, [(memory.data_ptr(), 16)], (0, 0))
    begun.wait()
    assert seen == [1] and device.here() == 0
    assert memory.tolist() == [1.0, 2.0, 3.0, 4.0] * 2


def _host_bytes(given: object) -> torch.Tensor:
    interface = given.__cuda_array_interface__
    (count,), (address, read_only) = interface["shape"], interface["data"]
    assert interface["typestr"] == "|u1" and not read_only
    return HOST.tensor((address, count), torch.uint8)
