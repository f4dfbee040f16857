"""Attention of decoding rows compiled for the CPU, in float32 over float32 or bfloat16: it reads
exactly the keys that each row has, once for all query heads that share them, where a product over
an arena pads every row to the longest one. `attention` says what it computes, serves everything
else and is its reference.
"""

import numpy as np
from numba import types
from numba.extending import overload

from polyhead.adapters.cpu_kernels import compiled

ORDERED = {"reassoc", "contract", "arcp", "nsz"}
"""Sums may be taken in any order; NaN and infinity keep their meaning, they show an overflow."""

f32 = np.float32


def _wide(x):  # type: ignore[no-untyped-def]
    raise NotImplementedError("compiled code only")


@overload(_wide, inline="always")
def _widened(x):  # type: ignore[no-untyped-def]
    """A stored number as float32: bfloat16, which numba does not know, comes as its bits."""
    if isinstance(x, types.Integer):
        return lambda x: np.int32(np.int32(x) << np.int32(16)).view(np.float32)
    return lambda x: x


@compiled(inline="always", fastmath=ORDERED)
def _exp(x):  # type: ignore[no-untyped-def]
    """e**x for x <= 0, to two units in the last place (Cephes' polynomial); 0 below -87."""
    x = f32(-87.0) if x < f32(-87.0) else x
    n = np.floor(x * f32(1.44269504) + f32(0.5))
    r = x - n * f32(0.693359375) + n * f32(2.12194440e-4)
    p = f32(1.9875691500e-4) * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    p = p * r * r + r + f32(1.0)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23))
    return p * power.view(np.float32)


@compiled(fastmath=ORDERED)
def decode(q, new_k, new_v, keys, values, numbers, scale, window, out):  # type: ignore[no-untyped-def]
    """Write each row's new key and value, then let its query look at all it has.

    q, out `[N, heads, d]`; new_k, new_v `[N, kv_heads, d]`; keys, values `[rows, kv_heads,
    capacity, d]`; numbers `[n, 3]`: token, row, position; window: how many keys a query sees.
    All contiguous; q and out float32, the others float32 too or the bits of bfloat16 as int16.
    """
    heads = q.shape[1]
    share = heads // keys.shape[1]
    scores = np.empty(keys.shape[2], np.float32)
    for i in range(numbers.shape[0]):
        token, row, last = numbers[i]
        first = max(0, last - window + 1)
        for h in range(heads):
            shared = h // share
            k, v = keys[row, shared], values[row, shared]
            if h % share == 0:
                k[last] = new_k[token, shared]
                v[last] = new_v[token, shared]
            _look(q[token, h], k, v, first, last, scale, scores, out[token, h])


@compiled(fastmath=ORDERED)
def decode_biased(q, new_k, new_v, keys, values, numbers, bias, out):  # type: ignore[no-untyped-def]
    """The same for attention that adds to each score what the distance to the key says.

    bias `[heads, distances]`; as many heads of keys as of queries, scores are not scaled. Tokens of
    one row come in the order of their positions: each finds the keys of those before it.
    """
    scores = np.empty(keys.shape[2], np.float32)
    for i in range(numbers.shape[0]):
        token, row, last = numbers[i]
        for h in range(q.shape[1]):
            k, v = keys[row, h], values[row, h]
            k[last] = new_k[token, h]
            v[last] = new_v[token, h]
            _look_biased(q[token, h], k, v, last, bias[h], scores, out[token, h])


@compiled(fastmath=ORDERED)
def cross(q, keys, values, numbers, out):  # type: ignore[no-untyped-def]
    """Each token's query looks at all keys of a row; `decode` says what the arguments are."""
    scores = np.empty(keys.shape[2], np.float32)
    for i in range(numbers.shape[0]):
        token, row, last = numbers[i]
        for h in range(q.shape[1]):
            k, v = keys[row, h], values[row, h]
            _look(q[token, h], k, v, 0, last, f32(1.0), scores, out[token, h])


@compiled(inline="always", fastmath=ORDERED)
def _look(q, k, v, first, last, scale, scores, out):  # type: ignore[no-untyped-def]
    """One head: out = softmax(scale * q k) v over the keys first … last."""
    width = q.shape[0]
    high = f32(-np.inf)
    for j in range(first, last + 1):
        score = f32(0.0)
        for d in range(width):
            score += q[d] * _wide(k[j, d])  # type: ignore[no-untyped-call]
        score *= scale
        scores[j] = score
        high = score if score > high else high
    _mix(v, first, last, scores, high, out)


@compiled(inline="always", fastmath=ORDERED)
def _look_biased(q, k, v, last, bias, scores, out):  # type: ignore[no-untyped-def]
    """One head: out = softmax(q k + bias) v over the keys 0 … last."""
    width = q.shape[0]
    high = f32(-np.inf)
    for j in range(last + 1):
        score = bias[last - j]
        for d in range(width):
            score += q[d] * _wide(k[j, d])  # type: ignore[no-untyped-call]
        scores[j] = score
        high = score if score > high else high
    _mix(v, 0, last, scores, high, out)


@compiled(inline="always", fastmath=ORDERED)
def _mix(v, first, last, scores, high, out):  # type: ignore[no-untyped-def]
    """The mean of the values by e to their scores, of which `high` is the highest."""
    width = out.shape[0]
    total = f32(0.0)
    for j in range(first, last + 1):
        scores[j] = _exp(scores[j] - high)
        total += scores[j]
    out[:] = f32(0.0)
    for j in range(first, last + 1):
        weight = scores[j] / total
        for d in range(width):
            out[d] += weight * _wide(v[j, d])  # type: ignore[no-untyped-call]
