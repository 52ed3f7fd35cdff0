"""A step against eager, call by call: values, memory, gradients, errors; and a shrinker.

Eager, the compiled step and a float64 reference each have arguments of their own; after every call
all take over eager's state. Tolerances are those of `tracejit.testing`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence

import torch

import tracejit
from support.random_text import Program
from tracejit.equality import EPS, Magnitudes
from tracejit.errors import SideEffectError, WrongResult
from tracejit.testing import _compare, _visible

Cast = Callable[[torch.Tensor, torch.dtype], torch.Tensor]
SHIFT = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 1e-2}


class IllConditioned(Exception):
    """The program's results depend on rounding: no way of computing them could be called right."""


def exact(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return t.to(dtype).double()


def loaded(text: str, name: str) -> tuple[Callable, Callable]:
    """`make_args` and `step` of a program's text."""
    space: dict[str, object] = {"__name__": "random_program"}
    exec(compile(text, f"<{name}>", "exec"), space)
    return space["make_args"], space["step"]


def in_float64(text: str) -> str:
    head, step = text.split("\n\n\ndef step(")
    return f"{head}\n\n\ndef step(" + re.sub(r"torch\.(float32|bfloat16)", "torch.float64", step)


class Wide(Magnitudes):
    """Magnitudes for a program that rounds to a narrower dtype on the way to some result."""

    def __init__(self, narrow: torch.dtype):
        super().__init__()
        self.narrow = narrow

    def norm_of(self, pointer: int, tensor: torch.Tensor) -> float:
        return super().norm_of(pointer, tensor) * max(1.0, EPS[self.narrow] / EPS[tensor.dtype])


def run_program(program: Program, variants: Sequence[dict], calls: int = 3) -> dict[int, str]:
    """Compare a program compiled in several ways; returns the variants refused, with the reason."""
    text = str(program)
    make_args, step = loaded(text, "program")
    reference = loaded(in_float64(text), "reference")[1]
    check_conditioning(reference, make_args, program.dtype, calls, program.outside)
    refused = {}
    for k, options in enumerate(variants):
        try:
            compare(
                step,
                make_args,
                reference=reference,
                calls=calls,
                narrow=program.dtype,
                outside=program.outside,
                layouts="autograd.grad" not in text,
                **options,
            )
        except RuntimeError as error:
            if not is_refusal(error):
                raise
            refused[k] = str(error)
    return refused


def compare(
    step: Callable,
    make_args: Callable[[Cast], list],
    *,
    reference: Callable | None = None,
    calls: int = 3,
    narrow: torch.dtype = torch.float32,
    outside: bool = False,
    layouts: bool = True,
    **options: object,
) -> tracejit.CompiledStep:
    """Check a compiled step against eager in lockstep; returns it.

    make_args: called with `cast(tensor, dtype)`, which makes a tensor eager's or the reference's.
    reference: the step for float64 arguments; the step itself unless it names dtypes.
    outside:   call backward on what is returned.
    layouts:   compare strides (torch lays out some results as its kernels happen to make them).
    Raises AssertionError where they differ, the step's own error where it is refused.
    """
    compiled = tracejit.compile(step, **options)
    eager_args, ours_args, exact_args = (make_args(c) for c in (torch.Tensor.to,) * 2 + (exact,))
    inside = Inside(step, make_args(torch.Tensor.to), narrow) if outside else None
    for call in range(calls):
        eager, error = visible(step, eager_args, call, outside)
        magnitudes = Wide(narrow)
        compiled.observer = magnitudes
        if error is not None:
            check_error(compiled, ours_args, call, outside, error)
            return compiled
        ours, ours_error = visible(compiled, ours_args, call, outside)
        if is_refusal(ours_error):
            raise ours_error
        if ours_error is not None:
            raise AssertionError(f"call {call}: eager takes it; {ours_error!r}") from ours_error
        if inside is not None:
            magnitudes = inside.magnitudes(call, ours)
        torch.set_default_dtype(torch.float64)
        try:
            truth, error = visible(reference or step, exact_args, call, outside)
        finally:
            torch.set_default_dtype(torch.float32)
        if error is not None:
            raise AssertionError(f"the float64 reference raised {error!r}")
        check_memory(call, ours.memory, eager.memory, layouts)
        _compare(call, ours.seen, eager.seen, truth.seen, magnitudes)
        for args in (ours_args, exact_args, *([inside.args] if inside else ())):
            synchronize(eager_args, args)
    return compiled


class Inside:
    """The same step with the backward inside, where the magnitudes of gradients can be seen."""

    def __init__(self, step: Callable, args: list, narrow: torch.dtype):
        def whole(*given):
            returned = step(*given)
            backward(returned)
            return returned

        self.args, self.narrow = args, narrow
        self.compiled = tracejit.compile(whole, backend="numpy", mode="rerun")

    def magnitudes(self, call: int, ours: Visible) -> Wide:
        found = self.compiled.observer = Wide(self.narrow)
        mine, error = visible(self.compiled, self.args, call, outside=False)
        if error is not None:
            raise error
        norms = found._norms
        pointers = [(a[2], b[2]) for a, b in zip(ours.seen, mine.seen, strict=True)]
        found._norms = {p: norms[q] for p, q in pointers if q in norms}
        return found


def is_refusal(error: Exception | None) -> bool:
    """Whether it says "not supported", at once or when a backward reaches what is not; or that the
    step changes what a compiled step cannot change. By default such a step runs eagerly."""
    if isinstance(error, SideEffectError):
        return True
    return error is not None and "is not supported inside a compiled step" in str(error)


def check_error(compiled, args, call, outside, error) -> None:
    """Ours has to raise the same class of error, and to leave everything as it was."""
    held = tensors(args)
    before = [(copy_of(t), copy_of(t.grad) if t.is_leaf else None) for t in held]
    _, ours = visible(compiled, args, call, outside)
    if ours is None:
        raise AssertionError(f"call {call}: eager raised {error!r}, the compiled step did not")
    if is_refusal(ours):
        raise ours
    if not isinstance(ours, type(error)) or isinstance(ours, WrongResult):
        raise AssertionError(f"call {call}: eager raised {error!r}, ours {ours!r}") from ours
    if outside:
        return  # the step itself may have been right
    for t, (data, grad) in zip(held, before, strict=True):
        now = copy_of(t.grad) if t.is_leaf else None
        same = equal(copy_of(t), data) and ((now is None) == (grad is None)) and equal(now, grad)
        assert same, f"call {call}: a tensor of shape {list(t.shape)} changed, though it raised"


def copy_of(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.detach().clone()


def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


class Visible:
    """What the user can see after a call: values, and who shares memory with whom."""

    def __init__(self, returned: object, args: list):
        held = tensors(args)
        self.seen = _visible(returned, held)
        first: dict[int, int] = {}
        self.memory = [
            (first.setdefault(t.untyped_storage().data_ptr(), k), tuple(t.shape), strides(t))
            if t.numel()
            else None
            for k, t in enumerate([*tensors(returned), *held])
        ]


def strides(t: torch.Tensor) -> tuple[int, ...]:
    return tuple(st for st, n in zip(t.stride(), t.shape, strict=True) if n > 1)


def check_memory(call: int, ours: list, eager: list, layouts: bool) -> None:
    for k, (a, b) in enumerate(zip(ours, eager, strict=False)):
        if b is not None and not layouts:  # nor does it say which gradients share memory
            a, b = a and a[1:2], b[1:2]
        elif b is not None and 0 in b[2]:
            a, b = a and a[:2], b[:2]
        assert a == b, f"call {call}: tensor {k} has (memory of, shape, strides) {a}, eager {b}"


def tensors(x: object) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for item in x for t in tensors(item)] if isinstance(x, (tuple, list)) else []


def visible(step, args, call, outside) -> tuple[Visible | None, Exception | None]:
    """Call a step; a float argument has another value on each call."""
    given = [a * (1 + call / 4) if isinstance(a, float) else a for a in args]
    try:
        returned = step(*given)
        if outside:
            backward(returned)
    except Exception as error:  # whatever eager raises is to be compared
        return None, error
    return Visible(returned, args), None


def backward(returned: object) -> None:
    roots = [t for t in tensors(returned) if t.requires_grad]
    if roots:
        sum(weighted(t) for t in roots).backward()


def weighted(t: torch.Tensor) -> torch.Tensor:
    """A loss in which nothing cancels, as the plain sum of a softmax does."""
    weights = torch.linspace(0.5, 1.5, t.numel(), dtype=torch.float64).view(t.shape)
    return (t.double() * weights).sum()


def synchronize(eager_args: list, args: list) -> None:
    """Give `args` the values and gradients that eager is left with."""
    for t, o in zip(tensors(eager_args), tensors(args), strict=True):
        o.data.copy_(t.data)
        if t.is_leaf and t.grad is not None:
            o.grad.data.copy_(t.grad)


def check_conditioning(step, make_args, narrow, calls, outside) -> None:
    """Moving every input a little must move every result a little, and none that is not a float."""
    plain = free_run(step, make_args, exact, calls, outside)
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)

        def moved(t: torch.Tensor, dtype: torch.dtype, generator=generator) -> torch.Tensor:
            t = exact(t, dtype)
            noise = torch.randn(t.shape, dtype=t.dtype, generator=generator)
            near = t * (1 + SHIFT[narrow] * noise)
            if 0 in t.stride():
                return near
            # as it lies in memory, which decides what eager takes to overlap
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(near)

        for a, b in zip(plain, free_run(step, make_args, moved, calls, outside), strict=True):
            same = a is None or b is None or a.dtype is b.dtype
            if (a is None) != (b is None) or not same:
                raise IllConditioned
            if a is None:
                continue
            if not a.is_floating_point():
                good = torch.equal(a, b)
            else:
                far = (a - b).nan_to_num().norm()
                good = torch.equal(a.isfinite(), b.isfinite()) and bool(
                    far <= 100 * SHIFT[narrow] * a.nan_to_num().norm() + 1e-9 * a.numel()
                )
            if not good:
                raise IllConditioned


def free_run(step, make_args, cast, calls, outside) -> list[torch.Tensor | None]:
    args, seen = make_args(cast), []
    for call in range(calls):
        found, error = visible(step, args, call, outside)
        if error is not None:
            return seen
        seen += [copy for *_, copy in found.seen]
    return seen


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """The program with every statement, argument and result dropped that the failure can spare."""
    again = True
    while again:
        again = False
        for line in (*reversed(program.body), *program.returns, *program.args):
            smaller = program.without(line)
            if smaller is not None and fails(smaller):
                program, again = smaller, True
                break
    return program


def outcome(program: Program, variants: Sequence[dict]) -> tuple[str, dict[int, str]]:
    """One of equal, refused, ill-conditioned, and why variants are refused. AssertionError with the
    shrunk program where it differs from eager."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about create_graph and var of one element
        try:
            refused = run_program(program, variants)
        except IllConditioned:
            return "ill-conditioned", {}
        except Exception as error:
            kind = type(error)
            small = shrink(program, lambda p: fails_alike(p, variants, kind))
            raise AssertionError(f"{error}\n\n{small}") from error
    return ("refused" if refused else "equal"), refused


def fails_alike(program: Program, variants: Sequence[dict], kind: type) -> bool:
    """Whether a program fails with an error of this class."""
    try:
        run_program(program, variants)
    except IllConditioned:
        return False
    except Exception as found:
        return type(found) is kind
    return False
