"""What tracejit asks of Triton's runtime, the same from Triton 3.6 to 3.9: the one place to look
when that changes. Importing this module does not import Triton."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

from tracejit.errors import BackendUnavailable
from tracejit.runtime.device import LoadedKernel
from tracejit.runtime.triton_launch import DevicePointer, LoadedLaunch

_lock = threading.RLock()  # the active driver is global to the process


def require_compiler(backend: str) -> None:
    """Raise BackendUnavailable where Triton cannot compile."""
    try:
        import triton
    except ImportError:
        raise BackendUnavailable(
            backend=backend, reason="Triton is not installed", remedy="Install it"
        ) from None
    if triton.knobs.runtime.interpret:
        raise BackendUnavailable(
            backend=backend,
            reason="this process interprets Triton kernels (TRITON_INTERPRET=1)",
            remedy="Use a process without TRITON_INTERPRET",
        )


@contextlib.contextmanager
def active(driver: object) -> Iterator[None]:
    """Triton compiles for the device of another driver, and loads kernels with it."""
    from triton.runtime.driver import driver as config

    with _lock:
        before = config._active
        config.set_active(driver)
        try:
            yield
        finally:
            config._active = before


@contextlib.contextmanager
def compilations(noted: Callable[[str], None]) -> Iterator[None]:
    """A context in which the name of each kernel that Triton compiles is noted; not of those that
    it finds in its cache."""
    from triton import knobs

    before = knobs.compilation.listener

    def listener(**about: object) -> None:
        if not about["cache_hit"]:
            noted(about["metadata"]["name"])
        if before is not None:
            before(**about)

    knobs.compilation.listener = listener
    try:
        yield
    finally:
        knobs.compilation.listener = before


def load_kernel(launch: LoadedLaunch, pointers: Sequence[DevicePointer]) -> LoadedKernel:
    """Compile a launch's kernel, specialized as Triton would for these pointers, and bring it to
    the current device.

    Since Triton 3.3 `run` takes the grid, the stream, the function, packed metadata, metadata for
    hooks, the two hooks, and all arguments of the jit function, constants too. Pointers may be
    integers.
    """
    compiled = launch.function.warmup(*pointers, grid=launch.geometry.grid, **launch.options())
    run = compiled.run  # which loads the binary
    return LoadedKernel(run, compiled.function, compiled.packed_metadata)
