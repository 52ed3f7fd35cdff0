"""What stands for `torch.func.grad`, `vjp` and `jvp` while a step is traced, and so for what torch
composes of them: `jacrev`, `jacfwd`, `hessian`.

A function runs once, on leaves that stand for what it is differentiated by, and `autograd.grad`
does the rest; the borders of a level are calls of a rule (`functions/transforms.py`), so that later
traces and vmaps see them. jvp is the derivative of the vjp, which is linear in its cotangents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch._functorch import eager_transforms as torch_transforms
from torch.overrides import handle_torch_function
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tracejit.capture.trace.active import current

Tensor = torch.Tensor
Argnums = int | tuple[int, ...] | None


class _Level:
    """The leaves of one transform, and whether what it returns may have a history outside."""

    def __init__(self, *, forward: bool = False) -> None:
        """forward: it is one of jvp's, whose leaves are views of what they stand for."""
        self._forward, self._outer = forward, torch.is_grad_enabled()
        self.leaves: list[Tensor] = []
        self._given: dict[int, Tensor] = {}  # by the ids of leaves: what they stand for

    def _ask(self, which: str, *tensors: Tensor) -> object:
        return handle_torch_function(torch.func.grad, tensors, which, *tensors)

    def enter(self, x: object) -> Tensor:
        """A leaf that stands for a tensor."""
        if not isinstance(x, Tensor):
            raise ValueError(f"Thing passed to transform API must be Tensor, got {type(x)}")
        made = self._ask("enter", x)
        self.leaves.append(made)
        self._given[id(made)] = x
        return made

    def close(self) -> None:
        """The function has run."""
        for leaf in self.leaves:
            self._ask("close", leaf)

    def reaches_outside(self, tensors: Sequence[Tensor]) -> bool:
        """Whether any of these can be differentiated by what is outside of the level."""
        return self._outer and any(self._ask("history", x, *self.leaves) for x in tensors)

    def along(self, x: Tensor, tangent: Tensor) -> Tensor:
        """The tangent of x, which can be differentiated outside of the level if x can."""
        if not self.reaches_outside([x]) or self.reaches_outside([tangent]):
            return tangent
        return self._ask("along", tangent, x)

    def leave(self, results: object) -> object:
        """Results as they are outside of it; a leaf is the tensor that it stands for."""
        return tree_map(self._left, results)

    def _left(self, x: object) -> Tensor:
        if not isinstance(x, Tensor):
            raise RuntimeError(f"Expected tensors, got unsupported type {type(x)}")
        if id(x) in self._given:
            given = self._given[id(x)]
            return given.view_as(given) if self._forward else given
        if not self._outer:
            return x.detach() if x.requires_grad else x
        given = [self._given.get(id(leaf), leaf) for leaf in self.leaves]
        return self._ask("leave", x, *self.leaves, *given)


def _entered(level: _Level, args: tuple, argnums: Argnums) -> tuple[tuple, object]:
    """The arguments with leaves in the place of what is differentiated by, and these."""
    if argnums is None:
        made = tree_map(level.enter, args)
        return made, made
    chosen = tree_map(level.enter, torch_transforms._slice_argnums(args, argnums))
    count = len(args)
    which = (argnums,) if isinstance(argnums, int) else argnums
    places = {k % count: x for k, x in zip(which, chosen, strict=True)}
    given = tuple(places.get(k, x) for k, x in enumerate(args))
    return given, chosen[0] if isinstance(argnums, int) else chosen


def _with_aux(name: str, output: object) -> tuple:
    if not (isinstance(output, tuple) and len(output) == 2):
        raise RuntimeError(
            f"{name}: output of function f should be a tuple: (output, aux) if has_aux is True"
        )
    return output


def _gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    create_graph: bool,
    retain_graph: bool = True,
) -> list[Tensor]:
    """Of outputs with a history by inputs; zeros for inputs that they do not depend on."""
    if cotangents is None:
        cotangents = [torch.ones_like(out) for out in outputs]
    pairs = [(x, g) for x, g in zip(outputs, cotangents, strict=True) if x.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(
        [x for x, _ in pairs],
        inputs,
        [g for _, g in pairs],
        retain_graph=retain_graph,
        create_graph=create_graph,
        allow_unused=True,
    )
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def grad_and_value(original: Callable) -> Callable:
    """`grad_and_value_impl`, by which `torch.func.grad` runs too."""

    def grad_and_value_impl(
        func: Callable, argnums: Argnums, has_aux: bool, args: tuple, kwargs: dict
    ) -> tuple:
        if current() is None:
            return original(func, argnums, has_aux, args, kwargs)
        name, aux, level = "grad_and_value(f)(*args)", None, _Level()
        with torch.enable_grad():
            given, chosen = _entered(level, args, argnums)
            output = func(*given, **kwargs)
            if has_aux:
                output, aux = _with_aux(name, output)
            if not isinstance(output, Tensor):
                raise RuntimeError(
                    f"{name}: Expected f(*args) to return a Tensor, got {type(output)}"
                )
            if output.dim() != 0:
                raise RuntimeError(
                    f"{name}: Expected f(*args) to return a scalar Tensor, got tensor with "
                    f"{output.dim()} dims. Maybe you wanted to use the vjp or jacrev APIs instead?"
                )
            level.close()
            inputs, spec = tree_flatten(chosen)
            keep = level.reaches_outside([output])
            found = _gradients([output], inputs, create_graph=keep)
            gradients = level.leave(tree_unflatten(found, spec))
            output, aux = level.leave(output), level.leave(aux) if has_aux else None
        return gradients, (output, aux) if has_aux else output

    return grad_and_value_impl


def vjp(original: Callable) -> Callable:
    """`_vjp_with_argnums`, by which `vjp` and `jacrev` run."""

    def vjp_with_argnums(
        func: Callable, *primals: object, argnums: Argnums = None, has_aux: bool = False
    ) -> tuple:
        if current() is None:
            return original(func, *primals, argnums=argnums, has_aux=has_aux)
        level = _Level()
        with torch.enable_grad():
            given, chosen = _entered(level, primals, argnums)
            out = func(*given)
            if has_aux:
                out, aux = _with_aux("vjp(f, *primals)", out)
                aux = level.leave(aux)
            level.close()
            outputs, out_spec = tree_flatten(out)
            torch_transforms.assert_non_empty_tensor_output(outputs, "vjp(f, *primals)")
            results = level.leave(out)
        for x in outputs:
            if not x.is_floating_point():
                raise RuntimeError(
                    "vjp(f, ...): All outputs of f must be floating-point or complex Tensors, got "
                    f"Tensor with dtype {x.dtype}"
                )
        inputs, spec = tree_flatten(chosen)

        def vjp_fn(
            cotangents: object, retain_graph: bool = True, create_graph: bool | None = None
        ) -> object:
            flat, its_spec = tree_flatten(cotangents)
            if its_spec != out_spec:
                raise RuntimeError(
                    "Expected pytree structure of cotangents to be the same as pytree structure of "
                    f"outputs to the function. cotangents: {its_spec}, primal output: {out_spec}"
                )
            if create_graph is None:
                create_graph = torch.is_grad_enabled()
            keep = create_graph and (
                level.reaches_outside(outputs) or any(g.requires_grad for g in flat)
            )
            modes = {"create_graph": keep, "retain_graph": retain_graph}
            found = _gradients(outputs, inputs, flat, **modes)
            return level.leave(tree_unflatten(found, spec)) if keep else tree_unflatten(found, spec)

        return (results, vjp_fn, aux) if has_aux else (results, vjp_fn)

    return vjp_with_argnums


def jvp(original: Callable) -> Callable:
    """`_jvp_with_argnums`, by which `jvp`, `jacfwd` and `hessian` run."""

    def jvp_with_argnums(
        func: Callable,
        primals: tuple,
        tangents: object,
        argnums: Argnums,
        strict: bool = False,
        *,
        has_aux: bool,
    ) -> tuple:
        if current() is None:
            return original(func, primals, tangents, argnums, strict=strict, has_aux=has_aux)
        name = torch_transforms.jvp_str
        if not isinstance(primals, tuple):
            raise RuntimeError(
                f"{name}: Expected primals to be a tuple. E.g. it should be valid to call "
                "f(*primals)."
            )
        chosen = primals if argnums is None else torch_transforms._slice_argnums(primals, argnums)
        flat, spec = tree_flatten(chosen)
        along, its_spec = tree_flatten(tangents)
        if spec != its_spec:
            raise RuntimeError(
                f"{name}: Expected primals and tangents to have the same python structure. For "
                f"example, if primals is a tuple of 3 tensors, tangents also must be. Got primals "
                f"with structure {spec} and tangents with structure {its_spec}"
            )
        torch_transforms.assert_non_empty_list_of_tensors(flat, name, "primals")
        torch_transforms.assert_non_empty_list_of_tensors(along, name, "tangents")
        level = _Level(forward=True)
        with torch.enable_grad():
            given, chosen = _entered(level, primals, argnums)
            out = func(*given)
            if has_aux:
                out, aux = _with_aux(name, out)
            level.close()
            outputs, out_spec = tree_flatten(out)
            torch_transforms.assert_non_empty_tensor_output(outputs, name)
            inputs, dual = tree_flatten(chosen)[0], _Level()
            through = [x for x in outputs if x.requires_grad]
            zeros = [dual.enter(torch.zeros_like(x)) for x in through]
            linear = _gradients(through, inputs, zeros, create_graph=True)
            pushed = iter(_gradients(linear, zeros, along, create_graph=True))
            dual.close()
            found = [next(pushed) if x.requires_grad else torch.zeros_like(x) for x in outputs]
            if strict and not all(x.requires_grad for x in outputs):
                raise RuntimeError(
                    "jvp(f, primals, tangents, strict=True): The output of f is independent of the "
                    "inputs. This is not allowed with strict=True."
                )
            level.leaves += dual.leaves
            found = [level.along(x, y) for x, y in zip(outputs, found, strict=True)]
            results = level.leave(out), level.leave(tree_unflatten(found, out_spec))
            return (*results, level.leave(aux)) if has_aux else results

    return jvp_with_argnums
