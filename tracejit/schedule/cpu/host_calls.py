"""What the host's calls work in on the CPU: copies by columns, as LAPACK wants them, and its
workspaces.

In: a call. Out: bytes, for one matrix at a time.
"""

from __future__ import annotations

import math

from tracejit.schedule.kernel import HostCall

BLOCK = 64  # columns of a block in LAPACK: workspaces grow with it
INTEGER = 8  # bytes, of LAPACK's integers at most
DOUBLE = 8


def integers(call: HostCall) -> int:
    """How many integers a call needs."""
    m, n = call.matrices[-2:]
    least = min(m, n)
    return {"lu": m + least, "eigh": 3 + 5 * n, "svd": 8 * least, "expm": n}.get(call.op.name, 0)


def numbers(call: HostCall) -> tuple[int, int]:
    """How many floats the copies of a call need, and how many LAPACK itself."""
    m, n = call.matrices[-2:]
    least, most = min(m, n), max(m, n)
    name, attrs = call.op.name, dict(call.attrs)
    if name == "lu":
        return m * n, 0
    if name == "lu_solve":
        return n * call.shapes[-1][-1], 0
    if name in ("qr", "geqrf"):
        columns = max(n, m) if attrs.get("complete") else n
        return m * columns, most * BLOCK
    if name == "eigh":
        return n * n, 1 + 6 * n + 2 * n * n + BLOCK * n
    if name == "svd":
        p, q = (m, n) if attrs["full"] else (least, least)
        return m * n + (m * p + q * n) * attrs["vectors"], 8 * least * (
            least + 2
        ) + 2 * BLOCK * most
    return 0, 0


def working_bytes(call: HostCall, itemsize: int) -> int:
    """The bytes that a call works in: integers first, then copies, then LAPACK's own."""
    if call.op.name == "expm":
        return call.shapes[0][-1] * INTEGER + 8 * math.prod(call.shapes[0][-2:]) * DOUBLE
    return integers(call) * INTEGER + sum(numbers(call)) * itemsize
