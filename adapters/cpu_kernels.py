"""Both forms compiled for float32 on the CPU, where a decode step's products are so small that
calling torch for each costs more than their arithmetic. The torch forms in `ops` say what they
compute, serve every other device and dtype, and are what these are tested against.

Matrices are passed as addresses and row strides: the tasks of a step, of whatever ranks, are then
one table of numbers. Callers keep the tensors alive and contiguous, see `compiled`.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils
from numba.extending import intrinsic

cgutils: Any = untyped_cgutils

BLOCK = 48
"""Tokens whose intermediate products stay in the first cache between two products."""


def _tile(rows: int, width: int, unroll: int) -> Callable[..., Any]:
    """`y += x @ b` for y `[rows, width]`, x `[rows, k]`, b `[k, width]`, y held in registers.

    unroll sums are kept apart, so that one multiplication need not wait for the last.
    """
    floats = ir.FloatType()
    vector = ir.VectorType(floats, width)
    fuse = ("contract",)

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        y, ldy, x, ldx, b, ldb, k = args
        number = y.type

        def at(base: Any, row: Any, stride: Any, column: Any, kind: ir.Type) -> Any:
            index = builder.add(builder.mul(row, stride), column)
            address = builder.add(base, builder.shl(index, number(2)))
            return builder.inttoptr(address, kind.as_pointer())

        def load(base: Any, row: Any, stride: Any, column: Any, kind: ir.Type) -> Any:
            return builder.load(at(base, row, stride, column, kind), align=4)

        sums = [[cgutils.alloca_once(builder, vector) for _ in range(rows)] for _ in range(unroll)]
        for part in sums:
            for row, place in enumerate(part):
                first = part is sums[0]
                start = load(y, number(row), ldy, number(0), vector) if first else vector(None)
                builder.store(start, place)

        def step(index: Any, part: Any) -> None:
            factor = load(b, index, ldb, number(0), vector)
            for row, place in enumerate(part):
                one = load(x, number(row), ldx, index, floats)
                lane = builder.insert_element(vector(ir.Undefined), one, ir.IntType(32)(0))
                mask = ir.VectorType(ir.IntType(32), width)(None)
                spread = builder.shuffle_vector(lane, vector(ir.Undefined), mask)
                product = builder.fmul(spread, factor, flags=fuse)
                builder.store(builder.fadd(builder.load(place), product, flags=fuse), place)

        whole = builder.sdiv(k, number(unroll))
        with cgutils.for_range(builder, whole) as loop:
            for offset, part in enumerate(sums):
                step(builder.add(builder.mul(loop.index, number(unroll)), number(offset)), part)
        if unroll > 1:
            with cgutils.for_range(builder, k, builder.mul(whole, number(unroll))) as loop:
                step(loop.index, sums[0])
        for row in range(rows):
            total = builder.load(sums[0][row])
            for part in sums[1:]:
                total = builder.fadd(total, builder.load(part[row]))
            builder.store(total, at(y, number(row), ldy, number(0), vector), align=4)
        return _context.get_dummy_value()

    def tile(_context: Any, y: Any, ldy: Any, x: Any, ldx: Any, b: Any, ldb: Any, k: Any) -> Any:
        return types.void(y, ldy, x, ldx, b, ldb, k), generate

    return intrinsic(tile)


_tile_6_16, _tile_4_16, _tile_1_16 = _tile(6, 16, 1), _tile(4, 16, 1), _tile(1, 16, 4)
_tile_4_8, _tile_1_8 = _tile(4, 8, 2), _tile(1, 8, 4)
_tile_1_1 = _tile(1, 1, 4)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function without Python's lock held, and keep it for the next process."""

    def compile_it(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # nowhere to write the cache: compile it in every process
            return numba.njit(nogil=True, **options)(function)

    return compile_it


@compiled()
def _product(y, ldy, x, ldx, b, ldb, m, k, n):  # type: ignore[no-untyped-def]
    """`y += x @ b` for y `[m, n]`, x `[m, k]`, b `[k, n]`."""
    column = 0
    while column < n:
        own_y, own_b, row = y + 4 * column, b + 4 * column, 0
        if n - column >= 16:
            while row + 6 <= m:
                _tile_6_16(own_y + 4 * row * ldy, ldy, x + 4 * row * ldx, ldx, own_b, ldb, k)
                row += 6
            while row + 4 <= m:
                _tile_4_16(own_y + 4 * row * ldy, ldy, x + 4 * row * ldx, ldx, own_b, ldb, k)
                row += 4
            while row < m:
                _tile_1_16(own_y + 4 * row * ldy, ldy, x + 4 * row * ldx, ldx, own_b, ldb, k)
                row += 1
            column += 16
        elif n - column >= 8:
            while row + 4 <= m:
                _tile_4_8(own_y + 4 * row * ldy, ldy, x + 4 * row * ldx, ldx, own_b, ldb, k)
                row += 4
            while row < m:
                _tile_1_8(own_y + 4 * row * ldy, ldy, x + 4 * row * ldx, ldx, own_b, ldb, k)
                row += 1
            column += 8
        else:
            while row < m:
                _tile_1_1(own_y + 4 * row * ldy, ldy, x + 4 * row * ldx, ldx, own_b, ldb, k)
                row += 1
            column += 1


@compiled()
def combined_shrink(x, width, a, ranks, runs, hidden):  # type: ignore[no-untyped-def]
    """Every task's first product. x: address of `[N, width]`; a, ranks `[T]`: the addresses and
    sums of ranks of the tasks' A_t; runs `[K, 3]`: first token, tokens, task; hidden: `[N, R]`
    float32 zeros, of which each token fills as many numbers as its task has ranks."""
    for i in range(runs.shape[0]):
        first, count, task = runs[i]
        rank = ranks[task]
        if rank > 0:
            to = hidden.ctypes.data + 4 * first * hidden.shape[1]
            own = x + 4 * first * width
            _product(to, hidden.shape[1], own, width, a[task], rank, count, width, rank)


@compiled()
def combined_expand(y, width, b, ranks, offsets, runs, hidden):  # type: ignore[no-untyped-def]
    """Every task's second product for one module, added onto y: address of `[N, width]`. b, ranks,
    offsets `[T]`: addresses and ranks of the tasks' B_t and where in hidden their numbers begin."""
    for i in range(runs.shape[0]):
        first, count, task = runs[i]
        rank = ranks[task]
        if rank > 0:
            own = hidden.ctypes.data + 4 * (first * hidden.shape[1] + offsets[task])
            to = y + 4 * first * width
            _product(to, width, own, hidden.shape[1], b[task], width, count, rank, width)


@compiled()
def factored_shrink(x, width, a, weights, rows, first, mixed):  # type: ignore[no-untyped-def]
    """First half for a group. x: address of `[n, width]`; a: of `[H, width/H, G*S*r]`; weights
    `[*, M, H, S]`, of which row rows[i] is token i's and module first the group's first; mixed
    `[n, G, r]` float32 zeros, to which the activations go, averaged by head and skill."""
    tokens, size, rank = mixed.shape
    heads, skills = weights.shape[2], weights.shape[3]
    inner, columns = width // heads, skills * rank
    products = np.empty((BLOCK, columns), np.float32)
    for h in range(heads):
        for g in range(size):
            panel = a + 4 * (h * inner * size + g) * columns
            for start in range(0, tokens, BLOCK):
                count = min(BLOCK, tokens - start)
                products[:count] = 0
                own = x + 4 * (start * width + h * inner)
                to = products.ctypes.data
                _product(to, columns, own, width, panel, size * columns, count, inner, columns)
                for i in range(count):
                    w = weights[rows[start + i], first + g, h]
                    for s in range(skills):
                        for j in range(rank):
                            mixed[start + i, g, j] += w[s] * products[i, s * rank + j]


@compiled()
def factored_expand(y, width, b, weights, rows, module, g, mixed):  # type: ignore[no-untyped-def]
    """Second half for module number `module`, the g-th of its group, added onto y: address of
    `[n, width]`; b: of `[H, S*r, width/H]`."""
    tokens, _, rank = mixed.shape
    heads, skills = weights.shape[2], weights.shape[3]
    outer, columns = width // heads, skills * rank
    spread = np.empty((BLOCK, columns), np.float32)
    for h in range(heads):
        for start in range(0, tokens, BLOCK):
            count = min(BLOCK, tokens - start)
            for i in range(count):
                w = weights[rows[start + i], module, h]
                for s in range(skills):
                    for j in range(rank):
                        spread[i, s * rank + j] = w[s] * mixed[start + i, g, j]
            to = y + 4 * (start * width + h * outer)
            panel = b + 4 * h * columns * outer
            _product(to, width, spread.ctypes.data, columns, panel, outer, count, columns, outer)
