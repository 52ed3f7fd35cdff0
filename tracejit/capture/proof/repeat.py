"""Which calls may be made once more, when a trace that failed is followed by an eager run.

What is pure may. So may what reads (time, files, the environment), what draws from generators that
`snapshot.py` puts back, and what only shows something (`print`, logging), which may then appear
twice. All else may not: a file written, a message sent, a process started.
"""

from __future__ import annotations

import io
import sys

from tracejit.capture.python.snapshot import Snapshot

_MODULES = frozenset(
    {
        *("random", "_random", "time", "datetime", "_datetime", "calendar", "zoneinfo", "timeit"),
        *("posixpath", "genericpath", "fnmatch", "glob", "locale", "_locale", "platform", "math"),
        *("warnings", "_warnings", "traceback", "linecache", "tokenize", "inspect", "logging"),
        *("re", "_sre", "string", "textwrap", "pprint", "copy", "struct", "_struct", "bisect"),
        *("hashlib", "_hashlib", "zlib", "base64", "binascii", "_bisect", "heapq", "_heapq"),
        *("statistics", "_statistics", "fractions", "decimal", "_decimal", "numbers", "cmath"),
        *("codecs", "_codecs", "encodings", "dis", "ast", "gc", "tracemalloc", "resource", "sys"),
        *("functools", "itertools", "operator", "collections", "contextlib", "types", "weakref"),
        *(
            "_functools",
            "_operator",
            "_collections",
            "_abc",
            "abc",
            "dataclasses",
            "enum",
            "typing",
        ),
        *("_json", "unicodedata", "_weakref", "builtins", "stat", "_stat", "keyword", "reprlib"),
    }
)
# of modules that also have functions which may not
_NAMES = {
    "io": frozenset({"open", "text_encoding"}),
    "_thread": frozenset({"allocate_lock", "RLock", "acquire", "release", "locked", "get_ident"})
    | {"__enter__", "__exit__"},
    "threading": frozenset({"current_thread", "main_thread", "RLock", "__enter__", "__exit__"}),
    "json": frozenset({"loads", "dumps", "load"}),
    "os": frozenset(
        {
            *("getenv", "get", "encode", "decode", "__getitem__", "__contains__", "__iter__"),
            *("__len__", "fspath", "fsencode", "fsdecode", "walk", "keys", "items", "values"),
        }
    ),
    "posix": frozenset(
        {
            *("getcwd", "getpid", "getppid", "stat", "lstat", "fstat", "listdir", "scandir"),
            *("fspath", "access", "cpu_count", "getuid", "uname", "sched_getaffinity", "times"),
            *("isatty", "getloadavg", "get_terminal_size", "readlink"),
        }
    ),
    "_io": frozenset(
        {
            *("open", "read", "readline", "readlines", "readinto", "read1", "seek", "tell"),
            *("close", "flush", "fileno", "isatty", "readable", "seekable", "writable"),
            *("__enter__", "__exit__", "getvalue", "getbuffer", "text_encoding"),
        }
    ),
}
_INPUT = "input"
_NOT_OF_LIBRARIES = (
    *("torch.serialization", "torch.distributed", "torch.multiprocessing", "torch.hub"),
    *("torch.utils.data", "torch.utils.tensorboard", "numpy.lib"),
)
_NOT_BY_NAME = frozenset({"save", "savez", "tofile", "dump", "PyTorchFileWriter", "fork"})


def may_repeat(module: str, name: str, owner: object = None) -> bool:
    """Whether a function that is not known to be pure may be called once more. `owner`: what it is
    a method of."""
    shown = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    if owner is not None and any(owner is stream for stream in shown):
        return True
    if isinstance(owner, (io.StringIO, io.BytesIO)):
        return True
    root = module.partition(".")[0]
    if root in ("torch", "numpy"):
        kept = any(module == m or module.startswith(f"{m}.") for m in _NOT_OF_LIBRARIES)
        return not kept and name not in _NOT_BY_NAME
    if module in _NAMES:
        return name in _NAMES[module]
    return root in _MODULES and name != _INPUT


def suspect(snapshot: Snapshot) -> str:
    """What of that which a step's code names may do something that must not be done twice; then its
    trace is watched. Empty where there is nothing."""
    known = _MODULES | {"torch", "numpy", "tracejit"}
    modules = {m.__name__ for m in snapshot.modules.values()}
    found = [m for m in modules if m.partition(".")[0] not in known]
    found += snapshot.named & {"open", _INPUT, "exec", "eval", "__import__", "import_module"}
    return ", ".join(sorted([*found, *(cls.__name__ for cls in snapshot.foreign)])[:3])
