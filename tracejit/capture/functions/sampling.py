"""Random tensors: rand, randn, randint, bernoulli, normal_, uniform_, multinomial, …

Each draws where eager does, in memory of the layout that eager's has, from the generator that eager
takes: `drawn` makes the numbers an input of the graph. What eager computes with them is nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from tracejit.capture.functions.assembly import joined
from tracejit.capture.functions.common import (
    by_rule,
    cast,
    common_shape,
    default_dtype,
    expand,
    literal,
    operand,
    size_args,
)
from tracejit.capture.functions.counted import counted, is_counted
from tracejit.capture.functions.derived import no_derivative, underived
from tracejit.capture.functions.factories import made, options_of
from tracejit.capture.functions.movement import preserved_strides
from tracejit.capture.functions.reparameterized import GAMMA
from tracejit.capture.functions.rows import emitted
from tracejit.capture.trace import bounds, cuts
from tracejit.capture.trace.draws import Called, Draw, Known, Sampled, default_generator
from tracejit.capture.trace.scalars import is_runtime, pinned, plain
from tracejit.capture.trace.sources import source_of
from tracejit.capture.trace.table import COMPARED, rule
from tracejit.capture.trace.tensor import TO_TORCH, Handle, Ints, TracedTensor, broadcast_shape
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value
from tracejit.ir.types import DType, Type, b1, contiguous_strides, f32, f64, i64

Tensor, Generator = torch.Tensor, torch.Generator
Number = int | float


def drawn(
    t: Trace,
    fill: str,
    type: Type,
    strides: Ints | None = None,
    generator: Generator | None = None,
    **named: Number,
) -> Value:
    """Numbers of a type, drawn now: an input of the graph. `fill` is the method of tensors that
    draws them, with its arguments by name; `strides` say in which order."""
    if generator is None:
        generator = default_generator(type.device)
    for name, x in named.items():
        if not isinstance(x, (int, float)):
            raise t.unsupported(f"The argument {name} has a rule for a number")
    if t.fast_random and is_counted(fill, type):
        key = drawn(t, "random_", Type(i64, (1,), type.device), None, generator)
        return counted(t, fill, type, key, (*named.values(),))
    operands = tuple([x.value if is_runtime(x) else plain(x) for x in named.values()])
    plain_strides = contiguous_strides(type.shape)
    strides = plain_strides if strides is None else strides
    event = Draw(fill, (*named,), operands, type, strides, t.draws.position(generator))
    numbers = [plain(x) for x in named.values()]
    return _done(t, event, generator, numbers, None if strides == plain_strides else strides)


def _done(
    t: Trace,
    event: Draw | Called,
    generator: object,
    numbers: list[Number],
    strides: Ints | None = None,
) -> Value:
    """Do an event now: what it draws is an input of the graph."""
    t.draws.do(event, numbers)
    value = t.b.param(event.type, strides)
    t.draws.values[len(t.draws.events) - 1] = value
    t.journal.found_draw(event, generator)
    return value


def number_drawn(
    t: Trace, module: str, name: str, whole: bool, names: tuple[str, ...], *numbers: Number
) -> TracedTensor:
    """A number that a function of `random` or `numpy.random` draws, in a tensor; `names` are those
    of its last arguments."""
    source = source_of(module, name, numbers)
    operands = tuple([x.value if is_runtime(x) else plain(x) for x in numbers])
    event = Called(name, whole, names, operands, t.draws.position(source))
    t.called(number_drawn, ())
    return t.fresh(_done(t, event, source, [plain(x) for x in numbers]))


COMPARED.add(number_drawn)


def like(h: Handle, dtype: DType | None = None) -> Type:
    """The type of what is drawn for each element of a tensor."""
    return Type(dtype or h.dtype, h.shape, h.device)


# ---- in place

# the arguments of the methods that fill a tensor, with their defaults
_METHODS = {
    "uniform_": {"from": 0.0, "to": 1.0},
    "normal_": {"mean": 0.0, "std": 1.0},
    "exponential_": {"lambd": 1.0},
    "log_normal_": {"mean": 1.0, "std": 2.0},
    "cauchy_": {"median": 0.0, "sigma": 1.0},
    "geometric_": {"p": None},
}


def written(t: Trace, self: Tensor, value: Value) -> Tensor:
    """A tensor that is filled with what was drawn."""
    t.write(t.lift(self), value)
    return self


def _filling(name: str, defaults: dict[str, Number | None]) -> Callable:
    """The rule of a method that fills a tensor with numbers of one distribution."""

    def method(
        t: Trace, self: Tensor, *args: Number, generator: Generator | None = None, **named: Number
    ) -> Tensor:
        given = dict(zip(defaults, args, strict=False)) | named
        if len(args) > len(defaults) or not given.keys() <= defaults.keys():
            raise TypeError(f"{name}() takes {', '.join(defaults)}")
        numbers = defaults | given
        if None in numbers.values():
            raise TypeError(f"{name}() needs {', '.join(defaults)}")
        h = t.lift(self)
        return written(t, self, drawn(t, name, like(h), h.strides, generator, **numbers))

    return method


for _name, _defaults in _METHODS.items():
    rule(getattr(Tensor, _name))(_filling(_name, _defaults))


@rule(Tensor.random_)
def random_(
    t: Trace, self: Tensor, *ends: int, generator: Generator | None = None, **named: int
) -> Tensor:
    """Integers: of the dtype's whole range, below an end, or between two."""
    names = ("from", "to") if len(ends) > 1 else ("to",)
    h = t.lift(self)
    numbers = dict(zip(names, ends, strict=False)) | named
    return written(t, self, drawn(t, "random_", like(h), h.strides, generator, **numbers))


def _bernoulli(
    t: Trace, of: Handle, p: object, strides: Ints, generator: Generator | None
) -> Value:
    """For each element of a tensor a one with probability p, a number or a tensor, else a zero."""
    if not isinstance(p, Tensor):
        return cast(t, drawn(t, "bernoulli_", like(of, b1), strides, generator, p=p), of.dtype)
    chances = t.lift(p)
    if not chances.dtype.is_float:
        raise t.unsupported("Probabilities that are no floats have no rule")
    if broadcast_shape([of.shape, chances.shape]) != of.shape:
        raise t.shape_error("the probabilities do not broadcast to the tensor's shape")
    wide = f64 if chances.dtype is f64 else f32
    reason = "Expected p_in >= 0 && p_in <= 1 to be true, but got false."
    bounds.between(t, p, 0.0, 1.0, t.shape_error(reason))
    numbers = drawn(t, "uniform_", like(of, wide), strides, generator)
    below = t.b.lt(numbers, expand(t, cast(t, t.read(chances), wide), of.shape))
    return t.unread(cast(t, below, of.dtype), t.read(chances))


@rule(Tensor.bernoulli_)
def bernoulli_(
    t: Trace, self: Tensor, p: object = 0.5, *, generator: Generator | None = None
) -> Tensor:
    h = t.lift(self)
    value = _bernoulli(t, h, p, h.strides, generator)
    if isinstance(p, Tensor) and t.grad_on:
        value = t.unread(value, t.read(h))
    return written(t, self, value)


@rule(torch.bernoulli, Tensor.bernoulli)
def bernoulli(
    t: Trace, input: Tensor, p: object = None, *, generator: Generator | None = None
) -> TracedTensor:
    """Ones with the probabilities in a tensor, or with one probability for all elements."""
    h = t.lift(input)
    strides = contiguous_strides(h.shape) if p is None else preserved_strides(h)
    if isinstance(p, Number):
        with t.untaped():
            value = t.b.alias(_bernoulli(t, h, p, strides, generator))
        undefined = no_derivative(t, "aten::bernoulli", "self")
        vjp = lambda b, cts, need: (undefined(),)  # noqa: E731
        return t.fresh(t.derive("bernoulli", (t.read(h),), value, vjp), strides)
    value = _bernoulli(t, h, input if p is None else p, strides, generator)
    return _constant_of(t, value, (input,), strides)


def _constant_of(
    t: Trace, value: Value, inputs: tuple[Tensor, ...], strides: Ints | None = None
) -> TracedTensor:
    """A new tensor that autograd knows as a function of inputs, with derivative zero."""
    for x in inputs:
        value = t.unread(value, t.read(t.lift(x)))
    return t.fresh(value, strides)


# ---- new ones


def _factory(fill: str, **numbers: Number) -> Callable:
    """rand, randn: of a size."""

    def factory(
        t: Trace, *size: object, generator: Generator | None = None, **options: object
    ) -> TracedTensor:
        shape = size_args(t, (options.pop("size"),) if "size" in options else size)
        o = options_of(t, options)
        if any(n < 0 for n in shape):
            raise t.shape_error(f"Trying to create tensor with negative dimension: {list(shape)}")
        type = Type(o.dtype or default_dtype(), shape, o.device)
        return made(t, drawn(t, fill, type, None, generator, **numbers), o.requires_grad)

    return factory


def _factory_like(fill: str, **numbers: Number) -> Callable:
    """rand_like, randn_like."""

    def factory(
        t: Trace, input: Tensor, *, generator: Generator | None = None, **options: object
    ) -> TracedTensor:
        h = t.lift(input)
        o = options_of(t, options, h)
        strides = None if o.packed else preserved_strides(h)
        type = Type(o.dtype, h.shape, o.device)
        value = drawn(t, fill, type, strides, generator, **numbers)
        return made(t, value, o.requires_grad, strides)

    return factory


rule(torch.rand)(_factory("uniform_", **{"from": 0.0, "to": 1.0}))
rule(torch.randn)(_factory("normal_", mean=0.0, std=1.0))
rule(torch.rand_like)(_factory_like("uniform_", **{"from": 0.0, "to": 1.0}))
rule(torch.randn_like)(_factory_like("normal_", mean=0.0, std=1.0))


def _integers(
    t: Trace, type: Type, strides: Ints | None, generator: Generator | None, ends: tuple
) -> Value:
    low, high = (0, *ends) if len(ends) == 1 else ends
    if high <= low:
        raise t.shape_error(f"random_ expects 'from' to be less than 'to', but got {low} >= {high}")
    value = drawn(t, "random_", type, strides, generator, **{"from": low, "to": high})
    if not (is_runtime(low) or is_runtime(high)) and not type.dtype.narrow:
        t.ranges[value] = low, high - 1
    return value


def _ends(*args: object, options: dict) -> tuple[tuple, tuple]:
    """The ends low and high, or high alone, among leading arguments and keywords; and the rest."""
    args = list(args)
    found = [options.pop("low")] if "low" in options else []
    while args and len(found) < 2 and not isinstance(args[0], (tuple, list)):
        found.append(args.pop(0))
    if "high" in options:
        found.append(options.pop("high"))
    return tuple(found), tuple(args)


@rule(torch.randint)
def randint(
    t: Trace, *args: object, generator: Generator | None = None, **options: object
) -> TracedTensor:
    """Integers below an end, or between two."""
    ends, size = _ends(*args, options=options)
    shape = size_args(t, (options.pop("size"),) if "size" in options else size)
    o = options_of(t, options)
    type = Type(o.dtype or i64, shape, o.device)
    return made(t, _integers(t, type, None, generator, ends), o.requires_grad)


@rule(torch.randint_like)
def randint_like(
    t: Trace,
    input: Tensor,
    *args: object,
    generator: Generator | None = None,
    **options: object,
) -> TracedTensor:
    ends, _ = _ends(*args, options=options)
    h = t.lift(input)
    o = options_of(t, options, h)
    strides = None if o.packed else preserved_strides(h)
    value = _integers(t, Type(o.dtype, h.shape, o.device), strides, generator, ends)
    return made(t, value, o.requires_grad, strides)


@rule(torch.randperm)
def randperm(
    t: Trace, n: int, *, generator: Generator | None = None, **options: object
) -> TracedTensor:
    """0, 1, … below n in some order."""
    o = options_of(t, options)
    n = int(n)
    value = drawn(t, "randperm", Type(o.dtype or i64, (n,), o.device), None, generator, n=n)
    t.ranges[value] = 0, max(n - 1, 0)
    return made(t, value, o.requires_grad)


@rule(torch.normal)
def normal(
    t: Trace,
    mean: object = 0.0,
    std: object = 1.0,
    size: object = None,
    *,
    generator: Generator | None = None,
    **options: object,
) -> TracedTensor:
    """Of means and deviations in tensors, or of one number each and a size."""
    tensors = tuple(x for x in (mean, std) if isinstance(x, Tensor))
    if not tensors:
        factory = _factory("normal_", mean=mean, std=std)
        return factory(t, size, generator=generator, **options)
    if size is not None or options.keys() - {"out"}:
        raise t.unsupported("Options beside tensors have no rule")
    first = t.lift(tensors[0])
    shape = common_shape(t, [operand(t, x) for x in tensors])
    deviation = 1.0
    if isinstance(std, Tensor):
        reason = "normal expects all elements of std >= 0.0"
        bounds.between(t, std, 0.0, math.inf, t.shape_error(reason))
    else:
        deviation = std
    type = Type(first.dtype, shape, first.device)
    value = drawn(t, "normal_", type, None, generator, mean=0.0, std=deviation)
    with t.untaped():
        if isinstance(std, Tensor):
            factor = cast(t, t.read(t.lift(std)), first.dtype)
            value = t.b.mul(value, expand(t, factor, shape))
        shift = literal(mean, first.dtype) if not isinstance(mean, Tensor) else None
        if shift is None:
            shift = expand(t, cast(t, t.read(t.lift(mean)), first.dtype), shape)
        value = t.b.add(value, shift)
    return _constant_of(t, value, tensors)


# ---- where the values decide how much is drawn


def sampled(t: Trace, input: Tensor, shape: Ints, search: Sampled) -> Value:
    """What torch draws from the values of a tensor: these are computed before."""
    with t.untaped():
        (flat,) = cuts.searched(t, t.read(t.lift(input)), search)
        return t.b.reshape(flat, shape=shape)


def sampling(
    t: Trace, h: Handle, draw: str, generator: Generator | None, *numbers: Number
) -> Sampled:
    """A search that draws from the values of a tensor."""
    generator = generator or default_generator(h.device)
    plain_ones = tuple(map(pinned, numbers))
    return Sampled(draw, plain_ones, Known(generator), t.draws.position(generator))


@rule(torch.multinomial, Tensor.multinomial)
def multinomial(
    t: Trace,
    input: Tensor,
    num_samples: int,
    replacement: bool = False,
    *,
    generator: Generator | None = None,
) -> TracedTensor:
    """Indices with the weights in a tensor's rows as probabilities."""
    h, n = t.lift(input), int(num_samples)
    if len(h.shape) not in (1, 2) or not h.dtype.is_float:
        raise t.shape_error("prob_dist must be 1 or 2 dim, of floats")
    if n <= 0 or (n > h.shape[-1] and not replacement):
        raise t.shape_error("cannot sample that many samples")
    shape = (*h.shape[:-1], n)
    if n > 1 or not h.numel:
        search = sampling(t, h, "multinomial", generator, n, replacement)
        search = replace(search, strides=tuple(preserved_strides(h)))
        value = sampled(t, input, shape, search)
        t.ranges[value] = 0, h.shape[-1] - 1
        return t.fresh(value)
    weights, last = t.read(h), len(h.shape) - 1
    with t.untaped(), t.unchecked():
        reason = "probability tensor contains either `inf`, `nan` or element < 0"
        bad = t.b.not_(t.b.and_(t.b.ge(weights, 0.0), t.b.lt(weights, math.inf)))
        bounds.require(t, bad, t.shape_error(reason))
        reason = "invalid multinomial distribution (sum of probabilities <= 0)"
        empty = t.b.eq(t.b.reduce_max(weights, axes=(last,)), 0.0)
        bounds.require(t, empty, t.shape_error(reason))
    strides = preserved_strides(h)
    numbers = drawn(t, "exponential_", like(h), strides, generator, lambd=1.0)
    with t.untaped():
        scores = t.fresh(t.b.div(weights, numbers))
    return by_rule(t, torch.argmax, scores, -1, True)


@rule(torch.poisson)
def poisson(t: Trace, input: Tensor, generator: Generator | None = None) -> TracedTensor:
    h = t.lift(input)
    value = sampled(t, input, h.shape, sampling(t, h, "poisson", generator))
    return _constant_of(t, value, (input,))


@rule(torch._standard_gamma)
def standard_gamma(t: Trace, input: Tensor, generator: Generator | None = None) -> TracedTensor:
    """Of shapes in a tensor, by which its samples have a derivative."""
    h = t.lift(input)
    alpha = t.read(h)
    value = sampled(t, input, h.shape, sampling(t, h, "_standard_gamma", generator))
    with t.untaped():
        out = t.b.alias(value)
    return t.fresh(
        t.derive(
            "_standard_gamma",
            (alpha,),
            out,
            lambda b, cts, need: (b.mul(cts[0], emitted(t, GAMMA, (alpha, out))),),
        )
    )


@rule(torch._sample_dirichlet)
def sample_dirichlet(t: Trace, input: Tensor, generator: Generator | None = None) -> TracedTensor:
    """Of concentrations in a tensor; torch.distributions has the derivative."""
    h = t.lift(input)
    value = sampled(t, input, h.shape, sampling(t, h, "_sample_dirichlet", generator))
    return t.fresh(underived(t, "_sample_dirichlet", (t.read(h),), value))


@rule(torch.binomial)
def binomial(
    t: Trace, count: Tensor, prob: Tensor, generator: Generator | None = None
) -> TracedTensor:
    """How many of so many trials succeed, of each element's probability."""
    n, p = t.lift(count), t.lift(prob)
    for h, name in ((n, "count"), (p, "prob")):
        if not h.dtype.is_float:
            raise ValueError(f"binomial only supports floating-point dtypes for {name}")
    if n.dtype is not p.dtype:
        raise t.shape_error(f"Found dtype {TO_TORCH[p.dtype]} but expected {TO_TORCH[n.dtype]}")
    if n.dtype not in (f32, f64):
        raise t.not_implemented("binomial_cpu", n.dtype)
    if t.grad_on and (t.requires_grad(n) or t.requires_grad(p)):
        raise t.no_derivative("aten::binomial")
    shape = common_shape(t, [operand(t, count), operand(t, prob)])
    with t.untaped():
        both = [t.b.reshape(expand(t, t.read(h), shape), shape=(1, *shape)) for h in (n, p)]
        value = joined(t, both, 0)
        (flat,) = cuts.searched(t, value, sampling(t, n, "binomial", generator))
        return t.fresh(t.b.reshape(flat, shape=shape))
