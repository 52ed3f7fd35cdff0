"""Generated Triton as a module of Python: stored as a file, and run."""

from __future__ import annotations

import linecache
from types import ModuleType

from tracejit.codegen.triton import Source
from tracejit.runtime.cache import DiskCache, pack, sha256

DISK = DiskCache()


def import_source(source: Source) -> object:
    """Store a source as a file, run it as a module, return its kernel.

    Triton reads a function's text back through linecache, which is told here, so that the file may
    go at any time.
    """
    key = f"{source.name} {sha256(source.text)}"
    path = DISK.put("triton", key, source.text)
    text = pack(key, source.text).decode()
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    module = ModuleType(source.name)
    module.__file__ = str(path)
    exec(compile(text, str(path), "exec"), module.__dict__)
    return getattr(module, source.name)
