"""Which elements torch's topk chooses among equal ones on a CPU, and in which order they come.

torch selects by `std::partial_sort`, or `std::nth_element` and `std::sort`, whose order of equal
elements follows from how they work. These are the algorithms of GCC's standard library (libstdc++,
bits/stl_algo.h and stl_heap.h) on rows of ranks; `codegen/c_moves.py` has them in C.
"""

from __future__ import annotations

import numpy as np

Items = list[tuple[int, int]]  # ranks and places; only the ranks are compared


def chosen(x: np.ndarray, count: int, descending: bool, how: str) -> np.ndarray:
    """The places of the first `count` elements of each row of the last axis. `how`: sorted, or
    unsorted. NaN is the largest."""
    rows = x.reshape(-1, x.shape[-1])
    found = [_row(row, count, descending, how == "sorted") for row in rows]
    return np.array(found, np.int64).reshape(*x.shape[:-1], count)


def _row(row: np.ndarray, count: int, descending: bool, in_order: bool) -> list[int]:
    ranks = np.unique(row, return_inverse=True)[1].reshape(-1)
    ranks = -ranks if descending else ranks
    if in_order:
        order = np.argsort(ranks, kind="stable")[: count + 1]
        if np.all(np.diff(ranks[order])):
            return order[:count].tolist()
    items = [(int(rank), place) for place, rank in enumerate(ranks)]
    if count * 64 <= len(items):
        _partial_sort(items, 0, count, len(items))
    elif count:
        _select(items, count - 1)
        if in_order:
            _sort(items, count - 1)
    return [place for _, place in items[:count]]


def _depth(n: int) -> int:
    return 2 * (n.bit_length() - 1)


def _sift(a: Items, first: int, hole: int, n: int, item: tuple[int, int]) -> None:
    """Put an item where the hole of a heap is: down to a leaf, and up again."""
    top = child = hole
    while child < (n - 1) // 2:
        child = 2 * (child + 1)
        if a[first + child][0] < a[first + child - 1][0]:
            child -= 1
        a[first + hole] = a[first + child]
        hole = child
    if n % 2 == 0 and child == (n - 2) // 2:
        child = 2 * (child + 1)
        a[first + hole] = a[first + child - 1]
        hole = child - 1
    while hole > top and a[first + (hole - 1) // 2][0] < item[0]:
        a[first + hole] = a[first + (hole - 1) // 2]
        hole = (hole - 1) // 2
    a[first + hole] = item


def _heap_select(a: Items, first: int, middle: int, last: int) -> None:
    n = middle - first
    for parent in reversed(range(n // 2)):
        _sift(a, first, parent, n, a[first + parent])
    for i in range(middle, last):
        if a[i][0] < a[first][0]:
            item, a[i] = a[i], a[first]
            _sift(a, first, 0, n, item)


def _partial_sort(a: Items, first: int, middle: int, last: int) -> None:
    _heap_select(a, first, middle, last)
    for end in range(middle - 1, first, -1):
        item, a[end] = a[end], a[first]
        _sift(a, first, 0, end - first, item)


def _swap(a: Items, i: int, j: int) -> None:
    a[i], a[j] = a[j], a[i]


def _cut(a: Items, first: int, last: int) -> int:
    """Partition by the median of three, which stands first."""
    x, y, z = first + 1, first + (last - first) // 2, last - 1
    if a[x][0] < a[y][0]:
        median = y if a[y][0] < a[z][0] else z if a[x][0] < a[z][0] else x
    else:
        median = x if a[x][0] < a[z][0] else z if a[y][0] < a[z][0] else y
    _swap(a, first, median)
    pivot, low, high = a[first][0], first + 1, last
    while True:
        while a[low][0] < pivot:
            low += 1
        high -= 1
        while pivot < a[high][0]:
            high -= 1
        if low >= high:
            return low
        _swap(a, low, high)
        low += 1


def _insert(a: Items, i: int) -> None:
    """An item among those before it, of which one does not come after it."""
    item = a[i]
    while item[0] < a[i - 1][0]:
        a[i] = a[i - 1]
        i -= 1
    a[i] = item


def _insertion_sort(a: Items, first: int, last: int) -> None:
    for i in range(first + 1, last):
        if a[i][0] < a[first][0]:
            a[first : i + 1] = [a[i], *a[first:i]]
        else:
            _insert(a, i)


def _select(a: Items, nth: int) -> None:
    """`std::nth_element`."""
    first, last, depth = 0, len(a), _depth(len(a))
    while last - first > 3:
        if depth == 0:
            _heap_select(a, first, nth + 1, last)
            _swap(a, first, nth)
            return
        depth -= 1
        cut = _cut(a, first, last)
        first, last = (cut, last) if cut <= nth else (first, cut)
    _insertion_sort(a, first, last)


def _sort(a: Items, last: int) -> None:
    """`std::sort`."""
    waiting = [(0, last, _depth(max(last, 1)))]
    while waiting:
        first, end, depth = waiting.pop()
        while end - first > 16:
            if depth == 0:
                _partial_sort(a, first, end, end)
                break
            depth -= 1
            cut = _cut(a, first, end)
            waiting.append((cut, end, depth))
            end = cut
    _insertion_sort(a, 0, min(last, 16))
    for i in range(16, last):
        _insert(a, i)
