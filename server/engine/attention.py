"""Attention of one packed step over the key-value store, registered with transformers.

A step is one row of tokens `[1, N]` of many sequences. For each layer the new keys and values are
written into the store, then decoding sequences attend arena by arena in one product each, and
prompt chunks one by one.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Ordered
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from polyhead.adapters.compiled import READ, compiled_for
from polyhead.adapters.cpu_pair_tiles import pairs_supported
from polyhead.adapters.masked_attention import masked_attention
from polyhead.server.engine import cpu_attention, cpu_pair_attention
from polyhead.server.engine.batch import Row
from polyhead.server.engine.kv_cache import KVStore

IMPLEMENTATION = "polyhead"
"""The name under which transformers finds this attention."""


class UnsupportedAttention(ValueError):
    """The backbone's attention has a feature that this one does not implement."""


@dataclass(frozen=True)
class DecodeGroup:
    """The decoding rows of one arena. Row `rows[i]` of the arena belongs to token `tokens[i]`."""

    arena: int
    numbers: NDArray[np.int64]  # [n, 3]: token, row, position
    tokens: Tensor | slice  # [n], a slice where they are adjacent
    rows: Tensor  # [n]
    positions: Tensor  # [n]
    held: int  # rows of the arena that are attended to, from 0
    longest: int  # keys of the longest one
    dense: bool  # rows are exactly 0 … held-1, in order


@dataclass(frozen=True)
class PrefillChunk:
    """Adjacent tokens of one sequence: positions `[start, start + count)`."""

    arena: int
    row: int
    token: int  # index of the first one in the packed row
    start: int
    count: int


class StepAttention:
    """Everything the layers need to know about one step; built once, read by every layer."""

    def __init__(self, rows: Ordered[Row], store: KVStore, device: torch.device) -> None:
        self.store = store
        self._device = device
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._compiled = store.dtype in READ and compiled_for(torch.float32, device)
        self.groups, self.chunks = _arrange(rows, device)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """q `[1, heads, N, d]`, k and v `[1, kv_heads, N, d]`; answers `[1, N, heads, d]`."""
        keys, values = self.store.keys[layer], self.store.values[layer]
        queries, new_k, new_v = (t[0].transpose(0, 1).contiguous() for t in (q, k, v))
        out = queries.new_empty(queries.shape)  # [N, heads, d]
        for group in self.groups:
            own_k, own_v = keys[group.arena], values[group.arena]
            if self._compiled:
                _decode_compiled(group, queries, new_k, new_v, own_k, own_v, scale, window, out)
                continue
            own_k[group.rows, :, group.positions] = new_k[group.tokens]
            own_v[group.rows, :, group.positions] = new_v[group.tokens]
            out[group.tokens] = self._decode(
                group, queries[group.tokens], own_k, own_v, scale, window
            )
        for chunk in self.chunks:
            part = slice(chunk.token, chunk.token + chunk.count)
            out[part] = _prefill(
                chunk,
                queries[part],
                new_k[part],
                new_v[part],
                keys[chunk.arena],
                values[chunk.arena],
                scale,
                window,
            )
        return out.unsqueeze(0)

    def _decode(
        self,
        group: DecodeGroup,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        heads, width = q.shape[1:]
        kv_heads = k.shape[1]
        if not group.dense:
            spread = q.new_zeros(group.held, heads, width)
            spread[group.rows] = q
            q = spread
        # The query heads that share a key-value head become its queries: no copy of the keys.
        grouped = q.reshape(group.held, kv_heads, heads // kv_heads, width)
        mask = self._mask(group, window, q.dtype).expand(-1, 1, heads // kv_heads, -1)
        out = masked_attention(
            grouped,
            k[: group.held, :, : group.longest],
            v[: group.held, :, : group.longest],
            mask,
            scale,
        ).reshape(group.held, heads, width)
        return out if group.dense else out[group.rows]

    def _mask(self, group: DecodeGroup, window: int | None, dtype: torch.dtype) -> Tensor:
        """`[held, 1, 1, longest]`, 0 where a row's query may look, -inf elsewhere."""
        key = (group.arena, window)
        if key not in self._masks:
            last = torch.zeros(group.held, dtype=torch.long, device=self._device)
            last[group.rows] = group.positions  # idle rows look at key 0: finite, then ignored
            place = torch.arange(group.longest, device=self._device)
            seen = place <= last[:, None]
            if window is not None:
                seen &= place > last[:, None] - window
            blank = torch.zeros(seen.shape, dtype=dtype, device=self._device)
            self._masks[key] = blank.masked_fill_(~seen, float("-inf"))[:, None, None]
        return self._masks[key]


def _decode_compiled(
    group: DecodeGroup,
    q: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
    out: Tensor,
) -> None:
    factor = np.float32(q.shape[-1] ** -0.5 if scale is None else scale)
    seen = k.shape[2] if window is None else window
    lying = (stored(t) for t in (new_k, new_v, k, v))
    if _in_pairs(q, k):
        cpu_pair_attention.decode(stored(q), *lying, group.numbers, factor, seen, stored(out))
        return
    wide = out if out.dtype == torch.float32 else torch.empty(out.shape)
    numbers, found = group.numbers, wide.numpy()
    cpu_attention.decode(q.float().numpy(), *lying, numbers, factor, seen, found)
    if wide is not out:
        out[group.tokens] = wide[group.tokens].to(out.dtype)


def _in_pairs(q: Tensor, k: Tensor) -> bool:
    suited = cpu_pair_attention.suits(q.shape[1], k.shape[1], q.shape[2])
    return q.dtype == k.dtype == torch.bfloat16 and suited and pairs_supported()


def stored(t: Tensor) -> NDArray[Any]:
    """Numbers as the compiled code reads them."""
    return (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy()


def _arrange(
    rows: Ordered[Row], device: torch.device
) -> tuple[list[DecodeGroup], list[PrefillChunk]]:
    decoding: dict[int, list[tuple[int, Row]]] = {}
    chunks = []
    token = 0
    for row in rows:
        if row.count == 1:
            decoding.setdefault(row.place.arena, []).append((token, row))
        else:
            chunks.append(PrefillChunk(row.place.arena, row.place.row, token, row.start, row.count))
        token += row.count
    groups = []
    for arena, found in decoding.items():
        found.sort(key=lambda pair: pair[1].place.row)
        groups.append(_group(arena, found, device))
    return groups, chunks


def _group(arena: int, found: list[tuple[int, Row]], device: torch.device) -> DecodeGroup:
    def index(values: list[int]) -> Tensor:
        return torch.tensor(values, device=device)

    tokens = [token for token, _ in found]
    rows = [row.place.row for _, row in found]
    positions = [row.start for _, row in found]
    held = max(rows) + 1
    adjacent = tokens == list(range(tokens[0], tokens[0] + len(tokens)))
    return DecodeGroup(
        arena=arena,
        numbers=np.array([tokens, rows, positions], np.int64).T.copy(),
        tokens=slice(tokens[0], tokens[-1] + 1)
        if adjacent
        else torch.tensor(tokens, device=device),
        rows=index(rows),
        positions=index(positions),
        held=held,
        longest=max(positions) + 1,
        dense=rows == list(range(held)),
    )


def _prefill(
    chunk: PrefillChunk,
    q: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """One chunk of a prompt: q `[n, heads, d]` to `[n, heads, d]`."""
    end = chunk.start + chunk.count
    row_k, row_v = k[chunk.row, :, :end], v[chunk.row, :, :end]  # [kv_heads, end, d]
    row_k[:, chunk.start :] = new_k.transpose(0, 1)
    row_v[:, chunk.start :] = new_v.transpose(0, 1)
    kv_heads, heads = row_k.shape[0], q.shape[1]
    grouped = q.transpose(0, 1).view(kv_heads, heads // kv_heads, chunk.count, -1)
    shape = (kv_heads, heads // kv_heads, end, row_k.shape[-1])
    shared = (row_k.unsqueeze(1).expand(shape), row_v.unsqueeze(1).expand(shape))
    if chunk.start == 0 and window is None:
        out = F.scaled_dot_product_attention(grouped, *shared, is_causal=True, scale=scale)
    else:
        mask = _chunk_mask(chunk, window, q.device)
        out = masked_attention(grouped, *shared, mask, scale)
    return out.reshape(heads, chunk.count, -1).transpose(0, 1)


def _chunk_mask(chunk: PrefillChunk, window: int | None, device: torch.device) -> Tensor:
    """`[count, start + count]`, True where a query may look."""
    end = chunk.start + chunk.count
    query = torch.arange(chunk.start, end, device=device)[:, None]
    key = torch.arange(end, device=device)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


_active: ContextVar[StepAttention | None] = ContextVar("polyhead_attention", default=None)


@contextmanager
def use_step(step: StepAttention) -> Iterator[None]:
    """Make `step` what the backbone's attention layers work on inside."""
    token = _active.set(step)
    try:
        yield
    finally:
        _active.reset(token)


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. Outside of a step it is torch's own attention."""
    step = _active.get()
    if step is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, None
    used = {name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None}
    if used or module.__dict__.get("is_cross_attention"):
        raise UnsupportedAttention(
            f"{type(module).__name__} uses {sorted(used) or 'cross attention'}"
        )
    layer: Any = module.layer_idx
    window: int | None = kwargs.get("sliding_window")
    out = step.attend(layer, query, key, value, kwargs.get("scaling"), window)
    return out, None


def _attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask inside a step: `StepAttention` knows what every query may see."""
    if _active.get() is not None:
        return None
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


AttentionInterface.register(IMPLEMENTATION, _attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, _attention_mask)
