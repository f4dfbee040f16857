"""Attention of decoding rows for bfloat16 on CPUs that multiply pairs of it: what `cpu_attention`
does, all query heads that share keys at once.
"""

import numpy as np

from polyhead.adapters.cpu_kernels import compiled
from polyhead.adapters.cpu_pair_kernels import product
from polyhead.adapters.cpu_pair_tiles import LANES, WIDE, mixing, narrow, prefetch
from polyhead.server.engine.cpu_attention import ORDERED, _exp

f32 = np.float32
CACHE_LINE = 64
_mixed = mixing(((4, 2), (3, 2), (2, 4), (1, 4)))


def suits(heads: int, kv_heads: int, width: int) -> bool:
    """Whether heads of these numbers and width can be taken."""
    return width % WIDE == 0 and heads // kv_heads <= LANES


@compiled(fastmath=ORDERED)
def decode(q, new_k, new_v, keys, values, numbers, scale, window, out):  # type: ignore[no-untyped-def]
    """Arguments as in `cpu_attention.decode`; all of them bfloat16, as the bits of it."""
    heads, width = q.shape[1], q.shape[2]
    share = heads // keys.shape[1]
    pairs = np.zeros((width // 2, LANES, 2), q.dtype)
    products = np.empty((keys.shape[2], LANES), np.float32)
    scores = np.empty((share, keys.shape[2]), np.float32)
    found = np.empty((share, width), np.float32)
    for i in range(numbers.shape[0]):
        token, row, last = numbers[i]
        first = max(0, last - window + 1)
        for shared in range(keys.shape[1]):
            k, v, h = keys[row, shared], values[row, shared], shared * share
            k[last], v[last] = new_k[token, shared], new_v[token, shared]
            _pair(q[token, h : h + share], pairs)
            count = last + 1 - first
            if shared + 1 < keys.shape[1]:
                _fetch(keys[row, shared + 1], values[row, shared + 1], first, count)
            elif i + 1 < numbers.shape[0]:
                _, other, end = numbers[i + 1]
                start = max(0, end - window + 1)
                _fetch(keys[other, 0], values[other, 0], start, end + 1 - start)
            of, to = k.ctypes.data + 2 * first * width, products.ctypes.data
            product(to, LANES, of, width, pairs.ctypes.data, LANES, count, width // 2, LANES)
            for own in range(share):
                _softmax(products, own, count, scale, scores[own])
            _mix(scores, v.ctypes.data + 2 * first * width, count, found)
            _write(found, out[token, h : h + share])


@compiled(inline="always")
def _fetch(k, v, first, count):  # type: ignore[no-untyped-def]
    """Ask for the next keys and values while these are computed: rows lie far apart, and the CPU
    does not guess from one's end where the next begins."""
    start, size = 2 * first * k.shape[1], 2 * count * k.shape[1]
    for line in range(start, start + size, CACHE_LINE):
        prefetch(k.ctypes.data + line)
        prefetch(v.ctypes.data + line)


@compiled(inline="always")
def _pair(q, pairs):  # type: ignore[no-untyped-def]
    """q `[share, d]` as a matrix to multiply by, `[d/2, LANES, 2]`."""
    for own in range(q.shape[0]):
        for p in range(pairs.shape[0]):
            pairs[p, own, 0] = q[own, 2 * p]
            pairs[p, own, 1] = q[own, 2 * p + 1]


@compiled(fastmath=ORDERED)
def _softmax(products, own, count, scale, scores):  # type: ignore[no-untyped-def]
    high = f32(-np.inf)
    for j in range(count):
        score = products[j, own] * scale
        scores[j] = score
        high = score if score > high else high
    total = f32(0.0)
    for j in range(count):
        scores[j] = _exp(scores[j] - high)
        total += scores[j]
    scale = f32(1.0) / total
    for j in range(count):
        scores[j] *= scale


@compiled()
def _mix(scores, v, count, found):  # type: ignore[no-untyped-def]
    """found `[share, d]` = scores `[share, count]` times the values at the address v."""
    share, width = found.shape
    for column in range(0, width, WIDE):
        to, of = found.ctypes.data + 4 * column, v + 2 * column
        _mixed(to, width, scores.ctypes.data, scores.shape[1], of, width, share, count)


@compiled(inline="always")
def _write(found, out):  # type: ignore[no-untyped-def]
    for lane in range(0, found.size, LANES):
        narrow(out.ctypes.data + 2 * lane, found.ctypes.data + 4 * lane)
