"""What ran during a trace: every code object, and every C function that is not known to be pure.

A replay does not run the step's Python. That is right only if running it again could do nothing
else. So a trace from which a replay may be armed runs under a profiler. Each function that it sees
must be user code (`heap.py` accounts for that), Python code of a module listed here, or a C
function listed here. Pure functions are listed, not impure ones: an unknown function keeps the step
in rerun.
"""

from __future__ import annotations

import builtins
import os
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType, MappingProxyType, MethodType, ModuleType

import numpy as np
import torch

from tracejit.capture.effects.hyperparameters import Hyperparameters
from tracejit.capture.proof.repeat import may_repeat
from tracejit.capture.python import mathematics, profiler
from tracejit.capture.python.bytecode import dynamic
from tracejit.capture.python.classes import is_heap_type

_HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_NUMPY = os.path.dirname(os.path.abspath(np.__file__)) + os.sep
_STDLIB = os.path.dirname(os.__file__) + os.sep

PURE_BUILTINS = frozenset(
    getattr(builtins, name)
    for name in (
        *("range", "len", "zip", "enumerate", "abs", "min", "max", "sum", "tuple", "list"),
        *("dict", "set", "frozenset", "float", "int", "bool", "isinstance", "issubclass"),
        *("reversed", "sorted", "any", "all", "round", "slice", "map", "filter", "pow", "divmod"),
        *("iter", "next", "type", "str", "callable", "NotImplementedError", "ValueError", "repr"),
        *("TypeError", "RuntimeError", "AssertionError", "IndexError", "KeyError", "Exception"),
        *("AttributeError", "StopIteration", "NotImplemented", "super", "property", "bytes"),
        *("getattr", "hasattr", "setattr", "object", "format", "ord", "chr", "staticmethod"),
        *("classmethod", "ArithmeticError", "ZeroDivisionError", "LookupError", "Ellipsis"),
    )
)
# Whose methods compute, or change the container that they belong to (which the heap's check sees).
_PURE_RECEIVERS = (
    *(dict, list, tuple, set, frozenset, str, bytes, int, float, OrderedDict, defaultdict, deque),
    *(range, slice, type(None), type({}.keys()), type({}.values()), type({}.items())),
    *(torch.Tensor, torch.Size, torch.dtype, torch.device, type(_ for _ in ()), property),
    *(MappingProxyType, MethodType, FunctionType),
)
_PURE_MODULES = frozenset(
    {
        *("functools", "contextlib", "collections", "collections.abc", "_collections_abc", "abc"),
        *("typing", "enum", "dataclasses", "operator", "types", "numbers", "copy", "itertools"),
        *(
            "copyreg",
            "typing_extensions",
            "weakref",
            "_weakrefset",
            "keyword",
            "reprlib",
            "inspect",
        ),
    }
)
_READ_ALL = frozenset({"copy", "copyreg", "dataclasses"})  # of the objects given to them
_PURE_TORCH_MODULES = (
    *("torch", "torch._C", "torch._VF", "torch._classes", "torch._compile", "torch._dynamo"),
    *("torch._functorch.autograd_function", "torch._functorch.pyfunctorch"),
    *("torch._functorch.utils", "torch._higher_order_ops", "torch._jit_internal"),
    *("torch._linalg_utils", "torch._lowrank", "torch._namedtensor_internals", "torch._ops"),
    *(
        "torch._tensor",
        "torch._utils",
        "torch.accelerator",
        "torch.amp",
        "torch.autograd",
        "torch.backends",
    ),
    *("torch.compiler", "torch.cuda", "torch.functional", "torch.jit", "torch.nn", "torch.optim"),
    *("torch.overrides", "torch.profiler", "torch.return_types", "torch.types"),
    *("torch.utils._contextlib", "torch.utils._device", "torch.utils._foreach_utils"),
    *("torch.utils._python_dispatch", "torch.utils._pytree", "torch.utils.checkpoint"),
    "torch.utils.hooks",
)
_IMPURE_TORCH_MODULES = ("torch.nn.init", "torch.nn.parallel", "torch.cuda.random")
# C functions of these modules, by name.
_PURE_C = {
    "builtins": frozenset({f.__name__ for f in PURE_BUILTINS if callable(f)} | {"__build_class__"}),
    "functools": frozenset({"reduce"}),
    "_functools": frozenset({"reduce"}),
    "_operator": None,  # None: all of them
    "_abc": None,
    "math": None,
    "itertools": None,
    "_collections": None,
    "_thread": frozenset({"get_ident"}),
    "_weakref": frozenset({"proxy", "getweakrefcount"}),
    "sys": frozenset({"getrecursionlimit", "intern", "getsizeof", "_getframe"}),
}
_PURE_TYPE_METHODS = frozenset(
    {"mro", "__prepare__", "__new__", "__init__", "__call__", "fromkeys"}
)
# object's own methods, of instances of Python classes
_OBJECT_METHODS = frozenset(
    {
        *("__init__", "__new__", "__setattr__", "__getattribute__", "__init_subclass__"),
        *("__delattr__", "__format__", "__enter__", "__exit__", "__reduce_ex__"),
    }
)
_BY_NAME = (getattr, hasattr, setattr, delattr)
_LIBRARY_ONLY = frozenset(
    {*("id", "vars", "dir", "locals", "globals", "hash"), *("_getframe", "getsizeof", "get_ident")}
)
_IMPURE_TORCH_C = frozenset(
    {
        *("manual_seed", "seed", "_cuda_synchronize", "_cuda_setDevice", "set_num_threads"),
        *("set_default_dtype", "_set_default_dtype", "set_flush_denormal", "get_num_threads"),
        *("get_rng_state", "set_state", "initial_seed", "fork", "wait"),
    }
)


# Where users put functions of their own in place of torch's.
_PATCHED = ("torch.nn", "torch.optim", "torch.functional")
_TENSOR = vars(torch.Tensor)
_C_NAMES = (vars(torch), vars(torch.nn.functional))


def origin(code: CodeType) -> str:
    """Whose code this is: "tracejit", "torch", "stdlib" (and its like) or "user"."""
    known = _origins.get(code)
    if known is None:
        name = code.co_filename
        if name.startswith((_HERE, "<tracejit ")):  # or generated
            known = "tracejit"
        elif name.startswith(_TORCH):
            known = "torch"
        elif (
            name.startswith("<frozen")
            or name.startswith(_NUMPY)
            or name.endswith(os.sep + "typing_extensions.py")
            or (name.startswith(_STDLIB) and "site-packages" not in name[len(_STDLIB) :])
        ):
            known = "stdlib"
        else:
            known = "user"
        _origins[code] = known
    return known


_origins: dict[CodeType, str] = {}


class Seen:
    """What a trace ran: code objects with the names of their modules, and why not to replay it."""

    def __init__(self) -> None:
        self.codes: dict[CodeType, str] = {}
        self.refusals: list[str] = []
        self.aliases: list[str] = []  # calls of functions of math by other names than math's
        self.unrepeatable: list[str] = []  # what it called and may not be called once more
        self.computes_names = False  # it reaches attributes by names that it does not spell out
        # names of torch under which functions that it ran may be found, per id of their namespace
        self.places: dict[int, tuple[Mapping[str, object], set[str]]] = {}
        self._calls: set[tuple] = set()
        self._impure: set[CodeType] = set()  # already refused, with all that they call
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
        return self.computes_names or (not other.computes_names and other.names() <= self.names())

    def joined(self, other: Seen) -> Seen:
        """All that either has run, `other` later."""
        both = Seen()
        both.codes = self.codes | other.codes
        both.computes_names = other.computes_names
        for holder, names in (*self.places.values(), *other.places.values()):
            both.places.setdefault(id(holder), (holder, set()))[1].update(names)
        return both

    def profile(self, frame: FrameType, event: str, arg: object) -> None:
        """The profiler; see `sys.setprofile`."""
        if self._ignoring is not None:
            if event == "return" and frame is self._ignoring:
                self._ignoring = None
            return
        if event == "call":
            code = frame.f_code
            if code in AGAIN:
                self._ignoring = frame
            elif code not in self.codes:
                self._python(frame, code)
        elif (
            event == "c_call"
            and origin(frame.f_code) != "tracejit"
            and frame.f_code not in self._impure
        ):
            self._c(frame, arg)

    def _python(self, frame: FrameType, code: CodeType) -> None:
        module = frame.f_globals.get("__name__") or ""
        if code.co_filename == "<string>":  # made by dataclasses or namedtuple
            if module.startswith(("tracejit.", "torch.")):
                _origins[code] = module.partition(".")[0]
            elif module.startswith("namedtuple_"):
                _origins[code], module = "stdlib", "collections"
        whose = origin(code)
        if whose == "tracejit":
            return
        if whose == "stdlib" and _called_by_us(frame):
            return
        self.codes[code] = module
        if (whose == "user" or module in _READ_ALL) and dynamic(code):
            self.computes_names = True
        if whose == "torch":
            if _within(module, _PATCHED):
                self._place(frame.f_globals, code.co_name)
            elif module == torch._tensor.__name__:
                self._place(_TENSOR, code.co_name)
            known = _within(module, _PURE_TORCH_MODULES) and not _within(
                module, _IMPURE_TORCH_MODULES
            )
        else:
            known = whose == "user" or module in _PURE_MODULES or module.startswith("importlib")
        if frame.f_back is not None and frame.f_back.f_code in self._impure:
            self._impure.add(code)
        elif not known and not _called_by_us(frame):
            self._impure.add(code)
            self._refuse(frame.f_back, f"it calls {module}.{code.co_name}")
            self._repeats(frame.f_back, module, code.co_name, None)

    def _c(self, frame: FrameType, function: object) -> None:
        owner = getattr(function, "__self__", None)
        by_user = origin(frame.f_code) == "user"
        if by_user and not self.computes_names and any(function is f for f in _BY_NAME):
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
        if mathematics.is_function(function):  # by math's name it is a wrapper now
            self.aliases.append(f"{_where(frame)}it calls math.{function.__name__} by another name")
        if not _pure(function, owner, by_user) and not _called_by_us(frame):
            name = getattr(function, "__qualname__", function.__name__)
            module = function.__module__ or type(owner).__module__
            self._calls.discard(key)
            self._refuse(frame, f"it calls {module}.{name}")
            self._repeats(frame, module, function.__name__, owner)

    def _place(self, holder: Mapping[str, object], name: str) -> None:
        if callable(holder.get(name)):
            self.places.setdefault(id(holder), (holder, set()))[1].add(name)

    def _refuse(self, frame: FrameType | None, what: str) -> None:
        text = f"{_user_line(frame)}{what}, which is not known to be pure"
        text = text.replace("builtins.", "")
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
AGAIN = frozenset({Hyperparameters.call_back.__code__})


def _where(frame: FrameType | None) -> str:
    """The user's line that a frame was called from, as the start of a reason."""
    while frame is not None and origin(frame.f_code) != "user":
        frame = frame.f_back
    if frame is None:
        return ""
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}: "


def _within(module: str, roots: tuple[str, ...]) -> bool:
    return any(
        module == root or (root != "torch" and module.startswith(root + ".")) for root in roots
    )


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


def _pure(function: object, owner: object, by_user: bool) -> bool:
    name = function.__name__
    if owner is None or isinstance(owner, ModuleType):
        module = function.__module__ or getattr(owner, "__name__", "")
        if module.startswith("torch"):
            return name not in _IMPURE_TORCH_C
        if name in _LIBRARY_ONLY:
            return not by_user
        names = _PURE_C.get(module, frozenset())
        return names is None or name in names
    if isinstance(owner, type):
        if issubclass(owner, BaseException) or name in _PURE_TYPE_METHODS:
            return True
        return owner.__module__.startswith("torch") and name not in _IMPURE_TORCH_C
    if isinstance(owner, (*_PURE_RECEIVERS, BaseException)):
        return True
    if (function.__module__ or type(owner).__module__).startswith("torch"):
        return name not in _IMPURE_TORCH_C
    return name in _OBJECT_METHODS and is_heap_type(type(owner))


@contextmanager
def watch(on: bool) -> Iterator[Seen | None]:
    """Collect what runs inside the block on this thread (None if `on` is false, or a profiler that
    cannot be called along is active)."""
    if not on or not profiler.is_free():
        yield None
        return
    seen = Seen()
    with profiler.profiled(seen.profile):
        yield seen
