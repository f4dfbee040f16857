"""Runs one batch through an encoder-decoder: sources are encoded first, then answers decode.

The layers are the backbone's own, called stack by stack, for the encoder's output is never needed
whole: cross attention's keys and values are made of it at once, under the plan of the sources,
and go to the key-value store.
"""

from collections.abc import Sequence as Ordered
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from polyhead.adapters.encoder_decoder import check_family, cross_attentions
from polyhead.adapters.inject import Injection
from polyhead.server.engine.batch import Batch, Row, SourceRow
from polyhead.server.engine.kv_cache import KVShape, StepCache
from polyhead.server.engine.kv_space import Place, Resize
from polyhead.server.engine.request import Request
from polyhead.server.engine.runner import Packed, Runner, cache_keyword
from polyhead.server.engine.sequence import Sequence
from polyhead.server.engine.source_attention import (
    IMPLEMENTATION,
    DecoderStep,
    EncoderStep,
    use_step,
)


class SourceRunner(Runner):
    """A runner of T5 and its like. Raises `InjectionError` for a backbone of another family."""

    attention = IMPLEMENTATION

    def __init__(
        self, model: PreTrainedModel, injection: Injection | None, capacities: Ordered[int]
    ) -> None:
        super().__init__(model, injection, capacities)
        parts: Any = model
        self._encoder, self._decoder, self._head = parts.encoder, parts.decoder, parts.lm_head
        scaled = getattr(model.config, "scale_decoder_outputs", model.config.tie_word_embeddings)
        self._scale = parts.model_dim**-0.5 if scaled else 1.0
        self._cross = cross_attentions(model)
        self._block_cache = cache_keyword(self._decoder.block[0])
        self._bias = torch.empty(self._shape.heads, 0, device=self.device)

    def _shape_of(self, model: PreTrainedModel) -> KVShape:
        check_family(model)
        config: Any = model.config
        return KVShape(config.num_decoder_layers, config.num_heads, config.d_kv)

    def probe(self) -> None:
        """One tiny step on the bare backbone, with a source and its answer's first tokens."""
        ids = [0, 0]
        request = Request("probe", "base", "base", (0,), source=(0, 0, 0))
        sequence, place = Sequence(request, 0, ids), Place(0, 0)
        source = Place(len(self.store.capacities) - 1, 0)
        row = Row(sequence, 0, 2, place, source)
        opening = [Resize(place.arena, 1), Resize(source.arena, 1)]
        self.run(Batch([row], opening, [SourceRow(request.source, None, source)]))
        self.reset()

    def _encode(self, sources: Ordered[SourceRow]) -> None:
        if not sources:
            return
        ordered = self._by_adapter(sources)
        counts = [len(source.tokens) for source in ordered]
        step = EncoderStep(counts, self._biases(self._encoder))
        packed = [token for source in ordered for token in source.tokens]
        with self._planned([source.adapter for source in ordered], counts), use_step(step):
            hidden = self._through(self._encoder, packed)
            for layer, attention in enumerate(self._cross):
                keys, values = attention.k(hidden)[0], attention.v(hidden)[0]
                self._keep(layer, ordered, keys.split(counts), values.split(counts))

    def _by_adapter(self, sources: Ordered[SourceRow]) -> list[SourceRow]:
        if self._injection is None:
            return list(sources)
        adapters = [source.adapter for source in sources]
        order = self._injection.arrange(adapters, [len(source.tokens) for source in sources])
        return [sources[i] for i in order]

    def _keep(
        self, layer: int, sources: list[SourceRow], keys: Ordered[Tensor], values: Ordered[Tensor]
    ) -> None:
        """Store each source's keys and values `[L, heads * d]`."""
        heads, width = self._shape.heads, self._shape.width
        for side, found in ((self.store.keys, keys), (self.store.values, values)):
            for source, own in zip(sources, found, strict=True):
                row = side[layer][source.place.arena][source.place.row]  # [heads, capacity, d]
                row[:, : len(own)] = own.view(-1, heads, width).transpose(0, 1)

    def _logits(self, packed: Packed) -> Tensor:
        longest = max(row.stop for row in packed.rows)
        step = DecoderStep(packed.rows, self.store, self._bias_of(longest))
        with use_step(step):
            hidden = self._through(self._decoder, packed.ids)
        wanted = [entry.token for entry in packed.logits] or [0]
        logits: Tensor = self._head(hidden[0, wanted] * self._scale)
        return logits

    def _through(self, stack: Any, ids: list[int]) -> Tensor:
        """The hidden states `[1, N, D]` after a stack. Attention finds keys, sources and biases in
        the active step; what stands for them here only tells the layers not to make any."""
        hidden = stack.embed_tokens(torch.tensor([ids], device=self.device))
        nothing = hidden.new_empty(0)
        decoding: dict[str, Any] = {}
        if stack.is_decoder:
            decoding = {
                "encoder_hidden_states": nothing,
                "encoder_decoder_position_bias": nothing,
                self._block_cache: self._step_cache(nothing),
            }
        for block in stack.block:
            hidden = block(hidden, position_bias=nothing, **decoding)[0]
        normed: Tensor = stack.final_layer_norm(hidden)
        return normed

    def _step_cache(self, nothing: Tensor) -> EncoderDecoderCache:
        source = DynamicCache()
        for layer in range(self._shape.layers):
            source.update(nothing[None, None, None], nothing[None, None, None], layer)
        cache = EncoderDecoderCache(StepCache(), source)
        cache.is_updated = dict.fromkeys(range(self._shape.layers), True)
        return cache

    def _bias_of(self, longest: int) -> Tensor:
        if self._bias.shape[1] < longest:
            back = -torch.arange(max(longest, 2 * self._bias.shape[1]), device=self.device)
            self._bias = self._biases(self._decoder)(back).float().contiguous()
        return self._bias

    @staticmethod
    def _biases(stack: Any) -> Any:
        """The biases of distances in a stack, whose first layer has them for all."""
        attention = stack.block[0].layer[0].SelfAttention

        def biases(distances: Tensor) -> Tensor:
            buckets = attention._relative_position_bucket(
                distances,
                bidirectional=not attention.is_decoder,
                num_buckets=attention.relative_attention_num_buckets,
                max_distance=attention.relative_attention_max_distance,
            )
            found: Tensor = attention.relative_attention_bias(buckets)
            return found.movedim(-1, 0)

        return biases
