"""torch's own databases of operators: an entry in, what becomes of it in a compiled step out.

The samples are those that torch ships (`torch.testing._internal`), for float32 where an entry has
it, or for another dtype that is asked for. Each runs in eager and in a compiled step that refuses
rather than fall back: results, layout, what is left of the arguments, and the gradients of all of
them are compared.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch.utils import _pytree as pytree

import tracejit
from tracejit.errors import TracejitError

MOST = 6  # samples of an entry
LARGEST = 10_000  # elements of a sample
SEEN = 300  # samples that are looked at, to choose from
DTYPES = (torch.float32, torch.int64, torch.bool)
FURTHER = (torch.float64, torch.bfloat16, torch.int64, torch.bool)  # of the second table

# Whose results are memory as it comes: shape, dtype and layout are compared.
UNINITIALIZED = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty"}
UNINITIALIZED |= {"new_empty_strided"}
# In which it is open which of equal elements comes first.
TIES = {"argsort", "kthvalue", "median", "mode", "msort", "nanmedian", "sort", "topk"}
# of the larger of an element, the largest of its tensor, and 1; the samples go up to 10
TOLERANCE = 2e-5


# Whose results are vectors of any sign: where the values are that they belong to, and where the
# vectors, and whether these are rows.
SIGNED = {
    "linalg.eigh": (0, (1, False)),
    "linalg.svd": (1, (0, False), (2, True)),
    "svd": (1, (0, False), (2, False)),
    "svd_lowrank": (1, (0, False), (2, False)),
    "pca_lowrank": (1, (0, False), (2, False)),
}


def same(out: object) -> object:
    """What is compared of most results."""
    return out


def signless(out: tuple, *, values: int, vectors: Sequence[tuple[int, bool]]) -> list[torch.Tensor]:
    """Results with vectors of any sign, turned: in the first lot of vectors the largest component
    of each is positive. Those without a value, of a full decomposition, may be any that are
    orthogonal: as the space that they span."""
    found, turns = [out[values].detach()], None
    for place, rows in vectors:
        x = out[place].detach()
        x = x.mT if rows else x
        k = out[values].shape[-1]
        own, rest = x[..., :k], x[..., k:]
        if turns is None and own.numel():
            at = own.abs().argmax(-2, keepdim=True)
            turns = own.gather(-2, at).sign()
        found += [own if turns is None else own * turns, rest @ rest.mT]
    return found


@dataclass(frozen=True)
class Outcome:
    """`kind`: pass, refused, wrong, error (of another kind than our own), or none (no sample)."""

    kind: str
    reason: str = ""


@dataclass(frozen=True)
class Case:
    """One sample: how it is called, and what of the result has a gradient."""

    function: Callable
    args: tuple
    kwargs: dict
    differentiated: Callable = staticmethod(lambda out: out)
    seen: Callable = same  # what of the results is compared

    @property
    def size(self) -> int:
        return sum(x.numel() for x in tensors((self.args, self.kwargs)))

    def fresh(self) -> tuple[tuple, dict]:
        """Copies of the arguments, laid out as they are."""
        made: dict[int, torch.Tensor] = {}

        def copied(x: object) -> object:
            if isinstance(x, torch.nn.Module):
                return copy.deepcopy(x)
            if not isinstance(x, torch.Tensor):
                return x
            if id(x) not in made:
                made[id(x)] = copy_of(x)
            return made[id(x)]

        return pytree.tree_map(copied, (self.args, self.kwargs))


def copy_of(x: torch.Tensor) -> torch.Tensor:
    """A leaf with its own memory, of the same strides also where elements overlap."""
    if x.layout is not torch.strided:
        return x.detach().clone().requires_grad_(x.requires_grad)
    size = (
        1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    )
    memory = x.detach().as_strided((size,), (1,), x.storage_offset()).clone()
    return memory.as_strided(x.shape, x.stride(), 0).detach().requires_grad_(x.requires_grad)


def tensors(tree: object) -> list[torch.Tensor]:
    """The tensors of a tree, the parameters of its modules among them."""
    found: list[torch.Tensor] = []
    for x in pytree.tree_leaves(tree):
        found += [x] if isinstance(x, torch.Tensor) else []
        found += list(x.parameters()) if isinstance(x, torch.nn.Module) else []
    return found


def opened(tree: object) -> object:
    """A tree with the tensors that each module holds in its place."""
    return pytree.tree_map(
        lambda x: dict(x.state_dict()) if isinstance(x, torch.nn.Module) else x, tree
    )


def dtype_of(entry: object) -> torch.dtype | None:
    """The dtype that an entry is tried in."""
    return next((d for d in DTYPES if d in entry.dtypes), None)


def cases(entry: object, dtype: torch.dtype, function: Callable | None = None) -> Iterator[Case]:
    """Some of an entry's samples, small ones if it has any, from all over its list."""
    torch.manual_seed(5)
    grad = entry.supports_autograd and dtype.is_floating_point
    samples = islice(entry.sample_inputs("cpu", dtype, requires_grad=grad), SEEN)
    function = function or entry.op
    seen = (
        partial(signless, values=SIGNED[entry.name][0], vectors=SIGNED[entry.name][1:])
        if entry.name in SIGNED
        else same
    )
    found = [
        Case(function, (s.input, *s.args), s.kwargs, s.output_process_fn_grad, seen)
        for s in samples
    ]
    found = [case for case in found if case.size <= LARGEST] or found
    last, step = len(found) - 1, max(1, MOST - 1)
    chosen = sorted({round(k * last / step) for k in range(MOST)}) if found else []
    return (found[k] for k in chosen)


def step_of(case: Case) -> Callable:
    """A step that calls the function and differentiates its results by all arguments."""

    def step(args: tuple, kwargs: dict) -> tuple:
        leaves = [x for x in tensors((args, kwargs)) if x.requires_grad]
        out = case.function(*args, **kwargs)
        outs = [x for x in tensors(case.differentiated(out)) if x.requires_grad]
        grads = []
        if leaves and outs:
            outs = [x.abs() if x.is_complex() else x for x in outs]
            total = sum((x * weights(x)).sum() for x in outs)
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
        return out, [x.requires_grad for x in tensors(out)], list(grads)

    return step


def weights(x: torch.Tensor) -> torch.Tensor:
    """A fixed cotangent of a tensor's shape and dtype."""
    n = x.numel()
    row = torch.arange(n, dtype=torch.float64).mul(0.7).sin().add(0.3)
    return row.to(x.dtype).reshape(x.shape)


def outcome(
    case: Case, *, backend: str, uninitialized: bool = False, ties: bool = False
) -> Outcome:
    """What becomes of one sample; none where eager refuses it. With `ties`, only the first
    of the results is compared by its values, unless it is an order itself."""
    step = step_of(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = case.fresh()
        torch.manual_seed(11)
        try:
            theirs = step(*given)
        except Exception as error:
            return Outcome("none", f"eager: {type(error).__name__}")
        ours_given = case.fresh()
        torch.manual_seed(11)
        compiled = tracejit.compile(step, backend=backend, on_unsupported="raise")
        try:
            ours = compiled(*ours_given)
        except TracejitError as error:
            return Outcome("refused", f"{type(error).__name__}: {error}")
        except Exception as error:
            return Outcome("error", f"{type(error).__name__}: {error}")
        values = not uninitialized
        if ties:
            both = (tensors(result[0])[:1] for result in (theirs, ours))
            what = difference(theirs[:2], ours[:2], strides=True, values=False)
            what = what or (difference(*both) if case.function is not torch.argsort else "")
            return Outcome("wrong", what) if what else Outcome("pass")
        what = difference(theirs[:2], ours[:2], strides=True, values=False)
        theirs, ours = ((case.seen(out), *rest) for out, *rest in (theirs, ours))
        what = what or difference(theirs[:2], ours[:2], values=values)
        what = what or difference(opened(given), opened(ours_given), strides=True, values=values)
        what = what or difference(theirs[2], ours[2])  # torch does not say how gradients lie
        if what and values and closer(case, theirs, ours):
            what = ""
    return Outcome("wrong", what) if what else Outcome("pass")


NARROWER = (torch.float32, torch.bfloat16, torch.float16)


def closer(case: Case, theirs: tuple, ours: tuple) -> bool:
    """Whether our results differ from eager's in nothing but values, and are nearer to those of
    float64 than eager's are."""
    if difference(theirs[:2], ours[:2], strides=True, values=False):
        return False

    def double(x: object) -> object:
        if not isinstance(x, torch.Tensor) or x.dtype not in NARROWER:
            return x
        return x.detach().double().requires_grad_(x.requires_grad)

    args, kwargs = pytree.tree_map(double, case.fresh())
    for x in pytree.tree_leaves(args):
        if isinstance(x, torch.nn.Module):
            x.double()
    torch.manual_seed(11)
    try:
        out, *rest = step_of(case)(args, kwargs)
        truth = case.seen(out), *rest
    except Exception:  # a dtype among the arguments, say
        return False
    lists = [tensors(tree) for tree in (theirs, ours, truth)]
    if len({len(found) for found in lists}) > 1:
        return False
    return all(
        close(eager, mine) or error(mine, exact) <= error(eager, exact)
        for eager, mine, exact in zip(*lists, strict=True)
        if exact.shape == mine.shape
    )


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error of an element."""
    return (x.detach().double() - exact.detach().double()).abs().max().item()


def difference(theirs: object, ours: object, *, values: bool = True, strides: bool = False) -> str:
    """In what two trees of tensors differ, or nothing."""
    (eager, shape), (mine, our_shape) = pytree.tree_flatten(theirs), pytree.tree_flatten(ours)
    if str(shape) != str(our_shape):
        return f"structure {our_shape}, eager {shape}"
    for k, (x, y) in enumerate(zip(eager, mine, strict=True)):
        if not isinstance(x, torch.Tensor):
            if x != y and x == x:
                return f"leaf {k}: {y!r}, eager {x!r}"
            continue
        for name in ("dtype", "shape"):
            if getattr(x, name) != getattr(y, name):
                return f"leaf {k}: {name} {getattr(y, name)}, eager {getattr(x, name)}"
        if strides and x.stride() != y.stride() and x.numel():
            return f"leaf {k}: strides {y.stride()}, eager {x.stride()}"
        if values and not close(x.detach(), y.detach()):
            return f"leaf {k}: {y.detach().flatten()[:8]}, eager {x.detach().flatten()[:8]}"
    return ""


def close(eager: torch.Tensor, ours: torch.Tensor) -> bool:
    if not eager.dtype.is_floating_point:
        return torch.equal(eager, ours)
    ordinary = eager[eager.abs() < 1e4].abs().double()
    typical = max(1.0, ordinary.max().item() if ordinary.numel() else 0.0)
    a, b = eager.double(), ours.double()
    narrow = {torch.bfloat16: 2.0**16, torch.float16: 2.0**13}.get(eager.dtype, 1.0)
    most = TOLERANCE * narrow * torch.clamp(a.abs(), min=typical)
    same = (a == b) | ((a - b).abs() <= most) | (a.isnan() & b.isnan())
    return bool(same.all())


@contextmanager
def torch_as_it_is() -> Iterator[None]:
    """Put back what importing torch's own tests changes in torch: the calls of scripted functions,
    and whether flags of backends may be set."""
    kinds = torch._C.ScriptFunction, torch._C.ScriptMethod
    calls = [kind.__call__ for kind in kinds]
    try:
        yield
    finally:
        for kind, call in zip(kinds, calls, strict=True):
            kind.__call__ = call
        # the module's own variable: `torch.backends` stands for the module, and keeps what is set
        torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True


def operators() -> dict[str, object]:
    """torch's database of operators, by name."""
    with torch_as_it_is():
        from torch.testing._internal.common_methods_invocations import op_db
    return {f"{e.name}.{e.variant_test_name}".rstrip("."): e for e in op_db}


WORST = ("wrong", "error", "refused", "pass", "none")


def outcome_of(entry: object, backend: str = "numpy", dtype: torch.dtype | None = None) -> Outcome:
    """The worst that becomes of an entry's samples, of a dtype."""
    further, dtype = dtype is not None, dtype or dtype_of(entry)
    if dtype is None or dtype not in entry.dtypes:
        return Outcome("none", "no dtype")
    try:
        chosen = list(cases(entry, dtype))
    except Exception as error:
        return Outcome("none", f"samples: {type(error).__name__}: {error}")
    loose = entry.name in UNINITIALIZED
    ties = further and dtype is not torch.float64 and entry.name in TIES
    return worst(outcome(case, backend=backend, uninitialized=loose, ties=ties) for case in chosen)


def worst(found: Iterable[Outcome]) -> Outcome:
    return min(found, key=lambda o: WORST.index(o.kind), default=Outcome("none", "no samples"))


# --- modules -----------------------------------------------------------------------------------


def modules() -> dict[str, object]:
    """torch's database of modules, by name."""
    with torch_as_it_is():
        from torch.testing._internal.common_modules import module_db
    return {entry.name: entry for entry in module_db}


def module_cases(entry: object) -> Iterator[Case]:
    """Some of a module's samples, in training and not."""
    torch.manual_seed(5)
    for training in (True, False):
        given = entry.module_inputs_func(
            entry, device="cpu", dtype=torch.float32, requires_grad=True, training=training
        )
        made = []
        for sample in given:
            if sample.forward_input is None:
                continue
            new, called = sample.constructor_input, sample.forward_input
            module = entry.module_cls(*new.args, **new.kwargs).train(training)
            made.append(Case(_called, (module, *called.args), called.kwargs))
        last = len(made) - 1
        yield from (made[k] for k in sorted({round(k * last / 3) for k in range(4)}) if made)


def _called(module: torch.nn.Module, *args: object, **kwargs: object) -> object:
    return module(*args, **kwargs)


def outcome_of_module(entry: object, backend: str = "numpy") -> Outcome:
    """The worst that becomes of a module's samples."""
    return worst(outcome(case, backend=backend) for case in module_cases(entry))
