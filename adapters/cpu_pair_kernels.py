"""Both forms compiled for bfloat16 on CPUs that multiply pairs of it; see `cpu_kernels`, whose
signatures these have. What differs: x and y are bfloat16, and every matrix to multiply by lies in
pairs of rows, its columns a multiple of `LANES` (`pairs`). Sums and weights are float32.
"""

import numpy as np

from polyhead.adapters.cpu_kernels import BLOCK, compiled
from polyhead.adapters.cpu_pair_tiles import (
    LANES,
    add_scaled,
    adding,
    narrow,
    rounding,
    summing,
)

TALL, SHORT, LONG = ((8, 1), (4, 1), (1, 4)), ((8, 1), (1, 4)), ((4, 2), (1, 4))
FLAT = ((8, 1), (4, 1), (1, 1))
"""Heights of tiles, each with its unroll: for sums of many, for narrow strips of them, for few rows
of very many, and for sums of few."""
_32, _16, _8 = summing(32, TALL), summing(16, SHORT), summing(8, SHORT)
_16_rounding, _8_rounding = rounding(16, LONG), rounding(8, LONG)
_32_adding, _16_adding, _8_adding = (adding(columns, FLAT) for columns in (32, 16, 8))


@compiled()
def product(y, ldy, x, ldx, b, ldb, m, pairs, n):  # type: ignore[no-untyped-def]
    """`y = x @ b` for y `[m, n]` float32."""
    column = 0
    while column + 32 <= n:
        _32(y + 4 * column, ldy, x, ldx, b + 4 * column, ldb, m, pairs)
        column += 32
    if column + 16 <= n:
        _16(y + 4 * column, ldy, x, ldx, b + 4 * column, ldb, m, pairs)
        column += 16
    if column < n:
        _8(y + 4 * column, ldy, x, ldx, b + 4 * column, ldb, m, pairs)


@compiled()
def _rounded_product(y, ldy, x, ldx, b, ldb, m, pairs, n):  # type: ignore[no-untyped-def]
    """`y = x @ b` for y `[m, n]` bfloat16: few rows and columns, many pairs."""
    column = 0
    while column + 16 <= n:
        _16_rounding(y + 2 * column, ldy, x, ldx, b + 4 * column, ldb, m, pairs)
        column += 16
    if column < n:
        _8_rounding(y + 2 * column, ldy, x, ldx, b + 4 * column, ldb, m, pairs)


@compiled()
def _add_product(y, ldy, x, ldx, b, ldb, m, pairs, n):  # type: ignore[no-untyped-def]
    """`y += x @ b` for y `[m, n]` bfloat16: few pairs."""
    column = 0
    while column + 32 <= n:
        _32_adding(y + 2 * column, ldy, x, ldx, b + 4 * column, ldb, m, pairs)
        column += 32
    if column + 16 <= n:
        _16_adding(y + 2 * column, ldy, x, ldx, b + 4 * column, ldb, m, pairs)
        column += 16
    if column < n:
        _8_adding(y + 2 * column, ldy, x, ldx, b + 4 * column, ldb, m, pairs)


@compiled()
def combined_shrink(x, width, a, ranks, runs, hidden):  # type: ignore[no-untyped-def]
    """hidden: `[N, R]` bfloat16."""
    for i in range(runs.shape[0]):
        first, count, task = runs[i]
        rank = ranks[task]
        if rank > 0:
            to = hidden.ctypes.data + 2 * first * hidden.shape[1]
            own, pairs = x + 2 * first * width, width // 2
            _rounded_product(to, hidden.shape[1], own, width, a[task], rank, count, pairs, rank)


@compiled()
def combined_expand(y, width, b, ranks, offsets, runs, hidden):  # type: ignore[no-untyped-def]
    """hidden: `[N, R]` bfloat16."""
    for i in range(runs.shape[0]):
        first, count, task = runs[i]
        rank = ranks[task]
        if rank > 0:
            own = hidden.ctypes.data + 2 * (first * hidden.shape[1] + offsets[task])
            to, pairs = y + 2 * first * width, rank // 2
            _add_product(to, width, own, hidden.shape[1], b[task], width, count, pairs, width)


@compiled(fastmath={"reassoc", "contract"})
def factored_shrink(x, width, a, weights, rows, first, mixed):  # type: ignore[no-untyped-def]
    tokens, size, rank = mixed.shape
    heads, skills = weights.shape[2], weights.shape[3]
    inner, columns = width // heads, skills * rank
    products = np.empty((BLOCK, columns), np.float32)
    for h in range(heads):
        for g in range(size):
            panel = a + 4 * (h * (inner // 2) * size + g) * columns
            for start in range(0, tokens, BLOCK):
                count = min(BLOCK, tokens - start)
                own, to = x + 2 * (start * width + h * inner), products.ctypes.data
                pairs, stride = inner // 2, size * columns
                product(to, columns, own, width, panel, stride, count, pairs, columns)
                for i in range(count):
                    w = weights[rows[start + i], first + g, h]
                    for s in range(skills):
                        for j in range(rank):
                            mixed[start + i, g, j] += w[s] * products[i, s * rank + j]


@compiled(fastmath={"reassoc", "contract"})
def factored_expand(y, width, b, weights, rows, module, g, mixed):  # type: ignore[no-untyped-def]
    tokens, _, rank = mixed.shape
    heads, skills = weights.shape[2], weights.shape[3]
    outer, columns = width // heads, skills * rank
    spread = np.empty(columns, np.float32)
    rounded = np.empty((BLOCK, columns), np.uint16)
    for h in range(heads):
        for start in range(0, tokens, BLOCK):
            count = min(BLOCK, tokens - start)
            for i in range(count):
                w = weights[rows[start + i], module, h]
                for s in range(skills):
                    for j in range(rank):
                        spread[s * rank + j] = w[s] * mixed[start + i, g, j]
                to, of = rounded.ctypes.data + 2 * i * columns, spread.ctypes.data
                for lane in range(0, columns, LANES):
                    narrow(to + 2 * lane, of + 4 * lane)
            to, own = y + 2 * (start * width + h * outer), rounded.ctypes.data
            panel, pairs = b + 4 * h * (columns // 2) * outer, columns // 2
            _add_product(to, width, own, columns, panel, outer, count, pairs, outer)


@compiled()
def fold_a(a, weights, folded, rank):  # type: ignore[no-untyped-def]
    """Average a group's skills for one task. a `[H, I/H/2, 2*G*S*r]` and folded `[I/2, 2*R]`
    bfloat16, weights `[G, H, S]`; R is G * r, padded to whole vectors, and 2 * r makes them."""
    heads, pairs, numbers = a.shape
    size, skills = weights.shape[0], weights.shape[2]
    total = np.zeros(folded.shape[1], np.float32)
    start = total.ctypes.data
    for h in range(heads):
        for p in range(pairs):
            total[: 2 * size * rank] = 0
            of = a.ctypes.data + 2 * (h * pairs + p) * numbers
            for g in range(size):
                for s in range(skills):
                    for lane in range(0, 2 * rank, LANES):
                        at = start + 4 * (2 * g * rank + lane)
                        add_scaled(at, of + 2 * lane, weights[g, h, s])
                    of += 4 * rank
            to = folded.ctypes.data + 2 * (h * pairs + p) * folded.shape[1]
            for lane in range(0, folded.shape[1], LANES):
                narrow(to + 2 * lane, start + 4 * lane)


@compiled()
def fold_b(b, weights, folded):  # type: ignore[no-untyped-def]
    """The same of one module's second half: b `[H, S, r/2, 2*O/H]`, folded `[r/2, H, 2*O/H]`
    bfloat16, weights `[H, S]`."""
    heads, skills, pairs, numbers = b.shape
    total = np.empty(LANES, np.float32)
    start = total.ctypes.data
    for h in range(heads):
        for p in range(pairs):
            for lane in range(0, numbers, LANES):
                total[:] = 0
                for s in range(skills):
                    of = b.ctypes.data + 2 * (((h * skills + s) * pairs + p) * numbers + lane)
                    add_scaled(start, of, weights[h, s])
                narrow(folded.ctypes.data + 2 * ((p * heads + h) * numbers + lane), start)
