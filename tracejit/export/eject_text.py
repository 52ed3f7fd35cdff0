"""The text of an ejected file around what is particular to a step, and helpers for lines."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
from collections.abc import Iterable, Iterator, Sequence

WIDE = 88  # columns of a line of Python


def quoted(text: str) -> str:
    """A string as a literal, in double quotes where it has none."""
    plain = repr(text)
    return f'"{plain[1:-1]}"' if plain[0] == "'" and '"' not in plain else plain


def local_name(name: str) -> str:
    """What a tensor is called in a call: of an optimizer's state, by parameter and kind."""
    of = re.fullmatch(r".*state\[(.+)\]\.(\w+)", name)
    return f"{of[1]}_{of[2]}" if of else name


def is_reserved(name: str) -> bool:
    """Whether the lines of a call may use a name for something of their own."""
    return (
        re.fullmatch(r"(out|h|read|draw|result|kernel)\d+|i|f32|work|space|table", name) is not None
    )


def names_of(source: str) -> set[str]:
    """What a module defines and imports at its top."""
    found: set[str] = set()
    for node in ast.parse(source).body:
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                found.add(node.name)
            case ast.Assign():
                found |= {t.id for t in node.targets if isinstance(t, ast.Name)}
            case ast.Import() | ast.ImportFrom():
                found |= {(a.asname or a.name).partition(".")[0] for a in node.names}
    return found


def identifier(name: str, taken: set[str]) -> str:
    """A name as an identifier that is not taken; it is then."""
    text = re.sub(r"\W+", "_", name).strip("_") or "x"
    text = f"_{text}" if text[0].isdigit() or keyword.iskeyword(text) else text
    while text in taken or is_reserved(text):
        text += "_"
    taken.add(text)
    return text


#: what the lines of a call name, besides what the kernels' part of the file defines
NAMED = {
    *("self", "state", "numbers", "torch", "ctypes", "math", "check", "within", "same"),
    *("abs", "float", "len", "range"),
    *(name for name in dir(builtins) if name[0].isupper()),
}


def indented(lines: Iterable[str], by: int) -> Iterator[str]:
    """Lines further to the right."""
    for line in lines:
        yield f"{' ' * by}{line}" if line else line


def listed(head: str, rows: Sequence[str], tail: str, by: int = 4) -> str:
    """Rows between a head and a tail, one per line."""
    if not rows:
        return head + tail.strip()
    return "\n".join([head, *(f"{' ' * by}{row}" for row in rows), tail])


SCRIPT = '''"""<<name>>, as tracejit compiled it: its kernels, and the order of their launches.

    python <<module>>.py              # three calls on numbers made up here; or on a state of
    python <<module>>.py state.pt     # yours: torch.save({name: tensor, …}, "state.pt")

    from <<module>> import Step
    step = Step(state)                # tensors by name, as STATE lists them; calls change them
    result = step(<<arguments>>)

It needs torch<<needs>>.
It is for the shapes that are asserted in the call. What a call returns has no history.
"""

<<imports>>

<<others>>

# name: (shape, dtype, whether it requires grad)
<<state>>
# those that have a gradient before a call: one of zeros where there is none
<<graded>>
# what calls read besides, and may change; those with a keyword can be given for one call
<<numbers>><<kinds>>

<<kernels>>


def check(tensor, name, shape, dtype, strides=None):
    """A tensor must be what the kernels were made for."""
    assert tensor.shape == shape, f"{name} has shape {tuple(tensor.shape)}, not {shape}"
    assert tensor.dtype is dtype, f"{name} is {tensor.dtype}, not {dtype}"
    right = tensor.is_contiguous() if strides is None else tensor.stride() == strides
    assert right, f"{name} has strides {tensor.stride()}"


def within(tensor, low, high, ignore, error, message):
    """Indices must be in their range: kernels read nothing outside."""
    outside = (tensor < low) | (tensor >= high)
    if ignore is not None:
        outside &= tensor != ignore
    if outside.any():
        raise error(message.replace("{value}", str(tensor[outside].flatten()[0].item())))


def same(a, b):
    """Whether two numbers are the same, of one type, NaN included."""
    return repr(a) == repr(b)


class Step:
    """The step and its state: `state`, tensors by name, and `numbers`."""

    def __init__(self, state):
        grads = {f"{name}.grad": name for name in STATE}
        given = {name: state[name] for name in state if name in STATE or name not in grads}
        assert given.keys() == STATE.keys(), sorted(given.keys() ^ STATE.keys())
        for name, (shape, dtype, *grad) in STATE.items():
            check(given[name], name, shape, dtype)
            given[name].requires_grad_(bool(grad))
        for name in state.keys() - given.keys():
            given[grads[name]].grad = state[name]
        self.state = state = given
        for name in WITH_GRADIENT:
            if state[name].grad is None:
                state[name].grad = torch.zeros_like(state[name])
        self.numbers = dict(NUMBERS)
<<fields>>

    @torch.no_grad()
<<signature>>
<<call>>


def made_up():
    """Arguments of a call."""
<<made_up>>


def made_up_state():
    """Weights by chance; what has no gradient is positive, as variances and data may be."""
    state = {}
    for name, (shape, dtype, *grad) in STATE.items():
        state[name] = torch.zeros(shape, dtype=dtype<<device>>)
        if dtype.is_floating_point and shape == ():
            state[name].fill_(1)  # a count of steps, a scale
        elif dtype.is_floating_point:
            state[name].normal_(0, 0.1)
            if not grad:
                state[name].abs_()
    return state


def main(path=None):
    """Three calls, on a state that is saved in a file, or on numbers made up here."""
    torch.manual_seed(0)
    step = Step(torch.load(path, weights_only=True) if path else made_up_state())
    for _ in range(3):
        print(step(**made_up()))


if __name__ == "__main__":
    main(*argv[1:])
'''
