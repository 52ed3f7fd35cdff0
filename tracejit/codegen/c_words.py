"""The C program that compares the words of many objects, and counts writes to many tensors.

It does what numpy does for `capture/python/words.py`, over half the memory.
"""

from __future__ import annotations

SOURCE = """
#include <stdint.h>

/* Objects of one kind: where they are, which of their words are asked, and what these are to be,
   one object after another. */
struct rows {
    const int64_t *const *objects;
    int64_t count;
    const int64_t *offsets;
    int64_t width;
    const int64_t *wanted;
};

/* Whether all words are as wanted. The objects of a table are read once all before it are right:
   those are what lead to them. */
int tj_same(const struct rows *tables, int64_t count)
{
    for (const struct rows *t = tables; t < tables + count; t++) {
        const int64_t *wanted = t->wanted;
        for (int64_t i = 0; i < t->count; i++) {
            const int64_t *object = t->objects[i];
            int64_t other = 0;
            for (int64_t k = 0; k < t->width; k++)
                other |= object[t->offsets[k]] ^ *wanted++;
            if (other)
                return 0;
        }
    }
    return 1;
}

/* Add one to the counter of each of some items: at a word of a tensor is its implementation, at a
   word of that its counter, some bytes into which the number is. 0, and nothing is changed, if an
   item has no counter. */
int tj_count(const int64_t *const *items, const int64_t *indices, int64_t count,
             int64_t implementation, int64_t counter, int64_t number)
{
    for (int64_t i = 0; i < count; i++)
        if (!((const int64_t *)items[indices[i]][implementation])[counter])
            return 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t *tensor = (const int64_t *)items[indices[i]][implementation];
        __atomic_fetch_add((uint32_t *)(tensor[counter] + number), 1, __ATOMIC_RELAXED);
    }
    return 1;
}
"""
