"""What ran during a trace: every code object, and every C function that is not known to be pure.

A replay does not run the step's Python. That is right only if running it again could do nothing
else. So a trace from which a replay may be armed runs under a profiler. Each function that it sees
must be user code (`heap.py` accounts for that), or be listed in `pure.py`: an unknown one keeps the
step in rerun. A function that asks for a setting of the process is guarded (`settings.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType

import torch

from tracejit.capture.effects.hyperparameters import Hyperparameters
from tracejit.capture.proof import settings
from tracejit.capture.proof.asked import noted
from tracejit.capture.proof.pure import (
    BY_NAME,
    READ_ALL,
    UNASKED_MODULES,
    pure_c,
    pure_python,
    pure_torch,
    remedy,
    unasked,
    within,
)
from tracejit.capture.proof.repeat import may_repeat
from tracejit.capture.proof.settings import Setting
from tracejit.capture.python import profiler
from tracejit.capture.python.bytecode import dynamic
from tracejit.capture.python.doubts import Passed
from tracejit.capture.python.generators import elsewhere
from tracejit.capture.python.origins import belongs, origin

# Where users put functions of their own in place of torch's.
_PATCHED = ("torch.nn", "torch.optim", "torch.functional")
_TENSOR = vars(torch.Tensor)
_C_NAMES = (vars(torch), vars(torch.nn.functional))


class Seen:
    """What a trace ran: code objects with the names of their modules, and why not to replay it."""

    def __init__(self) -> None:
        self.codes: dict[CodeType, str] = {}
        self.refusals: list[str] = []
        self.of_schedulers: set[str] = set()  # the attributes that it has asked for
        self.passed = Passed()  # which of the lines that are doubtful ran
        self.unasked: list[str] = []  # calls of C that would take a runtime scalar for a constant
        self.settings: dict[str, Setting] = {}  # of the process, that it asks for
        self.unrepeatable: list[str] = []  # what it called and may not be called once more
        self.computes_names = False  # it reaches attributes by names that it does not spell out
        # names of torch under which functions that it ran may be found, per id of their namespace
        self.places: dict[int, tuple[Mapping[str, object], set[str]]] = {}
        self._calls: set[tuple] = set()
        # by the ids of codes: hashing one costs as much as a call
        self._impure: dict[int, CodeType] = {}  # already refused, with all that they call
        self._noted: dict[int, CodeType] = {}  # of which nothing more is to be noted
        self._sure: dict[int, CodeType] = {}  # without doubtful lines
        self._ignoring: FrameType | None = None  # a call that a replay makes again

    def names(self) -> frozenset[str] | None:
        """Every name that the code could reach an attribute by; None: any name."""
        if self.computes_names:
            return None
        found: set[str] = set()
        for code in self.codes:
            found.update(code.co_names)
            pending = list(code.co_consts)
            while pending:
                constant = pending.pop()
                if type(constant) is str and constant.isidentifier():
                    found.add(constant)
                elif type(constant) is tuple:  # the attributes of a class pattern
                    pending += constant
        return frozenset(found)

    def covers(self, other: Seen) -> bool:
        """Whether `other` names nothing that this does not."""
        for i, (_, names) in other.places.items():
            if i not in self.places or not names <= self.places[i][1]:
                return False
        if not other.settings.keys() <= self.settings.keys():
            return False
        if not other.of_schedulers <= self.of_schedulers:
            return False
        if any(origin(code) == "user" and code not in self.codes for code in other.codes):
            return False  # whose globals were not looked at
        return self.computes_names or (not other.computes_names and other.names() <= self.names())

    def joined(self, other: Seen) -> Seen:
        """All that either has run, `other` later."""
        both = Seen()
        both.codes = self.codes | other.codes
        both.computes_names = other.computes_names
        both.settings = self.settings | other.settings
        both.of_schedulers = self.of_schedulers | other.of_schedulers
        for holder, names in (*self.places.values(), *other.places.values()):
            both.places.setdefault(id(holder), (holder, set()))[1].update(names)
        return both

    def note_of_scheduler(self, name: str, left: FrameType | None) -> None:
        """An attribute of a scheduler is asked for, perhaps by a call that a replay makes again;
        `left`: by which frame, where such a call has left it."""
        if self._ignoring is not None:
            return
        self.of_schedulers.add(name)
        text = (
            f"it reads {name} of a scheduler that it has stepped: read it before, or outside of it"
        )
        text = f"{_user_line(left)}{text}"
        if left is not None and text not in self.refusals:
            self.refusals.append(text)

    def profile(self, frame: FrameType, event: str, arg: object) -> None:
        """The profiler; see `sys.setprofile`."""
        passed = self.passed
        if passed.outermost is not None:
            if event == "return" and frame is passed.outermost:
                passed.leave()
        elif event == "call" and id(frame.f_code) not in self._sure and not passed.enter(frame):
            self._sure[id(frame.f_code)] = frame.f_code
        if self._ignoring is not None:
            if event == "return" and frame is self._ignoring:
                self._ignoring = None
            return
        if event == "call":
            code = frame.f_code
            if id(code) in self._noted:
                return
            if code in AGAIN:
                self._ignoring = frame
                return
            setting = settings.of_python(code)
            if setting is not None:
                self.settings[setting.text] = setting
            if setting is not None and setting.answers:
                self._ignoring = frame
            elif code not in self.codes:
                self._python(frame, code)
                if code in self.codes or origin(code) == "tracejit":
                    self._noted[id(code)] = code
        elif (
            event == "c_call"
            and origin(frame.f_code) != "tracejit"
            and id(frame.f_code) not in self._impure
        ):
            self._c(frame, arg)

    def _python(self, frame: FrameType, code: CodeType) -> None:
        module = frame.f_globals.get("__name__") or ""
        if code.co_filename == "<string>":  # made by dataclasses or namedtuple
            if module.startswith(("tracejit.", "torch.")):
                belongs(code, module.partition(".")[0])
            elif module.startswith("namedtuple_"):
                module = "collections"
                belongs(code, "stdlib")
        whose = origin(code)
        if code is elsewhere.__code__:
            self._refuse(frame, *frame.f_locals["of"])
        if whose == "tracejit":
            return
        if whose == "stdlib" and _called_by_us(frame):
            return
        self.codes[code] = module
        if module in UNASKED_MODULES and not _called_by_us(frame):
            self.unasked.append(f"{_user_line(frame)}it calls {module}.{code.co_name}")
        if (whose == "user" or module in READ_ALL) and dynamic(code):
            self.computes_names = True
        if whose == "torch":
            if within(module, _PATCHED):
                self._place(frame.f_globals, code.co_name)
            elif module == torch._tensor.__name__:
                self._place(_TENSOR, code.co_name)
            known = pure_torch(module, code.co_name)
        else:
            known = whose == "user" or pure_python(module, code.co_qualname)
        if frame.f_back is not None and id(frame.f_back.f_code) in self._impure:
            self._impure[id(code)] = code
        elif not known and not _called_by_us(frame):
            self._impure[id(code)] = code
            self._refuse(frame.f_back, module, code.co_name)
            self._repeats(frame.f_back, module, code.co_name, None)

    def _c(self, frame: FrameType, function: object) -> None:
        owner = getattr(function, "__self__", None)
        by_user = origin(frame.f_code) == "user"
        if by_user and not self.computes_names and any(function is f for f in BY_NAME):
            spelled = function.__name__ in frame.f_code.co_names and not dynamic(frame.f_code)
            self.computes_names = not spelled
        key = (function.__name__, function.__module__, type(owner), by_user)
        if key in self._calls:
            return
        self._calls.add(key)
        if not by_user:  # what user code names is guarded where it is read
            for holder in _C_NAMES:
                if holder.get(function.__name__) is function:
                    self._place(holder, function.__name__)
        if called := unasked(function, owner):
            self.unasked.append(f"{_user_line(frame)}it calls {called}")
        for setting in settings.of_c(function, owner):
            self.settings[setting.text] = setting
        if not pure_c(function, owner, by_user) and not _called_by_us(frame):
            name = getattr(function, "__qualname__", function.__name__)
            module = function.__module__ or type(owner).__module__
            self._calls.discard(key)
            self._refuse(frame, module, name)
            self._repeats(frame, module, function.__name__, owner)

    def _place(self, holder: Mapping[str, object], name: str) -> None:
        if callable(holder.get(name)):
            self.places.setdefault(id(holder), (holder, set()))[1].add(name)

    def _refuse(self, frame: FrameType | None, module: str, name: str) -> None:
        what = f"{module}.{name}".removeprefix("builtins.")
        text = f"{_user_line(frame)}it calls {what}, which is not known to be pure"
        text += f": {remedy(module, name)}"
        if text not in self.refusals:
            self.refusals.append(text)

    def _repeats(self, frame: FrameType | None, module: str, name: str, owner: object) -> None:
        if not may_repeat(module, name, owner) and not _importing(frame):
            text = f"{_user_line(frame)}it calls {module}.{name}"
            if text not in self.unrepeatable:
                self.unrepeatable.append(text)


def _importing(frame: FrameType | None) -> bool:
    """Whether an import is going on, which happens only once anyway."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _user_line(frame: FrameType | None) -> str:
    while frame is not None and origin(frame.f_code) != "user":
        frame = frame.f_back
    return (
        "" if frame is None else f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}: "
    )


# a replay makes these calls again, on the real objects
AGAIN = frozenset({Hyperparameters.call_back.__code__, torch.random.manual_seed.__code__})


def _called_by_us(frame: FrameType) -> bool:
    """Whether tracejit called this, with no user code in between."""
    while frame is not None:
        whose = origin(frame.f_code)
        if whose == "tracejit":
            return True
        if whose == "user":
            return False
        frame = frame.f_back
    return False


@contextmanager
def watch(on: bool) -> Iterator[Seen | None]:
    """Collect what runs inside the block on this thread (None if `on` is false, or a profiler that
    cannot be called along is active)."""
    if not on or not profiler.is_free():
        yield None
        return
    seen = Seen()
    with noted(seen.note_of_scheduler), seen.passed.traced(), profiler.profiled(seen.profile):
        yield seen
