"""The C program that compares the words of many objects, and counts writes to many tensors.

It does what numpy does for `capture/python/words.py`, over half the memory.
"""

from __future__ import annotations

SOURCE = """
#include <stdint.h>

#define AHEAD 8 /* objects, whose memory is fetched meanwhile */
#define LINE 8  /* words that are fetched at once */

/* Objects of one kind: where they are; the words that all of them have in common, from the first
   one on, with masks of those that are asked; and at which words each has something of its own,
   and what, one object after another. */
struct rows {
    const int64_t *const *objects;
    int64_t count;
    int64_t first;
    int64_t width;
    const int64_t *masks;
    const int64_t *common;
    const int64_t *offsets;
    int64_t owned;
    const int64_t *own;
};

/* Whether all words are as wanted. The objects of a table are read once all before it are right:
   those are what lead to them. */
int tj_same(const struct rows *tables, int64_t count)
{
    for (const struct rows *t = tables; t < tables + count; t++) {
        const int64_t *own = t->own;
        for (int64_t i = 0; i < t->count; i++) {
            const int64_t *object = t->objects[i], *row = object + t->first;
            int64_t other = 0;
            if (i + AHEAD < t->count)
                for (int64_t k = 0; k < t->width; k += LINE)
                    __builtin_prefetch(t->objects[i + AHEAD] + t->first + k);
            for (int64_t k = 0; k < t->owned; k++)
                other |= object[t->offsets[k]] ^ *own++;
            for (int64_t k = 0; k < t->width; k++)
                other |= (row[k] ^ t->common[k]) & t->masks[k];
            if (other)
                return 0;
        }
    }
    return 1;
}

/* Objects that are alive if all words of some tables are as wanted; and what Python makes a tuple
   with, whose items begin at a word. */
struct items {
    const struct rows *tables;
    int64_t count;
    void *const *objects;
    int64_t number;
    void **(*new_tuple)(int64_t number);
    void (*hold)(void *object);
    int64_t first;
    void *none;
};

/* A new tuple of these objects if all words are as wanted, else None. */
void *tj_again(const struct items *given)
{
    if (!tj_same(given->tables, given->count)) {
        given->hold(given->none);
        return given->none;
    }
    void **made = given->new_tuple(given->number);
    if (made)
        for (int64_t i = 0; i < given->number; i++) {
            given->hold(given->objects[i]);
            made[given->first + i] = given->objects[i];
        }
    return made;
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

/* An item of a tuple that is an array: at which word, its dtype, how many axes, their lengths and
   then strides. */
struct wanted {
    int64_t place;
    const void *dtype;
    int64_t axes;
    const int64_t *sizes;
};

/* An array of numpy's. */
struct array {
    int64_t users;
    const void *type;
    int64_t data;
    int axes;
    const int64_t *lengths, *strides;
    const void *base, *dtype;
    int flags;
};

/* Whether some items of a tuple are arrays of this type, as wanted, and have these flags; their
   addresses. */
int tj_arrays(const void *const *tuple, const void *type, int64_t flags, int64_t count,
              const struct wanted *wanted, int64_t *addresses)
{
    for (const struct wanted *w = wanted; w < wanted + count; w++) {
        const struct array *x = tuple[w->place];
        if (x->type != type || x->dtype != w->dtype || x->axes != w->axes
            || (x->flags & flags) != flags)
            return 0;
        for (int64_t i = 0; i < w->axes; i++)
            if (x->lengths[i] != w->sizes[i] || x->strides[i] != w->sizes[w->axes + i])
                return 0;
        *addresses++ = x->data;
    }
    return 1;
}
"""
