"""C source → a loaded shared library, through the system's compiler and the disk cache.

An entry of the cache is keyed by the source's digest, the compiler (path and version), the flags
and the CPU, and holds the library as base64, so that everything the cache promises about its
entries holds for libraries too: what is loaded is exactly the bytes whose checksum was verified.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import ctypes
import functools
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tracejit.codegen.c_prelude import C_FLAGS
from tracejit.errors import BackendUnavailable, TracejitError
from tracejit.runtime.cache import DiskCache, sha256
from tracejit.runtime.private import private_folder

FLAGS = ("-O3", "-march=native", *C_FLAGS, "-fopenmp-simd", "-fPIC", "-pthread", "-pipe")
# For gcc: the pass gains nothing on loops that are written out already, and takes it most of its
# time on some of them.
GCC_FLAGS = ("-fno-loop-unroll-and-jam",)
# Where there are 16 vector registers: a loop of more than 8 vectors keeps none of them in registers
# when it is unrolled completely, and takes gcc up to twice the time.
FEW_REGISTERS = ("--param=max-completely-peel-times=8",)
CANDIDATES = ("cc", "gcc", "clang")


class CompilationFailed(TracejitError, RuntimeError):
    """The system's compiler rejected a generated program: a bug of the generator."""

    message = (
        "the C compiler failed on generated code: {command}\n{output}\n"
        'Use backend="numpy" meanwhile, and report this'
    )
    advice = (
        'It is a fault of tracejit, or of the compiler: please report it. backend="numpy" needs no '
        "compiler, and CC names another one."
    )


class CannotCompile(TracejitError, OSError):
    """The C compiler, or the loader of libraries, lacks room, memory or a right."""

    message = "generated C cannot be compiled here: {reason}. {remedy}"
    advice = (
        "Free room on the disk of the cache and of temporary files, or name another one in "
        '`TRACEJIT_CACHE`; or compile the step with `backend="numpy"`.'
    )


# what compilers and linkers write where the machine is to blame; no message of theirs on C says so
_OF_THE_MACHINE = re.compile(
    r"No space left|Disk quota|File too large|Read-only file system|Permission denied"
    r"|[Cc]annot allocate|[Oo]ut of memory|memory exhausted|terminated with signal|Killed signal"
)


def find_compiler() -> tuple[str, ...]:
    """The command of the C compiler: $CC, else the first of cc, gcc, clang on the path."""
    asked = shlex.split(os.environ.get("CC", ""))
    for command in ([asked] if asked else []) + [[name] for name in CANDIDATES]:
        found = shutil.which(command[0])
        if found is not None:
            return (found, *command[1:])
    raise BackendUnavailable(
        backend="c",
        reason=f"no C compiler was found ($CC, {', '.join(CANDIDATES)})",
        remedy="Install one (gcc or clang), or set CC; the numpy executor needs none",
    )


@functools.cache
def version(command: tuple[str, ...]) -> str:
    """What a compiler says about itself, in one line."""
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BackendUnavailable(
            backend="c",
            reason=f"the C compiler {shlex.join(command)} does not run ({error})",
            remedy="Set CC to one that does; the numpy executor needs none",
        ) from error
    return done.stdout.partition("\n")[0]


@functools.cache
def cpu() -> tuple[str, frozenset[str]]:
    """The CPU's model and its feature flags, as far as the system tells them."""
    model, flags = platform.machine(), frozenset[str]()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{model} {platform.processor()}", flags
    for line in text.partition("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = f"{model} {value.strip()}"
        elif name.strip() in ("flags", "Features"):
            flags = frozenset(value.split())
    return model, flags


def vector_bytes() -> int:
    """The width of the CPU's widest vector registers that -march=native uses."""
    _, flags = cpu()
    if "avx512f" in flags:
        return 64
    return 32 if "avx" in flags else 16


def flags_for(command: tuple[str, ...]) -> tuple[str, ...]:
    """What a compiler is called with."""
    if "clang" in version(command):
        return FLAGS
    return (*FLAGS, *GCC_FLAGS, *(FEW_REGISTERS if vector_bytes() < 64 else ()))


def toolchain() -> str:
    """What a library depends on besides its source: the compiler, its flags and the CPU."""
    command = find_compiler()
    model, features = cpu()
    flags = " ".join(flags_for(command))
    parts = [shlex.join(command), version(command), flags, model, *sorted(features)]
    return "\n".join(parts)


def load_library(source: str) -> ctypes.CDLL:
    """The library of a C program, compiled unless the disk cache has it."""
    return cached_library(sha256(source)) or _compiled(source)


def locked_function(library: ctypes.CDLL, name: str, result: type | None, *types: type) -> Callable:
    """A function of a library that keeps Python's lock, so that no other thread of Python's changes
    anything meanwhile."""
    made = ctypes.PYFUNCTYPE(result, *types)(address_of(library, name))
    made.library = library  # held
    return made


def address_of(library: ctypes.CDLL, name: str) -> int:
    """Where a function of a library is."""
    return ctypes.cast(library[name], ctypes.c_void_p).value


def cached_library(digest: str) -> ctypes.CDLL | None:
    """The library of the program with this sha256, if the disk cache has it."""
    code = _decoded(DiskCache().get("c", _key(digest)))
    return None if code is None else _opened(code)


def compiled_object(source: str) -> bytes:
    """A C program as an object, a part of a library."""
    command = find_compiler()
    return compile_c(command, source, flags_for(command), "-c")


def linked(digest: str, objects: Sequence[bytes]) -> ctypes.CDLL:
    """The library of some objects, which the disk cache keeps under a digest of theirs."""
    command = find_compiler()
    return _kept(digest, _built(command, objects, ".o", (*flags_for(command), "-shared")))


def _compiled(source: str) -> ctypes.CDLL:
    command = find_compiler()
    return _kept(sha256(source), compile_c(command, source, flags_for(command)))


def _kept(digest: str, code: bytes) -> ctypes.CDLL:
    DiskCache().store("c", _key(digest), base64.b64encode(code).decode())
    return _opened(code)


def _key(digest: str) -> str:
    return f"{toolchain()}\n{digest}"


def compile_c(
    command: tuple[str, ...], source: str, flags: tuple[str, ...] = FLAGS, kind: str = "-shared"
) -> bytes:
    """The bytes of a shared library, or of an object, where `kind` is "-c". Raises
    CompilationFailed, or CannotCompile."""
    return _built(command, [source.encode()], ".c", (*flags, kind))


def _built(
    command: tuple[str, ...], inputs: Sequence[bytes], suffix: str, flags: Sequence[str]
) -> bytes:
    """What a compiler makes of files with these contents."""
    paths: list[Path] = []
    try:
        stem = f"unit_{secrets.token_hex(8)}"
        paths = [private_folder() / f"{stem}_{i}{suffix}" for i in range(len(inputs))]
        for path, content in zip(paths, inputs, strict=True):
            path.write_bytes(content)
        paths.append(private_folder() / f"{stem}.out")
        line = [*command, *flags, "-o", str(paths[-1]), *map(str, paths[:-1]), "-lm"]
        # in a process group of its own: Ctrl-C is for this process, whose handler decides
        done = subprocess.run(line, capture_output=True, text=True, process_group=0)
        if done.returncode < 0 or (done.returncode and _OF_THE_MACHINE.search(done.stderr)):
            raise _cannot(f"{shlex.join(line)} ended with {done.returncode}: {done.stderr.strip()}")
        if done.returncode:
            raise CompilationFailed(command=shlex.join(line), output=done.stderr)
        return paths[-1].read_bytes()
    except CannotCompile:
        raise
    except OSError as error:
        raise _cannot(str(error)) from error
    finally:
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _cannot(reason: str) -> CannotCompile:
    return CannotCompile(
        reason=reason,
        remedy=f"Make room in {tempfile.gettempdir()}, or set TMPDIR to another folder; "
        'backend="numpy" needs no compiler',
    )


def _decoded(body: str | None) -> bytes | None:
    try:
        return None if body is None else base64.b64decode(body, validate=True)
    except binascii.Error:
        return None


def _opened(code: bytes) -> ctypes.CDLL:
    """Load a library from a file that only this process can reach: one in memory where the disk is
    full, or holds nothing that may be executed."""
    try:
        path = private_folder() / f"library_{secrets.token_hex(8)}.so"
        try:
            path.write_bytes(code)
            return ctypes.CDLL(str(path))
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        try:
            return _opened_in_memory(code)
        except OSError:
            raise _cannot(str(error)) from error


def _opened_in_memory(code: bytes) -> ctypes.CDLL:
    descriptor = os.memfd_create("tracejit")  # stays open: the loader knows libraries by name
    with open(descriptor, "wb", closefd=False) as file:
        file.write(code)
    return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
