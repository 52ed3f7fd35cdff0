import os
import tempfile
from pathlib import Path

import torch

import tracejit

compiler = Path(tempfile.mkdtemp()) / "cc"  # as one that finds the disk full
compiler.write_text("#!/bin/sh\necho 'No space left on device' >&2\nexit 1\n")
compiler.chmod(0o700)
os.environ["CC"] = str(compiler)


@tracejit.compile(backend="c", on_unsupported="raise")
def step(x):
    return x.exp()


step(torch.ones(3))
