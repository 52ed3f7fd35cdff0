"""The generators of Python's `random` and of `numpy.random`, as a trace draws from them.

Each is one for the whole process, whose methods the functions of the module are. `Source` has them
by name, and keeps and sets the generator's state as a `torch.Generator` does.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Mapping

import numpy as np
from numpy.random import MT19937, RandomState

_PYTHONS: random.Random = random._inst
_NUMPYS: RandomState = np.random.mtrand._rand
_MT = 624 * 4 + 4  # bytes of numpy's state: the words, and how many of them are used

# function -> how many numbers it takes at most; what numpy takes after them is a size
FLOATS = {
    "random": {
        **{"random": 0, "uniform": 2, "gauss": 2, "normalvariate": 2, "lognormvariate": 2},
        **{"expovariate": 1, "vonmisesvariate": 2, "gammavariate": 2, "betavariate": 2},
        **{"paretovariate": 1, "weibullvariate": 2},
    },
    "numpy.random": {
        **{"random": 0, "random_sample": 0, "rand": 0, "randn": 0, "uniform": 2, "normal": 2},
        **{"beta": 2, "exponential": 1, "standard_normal": 0, "standard_exponential": 0},
        **{"gamma": 2, "laplace": 2, "lognormal": 2, "rayleigh": 1, "logistic": 2, "gumbel": 2},
        **{"chisquare": 1, "triangular": 3, "weibull": 1, "pareto": 1, "power": 1, "wald": 2},
    },
}
INTEGERS = {
    "random": {"randint": 2, "randrange": 3, "getrandbits": 1},
    "numpy.random": {"randint": 2, "binomial": 2, "poisson": 1, "geometric": 1},
}
# of numpy, which draw no normal numbers: these come in pairs, and one may wait for the next call
_UNPAIRED = ("random", "random_sample", "rand", "uniform", "exponential", "randint")


class Source:
    """A generator of the process. `functions`: its functions by name, as the module has them."""

    def __init__(self, module: str, get: Callable[[], object], put: Callable[[object], object]):
        self.module = module
        self.get_state, self.set_state = get, put
        owner, place = _owner(module)
        names = (*FLOATS[module], *INTEGERS[module])
        self.functions: Mapping[str, Callable[..., float | int]] = {
            name: place[name]
            for name in names
            if getattr(place.get(name), "__self__", None) is owner
            and place[name].__name__ == name  # nobody has put another one there
        }

    def __repr__(self) -> str:
        return f"<the generator of {self.module}>"


def _owner(module: str) -> tuple[object, Mapping[str, Callable]]:
    return (_PYTHONS, vars(random)) if module == "random" else (_NUMPYS, vars(np.random))


def is_usual() -> bool:
    """Whether numpy's generator is the one that it comes with: another may stand in for it."""
    return type(_NUMPYS._bit_generator) is MT19937


def _state() -> tuple | dict:
    return _NUMPYS.get_state() if is_usual() else _NUMPYS._bit_generator.state


def _set_state(state: tuple | dict) -> None:
    if type(state) is tuple:
        _NUMPYS.set_state(state)
    else:
        _NUMPYS._bit_generator.state = state


def _words() -> bytes | dict:
    """The state of numpy's generator but for the normal number that may wait: a hundredth of the
    time of `get_state`."""
    if not is_usual():
        return _state()
    generator = _NUMPYS._bit_generator
    with generator.lock:
        return ctypes.string_at(generator.ctypes.state_address, _MT)


def _set_words(state: bytes | dict) -> None:
    if type(state) is not bytes:
        return _set_state(state)
    generator = _NUMPYS._bit_generator
    with generator.lock:
        ctypes.memmove(generator.ctypes.state_address, state, _MT)


def _words_are_all() -> bool:
    """Whether the memory of numpy's generator is laid out as it is said here."""
    if not is_usual():
        return False
    _, words, at, *_ = _NUMPYS.get_state()
    return _words() == words.astype(np.uint32).tobytes() + np.int32(at).tobytes()


PYTHON = Source("random", _PYTHONS.getstate, _PYTHONS.setstate)
NUMPY = Source("numpy.random", _state, _set_state)
NUMPY_UNPAIRED = Source("numpy.random", _words, _set_words) if _words_are_all() else NUMPY


def source_of(module: str, name: str, numbers: tuple[object, ...]) -> Source:
    """The source that a function of a module with these numbers draws from: numpy's has a state
    that is kept sooner where no normal number is drawn."""
    if module == "random":
        return PYTHON
    small = name == "beta" and all(type(x) is float and x <= 1 for x in numbers)
    return NUMPY_UNPAIRED if name in _UNPAIRED or small else NUMPY
