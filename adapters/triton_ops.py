"""Both forms as Triton kernels, for CUDA devices. The torch forms in `ops` say what they compute
and are what these are tested against, in Triton's interpreter where there is no GPU.

Activations are handed from shrink to expand in float32 and in parts `[P, ...]`: each of P programs
sums over its share of the input and stores what it found, and the expand adds the parts up in their
order. Atomic additions would save the parts, and make a step's rounding depend on the weather.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

WIDENED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""The interpreter's products of bfloat16 are wrong: there they are made in float32, which holds
every product of two such numbers exactly."""


VARYING = ("tokens", "parts", "g", "first", "module", "tile")
"""What differs from launch to launch: no kernel is compiled anew for a special value of these."""


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function, once for each of its tile sizes and dtypes."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(do_not_specialize=[n for n in VARYING if n in names])(function)


@kernel
def _dot(left, right, total):  # type: ignore[no-untyped-def]
    """`total + left @ right`, accumulated in float32, and never in TF32."""
    if WIDENED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    return tl.dot(left, right, total, input_precision="ieee")


@kernel
def factored_shrink(  # type: ignore[no-untyped-def]
    x,  # [*, H*inner]
    a,  # [H, inner, G*S*r]
    weights,  # [*, M, H, S]
    positions,  # [tokens], each token's row of x
    rows,  # [tokens], each token's row of weights
    mixed,  # [P, tokens, G, r] float32
    tokens,
    inner,
    inner_each,
    first,
    row_stride,
    module_stride,
    HEADS: tl.constexpr,
    SKILLS: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS_EACH: tl.constexpr,
    INNER_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Some tokens, one module, and one part of heads, inputs and skills: `x_h A[h,s]` is weighted
    and added up over h and s before anything is stored."""
    g, part = tl.program_id(1), tl.program_id(2)
    skill_blocks: tl.constexpr = (SKILLS + BLOCK_S - 1) // BLOCK_S
    rest = part // skill_blocks
    start = (rest % INNER_SPLITS) * inner_each
    stop = tl.minimum(inner, start + inner_each)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < tokens
    column = tl.arange(0, BLOCK_S * BLOCK_R)
    s = (part % skill_blocks) * BLOCK_S + column // BLOCK_R
    j = column % BLOCK_R
    exists = (s < SKILLS) & (j < RANK)
    position = tl.load(positions + n, mask=live, other=0).to(tl.int64)
    row = tl.load(rows + n, mask=live, other=0).to(tl.int64)
    own_weights = weights + row * row_stride + (first + g) * module_stride
    total = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for i in range(HEADS_EACH):
        h = (rest // INNER_SPLITS) * HEADS_EACH + i
        product = tl.zeros([BLOCK_N, BLOCK_S * BLOCK_R], tl.float32)
        for begin in range(start, stop, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            at = x + position[:, None] * (HEADS * inner) + h * inner + k[None, :]
            own = tl.load(at, mask=live[:, None] & (k < stop)[None, :], other=0.0)
            at = a + (h * inner + k)[:, None] * (SIZE * SKILLS * RANK)
            at += (g * SKILLS + s)[None, :] * RANK + j[None, :]
            panel = tl.load(at, mask=(k < stop)[:, None] & exists[None, :], other=0.0)
            product = _dot(own, panel, product)
        at = own_weights[:, None] + h * SKILLS + s[None, :]
        w = tl.load(at, mask=live[:, None] & exists[None, :], other=0.0).to(tl.float32)
        total += tl.sum(tl.reshape(product * w, (BLOCK_N, BLOCK_S, BLOCK_R)), axis=1)
    r = tl.arange(0, BLOCK_R)
    at = mixed + ((part * tokens + n)[:, None] * SIZE + g) * RANK + r[None, :]
    tl.store(at, total, mask=live[:, None] & (r < RANK)[None, :])


@kernel
def factored_expand(  # type: ignore[no-untyped-def]
    y0,  # [*, H*outer0], and so on: up to three modules of a group
    y1,
    y2,
    b0,  # [H, S*r, outer0], and so on
    b1,
    b2,
    outer0,
    outer1,
    outer2,
    stride0,  # between the rows of y0, and so on
    stride1,
    stride2,
    weights,  # [*, M, H, S]
    positions,  # [tokens]
    rows,  # [tokens]
    mixed,  # [P, tokens, G, r] float32
    tokens,
    parts,
    g,  # number of the first of these modules in the group
    module,  # and in the weights
    row_stride,
    module_stride,
    SKILLS: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    MODULES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Some tokens, one head, some outputs of one module: adds `sum_s w[h,s] v B[h,s]` onto y.

    The tiles of all modules stand in a row, so that a group is one launch."""
    tile = tl.program_id(2)
    tiles0 = tl.cdiv(outer0, BLOCK_O)
    tiles1 = tiles0 + tl.cdiv(outer1, BLOCK_O)
    if tile < tiles0:
        _expand(
            y0, b0, outer0, stride0, tile, weights, positions, rows, mixed,
            tokens, parts, g, module, row_stride, module_stride,
            SKILLS, RANK, SIZE, BLOCK_N, BLOCK_O, BLOCK_S, BLOCK_R,
        )  # fmt: skip
    if MODULES > 1:  # noqa: SIM102, known when it is compiled
        if (tile >= tiles0) & (tile < tiles1):
            _expand(
                y1, b1, outer1, stride1, tile - tiles0, weights, positions, rows, mixed,
                tokens, parts,
                g + 1, module + 1, row_stride, module_stride,
                SKILLS, RANK, SIZE, BLOCK_N, BLOCK_O, BLOCK_S, BLOCK_R,
            )  # fmt: skip
    if MODULES > 2:  # noqa: SIM102
        if tile >= tiles1:
            _expand(
                y2, b2, outer2, stride2, tile - tiles1, weights, positions, rows, mixed,
                tokens, parts,
                g + 2, module + 2, row_stride, module_stride,
                SKILLS, RANK, SIZE, BLOCK_N, BLOCK_O, BLOCK_S, BLOCK_R,
            )  # fmt: skip


@kernel
def _expand(  # type: ignore[no-untyped-def]
    y,
    b,
    outer,
    stride,
    tile,
    weights,
    positions,
    rows,
    mixed,
    tokens,
    parts,
    g,
    module,
    row_stride,
    module_stride,
    SKILLS: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    h = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < tokens
    o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    r = tl.arange(0, BLOCK_R)
    v = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for part in range(parts):
        at = mixed + ((part * tokens + n)[:, None] * SIZE + g) * RANK + r[None, :]
        v += tl.load(at, mask=live[:, None] & (r < RANK)[None, :], other=0.0)
    position = tl.load(positions + n, mask=live, other=0).to(tl.int64)
    row = tl.load(rows + n, mask=live, other=0).to(tl.int64)
    own_weights = weights + row * row_stride + module * module_stride + h * SKILLS
    column = tl.arange(0, BLOCK_S * BLOCK_R)
    j = column % BLOCK_R
    total = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for first_skill in range(0, SKILLS, BLOCK_S):
        s = first_skill + tl.arange(0, BLOCK_S)
        at = own_weights[:, None] + s[None, :]
        w = tl.load(at, mask=live[:, None] & (s < SKILLS)[None, :], other=0.0).to(tl.float32)
        hidden = tl.reshape(w[:, :, None] * v[:, None, :], (BLOCK_N, BLOCK_S * BLOCK_R))
        own = first_skill + column // BLOCK_R
        exists = (own < SKILLS) & (j < RANK)
        at = b + (h * SKILLS * RANK + own * RANK + j)[:, None] * outer + o[None, :]
        panel = tl.load(at, mask=exists[:, None] & (o < outer)[None, :], other=0.0)
        total = _dot(hidden.to(panel.dtype), panel, total)
    at = y + position[:, None] * stride + h * outer + o[None, :]
    mask = live[:, None] & (o < outer)[None, :]
    base = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, (base + total).to(y.dtype.element_ty), mask=mask)


@kernel
def combined_shrink(  # type: ignore[no-untyped-def]
    x,  # [*, width]
    a,  # [T], addresses of the tasks' A_t [width, R]
    ranks,  # [T], their R
    positions,  # [tokens], each token's row of x, ordered by task
    items,  # [K, 3]: first token, tokens, task
    hidden,  # [P, tokens, widest] float32
    tokens,
    width,
    width_each,
    widest,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Some tokens of one task, some of its columns, and one part of the input: `x A_t`. With one
    token (BLOCK_N is 1) the task's factors are gathered and multiplied without the tensor cores."""
    item, part = tl.program_id(0), tl.program_id(2)
    first, count = tl.load(items + 3 * item), tl.load(items + 3 * item + 1)
    task = tl.load(items + 3 * item + 2)
    rank = tl.load(ranks + task)
    i = tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    own_a = tl.load(a + task).to(tl.pointer_type(x.dtype.element_ty))
    position = tl.load(positions + first + i, mask=i < count, other=0).to(tl.int64)
    total = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    stop = tl.minimum(width, (part + 1) * width_each)
    for begin in range(part * width_each, stop, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        at = x + position[:, None] * width + k[None, :]
        own = tl.load(at, mask=(i < count)[:, None] & (k < stop)[None, :], other=0.0)
        at = own_a + k[:, None] * rank + r[None, :]
        panel = tl.load(at, mask=(k < stop)[:, None] & (r < rank)[None, :], other=0.0)
        if BLOCK_N == 1:
            single = tl.reshape(own, (BLOCK_K, 1)).to(tl.float32)
            total += tl.sum(single * panel.to(tl.float32), axis=0)[None, :]
        else:
            total = _dot(own, panel, total)
    at = hidden + (part * tokens + first + i)[:, None] * widest + r[None, :]
    tl.store(at, total, mask=(i < count)[:, None] & (r < rank)[None, :])


@kernel
def combined_expand(  # type: ignore[no-untyped-def]
    y,  # [*, width]
    b,  # [T], addresses of the tasks' B_t [r, width]
    ranks,  # [T], their r, 0 where a task leaves the module bare
    offsets,  # [T], where in hidden their numbers begin
    positions,  # [tokens]
    items,  # [K, 3]: first token, tokens, task
    hidden,  # [P, tokens, widest] float32
    tokens,
    width,
    stride,  # between the rows of y
    parts,
    widest,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Some tokens of one task, some outputs of one module: adds `hidden B_t` onto y."""
    item = tl.program_id(0)
    first, count = tl.load(items + 3 * item), tl.load(items + 3 * item + 1)
    task = tl.load(items + 3 * item + 2)
    rank, offset = tl.load(ranks + task), tl.load(offsets + task)
    own_b = tl.load(b + task).to(tl.pointer_type(y.dtype.element_ty))
    i = tl.arange(0, BLOCK_N)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for begin in range(0, rank, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        low = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        for part in range(parts):
            at = hidden + (part * tokens + first + i)[:, None] * widest + (offset + r)[None, :]
            low += tl.load(at, mask=(i < count)[:, None] & (r < rank)[None, :], other=0.0)
        at = own_b + r[:, None] * width + o[None, :]
        panel = tl.load(at, mask=(r < rank)[:, None] & (o < width)[None, :], other=0.0)
        if BLOCK_N == 1:
            single = tl.reshape(low, (BLOCK_R, 1))
            total += tl.sum(single * panel.to(tl.float32), axis=0)[None, :]
        else:
            total = _dot(low.to(panel.dtype), panel, total)
    position = tl.load(positions + first + i, mask=i < count, other=0).to(tl.int64)
    at = y + position[:, None] * stride + o[None, :]
    mask = (i < count)[:, None] & (o < width)[None, :]
    if rank > 0:
        base = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, (base + total).to(y.dtype.element_ty), mask=mask)
