"""C as text: lines with the user's line beside them, literals, and types of values and memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tracejit.ir.ops.c_prelude import C_TYPES
from tracejit.ir.types import DType, bf16, f16, f64

COMMENT_COLUMN = 64  # the widest line that still moves all comments to its right


@dataclass(frozen=True, slots=True)
class Line:
    """One line of C and the user's line that it computes."""

    text: str
    where: str = ""


def block(head: str, body: Iterable[Line]) -> list[Line]:
    """`head { body }`, indented."""
    return [Line(f"{head} {{"), *indent(body), Line("}")]


def indent(lines: Iterable[Line]) -> list[Line]:
    """Lines one level deeper; preprocessor lines stay at the margin of their loop."""
    return [Line(f"  {line.text}" if line.text else "", line.where) for line in lines]


def render(lines: Sequence[Line]) -> str:
    """Text with the users' lines as aligned comments."""
    width = min(max((len(x.text) for x in lines if x.where), default=0), COMMENT_COLUMN)
    return "\n".join(
        f"{x.text:<{width}}  // {comment(x.where)}" if x.where else x.text for x in lines
    )


def comment(text: str) -> str:
    """Text that cannot end a comment, nor continue its line."""
    return text.replace("\\", "/").replace("*/", "* /").replace("\n", " ")


def value_type(dtype: DType) -> str:
    """The C type that values of a dtype are computed in."""
    return C_TYPES[dtype.name]


def memory_type(dtype: DType) -> str:
    """The C type of elements in memory."""
    return "uint16_t" if dtype.narrow else C_TYPES[dtype.name]


def literal(value: float, dtype: DType) -> str:
    """A number as a C constant of a dtype's value type."""
    if dtype.kind == "b":
        return "true" if value else "false"
    if dtype.kind in "iu":
        number = int(value)
        if number == -(1 << 63):
            return "INT64_MIN"
        return f"INT64_C({number})" if abs(number) >= 1 << 31 else str(number)
    with np.errstate(over="ignore"):
        number = float(value) if dtype is f64 else float(np.float32(value))
    if math.isnan(number):
        return "NAN" if dtype is not f64 else "(double)NAN"
    if math.isinf(number):
        return "INFINITY" if number > 0 else "-INFINITY"
    if dtype is f64:
        return repr(number)
    text = str(np.float32(value))
    return text + ("f" if "." in text or "e" in text else ".0f")


def loaded(text: str, dtype: DType) -> str:
    """An element of memory as a value."""
    return f"tj_load_{dtype.name}({text})" if dtype.narrow else text


def stored(text: str, dtype: DType) -> str:
    """A value of `dtype` as an element of memory."""
    return f"tj_store_{dtype.name}({text})" if dtype.narrow else text


def rounded(text: str, dtype: DType) -> str:
    """A result in the value type, rounded to what the dtype holds."""
    return f"tj_round_{dtype.name}({strip(text)})" if dtype in (bf16, f16) else text


def strip(text: str) -> str:
    """Without a pair of parentheses around the whole."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and i + 1 < len(text):
            return text
    return text[1:-1]


def product(sizes: Iterable[int]) -> int:
    """The product of sizes."""
    return math.prod(sizes)
