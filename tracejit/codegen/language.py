"""What a printer knows of its language: a frozen record of types, literals, templates and layout.

In: dtypes, numbers, primitives. Out: their texts. A language is one `Language`, which stands beside
its printer: `c_text.C`, `triton_text.TRITON`. Making one checks that its table has an entry for
every primitive that is printed, and for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from tracejit.errors import InvalidGraph
from tracejit.ir.ops import OPS, Op
from tracejit.ir.types import DType
from tracejit.records import dataclass

Template = str | Mapping[str, str]

# The primitives that a statement computes; the others become indices, stages and matmul kernels.
PRINTED = frozenset(n for n, op in OPS.items() if op.family == "elementwise") | {"full"}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a program and the user's line that it computes."""

    text: str
    where: str = ""


@dataclass(frozen=True)
class Language:
    """One language.

    `type_of` is the type that values of a dtype are computed in; `literal` prints a number of a
    dtype (`typed` where the text alone must tell its type), `rounded` a result as a value of a
    dtype, rounded to what the dtype holds; `true` is a condition that holds.
    """

    name: str
    templates: Mapping[str, Template]
    type_of: Callable[[DType], str]
    literal: Callable[[object, DType, bool], str]
    rounded: Callable[[str, DType], str]
    true: str
    margin: str  # of one level of a block
    remark: str  # starts a comment
    remark_column: int  # the widest line that still moves all comments to its right

    def __post_init__(self) -> None:
        if wrong := self.templates.keys() ^ PRINTED:
            raise InvalidGraph(reason=f"the {self.name} table and OPS differ: {sorted(wrong)}")

    def template(self, op: Op, dtype: DType, out: DType) -> str:
        """How an op prints for operands of a dtype and a result of dtype `out`."""
        template = self.templates[op.name]
        if isinstance(template, str):
            return template
        kind = dtype.kind
        pairs = (f"{dtype.name} to {out.name}", f"{kind} to {out.name}")
        for known in (*pairs, kind, *("i" if kind in "ub" else ""), "f"):
            if known in template:
                return template[known]
        raise InvalidGraph(reason=f"{op.name} has no {self.name} template for {dtype}")

    def indent(self, lines: Iterable[Line]) -> list[Line]:
        """Lines one block deeper."""
        return [Line(self.margin + x.text if x.text else "", x.where) for x in lines]

    def render(self, lines: Sequence[Line]) -> str:
        """Text with the users' lines as aligned comments."""
        width = min(max((len(x.text) for x in lines if x.where), default=0), self.remark_column)
        return "\n".join(
            f"{x.text:<{width}}  {self.remark} {comment(x.where)}" if x.where else x.text
            for x in lines
        )


def comment(text: str) -> str:
    """Text that cannot end a comment, nor continue its line."""
    return text.replace("\\", "/").replace("*/", "* /").replace("\n", " ")


def strip(text: str) -> str:
    """Text without a pair of parentheses around all of it."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for position, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0 and position + 1 < len(text):
            return text
    return text[1:-1]


def grouped(text: str) -> str:
    """Text as one operand."""
    return f"({text})" if " " in text else text
