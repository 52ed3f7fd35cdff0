"""C for calls of the host: the matrices of a batch one after another, by routines of LAPACK.

The routines are those of the library that numpy is linked with. Their addresses stand in the table
`tj_lapack` of a unit, which its loader fills, in the order of ROUTINES: of float32, then of
float64. Integers are 64-bit; a library with 32-bit ones reads and writes their lower halves, but
for the arrays of rows that getrf swaps, which `tj_wide` tells.

LAPACK has matrices by columns: row by row, a matrix is its transpose there. Where the routine says
the same of a transpose (cholesky, triangular solutions, the exponential) nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from string import Template

from tracejit.ir.ops.matrices import PADE, THETA
from tracejit.ir.types import f64
from tracejit.schedule.cpu.host_calls import integers, numbers
from tracejit.schedule.kernel import Kernel

ROUTINES = ("potrf", "trsm", "getrf", "getrs", "geqrf", "orgqr", "syevd", "gesdd", "gemm")

TABLE = f"""
/* Routines of LAPACK and BLAS, which the loader puts there; whether their integers are 64-bit.
   Units of one library have it in common. */
void *tj_lapack[{2 * len(ROUTINES)}] __attribute__((weak));
int64_t tj_wide __attribute__((weak));

static inline int64_t tj_integer(const int64_t *integers, int64_t i) {{
  return tj_wide ? integers[i] : ((const int32_t *)integers)[i];
}}
"""

_COPIES = """
/* The transpose of a matrix m x n that lies row by row. */
static void tj_turn_$s(int64_t m, int64_t n, const $T *from, $T *to) {
  for (int64_t i0 = 0; i0 < m; i0 += 16)
    for (int64_t j0 = 0; j0 < n; j0 += 16) {
      const int64_t i1 = i0 + 16 < m ? i0 + 16 : m, j1 = j0 + 16 < n ? j0 + 16 : n;
      for (int64_t i = i0; i < i1; i++)
        for (int64_t j = j0; j < j1; j++) to[j * m + i] = from[i * n + j];
    }
}

static inline void tj_unknown_$s(int64_t count, $T *to) {
  for (int64_t i = 0; i < count; i++) to[i] = NAN;
}

static inline bool tj_finite_$s(int64_t count, const $T *from) {
  for (int64_t i = 0; i < count; i++)
    if (!isfinite(from[i])) return false;
  return true;
}
"""

_CHOLESKY = """
static void tj_cholesky_$s(int64_t n, const $T *a, $T *out) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < n; j++) out[i * n + j] = j <= i ? a[i * n + j] : 0;
  int64_t info = 0;
  ((void (*)(const char *, const int64_t *, $T *, const int64_t *, int64_t *))$potrf)(
      "U", &n, out, &n, &info);
  if (info > 0)
    for (int64_t j = (info & 0x7fffffff) - 1; j < n; j++)
      for (int64_t i = j; i < n; i++) out[i * n + j] = NAN;
}
"""

_TRIANGULAR = """
/* X of A X = B, or of its transpose: from the other side, of transposes. */
static void tj_triangular_$s(int64_t n, int64_t k, bool upper, bool transposed, bool unit,
                             const $T *a, $T *x) {
  const $T one = 1;
  ((void (*)(const char *, const char *, const char *, const char *, const int64_t *,
             const int64_t *, const $T *, const $T *, const int64_t *, $T *, const int64_t *))
       $trsm)("R", upper ? "L" : "U", transposed ? "T" : "N", unit ? "U" : "N", &k, &n, &one, a, &n,
              x, &k);
}
"""

_LU = """
static void tj_lu_$s(int64_t m, int64_t n, const $T *a, $T *out, int64_t *swaps, $T *copy) {
  const int64_t k = m < n ? m : n;
  int64_t info = 0, *const order = swaps + k;
  $T *const pivots = out + m * n, *const rows = pivots + k;
  tj_turn_$s(m, n, a, copy);
  ((void (*)(const int64_t *, const int64_t *, $T *, const int64_t *, int64_t *, int64_t *))
       $getrf)(&m, &n, copy, &m, swaps, &info);
  tj_turn_$s(n, m, copy, out);
  for (int64_t i = 0; i < m; i++) order[i] = i;
  for (int64_t i = 0; i < k; i++) {
    const int64_t other = tj_integer(swaps, i), was = order[i];
    pivots[i] = other;
    order[i] = order[other - 1];
    order[other - 1] = was;
  }
  for (int64_t i = 0; i < m; i++) rows[i] = order[i];
}

/* The row of a number; the first one of what is none. */
static inline int64_t tj_row_$s(int64_t n, $T x) {
  return x >= 0 && x < n ? (int64_t)x : 0;
}

static void tj_lu_solve_$s(int64_t n, int64_t k, bool transposed, const $T *factors, const $T *b,
                           $T *out, $T *copy) {
  const $T *const order = factors + n * n + n;
  if (!transposed) {
    for (int64_t i = 0; i < n; i++)
      memcpy(out + i * k, b + tj_row_$s(n, order[i]) * k, k * sizeof($T));
    tj_triangular_$s(n, k, false, false, true, factors, out);
    tj_triangular_$s(n, k, true, false, false, factors, out);
    return;
  }
  memcpy(copy, b, n * k * sizeof($T));
  tj_triangular_$s(n, k, true, true, false, factors, copy);
  tj_triangular_$s(n, k, false, true, true, factors, copy);
  for (int64_t i = 0; i < n; i++)
    memcpy(out + tj_row_$s(n, order[i]) * k, copy + i * k, k * sizeof($T));
}
"""

_QR = """
static void tj_geqrf_$s(int64_t m, int64_t n, $T *columns, $T *factors, $T *work, int64_t room) {
  int64_t info = 0;
  ((void (*)(const int64_t *, const int64_t *, $T *, const int64_t *, $T *, $T *, const int64_t *,
             int64_t *))$geqrf)(&m, &n, columns, &m, factors, work, &room, &info);
}

/* Q with `inner` columns, and R. The factors of the reflections stand first in `work`. */
static void tj_qr_$s(int64_t m, int64_t n, int64_t inner, const $T *a, $T *out, $T *copy, $T *work,
                     int64_t room) {
  int64_t info = 0, k = m < n ? m : n;
  $T *const r = out + m * inner;
  tj_turn_$s(m, n, a, copy);
  tj_geqrf_$s(m, n, copy, work, work + k, room - k);
  for (int64_t i = 0; i < inner; i++)
    for (int64_t j = 0; j < n; j++) r[i * n + j] = i <= j && i < m ? copy[j * m + i] : 0;
  const int64_t left = room - k;
  ((void (*)(const int64_t *, const int64_t *, const int64_t *, $T *, const int64_t *, const $T *,
             $T *, const int64_t *, int64_t *))$orgqr)(&m, &inner, &k, copy, &m, work, work + k,
                                                       &left, &info);
  tj_turn_$s(inner, m, copy, out);
}

static void tj_reflections_$s(int64_t m, int64_t n, const $T *a, $T *out, $T *copy, $T *work,
                              int64_t room) {
  tj_turn_$s(m, n, a, copy);
  tj_geqrf_$s(m, n, copy, out + m * n, work, room);
  tj_turn_$s(n, m, copy, out);
}
"""

_EIGH = """
static void tj_eigh_$s(int64_t n, bool lower, bool vectors, const $T *a, $T *out, int64_t *integers,
                       int64_t count, $T *copy, $T *work, int64_t room) {
  int64_t info = 0;
  tj_turn_$s(n, n, a, copy);
  if (tj_finite_$s(n * n, copy))
    ((void (*)(const char *, const char *, const int64_t *, $T *, const int64_t *, $T *, $T *,
               const int64_t *, int64_t *, const int64_t *, int64_t *))$syevd)(
        vectors ? "V" : "N", lower ? "L" : "U", &n, copy, &n, out, work, &room, integers, &count,
        &info);
  else
    info = 1;
  if (info)
    tj_unknown_$s(vectors ? n + n * n : n, out);
  else if (vectors)
    tj_turn_$s(n, n, copy, out + n);
}
"""

_SVD = """
/* p columns of U and q rows of the transpose of V, if there are vectors. */
static void tj_svd_$s(int64_t m, int64_t n, int64_t p, int64_t q, bool vectors, const $T *a,
                      $T *out, int64_t *integers, $T *copy, $T *work, int64_t room) {
  const int64_t k = m < n ? m : n;
  int64_t info = 0;
  $T *const u = copy + m * n, *const vt = u + m * p;
  $T *const values = vectors ? out + m * p : out;
  tj_turn_$s(m, n, a, copy);
  if (tj_finite_$s(m * n, copy))
    ((void (*)(const char *, const int64_t *, const int64_t *, $T *, const int64_t *, $T *, $T *,
               const int64_t *, $T *, const int64_t *, $T *, const int64_t *, int64_t *, int64_t *))
         $gesdd)(!vectors ? "N" : p == m && q == n ? "A" : "S", &m, &n, copy, &m, values, u, &m, vt,
                 &q, work, &room, integers, &info);
  else
    info = 1;
  if (info) {
    tj_unknown_$s(vectors ? m * p + k + q * n : k, out);
  } else if (vectors) {
    tj_turn_$s(p, m, u, out);
    tj_turn_$s(n, q, vt, values + k);
  }
}
"""

_EXPM = """
static void tj_product(int64_t n, const double *a, const double *b, double *out) {
  const double one = 1, zero = 0;
  ((void (*)(const char *, const char *, const int64_t *, const int64_t *, const int64_t *,
             const double *, const double *, const int64_t *, const double *, const int64_t *,
             const double *, double *, const int64_t *))$gemm)("N", "N", &n, &n, &n, &one, a, &n, b,
                                                               &n, &zero, out, &n);
}

/* The exponential of a, in x; the rest is room for 7 n n numbers, and n integers. */
static void tj_exponential(int64_t n, double *a, double *x, double *rest, int64_t *swaps) {
  static const double c[] = {$pade};
  const int64_t count = n * n;
  double *const a2 = rest, *const a4 = a2 + count, *const a6 = a4 + count, *const u = a6 + count;
  double *const v = u + count, *const sum = v + count;
  double norm = 0;
  for (int64_t j = 0; j < n; j++) {
    double column = 0;
    for (int64_t i = 0; i < n; i++) column += fabs(a[i * n + j]);
    if (!(column <= norm)) norm = column;
  }
  if (!isfinite(norm)) {
    for (int64_t i = 0; i < count; i++) x[i] = NAN;
    return;
  }
  int squarings = 0;
  if (norm > $theta) squarings = (int)ceil(log2(norm / $theta));
  for (int64_t i = 0; i < count; i++) a[i] = ldexp(a[i], -squarings);
  tj_product(n, a, a, a2);
  tj_product(n, a2, a2, a4);
  tj_product(n, a4, a2, a6);
  for (int64_t i = 0; i < count; i++) x[i] = c[13] * a6[i] + c[11] * a4[i] + c[9] * a2[i];
  tj_product(n, a6, x, sum);
  for (int64_t i = 0; i < count; i++)
    sum[i] += c[7] * a6[i] + c[5] * a4[i] + c[3] * a2[i] + (i % (n + 1) == 0 ? c[1] : 0);
  tj_product(n, a, sum, u);
  for (int64_t i = 0; i < count; i++) x[i] = c[12] * a6[i] + c[10] * a4[i] + c[8] * a2[i];
  tj_product(n, a6, x, v);
  for (int64_t i = 0; i < count; i++)
    v[i] += c[6] * a6[i] + c[4] * a4[i] + c[2] * a2[i] + (i % (n + 1) == 0 ? c[0] : 0);
  for (int64_t i = 0; i < count; i++) {
    x[i] = v[i] + u[i];
    v[i] -= u[i];
  }
  int64_t info = 0;
  ((void (*)(const int64_t *, const int64_t *, double *, const int64_t *, int64_t *, int64_t *))
       $getrf)(&n, &n, v, &n, swaps, &info);
  ((void (*)(const char *, const int64_t *, const int64_t *, const double *, const int64_t *,
             const int64_t *, double *, const int64_t *, int64_t *))$getrs)("N", &n, &n, v, &n,
                                                                             swaps, x, &n, &info);
  for (; squarings > 0; squarings--) {
    tj_product(n, x, x, sum);
    memcpy(x, sum, count * sizeof(double));
  }
}
"""

_EXPM_OF = """
static void tj_expm_$s(int64_t n, const $T *a, $T *out, int64_t *swaps, double *room) {
  double *const x = room + n * n;
  for (int64_t i = 0; i < n * n; i++) room[i] = a[i];
  tj_exponential(n, room, x, x + n * n, swaps);
  for (int64_t i = 0; i < n * n; i++) out[i] = ($T)x[i];
}
"""


def _typed(text: str, double: bool) -> str:
    first = len(ROUTINES) * double
    names = {name: f"tj_lapack[{first + i}]" for i, name in enumerate(ROUTINES)}
    pade = ", ".join(map(repr, PADE))
    types = {"T": "double" if double else "float", "s": "f64" if double else "f32"}
    return Template(text).substitute(types, pade=pade, theta=repr(THETA), **names)


_TYPED = (_COPIES, _CHOLESKY, _TRIANGULAR, _LU, _QR, _EIGH, _SVD)
# In dependency order, as those of the prelude.
PARTS = (
    TABLE,
    *(_typed(text, double) for text in _TYPED for double in (False, True)),
    _typed(_EXPM, True),
    *(_typed(_EXPM_OF, double) for double in (False, True)),
)


def call_text(kernel: Kernel, number: int) -> str:
    """The exported function of a kernel that is a call."""
    call = kernel.call
    *batch, m, n = call.matrices
    double = kernel.buffers[-1].dtype is f64
    kind, s = ("double", "f64") if double else ("float", "f32")
    attrs = {name: _spelled(value) for name, value in call.attrs}
    lines = []
    for i, shape in enumerate(call.shapes):
        const = "const " * (i + 1 < len(call.shapes))
        size = math.prod(shape[len(batch) :])
        lines.append(f"{const}{kind} *const x{i} = ({const}{kind} *)buffers[{i}] + i * {size};")
    copies, own = numbers(call)
    lines.append("int64_t *const integers = scratch;")
    lines.append(f"{kind} *const copy = ({kind} *)(integers + {integers(call)});")
    lines.append(f"{kind} *const work = copy + {copies};")
    lines.append("(void)integers, (void)copy, (void)work;")
    lines += _statements(call.op.name, s, kind, m, n, call.shapes[-1], own, integers(call), attrs)
    body = "\n".join(f"    {line}" for line in lines)
    said = replace(kernel, call=replace(call, where=""))
    return (
        f"/* {said} */\n"
        f"void kernel{number}(const struct tj_run *run, void *scratch, void *const *buffers,"
        " const double *scalars) {\n"
        "  (void)run, (void)scalars;\n"
        f"  for (int64_t i = 0; i < {math.prod(batch)}; i++) {{\n{body}\n  }}\n}}\n"
    )


def _statements(
    name: str,
    s: str,
    kind: str,
    m: int,
    n: int,
    result: tuple[int, ...],
    own: int,
    count: int,
    attrs: Mapping[str, str],
) -> list[str]:
    """What is done for one matrix."""
    if name == "cholesky":
        return [f"tj_cholesky_{s}({n}, x0, x1);"]
    if name == "triangular_solve":
        k = result[-1]
        how = f"{attrs['upper']}, {attrs['transposed']}, {attrs['unit']}"
        return [
            f"memcpy(x2, x1, {n * k} * sizeof({kind}));",
            f"tj_triangular_{s}({n}, {k}, {how}, x0, x2);",
        ]
    if name == "lu":
        return [f"tj_lu_{s}({m}, {n}, x0, x1, integers, copy);"]
    if name == "lu_solve":
        how = f"{n}, {result[-1]}, {attrs['transposed']}"
        return [f"tj_lu_solve_{s}({how}, x0, x1, x2, copy);"]
    if name == "qr":
        inner = m if attrs["complete"] == "true" else min(m, n)
        return [f"tj_qr_{s}({m}, {n}, {inner}, x0, x1, copy, work, {own});"]
    if name == "geqrf":
        return [f"tj_reflections_{s}({m}, {n}, x0, x1, copy, work, {own});"]
    if name == "eigh":
        how = f"{n}, {attrs['lower']}, {attrs['vectors']}"
        return [f"tj_eigh_{s}({how}, x0, x1, integers, {count}, copy, work, {own});"]
    if name == "svd":
        k = min(m, n)
        p, q = (m, n) if attrs["full"] == "true" else (k, k)
        how = f"{m}, {n}, {p}, {q}, {attrs['vectors']}"
        return [f"tj_svd_{s}({how}, x0, x1, integers, copy, work, {own});"]
    return [f"tj_expm_{s}({n}, x0, x1, integers, (double *)(integers + {count}));"]


def _spelled(value: object) -> str:
    return "true" if value is True else "false" if value is False else str(value)
