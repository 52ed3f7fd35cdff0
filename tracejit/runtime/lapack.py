"""The routines of LAPACK and BLAS that the C executor calls: those of the library which numpy is
linked with.

numpy's wheels export them under names of their own, other builds under the usual ones; the names
also say whether integers are 64-bit.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np

from tracejit.codegen.c_matrices import ROUTINES
from tracejit.errors import BackendUnavailable
from tracejit.runtime.c_compiler import address_of

# how a routine may be called, and whether its integers are 64-bit
_SPELLINGS = (("scipy_{}_64_", True), ("{}_64_", True), ("scipy_{}_", False), ("{}_", False))


@functools.cache
def routines() -> tuple[tuple[int, ...], bool]:
    """The addresses of ROUTINES, of float32 first, and whether their integers are 64-bit.

    Raises BackendUnavailable where numpy's library does not export them.
    """
    names = [f"{kind}{name}" for kind in "sd" for name in ROUTINES]
    library = ctypes.CDLL(np.linalg._umath_linalg.__file__)
    for spelling, wide in _SPELLINGS:
        try:
            return tuple(address_of(library, spelling.format(name)) for name in names), wide
        except AttributeError:
            continue
    raise BackendUnavailable(
        backend="c",
        reason="the LAPACK that numpy is linked with does not export its routines",
        remedy='Use backend="numpy", or a numpy built with a LAPACK library of its own',
    )


def provide(library: ctypes.CDLL) -> None:
    """Fill the table of a library of kernels."""
    addresses, wide = routines()
    (ctypes.c_void_p * len(addresses)).in_dll(library, "tj_lapack")[:] = addresses
    ctypes.c_int64.in_dll(library, "tj_wide").value = wide
