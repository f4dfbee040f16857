"""The keys and values of every sequence, as tensors, behind transformers' `Cache` interface."""

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig

from polyhead.server.engine.kv_space import Clear, Copy, KVOperation, Resize
from polyhead.server.heap import Trimming


@dataclass(frozen=True)
class KVShape:
    """What the cache needs to know of a backbone."""

    layers: int
    heads: int  # key-value heads
    width: int  # of one head

    @classmethod
    def of(cls, config: PretrainedConfig) -> "KVShape":
        text = config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        return cls(
            layers=text.num_hidden_layers,
            heads=getattr(text, "num_key_value_heads", None) or heads,
            width=getattr(text, "head_dim", None) or text.hidden_size // heads,
        )

    def split(self, processes: int) -> "KVShape":
        """What each of several processes keeps, that hold a part of the heads each."""
        return replace(self, heads=self.heads // processes)

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that one token's keys and values take in all layers."""
        return 2 * self.layers * self.heads * self.width * dtype.itemsize


class KVStore:
    """Arenas of equal rows: keys and values `[rows, kv_heads, capacity, d]` per arena and layer.

    Which row belongs to whom is `KVSpace`'s business; this class carries its operations out.
    """

    def __init__(
        self,
        shape: KVShape,
        capacities: Ordered[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape = shape
        self.capacities = capacities
        self.dtype, self.device = dtype, device
        empty = [
            torch.zeros(0, shape.heads, capacity, shape.width, dtype=dtype, device=device)
            for capacity in capacities
        ]
        self.keys = [list(empty) for _ in range(shape.layers)]
        self.values = [list(empty) for _ in range(shape.layers)]
        self.trimming = Trimming()  # what a resize lets go of is as large as it is scattered

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for side in (self.keys, self.values) for layer in side for t in layer)

    def carry_out(self, operations: Ordered[KVOperation]) -> None:
        """Resize arenas, copy and clear rows, in the order given."""
        for operation in operations:
            freed = self._arena_bytes(operation) if isinstance(operation, Resize) else 0
            for side in (self.keys, self.values):
                for layer in side:
                    if isinstance(operation, Resize):
                        _resize(layer, operation)
                    elif isinstance(operation, Clear):
                        place = operation.place
                        layer[place.arena][place.row, :, operation.start :] = 0
                    else:
                        _copy(layer, operation)
            if freed and self.device.type == "cpu":
                self.trimming.freed(freed)

    def _arena_bytes(self, operation: Resize) -> int:
        layers = (layer for side in (self.keys, self.values) for layer in side)
        return sum(layer[operation.arena].nbytes for layer in layers)


def _resize(layer: list[Tensor], operation: Resize) -> None:
    old = layer[operation.arena]
    new = old.new_zeros(operation.rows, *old.shape[1:])
    kept = min(operation.rows, old.shape[0])
    new[:kept] = old[:kept]
    layer[operation.arena] = new


def _copy(layer: list[Tensor], operation: Copy) -> None:
    source, target, length = operation.source, operation.target, operation.length
    layer[target.arena][target.row, :, :length] = layer[source.arena][source.row, :, :length]


class StepCache(Cache):
    """What a backbone's forward pass sees as its cache: it hands a step's new keys and values
    through to the attention function, which alone knows where they belong."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        del layer_idx
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0: a step is one packed row, and its positions are given explicitly."""
        del layer_idx
        return 0
