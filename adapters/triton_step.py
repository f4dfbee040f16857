"""A step as the Triton kernels take it: the counterpart of `compiled` for CUDA devices."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from polyhead.adapters import ops, triton_ops
from polyhead.adapters.compiled import FactorTable, rows_of

WIDEST_TILE = 128
"""Columns of skills and ranks that one program holds."""
SMALLEST = 16
"""Least side of a tile that the tensor cores take."""
MOST_PARTS = 8
"""Of one shrink: every program of the expand adds them up again. This and the tile are the best of
those that `benchmarks gpu --tune` tried on an H200."""
TOGETHER = 3
"""Modules of a group that one launch of the expand takes."""
EXPAND_TILE = 64
"""Most outputs of one program of the factored expand."""
INTERPRETED = 4
"""Programs per launch where the kernels are interpreted: each of them is slow."""

Hidden = tuple[Tensor | None, Tensor | None]
"""The low-rank activations in parts: factored `[P, n, G, r]`, combined `[P, n, R]`, float32."""


@lru_cache
def _programs(device: torch.device) -> int:
    """How many programs fill the device."""
    if device.type != "cuda":
        return INTERPRETED
    return 2 * int(torch.cuda.get_device_properties(device).multi_processor_count)


def _splits(wanted: int, length: int, least: int) -> tuple[int, int]:
    """In how many parts to cut a length, and how long each is: a multiple of `least`."""
    each = least * triton.cdiv(triton.cdiv(length, least), max(1, wanted))
    return triton.cdiv(length, each), each


def _divisor(number: int, most: int) -> int:
    """The greatest one up to `most`."""
    return next(n for n in range(max(1, min(number, most)), 0, -1) if number % n == 0)


def _tile(length: int, most: int) -> int:
    """The side of a tile for something of this length."""
    return min(most, max(SMALLEST, int(triton.next_power_of_2(length))))


def _tokens_block(tokens: int) -> int:
    return _tile(tokens, 64)


@dataclass(frozen=True)
class _SkillTiles:
    """How the skills and ranks of a group are cut: BLOCK_S skills of BLOCK_R columns each."""

    skills: int
    rank: int
    blocks: int

    @classmethod
    def of(cls, group: ops.SkillGroup) -> "_SkillTiles":
        rank = triton.next_power_of_2(group.rank)
        skills = min(triton.next_power_of_2(group.skills), max(1, WIDEST_TILE // rank))
        rank = max(rank, SMALLEST // skills)
        return cls(skills, rank, triton.cdiv(group.skills, skills))


@dataclass(frozen=True, eq=False)
class TritonFactored:
    """The tokens of the factored form, all on the device.

    weights `[n, M, H, S]`, a module's H and S adjacent, of any float dtype; positions and rows
    `[tokens]`: where each token stands in the packed row, and its row of the weights.
    """

    positions: Tensor
    rows: Tensor
    weights: Tensor

    @classmethod
    def of(cls, tokens: slice | Tensor, weights: Tensor, pieces: ops.Pieces) -> "TritonFactored":
        device = weights.device
        if isinstance(tokens, slice):
            tokens = torch.arange(tokens.start, tokens.stop, device=device)
        return cls(tokens, torch.from_numpy(rows_of(pieces)).to(device), weights)

    def shrink(self, group: ops.SkillGroup, first: int, x: Tensor) -> Tensor:
        """x `[N, I]`, contiguous; answers `[P, tokens, G, r]`, averaged by head and skill."""
        tokens, inner = len(self.positions), group.a.shape[1]
        tiles, block = _SkillTiles.of(group), _tokens_block(tokens)
        blocks = triton.cdiv(tokens, block)
        wanted = min(MOST_PARTS, _programs(x.device) // (blocks * group.size * tiles.blocks))
        head_splits = _divisor(group.heads, wanted)
        block_k = _tile(inner, 64)
        splits, each = _splits(wanted // head_splits, inner, block_k)
        parts = head_splits * splits * tiles.blocks
        mixed = x.new_empty(parts, tokens, group.size, group.rank, dtype=torch.float32)
        triton_ops.factored_shrink[blocks, group.size, parts](
            x, group.a, self.weights, self.positions, self.rows, mixed,
            tokens, inner, each, first, self.weights.stride(0), self.weights.stride(1),
            HEADS=group.heads, SKILLS=group.skills, RANK=group.rank, SIZE=group.size,
            HEADS_EACH=group.heads // head_splits, INNER_SPLITS=splits,
            BLOCK_N=block, BLOCK_K=block_k, BLOCK_S=tiles.skills, BLOCK_R=tiles.rank,
        )  # fmt: skip
        return mixed

    def expand(self, group: ops.SkillGroup, first: int, g: int, mixed: Tensor, y: Tensor) -> None:
        """Adds module g's delta onto y `[N, O]`, contiguous."""
        self._expand(group, first, g, mixed, [y])

    def expand_all(
        self, group: ops.SkillGroup, first: int, mixed: Tensor, outputs: Sequence[Tensor]
    ) -> None:
        """Adds the deltas of all the group's modules onto their outputs `[N, O_g]`, each row of
        which is contiguous: they may be columns of one product."""
        for g in range(0, group.size, TOGETHER):
            self._expand(group, first, g, mixed, outputs[g : g + TOGETHER])

    def _expand(
        self, group: ops.SkillGroup, first: int, g: int, mixed: Tensor, ys: Sequence[Tensor]
    ) -> None:
        tokens, outers = len(self.positions), [b.shape[2] for b in group.b[g : g + len(ys)]]
        tiles, block = _SkillTiles.of(group), _tokens_block(tokens)
        block_o = _tile(max(outers), EXPAND_TILE)
        grid = triton.cdiv(tokens, block), group.heads, sum(triton.cdiv(o, block_o) for o in outers)
        empty = TOGETHER - len(ys)
        triton_ops.factored_expand[grid](
            *ys, *[ys[0]] * empty, *group.b[g : g + len(ys)], *[group.b[g]] * empty,
            *outers, *[0] * empty, *[y.stride(0) for y in ys], *[0] * empty,
            self.weights, self.positions, self.rows, mixed,
            tokens, len(mixed), g, first + g, self.weights.stride(0), self.weights.stride(1),
            SKILLS=group.skills, RANK=group.rank, SIZE=group.size,
            MODULES=len(ys), BLOCK_N=block, BLOCK_O=block_o,
            BLOCK_S=tiles.skills, BLOCK_R=tiles.rank,
        )  # fmt: skip


class TritonCombined:
    """The tokens of the combined form, all tasks in one table of addresses.

    Tasks with one token each, as in decoding, are gathered; where one has more, tokens are grouped
    by task in blocks. The factors must live as long as this does.
    """

    def __init__(
        self,
        tables: Sequence[FactorTable],
        positions: Sequence[Sequence[int]],
        device: torch.device,
    ) -> None:
        flat = [position for own in positions for position in own]
        longest = max(map(len, positions))
        self._block = 1 if longest == 1 else _tokens_block(longest)
        self._widest = max(int(table.groups[:, 1].max(initial=0)) for table in tables)
        self.positions = torch.tensor(flat, device=device)
        self._items = torch.tensor(_items(positions, self._block), device=device)  # [K, 3]
        groups = torch.stack([torch.from_numpy(table.groups) for table in tables], -1)
        modules = torch.stack([torch.from_numpy(table.modules) for table in tables], -1)
        self._groups, self._modules = groups.to(device), modules.to(device)  # [., 2, T], [M, 3, T]

    def shrink(self, index: int, x: Tensor) -> Tensor:
        """x `[N, I]`, contiguous; answers `[P, tokens, R]`, in the order of `positions`."""
        tokens, items, width = len(self.positions), len(self._items), x.shape[1]
        block_r = _tile(self._widest, 64)
        columns = triton.cdiv(self._widest, block_r)
        block_k = _tile(width, 128)
        wanted = _programs(x.device) // (items * max(1, columns))
        parts, each = _splits(wanted, width, block_k)
        hidden = x.new_empty(parts, tokens, self._widest, dtype=torch.float32)
        a, ranks = self._groups[index]
        triton_ops.combined_shrink[items, max(1, columns), parts](
            x, a, ranks, self.positions, self._items, hidden,
            tokens, width, each, self._widest,
            BLOCK_N=self._block, BLOCK_K=block_k, BLOCK_R=block_r,
        )  # fmt: skip
        return hidden

    def expand(self, module: int, hidden: Tensor, y: Tensor) -> None:
        """Adds the delta of module number `module` onto y `[N, O]`, each row contiguous."""
        width = y.shape[1]
        b, ranks, offsets = self._modules[module]
        block_o = _tile(width, 128)
        block_r = _tile(self._widest, 64)
        triton_ops.combined_expand[len(self._items), triton.cdiv(width, block_o)](
            y, b, ranks, offsets, self.positions, self._items, hidden,
            len(self.positions), width, y.stride(0), len(hidden), self._widest,
            BLOCK_N=self._block, BLOCK_O=block_o, BLOCK_R=block_r,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class TritonStep:
    """What `Plan` hands its work to where the kernels serve."""

    dtype: torch.dtype  # of the skills and factors
    factored: TritonFactored | None
    combined: TritonCombined | None

    def reads(self, x: Tensor, y: Tensor) -> bool:
        return x.dtype == y.dtype == self.dtype and y.is_contiguous()

    def shrink(self, group: ops.SkillGroup, index: int, first: int, x: Tensor) -> Hidden:
        mixed = None if self.factored is None else self.factored.shrink(group, first, x)
        return mixed, None if self.combined is None else self.combined.shrink(index, x)

    def expand(self, group: ops.SkillGroup, first: int, g: int, hidden: Hidden, y: Tensor) -> None:
        mixed, low_rank = hidden
        if self.factored is not None and mixed is not None:
            self.factored.expand(group, first, g, mixed, y)
        if self.combined is not None and low_rank is not None:
            self.combined.expand(first + g, low_rank, y)


def _items(positions: Sequence[Sequence[int]], block: int) -> list[tuple[int, int, int]]:
    """(first token, tokens, task) of every block of tokens of one task."""
    items = []
    first = 0
    for task, own in enumerate(positions):
        for start in range(0, len(own), block):
            items.append((first + start, min(block, len(own) - start), task))
        first += len(own)
    return items
