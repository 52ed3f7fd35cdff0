"""The C program that draws many numbers at once from torch's generator of the CPU.

MT19937 (Matsumoto and Nishimura 1998), from the bytes of a generator's state and back into them, by
loops that compilers vectorize. The transformations are eager's: of 64 bits, the high ones first,
the low 53 make a double; of 32 bits the low 24 make a float.
"""

from __future__ import annotations

# kinds of `struct draw`
BELOW, DOUBLES, FLOATS = range(3)

SOURCE = f"""
#include <stdint.h>
#include <string.h>

enum {{ N = 624, M = 397, BATCH = 2048 }};
enum {{ BELOW = {BELOW}, DOUBLES = {DOUBLES}, FLOATS = {FLOATS} }};

/* What is drawn into `out`: bytes that say which of `count` numbers are below a threshold (in units
   of 2^-53), or the numbers, in [0, 1). */
struct draw {{
    void *out;
    int64_t count;
    int64_t kind;
    int64_t below;
}};

/* The head of a generator's state as torch lays it out; the words stand in 64 bits each. */
struct head {{
    uint64_t seed;
    int32_t left;
    int32_t seeded;
    uint64_t next;
    uint64_t words[N];
}};

static uint32_t twisted(uint32_t a, uint32_t b)
{{
    return ((a & 0x80000000u) | (b & 0x7fffffffu)) >> 1 ^ (0u - (b & 1u) & 0x9908b0dfu);
}}

static void renew(uint32_t *w)
{{
    for (int k = 0; k < N - M; k++)
        w[k] = w[k + M] ^ twisted(w[k], w[k + 1]);
#pragma GCC ivdep
    for (int k = N - M; k < N - 1; k++)
        w[k] = w[k + M - N] ^ twisted(w[k], w[k + 1]);
    w[N - 1] = w[M - 1] ^ twisted(w[N - 1], w[0]);
}}

static void generate(uint32_t *w, int *at, uint32_t *restrict out, int count)
{{
    while (count > 0) {{
        if (*at == N) {{
            renew(w);
            *at = 0;
        }}
        int n = N - *at < count ? N - *at : count;
        const uint32_t *from = w + *at;
        for (int k = 0; k < n; k++) {{
            uint32_t y = from[k];
            y ^= y >> 11;
            y ^= y << 7 & 0x9d2c5680u;
            y ^= y << 15 & 0xefc60000u;
            out[k] = y ^ y >> 18;
        }}
        *at += n;
        out += n;
        count -= n;
    }}
}}

static int64_t bits53(uint64_t pair) /* the first word of the two is the high one */
{{
    return (int64_t)((pair & 0x1fffff) << 32 | pair >> 32);
}}

void tj_draw(struct head *head, const struct draw *draws, int64_t count)
{{
    uint32_t w[N];
    union {{ uint32_t words[BATCH]; uint64_t pairs[BATCH / 2]; }} got;
    int at = head->left > 1 ? (int)head->next : N;
    for (int k = 0; k < N; k++)
        w[k] = (uint32_t)head->words[k];
    for (const struct draw *d = draws; d < draws + count; d++) {{
        int each = d->kind == FLOATS ? BATCH : BATCH / 2;
        for (int64_t first = 0; first < d->count; first += each) {{
            int n = d->count - first < each ? (int)(d->count - first) : each;
            generate(w, &at, got.words, d->kind == FLOATS ? n : 2 * n);
            if (d->kind == BELOW) {{
                uint8_t *out = (uint8_t *)d->out + first;
                int64_t below = d->below;
                for (int k = 0; k < n; k++)
                    out[k] = bits53(got.pairs[k]) < below;
            }} else if (d->kind == DOUBLES) {{
                double *out = (double *)d->out + first;
                for (int k = 0; k < n; k++)
                    out[k] = (double)bits53(got.pairs[k]) * 0x1p-53;
            }} else {{
                float *out = (float *)d->out + first;
                for (int k = 0; k < n; k++)
                    out[k] = (float)(int32_t)(got.words[k] & 0xffffff) * 0x1p-24f;
            }}
        }}
    }}
    for (int k = 0; k < N; k++)
        head->words[k] = w[k];
    head->next = (uint64_t)at;
    head->left = N + 1 - at;
}}
"""
