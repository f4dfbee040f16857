"""Attention of an encoder-decoder's step, registered with transformers beside the causal one.

Sources are encoded in one packed row, each seeing itself only, from both sides. Answers decode in
another: every token looks at its own sequence's keys, with the bias of its distance to each, and
at those of its source. Both kinds lie in the key-value store, sources in arenas of their own.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from polyhead.adapters.compiled import READ, compiled_for
from polyhead.adapters.masked_attention import masked_attention
from polyhead.server.engine import cpu_attention
from polyhead.server.engine.attention import stored
from polyhead.server.engine.batch import Row
from polyhead.server.engine.kv_cache import KVStore
from polyhead.server.engine.kv_space import Place

IMPLEMENTATION = "polyhead-encoder-decoder"
"""The name under which transformers finds this attention."""
GATHERED = 64
"""Tokens whose keys are gathered at once, where no compiled code reads them in place."""
QUERIES = 512
"""Of a source at once: their biases take heads x queries x length numbers."""

Biases = Callable[[Tensor], Tensor]
"""From distances, key minus query, of any shape to the biases `[heads, *shape]` of one stack."""


class Step(Protocol):
    """What is active in a forward pass."""

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v `[1, heads, N, d]`; answers `[1, N, heads, d]`."""


class EncoderStep:
    """Sources of the given lengths side by side in one packed row."""

    def __init__(self, lengths: Ordered[int], biases: Biases) -> None:
        self._lengths = lengths
        self._biases = biases
        self._found: dict[int, Tensor] = {}

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        del module
        parts = []
        for own in zip(*(torch.split(t, list(self._lengths), 2) for t in (q, k, v)), strict=True):
            queries, keys, values = own
            for first, piece in enumerate(torch.split(queries, QUERIES, 2)):
                mask = self._bias(first * QUERIES, piece.shape[2], keys.shape[2], q)
                parts.append(masked_attention(piece, keys, values, mask, 1.0))
        return torch.cat(parts, dim=2).transpose(1, 2)

    def _bias(self, first: int, queries: int, length: int, like: Tensor) -> Tensor:
        """`[1, heads, queries, length]`; a short source's is kept for the next layers."""
        if length in self._found:
            return self._found[length]
        place = torch.arange(length, device=like.device)
        distances = place - place[first : first + queries, None]
        mask = self._biases(distances).to(like.dtype)[None]
        if length <= QUERIES:
            self._found[length] = mask
        return mask


@dataclass(frozen=True)
class Looks:
    """The tokens of a step that look into one arena, in the order of the packed row."""

    arena: int
    numbers: NDArray[np.int64]  # [n, 3]: token, row, the last key that the token sees
    placed: Tensor  # the same on the store's device


class DecoderStep:
    """The answers' rows of one step, packed; built once and read by every layer.

    bias: float32 `[heads, distances]`, of a key so many tokens back; as many as the longest has.
    """

    def __init__(self, rows: Ordered[Row], store: KVStore, bias: Tensor) -> None:
        self._store = store
        self._compiled = store.dtype in READ and compiled_for(torch.float32, store.device)
        self._own = _looks(rows, store.device, of_source=False)
        self._sources = _looks(rows, store.device, of_source=True)
        self._bias = bias

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._store.keys[module.layer_idx], self._store.values[module.layer_idx]
        queries = q[0].transpose(0, 1).contiguous()  # [N, heads, d]
        out = torch.empty(queries.shape, device=q.device)
        if not module.is_causal:
            for looks in self._sources:
                self._look(looks, queries, keys[looks.arena], values[looks.arena], None, out)
        else:
            new = [t[0].transpose(0, 1).contiguous() for t in (k, v)]
            for looks in self._own:
                own = (keys[looks.arena], values[looks.arena])
                self._look(looks, queries, *own, new, out)
        return out.to(q.dtype)[None]

    def _look(
        self,
        looks: Looks,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        new: list[Tensor] | None,
        out: Tensor,
    ) -> None:
        if not self._compiled:
            self._look_by_torch(looks, q, keys, values, new, out)
            return
        wide, numbers = q.float().numpy(), looks.numbers
        lying = [stored(t) for t in (keys, values)]
        if new is None:
            cpu_attention.cross(wide, *lying, numbers, out.numpy())
        else:
            fresh = [stored(t) for t in new]
            cpu_attention.decode_biased(
                wide, *fresh, *lying, numbers, self._bias.numpy(), out.numpy()
            )

    def _look_by_torch(
        self,
        looks: Looks,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        new: list[Tensor] | None,
        out: Tensor,
    ) -> None:
        tokens, rows, last = looks.placed.unbind(1)
        if new is not None:
            keys[rows, :, last], values[rows, :, last] = new[0][tokens], new[1][tokens]
        place = torch.arange(int(looks.numbers[:, 2].max()) + 1, device=q.device)
        for part in torch.split(torch.arange(len(tokens), device=q.device), GATHERED):
            back = last[part, None] - place  # [n, longest]
            mask = torch.zeros(len(part), 1, len(place), dtype=q.dtype, device=q.device)
            if new is not None:
                mask = self._bias[:, back.clamp(min=0)].transpose(0, 1).to(q.dtype)
            mask = mask.masked_fill(back[:, None] < 0, -torch.inf)[:, :, None]
            k, v = (t[rows[part], :, : len(place)] for t in (keys, values))
            found = masked_attention(q[tokens[part], :, None], k, v, mask, 1.0)
            out[tokens[part]] = found[:, :, 0].float()


def _looks(rows: Ordered[Row], device: torch.device, *, of_source: bool) -> list[Looks]:
    found: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    token = 0
    for row in rows:
        place = _source_of(row) if of_source else row.place
        whole = len(row.sequence.request.source) - 1
        for position in range(row.start, row.stop):
            found[place.arena].append((token, place.row, whole if of_source else position))
            token += 1
    tables = {arena: np.array(numbers, np.int64) for arena, numbers in found.items()}
    return [
        Looks(a, numbers, torch.from_numpy(numbers).to(device)) for a, numbers in tables.items()
    ]


def _source_of(row: Row) -> Place:
    assert row.source is not None, "the scheduler gives every row of an encoder-decoder a source"
    return row.source


_active: ContextVar[Step | None] = ContextVar("polyhead_encoder_decoder", default=None)


@contextmanager
def use_step(step: Step) -> Iterator[None]:
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
    return step.attend(module, query, key, value), None


AttentionInterface.register(IMPLEMENTATION, _attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
