"""Products of bfloat16 pairs, two multiplications in one instruction of the CPU (AVX512-BF16).

A matrix to multiply by lies in pairs of rows: `[k, n]` as `[k/2, n, 2]`. Sums are float32. All
matrices are passed as addresses, with strides in elements of their own. What is defined here are
functions for compiled code; an operand of one is an argument of it as LLVM sees it.
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
Heights = tuple[tuple[int, int], ...]


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


def _everywhere(builder: Any, value: Any, width: int) -> Any:
    """A vector of one value."""
    kind = ir.VectorType(value.type, width)
    first = builder.insert_element(kind(ir.Undefined), value, WORD(0))
    return builder.shuffle_vector(first, kind(ir.Undefined), ir.VectorType(WORD, width)(None))


def _narrow(builder: Any, value: Any, width: int) -> Any:
    """float32 to bfloat16, to the nearest, as the integers that hold it."""
    rounded = builder.fptrunc(value, ir.VectorType(_BFloat(), width))
    return builder.bitcast(rounded, ir.VectorType(HALF, width))


def _widen(builder: Any, value: Any, width: int) -> Any:
    words = ir.VectorType(WORD, width)
    moved = builder.shl(builder.zext(value, words), words([16] * width))
    return builder.bitcast(moved, ir.VectorType(FLOAT, width))


def _multiply_add(builder: Any, total: Any, left: Any, right: Any) -> Any:
    product = builder.fmul(left, right, flags=("contract",))
    return builder.fadd(total, product, flags=("contract",))


class _Tile:
    """A part of `x @ b`, `rows` by `vectors` vectors of `width` columns, its sums in registers.

    unroll sums are kept apart, so that one multiplication need not wait for the last. Subclasses
    say what a step along k adds, and where the sums go.
    """

    def __init__(self, rows: int, vectors: int, width: int, unroll: int) -> None:
        self.rows, self.vectors, self.width = rows, vectors, width
        self._unroll = unroll
        self._sums = ir.VectorType(FLOAT, width)

    def emit(
        self, builder: Any, y: Any, ldy: Any, x: Any, ldx: Any, b: Any, ldb: Any, steps: Any
    ) -> None:
        sums = self._zeros(builder)
        number, unroll = steps.type, self._unroll
        whole = builder.sdiv(steps, number(unroll))
        with cgutils.for_range(builder, whole) as loop:
            for offset in range(unroll):
                index = builder.add(builder.mul(loop.index, number(unroll)), number(offset))
                self._step(builder, sums[offset], (x, ldx, b, ldb), index)
        if unroll > 1:
            with cgutils.for_range(builder, steps, builder.mul(whole, number(unroll))) as loop:
                self._step(builder, sums[0], (x, ldx, b, ldb), loop.index)
        for row in range(self.rows):
            for vector in range(self.vectors):
                total = builder.load(sums[0][row][vector])
                for part in sums[1:]:
                    total = builder.fadd(total, builder.load(part[row][vector]))
                start = builder.mul(number(row), ldy)
                self._write(builder, total, y, builder.add(start, number(vector * self.width)))

    def _zeros(self, builder: Any) -> list[list[list[Any]]]:
        """Places for the sums, by part, row and vector."""

        def place() -> Any:
            made = cgutils.alloca_once(builder, self._sums)
            builder.store(self._sums(None), made)
            return made

        return [
            [[place() for _ in range(self.vectors)] for _ in range(self.rows)]
            for _ in range(self._unroll)
        ]

    def _step(self, builder: Any, sums: Any, matrices: Any, index: Any) -> None:
        raise NotImplementedError

    def _write(self, builder: Any, total: Any, y: Any, index: Any) -> None:
        """Store a vector of y, which begins at element `index`."""
        builder.store(total, _at(builder, y, index, 2, self._sums), align=4)


class _PairTile(_Tile):
    """x `[rows, 2 * steps]` bfloat16, b in pairs."""

    def _step(self, builder: Any, sums: Any, matrices: Any, index: Any) -> None:
        """Multiply by one pair of rows of b."""
        x, ldx, b, ldb = matrices
        number, words = index.type, ir.VectorType(WORD, self.width)
        pairs = ir.VectorType(_BFloat(), 2 * self.width)
        dot = self._instruction(builder, pairs)
        start, columns = builder.mul(index, ldb), []
        for vector in range(self.vectors):
            column = builder.add(start, number(vector * self.width))
            loaded = builder.load(_at(builder, b, column, 2, words), align=4)
            columns.append(builder.bitcast(loaded, pairs))
        for row, places in enumerate(sums):
            own = _at(builder, x, builder.mul(number(row), ldx), 1, HALF)
            pair = _at(builder, builder.ptrtoint(own, number), index, 2, WORD)
            spread = _everywhere(builder, builder.load(pair, align=2), self.width)
            both = builder.bitcast(spread, pairs)
            for place, column in zip(places, columns, strict=True):
                builder.store(builder.call(dot, [builder.load(place), both, column]), place)

    def _instruction(self, builder: Any, pairs: Any) -> Any:
        kind = ir.FunctionType(self._sums, [self._sums, pairs, pairs])
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * self.width}"
        return cgutils.get_or_insert_function(builder.module, kind, name)


class _RoundingTile(_PairTile):
    """y is bfloat16."""

    def _write(self, builder: Any, total: Any, y: Any, index: Any) -> None:
        place = _at(builder, y, index, 1, ir.VectorType(HALF, self.width))
        total = self._written(builder, total, place)
        builder.store(_narrow(builder, total, self.width), place, align=2)

    def _written(self, _builder: Any, total: Any, _place: Any) -> Any:
        return total


class _AddingTile(_RoundingTile):
    """Adds onto what y holds."""

    def _written(self, builder: Any, total: Any, place: Any) -> Any:
        return builder.fadd(total, _widen(builder, builder.load(place, align=2), self.width))


class _MixtureTile(_Tile):
    """x `[rows, steps]` float32, b plain bfloat16."""

    def _step(self, builder: Any, sums: Any, matrices: Any, index: Any) -> None:
        x, ldx, b, ldb = matrices
        place = _at(builder, b, builder.mul(index, ldb), 1, ir.VectorType(HALF, self.width))
        column = _widen(builder, builder.load(place, align=2), self.width)
        for row, (total,) in enumerate(sums):
            own = builder.add(builder.mul(index.type(row), ldx), index)
            one = builder.load(_at(builder, x, own, 2, FLOAT), align=4)
            spread = _everywhere(builder, one, self.width)
            builder.store(_multiply_add(builder, builder.load(total), column, spread), total)


class _Strip:
    """`x @ b` of any number of rows, tile below tile; sizes: a number of y, and one of x, has
    2**size bytes. heights: rows and unroll of the tiles, the highest first and one row last.
    """

    def __init__(
        self, make: Callable[[int, int], _Tile], heights: Heights, sizes: tuple[int, int]
    ) -> None:
        self._tiles = [make(*height) for height in heights]
        self._sizes = sizes

    def __call__(self, context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        y, ldy, x, ldx, b, ldb, m, steps = args
        number = m.type
        done = number(0)

        def below(base: Any, row: Any, stride: Any, size: int) -> Any:
            return builder.add(base, builder.shl(builder.mul(row, stride), number(size)))

        for tile in self._tiles:
            count = builder.sdiv(builder.sub(m, done), number(tile.rows))
            with cgutils.for_range(builder, count) as loop:
                row = builder.add(done, builder.mul(loop.index, number(tile.rows)))
                own = below(y, row, ldy, self._sizes[0]), ldy, below(x, row, ldx, self._sizes[1])
                tile.emit(builder, *own, ldx, b, ldb, steps)
            done = builder.add(done, builder.mul(count, number(tile.rows)))
        return context.get_dummy_value()


def _strip(kind: type[_Tile], vectors: int, width: int, heights: Heights, sizes: Any) -> Any:
    generate = _Strip(lambda rows, unroll: kind(rows, vectors, width, unroll), heights, sizes)

    def product(
        _context: Any, y: Any, ldy: Any, x: Any, ldx: Any, b: Any, ldb: Any, m: Any, steps: Any
    ) -> Any:
        return types.void(y, ldy, x, ldx, b, ldb, m, steps), generate

    return intrinsic(product)


def summing(columns: int, heights: Heights) -> Any:
    """`(y, ldy, x, ldx, b, ldb, m, pairs)`: y `[m, columns]` float32 = x `[m, 2 * pairs]` times a
    b in pairs."""
    return _strip(_PairTile, *_vectors(columns), heights, (2, 1))


def rounding(columns: int, heights: Heights) -> Any:
    """The same for a y of bfloat16."""
    return _strip(_RoundingTile, *_vectors(columns), heights, (1, 1))


def adding(columns: int, heights: Heights) -> Any:
    """The same, added onto a y of bfloat16."""
    return _strip(_AddingTile, *_vectors(columns), heights, (1, 1))


def mixing(heights: Heights) -> Any:
    """`(y, ldy, x, ldx, b, ldb, m, k)`: y `[m, WIDE]` float32 = x `[m, k]` float32 times a plain b
    `[k, WIDE]` of bfloat16."""
    return _strip(_MixtureTile, 1, WIDE, heights, (2, 2))


def _vectors(columns: int) -> tuple[int, int]:
    """How many vectors, of what width, make so many columns."""
    width = min(columns, WIDE)
    return columns // width, width


def _prefetching(_context: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, WORD, WORD, WORD])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        to_read, second_level, data = 0, 2, 1
        builder.call(fetch, [place, WORD(to_read), WORD(second_level), WORD(data)])
        return context.get_dummy_value()

    return types.void(at), generate


prefetch: Any = intrinsic(_prefetching)
"""Ask for the cache line at an address, which will be read soon; any address will do."""


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


def _scaling(_context: Any, to: Any, source: Any, factor: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        at, of, by = args
        floats, halves = ir.VectorType(FLOAT, LANES), ir.VectorType(HALF, LANES)
        value = builder.load(builder.inttoptr(of, halves.as_pointer()), align=2)
        wide, spread = _widen(builder, value, LANES), _everywhere(builder, by, LANES)
        place = builder.inttoptr(at, floats.as_pointer())
        total = _multiply_add(builder, builder.load(place, align=4), wide, spread)
        builder.store(total, place, align=4)
        return context.get_dummy_value()

    return types.void(to, source, factor), generate


add_scaled: Any = intrinsic(_scaling)
"""Add `LANES` bfloat16 numbers at the second address, times the third argument, onto as many
float32 numbers at the first."""
