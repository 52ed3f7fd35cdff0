"""What "equal to eager" means: the rule for tensors and losses, and all tolerances.

For every floating-point tensor t: ‖ours - f64‖ ≤ 4·‖eager - f64‖ + 16·eps·‖t recomputed with
absolute values‖, where f64 is the same step in float64; other dtypes must be equal.
`difference` applies it to one tensor. `testing.py` and `verify/` ask it for whole steps.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tracejit.capture.trace.tensor import TO_IR
from tracejit.ir.graph import Graph
from tracejit.ir.magnitudes import magnitudes

# Unit roundoff doubled: the distance from 1 to the next number of each dtype.
EPS = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}
EAGER_FACTOR = 4.0  # ‖ours - f64‖ may be this many times ‖eager - f64‖ …
MAGNITUDE_FACTOR = 16.0  # … plus this many eps of the result recomputed with absolute values
LOSS_RELATIVE = 1e-3  # free run: |Δloss| against |loss| …
LOSS_FIRST = 1e-9  # … plus this much of the first loss
PARAMETER_RELATIVE = 1e-5  # free run: parameters by norm


def losses_agree(ours: float, eager: float, first: float) -> bool:
    """The free-run rule for one loss."""
    if math.isnan(eager) or math.isinf(eager):
        return ours == eager or (math.isnan(eager) and math.isnan(ours))
    return abs(ours - eager) <= LOSS_RELATIVE * abs(eager) + LOSS_FIRST * abs(first)


def difference(
    a: torch.Tensor, b: torch.Tensor, reference: torch.Tensor, size: float
) -> str | None:
    """What is wrong with a tensor of ours, where eager has b, float64 has `reference`, and the norm
    of the result recomputed with absolute values is `size`; None if they are equal by the rule.
    Shapes and dtypes are the same; of complex tensors the parts are compared."""
    a, b, reference = map(in_parts, (a, b, reference))
    if not a.is_floating_point():
        return None if torch.equal(a, b) else "differs from eager"
    if not torch.equal(a.isnan(), b.isnan()):
        return "NaN where eager has none, or the reverse"
    finite = b.isfinite() & reference.isfinite()
    if not torch.equal(a[~finite], b[~finite]) and not torch.equal(
        a[~finite].nan_to_num(7.0), b[~finite].nan_to_num(7.0)
    ):
        return "infinities differ from eager"
    zero = torch.zeros((), dtype=torch.float64)
    error = torch.where(finite, a.double() - reference.double(), zero).norm()
    eager_error = torch.where(finite, b.double() - reference.double(), zero).norm()
    allowed = EAGER_FACTOR * eager_error + MAGNITUDE_FACTOR * EPS[b.dtype] * size
    if error <= allowed:
        return None
    return (
        f"‖ours - f64‖ = {error:.3e}, allowed {allowed:.3e} "
        f"(‖eager - f64‖ = {eager_error:.3e}, magnitude {size:.3e})"
    )


def in_parts(x: torch.Tensor) -> torch.Tensor:
    """A complex tensor as its real and imaginary parts; others as they are."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


@contextlib.contextmanager
def tensors_in_float64(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """A context in which the floats among some tensors, and their gradients, are copies in float64,
    and so is the default dtype. Afterwards all are what they were. Calls in it are to be made under
    `AllInFloat64`."""
    floats = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    saved = [(t, t.data, t.grad if t.is_leaf else None) for t in floats]
    default = torch.get_default_dtype()
    try:
        for t, data, grad in saved:
            if t.is_leaf:
                t.grad = None
            t.data = _widened(data).clone()
            if grad is not None:
                t.grad = _widened(grad.detach()).clone()
        torch.set_default_dtype(torch.float64)
        yield
    finally:
        torch.set_default_dtype(default)
        for t, data, grad in saved:
            if t.is_leaf:
                t.grad = None
            t.data = data
            if t.is_leaf:
                t.grad = grad


def _widened(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.complex128) if x.is_complex() else x.double()


_WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


class AllInFloat64(TorchDispatchMode):
    """What a step casts to float32, or makes of that dtype, is float64. Random floats are drawn in
    float32 and then widened: in float64 they would be others."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        draws = torch.Tag.nondeterministic_seeded in func.tags
        if not draws or "scaled_dot_product" in str(func):  # with dropout it is composed of others
            if kwargs.get("dtype") in _WIDE:
                kwargs = kwargs | {"dtype": _WIDE[kwargs["dtype"]]}
            return func(*args, **kwargs)
        if func.overloadpacket in (torch.ops.aten.rand, torch.ops.aten.randn):
            kwargs = kwargs | {"dtype": kwargs.get("dtype") or torch.float64}
        out = func(*map(_narrow, args), **{k: _narrow(x) for k, x in kwargs.items()})
        if func._schema.is_mutable:
            return args[0].copy_(out)
        floats = isinstance(out, torch.Tensor) and out.dtype is torch.float32
        return out.double() if floats else out


def _narrow(x: object) -> object:
    """A float64 tensor, or that dtype, as float32."""
    if isinstance(x, torch.Tensor) and x.dtype is torch.float64:
        return x.float()
    return torch.float32 if x is torch.float64 else x


class Magnitudes:
    """Observes a run: the norm of every output recomputed with absolute values."""

    def __init__(self) -> None:
        self._norms: dict[int, float] = {}

    def __call__(self, graph: Graph, inputs: Sequence, outputs: Sequence[torch.Tensor]) -> Callable:
        arrays = [array_of(x) for x in inputs]
        return lambda: self.of(graph, arrays, inputs, outputs)

    def of(
        self, graph: Graph, arrays: Sequence, inputs: Sequence, outputs: Sequence[torch.Tensor]
    ) -> None:
        """Find the norms of a run on `arrays`; `inputs` and `outputs` are where it wrote."""
        found, lower = magnitudes(graph, arrays), {}
        pairs = [(r.value, out) for r, out in zip(graph.results, outputs, strict=True)]
        position = {p.value: i for i, p in enumerate(graph.params)}
        pairs += [(w.value, inputs[position[w.target]]) for w in graph.writes]
        for value, tensor in pairs:
            norm = _norm(found[value])
            if not math.isfinite(norm):
                lower = lower or magnitudes(graph, arrays, first_order=True)
                norm = _norm(lower[value])
            self._norms[tensor.data_ptr()] = norm

    def norm_of(self, pointer: int, tensor: torch.Tensor) -> float:
        """The magnitude of the memory at an address; the tensor's own norm where unknown."""
        tensor = in_parts(tensor)
        own = torch.where(tensor.isfinite(), tensor.double(), 0.0).norm()
        found = self._norms.get(pointer, 0.0)
        return max(float(own), found) if math.isfinite(found) else float(own)


def _norm(size: np.ndarray) -> float:
    with np.errstate(over="ignore"):  # an infinite bound says nothing: see norm_of
        return float(np.linalg.norm(np.asarray(size, np.float64).ravel()))


def array_of(t: torch.Tensor | np.ndarray | float) -> np.ndarray | float:
    """An input of a graph, as the numpy rules of primitives take it."""
    if not isinstance(t, torch.Tensor):
        return float(t) if isinstance(t, int | float) else t
    t = in_parts(t.detach())
    if TO_IR[t.dtype].narrow:
        t = t.float()
    return t.cpu().clone().numpy()
