"""Products of bfloat16 pairs, two multiplications in one instruction of the CPU (AVX512-BF16).

A matrix to multiply by lies in pairs of rows: `[k, n]` as `[k/2, n, 2]`. Sums are float32. All
matrices are passed as addresses, with strides in elements of their own.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils as untyped_cgutils
from numba.extending import intrinsic

cgutils: Any = untyped_cgutils

FLOAT, WORD, HALF = ir.FloatType(), ir.IntType(32), ir.IntType(16)
LANES = 8
"""Columns of the narrowest tile: matrices have a multiple of it."""
WIDE = 16
"""Columns of a full vector of float32."""


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's `bfloat`, which llvmlite has no name for."""

    intrinsic_name = "bf16"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)

    def _to_string(self) -> str:
        return "bfloat"


@cache
def pairs_supported() -> bool:
    """Whether this CPU has the instruction, for vectors of 256 and 512 bits."""
    try:
        features = binding.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know on this machine
        return False
    return all(features.get(name, False) for name in ("avx512bf16", "avx512vl", "avx512bw"))


def _at(builder: Any, base: Any, index: Any, shift: int, kind: ir.Type) -> Any:
    """Element `index`, of 2**shift bytes, as a pointer."""
    offset = builder.shl(index, index.type(shift))
    return builder.inttoptr(builder.add(base, offset), kind.as_pointer())


def _narrow(builder: Any, value: Any, width: int) -> Any:
    """float32 to bfloat16, to the nearest, as the integers that hold it."""
    rounded = builder.fptrunc(value, ir.VectorType(_BFloat(), width))
    return builder.bitcast(rounded, ir.VectorType(HALF, width))


def _widen(builder: Any, value: Any, width: int) -> Any:
    words = ir.VectorType(WORD, width)
    moved = builder.shl(builder.zext(value, words), words([16] * width))
    return builder.bitcast(moved, ir.VectorType(FLOAT, width))


class _Tile:
    """`x @ b` for x `[rows, 2 * pairs]` and b of `vectors * width` columns, sums in registers.

    unroll sums are kept apart, so that one multiplication need not wait for the last.
    write: "float32" and "bfloat16" overwrite y, "add" adds onto a y of bfloat16.
    """

    def __init__(self, rows: int, vectors: int, width: int, unroll: int, write: str) -> None:
        self._rows, self._vectors, self._width = rows, vectors, width
        self._unroll, self._write = unroll, write
        self._sums = ir.VectorType(FLOAT, width)
        self._words = ir.VectorType(WORD, width)
        self._pairs = ir.VectorType(_BFloat(), 2 * width)

    def __call__(self, context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        y, ldy, x, ldx, b, ldb, pairs = args
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * self._width}"
        kind = ir.FunctionType(self._sums, [self._sums, self._pairs, self._pairs])
        dot = cgutils.get_or_insert_function(builder.module, kind, name)
        sums = self._zeros(builder)
        number, unroll = pairs.type, self._unroll
        whole = builder.sdiv(pairs, number(unroll))
        with cgutils.for_range(builder, whole) as loop:
            for offset in range(unroll):
                index = builder.add(builder.mul(loop.index, number(unroll)), number(offset))
                self._step(builder, dot, sums[offset], (x, ldx, b, ldb), index)
        if unroll > 1:
            with cgutils.for_range(builder, pairs, builder.mul(whole, number(unroll))) as loop:
                self._step(builder, dot, sums[0], (x, ldx, b, ldb), loop.index)
        self._finish(builder, sums, y, ldy)
        return context.get_dummy_value()

    def _zeros(self, builder: Any) -> list[list[list[Any]]]:
        sums = [
            [
                [cgutils.alloca_once(builder, self._sums) for _ in range(self._vectors)]
                for _ in range(self._rows)
            ]
            for _ in range(self._unroll)
        ]
        for place in (place for part in sums for row in part for place in row):
            builder.store(self._sums(None), place)
        return sums

    def _step(self, builder: Any, dot: Any, sums: Any, matrices: Any, index: Any) -> None:
        """Multiply by one pair of rows of b."""
        x, ldx, b, ldb = matrices
        number, words = index.type, self._words
        start = builder.mul(index, ldb)
        columns = []
        for vector in range(self._vectors):
            column = builder.add(start, number(vector * self._width))
            loaded = builder.load(_at(builder, b, column, 2, words), align=4)
            columns.append(builder.bitcast(loaded, self._pairs))
        for row in range(self._rows):
            own = _at(builder, x, builder.mul(number(row), ldx), 1, HALF)
            pair = _at(builder, builder.ptrtoint(own, number), index, 2, WORD)
            lane = builder.insert_element(words(ir.Undefined), builder.load(pair, align=2), WORD(0))
            mask = ir.VectorType(WORD, self._width)(None)
            spread = builder.shuffle_vector(lane, words(ir.Undefined), mask)
            both = builder.bitcast(spread, self._pairs)
            for place, column in zip(sums[row], columns, strict=True):
                builder.store(builder.call(dot, [builder.load(place), both, column]), place)

    def _finish(self, builder: Any, sums: Any, y: Any, ldy: Any) -> None:
        number, width = ldy.type, self._width
        for row in range(self._rows):
            for vector in range(self._vectors):
                total = builder.load(sums[0][row][vector])
                for part in sums[1:]:
                    total = builder.fadd(total, builder.load(part[row][vector]))
                index = builder.add(builder.mul(number(row), ldy), number(vector * self._width))
                if self._write == "float32":
                    builder.store(total, _at(builder, y, index, 2, self._sums), align=4)
                    continue
                place = _at(builder, y, index, 1, ir.VectorType(HALF, width))
                if self._write == "add":
                    before = _widen(builder, builder.load(place, align=2), width)
                    total = builder.fadd(total, before)
                builder.store(_narrow(builder, total, width), place, align=2)


def tile(rows: int, vectors: int, width: int, unroll: int, write: str) -> Callable[..., Any]:
    """A tile as a function `(y, ldy, x, ldx, b, ldb, pairs)` for compiled code; see `_Tile`."""
    generate = _Tile(rows, vectors, width, unroll, write)

    def product(_context: Any, y: Any, ldy: Any, x: Any, ldx: Any, b: Any, ldb: Any, k: Any) -> Any:
        return types.void(y, ldy, x, ldx, b, ldb, k), generate

    return intrinsic(product)


def _narrowing(_context: Any, to: Any, source: Any) -> Any:

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        at, of = args
        floats, halves = ir.VectorType(FLOAT, LANES), ir.VectorType(HALF, LANES)
        value = builder.load(builder.inttoptr(of, floats.as_pointer()), align=4)
        place = builder.inttoptr(at, halves.as_pointer())
        builder.store(_narrow(builder, value, LANES), place, align=2)
        return context.get_dummy_value()

    return types.void(to, source), generate


narrow: Any = intrinsic(_narrowing)
"""Round `LANES` float32 numbers at the second address to bfloat16 at the first."""


def _adding(_context: Any, to: Any, source: Any, factor: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        at, of, by = args
        floats, halves = ir.VectorType(FLOAT, LANES), ir.VectorType(HALF, LANES)
        value = builder.load(builder.inttoptr(of, halves.as_pointer()), align=2)
        lane = builder.insert_element(floats(ir.Undefined), by, WORD(0))
        mask = ir.VectorType(WORD, LANES)(None)
        spread = builder.shuffle_vector(lane, floats(ir.Undefined), mask)
        product = builder.fmul(_widen(builder, value, LANES), spread, flags=("contract",))
        place = builder.inttoptr(at, floats.as_pointer())
        total = builder.fadd(builder.load(place, align=4), product, flags=("contract",))
        builder.store(total, place, align=4)
        return context.get_dummy_value()

    return types.void(to, source, factor), generate


add_scaled: Any = intrinsic(_adding)
"""Add `LANES` bfloat16 numbers at the second address, times the third argument, onto as many
float32 numbers at the first."""


class _Mixture:
    """`x @ b` for x `[rows, k]` float32 and `WIDE` columns of a plain bfloat16 b, y overwritten."""

    def __init__(self, rows: int, unroll: int) -> None:
        self._rows, self._unroll = rows, unroll
        self._sums = ir.VectorType(FLOAT, WIDE)

    def __call__(self, context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        y, ldy, x, ldx, b, ldb, k = args
        number, unroll = k.type, self._unroll
        sums = [
            [cgutils.alloca_once(builder, self._sums) for _ in range(self._rows)]
            for _ in range(unroll)
        ]
        for place in (place for part in sums for place in part):
            builder.store(self._sums(None), place)
        whole = builder.sdiv(k, number(unroll))
        with cgutils.for_range(builder, whole) as loop:
            for offset in range(unroll):
                index = builder.add(builder.mul(loop.index, number(unroll)), number(offset))
                self._step(builder, sums[offset], (x, ldx, b, ldb), index)
        with cgutils.for_range(builder, k, builder.mul(whole, number(unroll))) as loop:
            self._step(builder, sums[0], (x, ldx, b, ldb), loop.index)
        for row in range(self._rows):
            total = builder.load(sums[0][row])
            for part in sums[1:]:
                total = builder.fadd(total, builder.load(part[row]))
            place = _at(builder, y, builder.mul(number(row), ldy), 2, self._sums)
            builder.store(total, place, align=4)
        return context.get_dummy_value()

    def _step(self, builder: Any, sums: Any, matrices: Any, index: Any) -> None:
        x, ldx, b, ldb = matrices
        number = index.type
        place = _at(builder, b, builder.mul(index, ldb), 1, ir.VectorType(HALF, WIDE))
        column = _widen(builder, builder.load(place, align=2), WIDE)
        mask = ir.VectorType(WORD, WIDE)(None)
        for row, total in enumerate(sums):
            own = builder.add(builder.mul(number(row), ldx), index)
            one = builder.load(_at(builder, x, own, 2, FLOAT), align=4)
            lane = builder.insert_element(self._sums(ir.Undefined), one, WORD(0))
            spread = builder.shuffle_vector(lane, self._sums(ir.Undefined), mask)
            product = builder.fmul(column, spread, flags=("contract",))
            builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)


def mixture(rows: int, unroll: int) -> Callable[..., Any]:
    """As a function `(y, ldy, x, ldx, b, ldb, k)` for compiled code; see `_Mixture`."""
    generate = _Mixture(rows, unroll)

    def mixed(_context: Any, y: Any, ldy: Any, x: Any, ldx: Any, b: Any, ldb: Any, k: Any) -> Any:
        return types.void(y, ldy, x, ldx, b, ldb, k), generate

    return intrinsic(mixed)
