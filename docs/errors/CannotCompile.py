import os
import tempfile
from pathlib import Path

import torch

import tracejit

compiler = Path(tempfile.mkdtemp()) / "cc"  # one that finds the disk full
compiler.write_text('[ "$1" = --version ] || { echo "No space left on device" >&2; exit 1; }\n')
os.environ["CC"] = f"sh {compiler}"


@tracejit.compile(backend="c", on_unsupported="raise")
def step(x):
    return x.exp()


step(torch.ones(3))
