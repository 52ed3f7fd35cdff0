"""Random numbers of a step: what is drawn, in which order, from which generators.

A trace draws at once, by torch's own functions from torch's own generators. So its numbers are
eager's, and so is whatever stands between two draws: a seed, a state that is kept or set. The
numbers are inputs of the graph. A replay makes the same draws anew, in the same order, before its
plan runs (`run.py`); a followed trace makes them as it goes (`follow/`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import torch

from tracejit.capture.trace.posing import really
from tracejit.capture.trace.scalars import is_runtime, plain
from tracejit.capture.trace.sources import Source
from tracejit.capture.trace.tensor import TO_TORCH, Ints
from tracejit.ir.graph import Arg, Value
from tracejit.ir.types import Type, f64, i64
from tracejit.records import dataclass

Tensor, Generator = torch.Tensor, torch.Generator
Numbers = Sequence[float | int]


class Event(Protocol):
    """Something that a step does with a generator, the `generator`-th of those that it uses.
    `numbers` are its arguments: some are runtime scalars, which each call has other ones of."""

    generator: int
    numbers: tuple[Arg, ...]

    def prepared(self) -> Callable[..., Tensor | None]:
        """A function of the generator and the numbers that does it, again and again in the same
        memory."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Numbers are drawn by a method of tensors that fills one in place, in its memory's order."""

    fill: str  # "bernoulli_", …, or "randperm"
    names: tuple[str, ...]  # of its arguments
    numbers: tuple[Arg, ...]
    type: Type
    strides: Ints
    generator: int

    def buffer(self) -> Tensor:
        """Memory for the numbers."""
        t = self.type
        dtype = TO_TORCH[t.dtype]
        return torch.empty_strided(t.shape, self.strides, dtype=dtype, device=really(t.device))

    def prepared(self) -> Callable[..., Tensor]:
        if self.type.device != "cpu":  # a kernel on another stream may still read the last ones
            return lambda *given: self.filling(self.buffer())(*given)
        return self.filling(self.buffer())

    def filling(self, buffer: Tensor) -> Callable[..., Tensor]:
        """The function that does it in some memory."""
        if self.fill == "randperm":
            return lambda generator, n: torch.randperm(n, generator=generator, out=buffer)
        fill, names = getattr(buffer, self.fill), self.names

        def draw(generator: Generator, *numbers: float) -> Tensor:
            return fill(**dict(zip(names, numbers, strict=True)), generator=generator)

        return draw


@dataclass(frozen=True, slots=True)
class Called:
    """A number is drawn by a function of `random` or `numpy.random`, from the `Source` that is the
    generator."""

    function: str
    whole: bool  # an integer
    names: tuple[str, ...]  # of its last numbers, which are given by name
    numbers: tuple[Arg, ...]
    generator: int

    @property
    def type(self) -> Type:
        """Of the tensor that holds the number."""
        return Type(i64 if self.whole else f64, (), "cpu")

    def prepared(self) -> Callable[..., Tensor]:
        buffer = torch.empty((), dtype=TO_TORCH[self.type.dtype])
        function, names = self.function, self.names
        first = len(self.numbers) - len(names)

        def draw(generator: Source, *numbers: float) -> Tensor:
            named = dict(zip(names, numbers[first:], strict=True))
            return buffer.fill_(generator.functions[function](*numbers[:first], **named))

        return draw


@dataclass(frozen=True, slots=True)
class Together:
    """What some draws fill lies in one memory, row by row; see `effects/together.py`. It comes
    after all other events of a step, and does nothing with the generator itself."""

    rows: tuple[int, ...]  # the events
    type: Type
    strides: Ints
    generator: int
    numbers: tuple[Arg, ...] = ()

    def buffer(self) -> Tensor:
        """Memory for all rows."""
        t = self.type
        dtype = TO_TORCH[t.dtype]
        return torch.empty_strided(t.shape, self.strides, dtype=dtype, device=really(t.device))

    def prepared(self) -> Callable[..., Tensor]:
        """A function of all that a trace has drawn, by event, which puts the rows there."""

        def put_together(drawn: Sequence[Tensor]) -> Tensor:
            return torch.stack([drawn[k] for k in self.rows], out=self.buffer())

        return put_together


@dataclass(frozen=True, slots=True)
class Seed:
    """A generator is seeded by `torch.manual_seed`, which seeds those of all devices."""

    numbers: tuple[Arg, ...]
    generator: int

    def prepared(self) -> Callable[..., None]:
        def seed(generator: Generator, number: int) -> None:
            torch.manual_seed(number)

        return seed


@dataclass(frozen=True, slots=True)
class Keep:
    """The state of a generator is read, to be set again."""

    generator: int
    numbers: tuple[Arg, ...] = ()

    def prepared(self) -> Callable[..., Tensor]:
        return Generator.get_state


@dataclass(frozen=True, slots=True)
class Restore:
    """A generator is put back into the state that the `kept`-th event has read."""

    kept: int
    generator: int
    numbers: tuple[Arg, ...] = ()

    def prepared(self) -> Callable[..., None]:
        def restore(generator: Generator, state: Tensor) -> None:
            generator.set_state(state)

        return restore


@dataclass(frozen=True, slots=True)
class Known:
    """A generator, as it is told from others: by its identity."""

    generator: Generator

    def __repr__(self) -> str:
        return f"<generator {id(self.generator)}>"


@dataclass(frozen=True, slots=True)
class Sampled:
    """Numbers are drawn from the values of a tensor, by a function of torch: how many its generator
    gives depends on these. It is the search of a cut, which computes them (`cuts.py`).

    strides: of the values, where torch draws as they lie.
    """

    draw: str
    numbers: tuple[float | int, ...]
    known: Known
    generator: int
    strides: tuple[int, ...] | None = None
    remedy: ClassVar[str] = ""  # it always finds as much

    def __call__(self, value: Tensor) -> tuple[Tensor]:
        """What is drawn, in one row."""
        draw = FROM_VALUES.get(self.draw) or getattr(torch, self.draw)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if self.strides is not None and value.stride() != self.strides:
                value = value.new_empty_strided(value.shape, self.strides).copy_(value)
            found = draw(value, *self.numbers, generator=self.known.generator)
        return (found.reshape(-1),)

    def prepared(self) -> Callable[..., tuple[Tensor]]:
        return lambda generator, value: self(value)


def _slopes_of_rrelu(
    value: Tensor, lower: float, upper: float, generator: Generator | None = None
) -> Tensor:
    """The slopes that rrelu draws: one for each element that is not positive, else 1."""
    value = value.contiguous()
    slopes = torch.empty_like(value)
    torch._C._nn.rrelu_with_noise(value, slopes, lower, upper, True, generator)
    return slopes


def _packed_mask(
    sizes: Tensor, keep: float, sequences: int, width: int, generator: Generator | None = None
) -> Tensor:
    """The mask of dropout for the rows of a packed sequence with so many sequences in each step, at
    their places in [steps, sequences, width]."""
    rows = torch.empty(int(sizes.sum()), width, dtype=torch.bool)
    rows.bernoulli_(keep, generator=generator)
    mask = torch.zeros(len(sizes), sequences, width, dtype=torch.bool)
    mask[torch.arange(sequences) < sizes[:, None]] = rows
    return mask


def _binomial(value: Tensor, generator: Generator | None = None) -> Tensor:
    """Successes in value[0] trials of probability value[1]."""
    count, prob = value
    return torch.binomial(count, prob, generator=generator)


FROM_VALUES = {"rrelu": _slopes_of_rrelu, "packed_mask": _packed_mask, "binomial": _binomial}


class Draws:
    """What one trace does with generators, and the tensors that it has drawn.

    `again` holds what was given already, where rules run late for calls that were followed.
    """

    def __init__(self) -> None:
        self.generators: list[Generator | Source] = []
        self.events: list[Event] = []
        self.given: list[Tensor | None] = []  # per event
        self.values: dict[int, Value] = {}  # inputs of the graph, by event
        self.again: deque[Tensor | None] = deque()
        self._before: list[Tensor] = []  # the states of the generators, at their first use

    def position(self, generator: Generator | Source) -> int:
        """The position of a generator among those that are used."""
        for i, known in enumerate(self.generators):
            if known is generator:
                return i
        self.generators.append(generator)
        self._before.append(generator.get_state())
        return len(self.generators) - 1

    def do(self, event: Event, numbers: Numbers = ()) -> Tensor | None:
        """Do what is next in the trace."""
        generator = self.generators[event.generator]
        if self.again:
            given = self.again.popleft()
        elif type(event) is Seed:  # torch has seeded the other devices
            generator.manual_seed(*numbers)
            given = None
        else:
            if type(event) is Restore:
                numbers = [self.given[event.kept]]
            with torch._C.DisableTorchFunction(), torch.no_grad():
                given = event.prepared()(generator, *numbers)
        self.events.append(event)
        self.given.append(given)
        return given

    def start_over(self) -> None:
        """The rules run for what was done so far: nothing is done twice."""
        self.again.extend(self.given)
        self.events, self.given, self.values = [], [], {}

    def undo(self) -> None:
        """Put the generators back as they were before the trace."""
        states = zip(self.generators, self._before, strict=True)
        for generator, state in reversed([*states]):  # two sources may have one generator
            generator.set_state(state)


def default_generator(device: str) -> Generator:
    """The one that torch draws from for a device where none is given."""
    if not really(device).startswith("cuda"):
        return torch.default_generator
    torch.cuda.init()
    return torch.cuda.default_generators[torch.device(device).index]


def arguments(named: dict[str, object]) -> tuple[tuple[Arg, ...], list[float | int]]:
    """Numbers as operands of the graph, and as they are in this trace."""
    operands = tuple([x.value if is_runtime(x) else plain(x) for x in named.values()])
    return operands, [plain(x) for x in named.values()]
