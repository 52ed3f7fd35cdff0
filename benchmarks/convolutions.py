"""python -m benchmarks.convolutions [NET ...]: each convolution of a net beside the machine's peak.

The convolutions of each net are found by its shapes, equal ones once, and measured alone: forward,
and the gradients of image, weight and bias, in one compiled step, in turns with eager. Columns:

  GFLOP       2·Co·Ci/groups·taps·places·batch, three times where the image has a gradient, else two
  ms, eager   medians of rounds in turns; eager in the better of its layouts
  share       of the peak of fused multiply-adds, which is measured first, with as many threads; the
              work is the definition's, of which transforms (3×3) need 16/36: more than 100 % may be
"""

from __future__ import annotations

import argparse
import ctypes
import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import tracejit
from benchmarks import image_steps

NETS = {
    "ResNet-18": image_steps.resnet,
    "VGG": image_steps.vgg,
    "AlexNet": image_steps.alexnet,
    "MobileNetV2": image_steps.mobilenet,
    "UNet": image_steps.unet,
}
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
_PEAK = """
#include <time.h>
#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
typedef float lanes __attribute__((vector_size(LANES * 4)));
static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}
double spin(long times, float *out) {
  double start = now();
  lanes sum[12];
  lanes a = (lanes){} + out[0], b = (lanes){} + out[1];
  for (int k = 0; k < 12; k++) sum[k] = a + (float)k;
  for (long i = 0; i < times; i++) {
#pragma GCC unroll 12
    for (int k = 0; k < 12; k++) sum[k] = sum[k] * a + b;
  }
  for (int k = 1; k < 12; k++) sum[0] += sum[k];
  out[2] = sum[0][0];
  return times * 12.0 * LANES * 2 / (now() - start);
}
"""


def peak(threads: int) -> float:
    """Operations a second that fused multiply-adds of float32 in registers come to."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "peak.c"), Path(folder, "peak.so")
        source.write_text(_PEAK)
        options = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run(["gcc", *options, str(source), "-o", str(library)], check=True)
        spin = ctypes.CDLL(str(library)).spin
        spin.argtypes, spin.restype = [ctypes.c_long, ctypes.c_void_p], ctypes.c_double

        def run(times: int) -> float:
            out = torch.tensor([0.5, 0.25, 0.0])
            return spin(times, out.data_ptr())

        with ThreadPoolExecutor(threads) as pool:
            return max(sum(pool.map(run, [5_000_000] * threads)) for _ in range(9))


@dataclass(frozen=True)
class Shape:
    """A convolution: its module's text, the image's shape, whether that has a gradient."""

    text: str
    image: tuple[int, ...]
    differentiated: bool


def convolutions(make: Callable) -> dict[Shape, tuple[nn.Module, int, int]]:
    """The convolutions of a net: a module, floating point operations, how often it is there."""
    found: dict[Shape, tuple[nn.Module, int, int]] = {}

    def note(module: nn.Module, inputs: tuple, out: torch.Tensor) -> None:
        if isinstance(module, _CONVOLUTIONS):
            (x,) = inputs
            shape = Shape(repr(module), tuple(x.shape), x.requires_grad)
            places = x if isinstance(module, nn.ConvTranspose2d) else out
            work = 2 * module.weight[0].numel() * math.prod(places.shape)
            work *= 3 if x.requires_grad else 2
            found[shape] = module, work, found.get(shape, (None, 0, 0))[2] + 1

    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        step, _ = make()
        step()
    finally:
        hook.remove()
    return found


def alone(module: nn.Module, shape: Shape, *, last: bool) -> Callable[[], object]:
    """A step that computes the convolution and its gradients."""
    layout = torch.channels_last if last else torch.contiguous_format
    module = module.to(memory_format=layout)
    x = torch.randn(shape.image).to(memory_format=layout)
    x.requires_grad_(shape.differentiated)
    g = torch.randn_like(module(x).detach())

    def step() -> torch.Tensor:
        for leaf in (x, *module.parameters()):
            leaf.grad = None
        y = module(x)
        y.backward(g)
        return y.detach()

    return step


def measure(module: nn.Module, shape: Shape, rounds: int) -> tuple[float, float]:
    """Milliseconds of the compiled step, and of eager in its better layout."""
    eager = [alone(module, shape, last=last) for last in (False, True)]
    ours = tracejit.compile(alone(module, shape, last=False), on_unsupported="raise")
    contenders = [ours, *eager]
    for step in contenders * 4:
        step()
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for step, spent in zip(contenders, times, strict=True):
            start = time.perf_counter()
            step()
            spent.append((time.perf_counter() - start) * 1e3)
    mine, *theirs = map(statistics.median, times)
    return mine, min(theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("nets", nargs="*", metavar="NET", help=f"of {', '.join(NETS)}; else all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    most = peak(options.threads)
    print(f"peak {most / 1e9:.0f} GFLOP/s with {options.threads} threads")
    for name in options.nets or NETS:
        print(
            f"\n{name:58s}{'times':>6s}{'GFLOP':>8s}{'ms':>8s}{'eager':>8s}{'share':>7s}{'eager':>7s}"
        )
        total = [0.0, 0.0, 0.0]
        for shape, (module, work, times) in convolutions(NETS[name]).items():
            mine, theirs = measure(module, shape, options.rounds)
            for i, x in enumerate((work, mine, theirs)):
                total[i] += times * x
            text = f"{shape.text.removesuffix(')')}) of {list(shape.image)}"
            _row(text, times, work, mine, theirs, most)
        _row("all", 1, *total, most)


def _row(text: str, times: int, work: float, mine: float, theirs: float, most: float) -> None:
    shares = "".join(f"{work / ms / 1e6 / (most / 1e9):7.0%}" for ms in (mine, theirs))
    print(f"{text[:57]:58s}{times:6d}{work / 1e9:8.2f}{mine:8.2f}{theirs:8.2f}{shares}", flush=True)


if __name__ == "__main__":
    main()
