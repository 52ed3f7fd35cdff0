"""`tracejit.grad(f)`: the gradient of a function over numpy arrays, as a compiled function.

    dloss = tracejit.grad(loss)          # of the first argument
    g = dloss(w, x, y)                   # an array like w

The function is traced like any step, and torch's rules of differentiation hold: at a tie of
np.maximum each side gets half.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tracejit.numpy_front.array import Array
from tracejit.numpy_front.core import ArrayData, refuse
from tracejit.numpy_front.step import NumpyStep
from tracejit.options import Options


def grad(
    function: Callable,
    argnums: int | tuple[int, ...] = 0,
    *,
    mode: str = "auto",
    backend: str = "auto",
    device: str | None = None,
) -> NumpyStep:
    """The gradient of a function that returns one float, a scalar or an array without axes.

    argnums: the positions of the arguments to differentiate by, arrays of floats; for a tuple of
    positions the result is a tuple. mode, backend, device: as in `tracejit.compile`.

    Raises UnsupportedOperation at the user's line for what has no rule: there is no plain function
    to fall back to. The function must not write to the arguments that it is differentiated by.
    """
    step = Gradient(function, Options(mode, backend, on_unsupported="raise", device=device))
    step.argnums = argnums if isinstance(argnums, tuple) else (argnums,)
    step.single = not isinstance(argnums, tuple)
    step._own |= {"argnums", "single"}
    return step


class Gradient(NumpyStep):
    """A compiled gradient. Within another step over numpy arrays it is a part of that."""

    argnums: tuple[int, ...]
    single: bool

    def _inside(self, *args: object, **kwargs: object) -> object:
        if not any(isinstance(x, ArrayData) for x in args):
            raise refuse("tracejit.grad", "it takes arrays of the step that it is called in", *args)
        return self._run(self._step, args, kwargs)

    def _run(self, function: Callable, args: tuple, kwargs: dict) -> object:
        args, leaves = list(args), []
        for i in self.argnums:
            x = args[i] if i < len(args) else None
            if not isinstance(x, ArrayData) or x.dtype.kind != "f":
                raise refuse(f"tracejit.grad by argument {i}", "pass an array of floats there", x)
            leaf = x.t.detach().requires_grad_()
            leaves.append(leaf)
            args[i] = Array(leaf, scalar=x.scalar, sure=x.sure)
        with torch.enable_grad():
            value = function(*args, **kwargs)
            if not isinstance(value, ArrayData) or value.t.ndim or value.dtype.kind != "f":
                raise refuse("tracejit.grad", "the function has to return one float", value)
            if not value.t.requires_grad:
                found = [torch.zeros_like(leaf) for leaf in leaves]
            else:
                found = torch.autograd.grad(value.t, leaves, allow_unused=True)
        found = [
            Array(torch.zeros_like(x) if g is None else g, scalar=x.ndim == 0)
            for x, g in zip(leaves, found, strict=True)
        ]
        return found[0] if self.single else tuple(found)
