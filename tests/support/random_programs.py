"""Random training-step programs: seed in, a runnable Python source text out.

A program is written statement by statement while it runs in eager, so that every statement is valid
where it stands: shapes, dtypes, gradients and values (finite, moderate) are known, not guessed. One
program in twenty ends in a statement that eager rejects. `random_check.py` compares and shrinks.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import torch

from support.random_expressions import (
    BINARY,
    BOOLEAN,
    COMPARE,
    INPLACE,
    INTEGER,
    REDUCE,
    SCAN,
    UNARY,
)
from support.random_text import PREAMBLE, Program

LARGEST = 30.0  # no value may exceed this: sums of products stay far from overflow
SIZES = (1, 2, 3, 4, 5, 5, 7, 7, 8, 33)
NO_GRAD = "with torch.no_grad():\n        "
F32, F64, BF16, I64, BOOL = torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool


def generate(seed: int) -> Program:
    """The program of a seed."""
    return Writer(seed).program()


def spelled(shape) -> str:
    return ", ".join(map(str, shape))


def broadcasts(a, b) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a), reversed(b), strict=False))


class Writer:
    """Writes one program; what it has so far has run in `names`."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.dtype = self.rng.choice((F32, F32, F32, F32, F64, BF16))
        self.mixed = self.rng.random() < 0.15
        self.sizes = tuple(self.rng.choice(SIZES) for _ in range(3)) + (1,)
        if self.rng.random() < 0.06:
            self.sizes += (0,)
        self.args: list[str] = []
        self.body: list[str] = []
        self.count = 0
        self.outside = False
        self.start()

    def start(self) -> None:
        """Forget all values, and run what there is from the start."""
        self.names: dict[str, object] = {"cast": torch.Tensor.to, "s": 0.5}
        exec(PREAMBLE, self.names)
        for line in self.args + self.body:
            exec(re.sub(r"\n\s+", "\n    ", line), self.names)

    # ---- choosing

    def maybe(self, p: float) -> bool:
        return self.rng.random() < p

    def tensors(self) -> list[str]:
        return [k for k, v in self.names.items() if isinstance(v, torch.Tensor)]

    def pick(self, accepts: Callable[[torch.Tensor], bool]) -> str | None:
        """A tensor, more often one that nothing has read yet."""
        found = [n for n in self.tensors() if accepts(self.names[n])]
        if not found:
            return None
        new = self.unread(found)
        return self.rng.choice(new[-3:] if new and self.maybe(0.6) else found)

    def unread(self, names: list[str]) -> list[str]:
        """Those of the names that no statement reads."""
        read = {w for line in self.body for w in re.findall(r"\w+", line.split(" = ", 1)[-1])}
        return [n for n in names if n not in read]

    def floating(self, minimum_rank: int = 0) -> str | None:
        return self.pick(lambda t: t.is_floating_point() and t.ndim >= minimum_rank)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return tuple(self.names[name].shape)

    def new_shape(self) -> tuple[int, ...]:
        rank = self.rng.choice((0, 1, 2, 2, 2, 3))
        return tuple(self.rng.choice(self.sizes) for _ in range(rank))

    def partner(self, x: str, into: bool = False) -> str:
        """A floating-point tensor that broadcasts with x (or to x); a new argument if need be."""
        shape = self.shape_of(x)

        def accepts(t: torch.Tensor) -> bool:
            if not t.is_floating_point() or not broadcasts(shape, t.shape):
                return False
            return torch.broadcast_shapes(shape, t.shape) == shape if into else True

        name = self.pick(accepts) if self.maybe(0.85) else None
        if name is None:
            kept = tuple(1 if self.maybe(0.2) else n for n in shape)
            name = self.argument(kept[self.rng.choice((0, 0, min(1, len(kept)))) :])
        return name

    # ---- arguments

    def argument(self, shape: tuple[int, ...], parameter: bool | None = None) -> str:
        parameter = self.maybe(0.4) if parameter is None else parameter
        name = f"{'w' if parameter else 'x'}{len(self.args)}"
        seed = self.rng.randrange(1000)
        dtype = self.dtype
        if self.mixed and self.maybe(0.4):
            dtype = self.rng.choice((F32, F64) if self.dtype is not BF16 else (F32, BF16))
        rank, kind = len(shape), self.rng.random()
        if parameter or kind < 0.7 or not rank:
            text = f"randn({spelled((seed, *shape))})"
        elif kind < 0.8:
            order = self.rng.sample(range(rank), rank)
            stored = tuple(shape[order.index(k)] for k in range(rank))
            text = f"randn({spelled((seed, *stored))}).permute({spelled(order)})"
        elif kind < 0.9:
            text = f"randn({spelled((seed, *shape[:-1], shape[-1] * 2 + 1))})[..., 1::2]"
        else:
            text = f"randn({spelled((seed, shape[0] + 2, *shape[1:]))})[1:-1]"
        text = f"cast({text}, {dtype})"
        return self.add_argument(f"{name} = {text}{'.requires_grad_()' if parameter else ''}")

    def add_argument(self, line: str) -> str:
        self.args.append(line)
        exec(line, self.names)
        return line.split(" = ")[0]

    def integer(self, high: int, shape: tuple[int, ...], name: str = "i") -> str:
        """An int64 argument; those named i are indices, which no statement writes to."""
        seed = self.rng.randrange(1000)
        line = f"{name}{len(self.args)} = integers({spelled((seed, max(high, 1), *shape))})"
        return self.add_argument(line)

    def alias(self) -> None:
        of = self.pick(lambda t: t.is_floating_point())
        form = "{}" if not self.names[of].requires_grad or self.maybe(0.5) else "{}.detach()"
        self.add_argument(f"y{len(self.args)} = {form.format(of)}")

    # ---- statements

    def assign(self, expression: str | None) -> str | None:
        if expression is None:
            return None
        self.count += 1
        text = f"t{self.count} = {expression}"
        return NO_GRAD + text if self.maybe(0.03) else text

    def unary(self):
        x = self.floating()
        return x and self.assign(self.rng.choice(UNARY).format(x=x))

    def binary(self):
        x = self.floating()
        return x and self.assign(self.rng.choice(BINARY).format(x=x, y=self.partner(x)))

    def compare(self):
        x = self.floating()
        y = self.rng.choice(("0", "0.5")) if self.maybe(0.4) else self.partner(x)
        return self.assign(self.rng.choice(COMPARE).format(x=x, y=y))

    def integers_and_booleans(self):
        kind, forms = self.rng.choice(((I64, INTEGER), (BOOL, BOOLEAN)))
        x = self.pick(lambda t: t.dtype is kind)
        if x is None:
            if kind is BOOL:
                return self.compare()
            x = self.integer(9, self.new_shape(), "n")
        shape = self.shape_of(x)
        y = self.pick(lambda t: t.dtype is kind and broadcasts(shape, t.shape))
        if self.maybe(0.15):
            axis = self.rng.randrange(len(shape)) if shape else 0
            op = self.rng.choice(("sum", "cumsum", "amax", "flip", "argmax"))
            return self.assign(f"{x}.{op}({axis})")
        if self.maybe(0.1):
            z = self.floating()
            return self.assign(f"{x} * {z}" if self.maybe(0.7) else f"{z} + {x}")
        return self.assign(self.rng.choice(forms).format(x=x, y=y))

    def where(self):
        m = self.pick(lambda t: t.dtype is BOOL)
        if m is None:
            return self.compare()
        shape = self.shape_of(m)
        x = self.pick(lambda t: t.is_floating_point() and broadcasts(shape, t.shape))
        if x is None:
            return None
        y = self.partner(x)
        forms = ("torch.where({m}, {x}, {y})", "{x}.masked_fill({m}, 0.5)", "{x} * {m}")
        forms += ("torch.where({m}, {x}, 0)", "{x}.where({m}, {y})", "torch.where({m}, 1.0, {x})")
        return self.assign(self.rng.choice(forms).format(m=m, x=x, y=y))

    def reduce(self):
        x = self.floating()
        shape, op = self.shape_of(x), self.rng.choice(REDUCE)
        axes = [k for k in range(len(shape)) if self.maybe(0.6)]
        keep = ", keepdim=True" if self.maybe(0.3) else ""
        if op == "logsumexp" and not axes:  # rejected by torch for some shapes
            return None
        if op in ("var", "std"):
            if not axes:  # torch's gradient over [] is wrong: it divides by one element's freedom
                return None
            correction = self.rng.choice(("", ", correction=0"))
            return self.assign(f"{x}.{op}({axes}{correction}{keep})")
        if op == "prod":
            axis = self.rng.choice((*range(len(shape)), None))
            return self.assign(f"{x}.prod()" if axis is None else f"{x}.prod({axis}{keep})")
        if op == "norm":
            return self.assign(f"({x}.square().sum({axes}{keep}) + 0.5).sqrt()")
        if op in ("sum", "mean") and not axes:
            return self.assign(f"{x}.{op}()")
        axis = axes[0] - len(shape) if len(axes) == 1 and self.maybe(0.5) else axes
        if op == "sum" and self.maybe(0.05):
            return self.assign(f"{x}.sum({axis}{keep}, dtype=torch.float64)")
        return self.assign(f"{x}.{op}({axis}{keep})")

    def extremum(self):
        x = self.floating()
        rank = len(self.shape_of(x))
        op, axis = self.rng.choice(("max", "min")), self.rng.randrange(-rank, rank) if rank else 0
        kind = self.rng.random()
        if kind < 0.3:
            return self.assign(f"{x}.{op}()")
        if kind < 0.5:
            return self.assign(f"{x}.arg{op}({axis})")
        if kind < 0.7:
            return self.assign(f"{x}.{op}({axis}).values")
        self.count += 2
        return f"t{self.count - 1}, t{self.count} = {x}.{op}({axis})"

    def scan(self):
        x = self.floating(1)
        if x is None:
            return None
        axis = self.rng.randrange(-len(self.shape_of(x)), len(self.shape_of(x)))
        return self.assign(self.rng.choice(SCAN).format(x=x, d=axis))

    def view_of(self, x: str) -> str:
        """An expression for a view of x (or a copy, where torch copies)."""
        shape, choice = self.shape_of(x), self.rng.choice
        rank = len(shape)
        if not rank:
            return x + choice((".unsqueeze(0)", ".expand(3)", ".view(1, 1)", ".reshape(1)"))
        axis = self.rng.randrange(rank)
        n = shape[axis]
        low, at = self.rng.randint(0, n), self.rng.randrange(-n, n) if n else 0
        front = ":, " * axis
        order = spelled(self.rng.sample(range(rank), rank))
        forms = [
            f"{x}.permute({order})",
            f"{x}.transpose({axis}, {self.rng.randrange(rank)})",
            f"{x}.unsqueeze({axis - choice((0, rank + 1))})",
            f"{x}[{front}{low}:]",
            f"{x}[{front}:{low}]",
            f"{x}[{front}::2]",
            f"{x}[{front}{min(1, n)}:{n}:{choice((1, 2, 3))}]",
            f"{x}.narrow({axis}, {low}, {self.rng.randint(0, n - low)})",
            f"{x}[{front}None]",
            f"{x}[..., None]",
            f"{x}.flatten()",
            f"{x}.reshape(-1)" if 0 not in shape else f"{x}.flatten(0, {axis})",
            f"{x}.view({spelled(self.refactored(shape))})",
            f"{x}.reshape({spelled(self.refactored(shape))})",
            f"{x}.squeeze()",
            f"{x}.squeeze({axis})",
            f"{x}.mT" if rank > 1 else f"{x}[None, :]",
            f"{x}.expand({spelled((choice((2, 3)), *shape))})",
            f"{x}.expand({spelled(choice((2, 3)) if m == 1 else m for m in shape)})",
            f"{x}.detach()",
            f"{x}.movedim({axis}, 0)",
        ]
        if n:
            parts = choice((2, 3))
            forms += [
                f"{x}[{front}{at}]",
                f"{x}.select({axis}, {at})",
                f"{x}.unbind({axis})[{at}]",
                f"{x}.chunk({parts}, {axis})[{choice((0, -1))}]",
                f"{x}.split({max(1, n // 2)}, {axis})[{choice((0, -1))}]",
                f"{x}.unflatten({axis}, (1, {n}))",
            ]
        if rank > 1:
            forms += [f"{x}.diagonal()", f"{x}.t()" if rank == 2 else f"{x}.transpose(0, 1)"]
        return choice(forms)

    def refactored(self, shape: tuple[int, ...]) -> list[int]:
        sizes = [m for n in shape for m in ((2, n // 2) if n and n % 2 == 0 else (n,))]
        while len(sizes) > 1 and self.maybe(0.6):
            k = self.rng.randrange(len(sizes) - 1)
            sizes[k : k + 2] = [sizes[k] * sizes[k + 1]]
        if self.maybe(0.3):
            sizes.insert(self.rng.randint(0, len(sizes)), 1)
        if 0 not in sizes and sizes and self.maybe(0.3):
            sizes[self.rng.randrange(len(sizes))] = -1
        return sizes

    def view(self):
        return self.assign(self.view_of(self.floating()))

    def copying_movement(self):
        x = self.floating()
        shape = self.shape_of(x)
        rank = len(shape)
        y = self.pick(lambda t: t.is_floating_point() and tuple(t.shape) == shape)
        axis = self.rng.randrange(rank) if rank else 0
        forms = [f"torch.stack([{x}, {y}], {axis})", f"torch.stack([{x}, {y}, {x}], -1)"]
        if rank:
            rest = (*shape[:axis], *shape[axis + 1 :])
            z = self.pick(
                lambda t: (
                    t.is_floating_point()
                    and t.ndim == rank
                    and (*t.shape[:axis], *t.shape[axis + 1 :]) == rest
                )
            )
            padded = 2 * self.rng.randint(1, rank)
            pads = spelled(self.rng.choice((0, 0, 1, 2)) for _ in range(padded))
            forms += [
                f"torch.cat([{x}, {z}], {axis})",
                f"torch.cat([{z}, {x}, {z}], {axis - rank})",
                f"{x}.flip({axis})",
                f"{x}.flip({list(range(rank))})",
                f"F.pad({x}, ({pads}))",
                f"F.pad({x}, ({pads}), value=0.5)",
                f"F.pad({x}, (-1, 1))",
                f"{x}.repeat({spelled(self.rng.choice((1, 2)) for _ in range(rank))})",
                f"{x}.repeat_interleave(2, {axis})",
                f"{x}.triu()" if rank > 1 else f"{x}.tile(2)",
                f"torch.tril({x}, -1)" if rank > 1 else f"torch.diag({x})",
            ]
        return self.assign(self.rng.choice(forms))

    def index(self):
        x = self.floating(1)
        if x is None:
            return None
        shape = self.shape_of(x)
        rank, axis = len(shape), self.rng.randrange(len(shape))
        count, n = self.rng.choice((1, 3, 5)), shape[axis]
        if not n:
            return None
        front = ":, " * axis
        kind = self.rng.randrange(7)
        if kind == 0:
            wide = [count if k == axis else self.rng.randint(0, m) for k, m in enumerate(shape)]
            return self.assign(f"{x}.gather({axis}, {self.integer(n, wide)})")
        if kind == 1:
            return self.assign(f"{x}.index_select({axis}, {self.integer(n, (count,))})")
        if kind == 2:
            if rank != 2:
                return None
            index = self.integer(shape[0], self.rng.choice(((count,), (2, count))))
            return self.assign(f"F.embedding({index}, {x})")
        if kind == 3:
            index = self.integer(n, self.rng.choice(((count,), (2, 2))))
            return self.assign(f"{x}[{front}{index}]")
        if kind == 4:
            picked = [self.rng.randrange(-n, n) for _ in range(count)]
            return self.assign(f"{x}[{front}{picked}]")
        if kind == 5 and rank > 1:
            rows, columns = self.integer(shape[0], (count,)), self.integer(shape[1], (count,))
            return self.assign(f"{x}[{rows}, {columns}]")
        index = self.integer(n, (*shape[:axis], count, *shape[axis + 1 :]))
        return self.assign(f"{x}.take_along_dim({index}, {axis})")

    def contraction(self):
        x = self.floating(1)
        if x is None:
            return None
        shape, new = self.shape_of(x), self.rng.choice(self.sizes)
        rank, k = len(shape), shape[-1]
        like = self.names[x].dtype

        def operand(*wanted: int) -> str:
            found = self.pick(lambda t: t.dtype is like and tuple(t.shape) == wanted)
            if found is None or self.maybe(0.4):
                before, self.dtype, self.mixed = (self.dtype, self.mixed), like, False
                found = self.argument(wanted, parameter=self.maybe(0.6))
                self.dtype, self.mixed = before
            return found

        kind = self.rng.randrange(6)
        if kind == 0 and rank == 3:
            text = f"torch.bmm({x}, {operand(shape[0], k, new)})"
        elif kind == 1:
            bias = f", {operand(new)}" if self.maybe(0.5) else ""
            text = f"F.linear({x}, {operand(new, k)}{bias})"
        elif kind == 2 and rank == 2:
            form = self.rng.choice(("ik", "ki", "i", "jk", "ijk"))
            text = f'torch.einsum("ij,kj->{form}", {x}, {operand(new, k)})'
        elif kind == 3 and rank == 2:
            text = f"torch.addmm({operand(new)}, {x}, {operand(k, new)}, alpha=0.5)"
        elif kind == 4 and rank == 2:
            text = f"{x} @ {x}.t()" if self.maybe(0.5) else f"{x}.t() @ {x}"
        else:
            text = f"{x} @ {operand(k, new) if self.maybe(0.8) else operand(k)}"
        return self.assign(f"({text}) * 0.25" if self.maybe(0.5) else text)

    def inplace(self):
        t = self.floating()
        if self.maybe(0.7):  # mostly not a leaf that requires grad
            t = self.pick(lambda v: v.is_floating_point() and not (v.is_leaf and v.requires_grad))
        if t is None:
            return None
        wrap = NO_GRAD if self.maybe(0.35) or self.names[t].is_leaf else ""
        target = t
        if self.maybe(0.4):
            target = self.view_of(t)
            if ".expand(" in target or ".detach()" in target:
                target = t
        try:
            into = eval(target, self.names)
        except (RuntimeError, IndexError):
            return None
        if 0 in into.stride():  # torch fills expanded tensors, with a warning
            return None
        shape = tuple(into.shape)

        def fits(v: torch.Tensor) -> bool:
            if not v.is_floating_point() or not broadcasts(shape, v.shape):
                return False
            return torch.broadcast_shapes(shape, v.shape) == shape

        y = self.pick(fits) or "0.25"
        form = self.rng.choice(INPLACE)
        if y == "0.25" and ("{y}" in form and ("{y}." in form or "{y} " in form or "(c" in form)):
            form = "{t}.mul_(0.5)"
        if target != t and not target.endswith("]") and re.match(r"\{t\}(\.data)? .?=", form):
            form = "{t}.add_({y})"
        return wrap + form.format(t=target, y=y)

    def integer_write(self):
        x = self.pick(lambda t: t.dtype in (I64, BOOL) and t.ndim > 0)
        if x is None or x[0] == "i":
            return None
        forms = ("{x}[0] = 1", "{x}.add_(1)", "{x}[{x} > 2] = 0", "{x}.fill_(1)", "{x}[1:] += 1")
        return self.rng.choice(forms).format(x=x)

    def leaf(self):
        x = self.floating()
        kind = self.rng.random()
        if kind < 0.5:
            return self.assign(f"{x}.detach().clone().requires_grad_()")
        return self.assign(f"{x}.detach()" if kind < 0.8 else f"{x}.data")

    # ---- gradients

    def leaves(self) -> list[str]:
        named = self.names
        return [n for n in self.tensors() if named[n].is_leaf and named[n].requires_grad]

    def loss(self) -> str | None:
        x = self.pick(lambda t: t.is_floating_point() and t.requires_grad)
        if x is None:
            return None
        y = self.pick(lambda t: t.is_floating_point() and t.requires_grad)
        forms = ("{x}.sum()", "{x}.mean()", "({x} ** 2).mean()", "({x} * {x}).sum()")
        forms += ("{x}.sum() + {y}.mean()", "({x} - 0.5).square().mean()", "{x}.tanh().sum()")
        return self.rng.choice(forms).format(x=x, y=y)

    def backward(self):
        loss = self.loss()
        if loss is None:
            return None
        leaves = self.leaves()
        kind = self.rng.random()
        if kind < 0.25 and leaves:
            chosen = sorted(set(self.rng.choices(leaves, k=self.rng.choice((1, 2)))))
            first, self.count = self.count + 1, self.count + len(chosen)
            names = ", ".join(f"t{first + k}" for k in range(len(chosen)))
            extra = self.rng.choice(("", "", ", create_graph=True", ", retain_graph=True"))
            return f"{names}, = torch.autograd.grad({loss}, [{', '.join(chosen)}]{extra})"
        if kind < 0.4:
            extra = self.rng.choice(("retain_graph=True", "create_graph=True"))
            return f"({loss}).backward({extra})"
        return f"({loss}).backward()"

    def update(self):
        w = self.pick(lambda t: t.is_leaf and t.requires_grad and t.grad is not None)
        if w is None:
            return None
        forms = [f"{NO_GRAD}{w} -= 0.1 * {w}.grad", f"{w}.data.add_({w}.grad, alpha=-0.1)"]
        forms += [f"{NO_GRAD}{w}.sub_({w}.grad * s)", f"{NO_GRAD}{w}.copy_({w} - 0.1 * {w}.grad)"]
        forms += [f"{NO_GRAD}{w}.grad.mul_(0.5)", f"{w}.grad = None", f"{NO_GRAD}{w}.grad.zero_()"]
        forms += [f"{w}.data -= {w}.grad.data * 0.1", f"{NO_GRAD}{w}.addcmul_({w}.grad, {w}.grad)"]
        text = self.rng.choice(forms)
        return text if self.maybe(0.9) else self.assign(f"{w}.grad * 0.5")

    # ---- the program

    KINDS = (
        *["unary"] * 5 + ["binary"] * 7 + ["reduce"] * 4 + ["view"] * 6 + ["inplace"] * 6,
        *["contraction"] * 4 + ["copying_movement"] * 3 + ["index"] * 2 + ["where"] * 2,
        *["scan"] * 3 + ["extremum", "compare", "integers_and_booleans", "integer_write", "leaf"],
        *["backward"] * 1 + ["update"],
    )

    def program(self) -> Program:
        for _ in range(self.rng.choice((2, 2, 3))):
            self.argument(self.new_shape())
        if not self.leaves():
            self.argument(self.new_shape(), parameter=True)
        if self.maybe(0.15):
            self.alias()
        if self.maybe(0.15):
            w = self.rng.choice(self.leaves())
            self.try_out(self.rng.choice((f"{w}.grad = None", f"{w}.grad = torch.zeros_like({w})")))
        length, tries = self.rng.randint(3, 14), 0
        while len(self.body) < length and tries < 60:
            tries += 1
            text = getattr(self, self.rng.choice(self.KINDS))()
            if text is not None and not self.try_out(text) and self.rejected and self.maybe(0.02):
                self.body.append(text)
                return self.finished()
        self.outside = self.maybe(0.15)
        if not self.outside and self.maybe(0.8):
            for make in ("backward", "update", "update"):
                for _ in range(4):
                    text = getattr(self, make)()
                    if text is not None and self.try_out(text):
                        break
        return self.finished()

    def try_out(self, text: str) -> bool:
        """Run a statement and keep it if eager takes it and all values stay moderate."""
        self.rejected = False
        before = dict(self.names)
        try:
            exec(re.sub(r"\n\s+", "\n    ", text), self.names)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            self.rejected = not isinstance(error, TypeError)
            self.names = before
            return False
        self.body.append(text)
        try:
            if self.moderate():
                return True
        except RuntimeError:  # torch refuses to say anything of some views whose base was written
            pass
        self.body.pop()
        self.start()
        return False

    def moderate(self) -> bool:
        seen = [self.names[n] for n in self.tensors()]
        seen += [t.grad for t in seen if t.is_leaf and t.grad is not None]
        for t in seen:
            if t.numel() > 4000:
                return False
            if t.numel() and not bool((t.detach().double().abs() <= LARGEST).all()):
                return False
        return True

    def finished(self) -> Program:
        tensors = self.tensors()
        count = min(len(tensors), self.rng.choice((1, 2, 3)))
        recent = self.unread(tensors)[-5:] or tensors
        returns = list(dict.fromkeys(self.rng.choice(recent) for _ in range(count)))
        args = self.args
        if any(re.search(r"\bs\b", line) for line in self.body):
            args = [*args, "s = 0.5"]
        text = "\n".join([*args, *self.body])
        narrow = next((d for d in (BF16, F32) if str(d) in text), F64)
        outside = self.outside and self.reaches_a_parameter(returns)
        return Program(narrow, tuple(args), tuple(self.body), tuple(returns), outside)

    def reaches_a_parameter(self, returns: list[str]) -> bool:
        """Whether backward through each that is returned fills the .grad of some argument."""
        given = {id(self.names[line.split(" = ")[0]]) for line in self.args}

        def reaches(node) -> bool:
            if node is None:
                return False
            return id(getattr(node, "variable", None)) in given or any(
                reaches(parent) for parent, _ in node.next_functions
            )

        found = [self.names[name] for name in returns if self.names[name].requires_grad]
        return bool(found) and all(reaches(t.grad_fn) for t in found)
