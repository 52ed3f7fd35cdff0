"""C functions that generated programs move elements with: copies past the caches, and sorting.

An item is what is sorted: the key of an element, which orders as an unsigned integer, and its
place. Items are sorted by the bytes of their keys, the lowest first (radix sort), which keeps the
order of equal ones; few of them by merging. Where only the first are asked for, the highest bits
tell most of the others.
"""

from __future__ import annotations

STREAM = """
/* Copies past the caches, for results too large to stay there: a plain store would first read
   what it overwrites. `tj_stream_end` makes them visible before what this thread does next. */
#if defined(__x86_64__) && !defined(__clang__)
#ifdef __AVX512F__
typedef long long tj_line __attribute__((vector_size(64), may_alias));
#define TJ_STREAM __builtin_ia32_movntdq512
#elif defined(__AVX__)
typedef long long tj_line __attribute__((vector_size(32), may_alias));
#define TJ_STREAM __builtin_ia32_movntdq256
#else
typedef long long tj_line __attribute__((vector_size(16), may_alias));
#define TJ_STREAM __builtin_ia32_movntdq
#endif
static inline void tj_stream(void *to, const void *from, int64_t bytes) {
  int64_t whole = (uintptr_t)to % sizeof(tj_line) ? 0 : bytes / (int64_t)sizeof(tj_line);
  for (int64_t i = 0; i < whole; i++) TJ_STREAM((tj_line *)to + i, ((const tj_line *)from)[i]);
  whole *= sizeof(tj_line);
  memcpy((char *)to + whole, (const char *)from + whole, bytes - whole);
}
static inline void tj_stream_end(void) {
  __builtin_ia32_sfence();
}
#else
static inline void tj_stream(void *to, const void *from, int64_t bytes) {
  memcpy(to, from, bytes);
}
static inline void tj_stream_end(void) {}
#endif
"""

KEYS = """
/* Keys that order as the values do. Zeros are equal; NaN is the largest. */
static inline uint32_t tj_key_f32(float x) {
  uint32_t bits = tj_bits_f32(x + 0.0f);
  return x != x ? UINT32_MAX : bits ^ (bits >> 31 ? UINT32_MAX : UINT32_C(1) << 31);
}

static inline uint64_t tj_key_f64(double x) {
  uint64_t bits = tj_bits_f64(x + 0.0);
  return x != x ? UINT64_MAX : bits ^ (bits >> 63 ? UINT64_MAX : UINT64_C(1) << 63);
}

static inline uint32_t tj_key_i32(int32_t x) {
  return (uint32_t)x ^ UINT32_C(1) << 31;
}

static inline uint64_t tj_key_i64(int64_t x) {
  return (uint64_t)x ^ UINT64_C(1) << 63;
}
"""

_ITEMS = {
    32: """
/* Items of 32-bit keys: the key above the place, so that no two are equal. */
typedef uint64_t tj_item32;
#define tj_make32(key, at) ((uint64_t)(key) << 32 | (uint32_t)(at))
#define tj_place32(item) ((int64_t)(uint32_t)(item))
#define tj_bits32(item, low) ((uint32_t)((item) >> (32 + (low))))
#define tj_less32(a, b) ((a) < (b))
#define tj_before32(a, b) ((a) >> 32 < (b) >> 32)
""",
    64: """
/* Items of 64-bit keys. */
typedef struct {
  uint64_t key;
  int64_t at;
} tj_item64;
#define tj_make64(key, at) ((tj_item64){key, at})
#define tj_place64(item) ((item).at)
#define tj_bits64(item, low) ((uint32_t)((item).key >> (low)))
#define tj_less64(a, b) ((a).key < (b).key)
#define tj_before64(a, b) ((a).key < (b).key)
""",
}

_SORT = """
enum { TJ_RUN{W} = 16, TJ_FEW{W} = 256 };

/* Few items: runs of TJ_RUN by insertion, then merged. In either array. */
__attribute__((unused)) static tj_item{W} *tj_merge{W}(tj_item{W} *a, tj_item{W} *b, int64_t n) {
  for (int64_t start = 0; start < n; start += TJ_RUN{W}) {
    const int64_t end = start + TJ_RUN{W} < n ? start + TJ_RUN{W} : n;
    for (int64_t i = start + 1; i < end; i++) {
      const tj_item{W} item = a[i];
      int64_t j = i;
      for (; j > start && tj_less{W}(item, a[j - 1]); j--) a[j] = a[j - 1];
      a[j] = item;
    }
  }
  for (int64_t width = TJ_RUN{W}; width < n; width *= 2) {
    for (int64_t start = 0; start < n; start += 2 * width) {
      const int64_t middle = start + width < n ? start + width : n;
      const int64_t end = middle + width < n ? middle + width : n;
      int64_t left = start, right = middle, to = start;
      while (left < middle && right < end) {
        const int other = tj_less{W}(a[right], a[left]);
        b[to++] = a[other ? right : left];
        right += other;
        left += !other;
      }
      while (left < middle) b[to++] = a[left++];
      while (right < end) b[to++] = a[right++];
    }
    tj_item{W} *const swapped = a;
    a = b;
    b = swapped;
  }
  return a;
}

/* The first `count` of n items in order, in either array. */
__attribute__((unused)) static tj_item{W} *tj_sort{W}(tj_item{W} *a, tj_item{W} *b, int64_t n,
                                                      int64_t count) {
  if (n > TJ_FEW{W} && count <= n / 4) { /* those at or below the bits of the last one wanted */
    uint32_t held[2048] = {0}, last = 0;
    for (int64_t i = 0; i < n; i++) held[tj_bits{W}(a[i], {W} - 11)]++;
    for (int64_t below = held[0]; below < count; below += held[last]) last++;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++) {
      const tj_item{W} item = a[i];
      a[kept] = item;
      kept += tj_bits{W}(item, {W} - 11) <= last;
    }
    n = kept;
  }
  if (n <= TJ_FEW{W}) return tj_merge{W}(a, b, n);
  int64_t held[{W} / 8][256] = {{0}};
  for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 8
    for (int digit = 0; digit < {W} / 8; digit++) held[digit][tj_bits{W}(a[i], digit * 8) & 255]++;
  for (int digit = 0; digit < {W} / 8; digit++) {
    int64_t *const places = held[digit];
    if (places[tj_bits{W}(a[0], digit * 8) & 255] == n) continue; /* all are equal there */
    int64_t start = 0;
    for (int value = 0; value < 256; value++) {
      const int64_t here = places[value];
      places[value] = start;
      start += here;
    }
    for (int64_t i = 0; i < n; i++) {
      const tj_item{W} item = a[i];
      b[places[tj_bits{W}(item, digit * 8) & 255]++] = item;
    }
    tj_item{W} *const swapped = a;
    a = b;
    b = swapped;
  }
  return a;
}
"""

_TOPK = """
/* torch's topk, by the algorithms of libstdc++ that it calls: equal items come as they leave them.
   ir/ops/selecting.py has the same in Python. */
static inline void tj_sift{W}(tj_item{W} *a, int64_t hole, int64_t n, tj_item{W} item) {
  const int64_t top = hole;
  int64_t child = hole;
  while (child < (n - 1) / 2) {
    child = 2 * (child + 1);
    child -= tj_before{W}(a[child], a[child - 1]);
    a[hole] = a[child];
    hole = child;
  }
  if (n % 2 == 0 && child == (n - 2) / 2) {
    child = 2 * (child + 1);
    a[hole] = a[child - 1];
    hole = child - 1;
  }
  for (; hole > top && tj_before{W}(a[(hole - 1) / 2], item); hole = (hole - 1) / 2)
    a[hole] = a[(hole - 1) / 2];
  a[hole] = item;
}

static void tj_heap_select{W}(tj_item{W} *a, int64_t n, int64_t all) {
  for (int64_t parent = n / 2; parent-- > 0;) tj_sift{W}(a, parent, n, a[parent]);
  for (int64_t i = n; i < all; i++)
    if (tj_before{W}(a[i], a[0])) {
      const tj_item{W} item = a[i];
      a[i] = a[0];
      tj_sift{W}(a, 0, n, item);
    }
}

static void tj_partial_sort{W}(tj_item{W} *a, int64_t n, int64_t all) {
  tj_heap_select{W}(a, n, all);
  for (int64_t end = n - 1; end > 0; end--) {
    const tj_item{W} item = a[end];
    a[end] = a[0];
    tj_sift{W}(a, 0, end, item);
  }
}

static inline void tj_swap{W}(tj_item{W} *a, tj_item{W} *b) {
  const tj_item{W} item = *a;
  *a = *b;
  *b = item;
}

/* Partition by the median of three. */
static tj_item{W} *tj_cut{W}(tj_item{W} *first, tj_item{W} *last) {
  tj_item{W} *x = first + 1, *y = first + (last - first) / 2, *z = last - 1, *median;
  if (tj_before{W}(*x, *y))
    median = tj_before{W}(*y, *z) ? y : tj_before{W}(*x, *z) ? z : x;
  else
    median = tj_before{W}(*x, *z) ? x : tj_before{W}(*y, *z) ? z : y;
  tj_swap{W}(first, median);
  for (const tj_item{W} pivot = *first;; x++) {
    while (tj_before{W}(*x, pivot)) x++;
    last--;
    while (tj_before{W}(pivot, *last)) last--;
    if (x >= last) return x;
    tj_swap{W}(x, last);
  }
}

static inline void tj_insert{W}(tj_item{W} *at) {
  const tj_item{W} item = *at;
  for (; tj_before{W}(item, at[-1]); at--) *at = at[-1];
  *at = item;
}

static void tj_insertion{W}(tj_item{W} *first, tj_item{W} *last) {
  for (tj_item{W} *at = first + 1; at < last; at++)
    if (tj_before{W}(*at, *first)) {
      const tj_item{W} item = *at;
      memmove(first + 1, first, (at - first) * sizeof(item));
      *first = item;
    } else {
      tj_insert{W}(at);
    }
}

static inline int tj_depth{W}(int64_t n) {
  return 2 * (63 - __builtin_clzll(n));
}

static void tj_quick{W}(tj_item{W} *first, tj_item{W} *last, int depth) {
  while (last - first > 16) {
    if (depth-- == 0) {
      tj_partial_sort{W}(first, last - first, last - first);
      return;
    }
    tj_item{W} *const cut = tj_cut{W}(first, last);
    tj_quick{W}(cut, last, depth);
    last = cut;
  }
}

/* The `count` items of n that come first, in order if `sorted`. */
__attribute__((unused)) static tj_item{W} *tj_topk{W}(tj_item{W} *a, int64_t n, int64_t count,
                                                      int sorted) {
  if (count * 64 <= n) {
    tj_partial_sort{W}(a, count, n);
    return a;
  }
  tj_item{W} *first = a, *last = a + n, *const nth = a + count - 1;
  for (int depth = tj_depth{W}(n); last - first > 3;) {
    if (depth-- == 0) {
      tj_heap_select{W}(first, nth + 1 - first, last - first);
      tj_swap{W}(first, nth);
      first = last;
      break;
    }
    tj_item{W} *const cut = tj_cut{W}(first, last);
    if (cut <= nth)
      first = cut;
    else
      last = cut;
  }
  tj_insertion{W}(first, last);
  if (sorted && count > 1) {
    tj_quick{W}(a, nth, tj_depth{W}(count - 1));
    tj_insertion{W}(a, count - 1 < 16 ? nth : a + 16);
    for (tj_item{W} *at = a + 16; at < nth; at++) tj_insert{W}(at);
  }
  return a;
}
"""

SORTS = tuple(_ITEMS[width] + (_SORT + _TOPK).replace("{W}", str(width)) for width in _ITEMS)
