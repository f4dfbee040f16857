"""Runs one batch through an encoder-decoder: sources are encoded first, then answers decode.

The layers are the backbone's own, called stack by stack, for the encoder's output is never needed
whole: cross attention's keys and values are made of it at once, under the plan of the sources,
and go to the key-value store.
"""

import time
from collections.abc import Sequence as Ordered
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from polyhead.adapters.encoder_decoder import check_family, cross_attentions
from polyhead.adapters.inject import Injection
from polyhead.server.engine.batch import Batch, Row, Sampled, SourceRow
from polyhead.server.engine.kv_cache import KVShape, StepCache
from polyhead.server.engine.kv_space import Place, Resize
from polyhead.server.engine.request import Request
from polyhead.server.engine.runner import Packed, Runner, RunReport, cache_keyword
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

    def reset(self) -> None:
        """Throw away the key-value store and sources that are encoded in part."""
        super().reset()
        self._halfway: dict[object, Tensor] = {}  # [1, L, D], by the source's owner

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

    def run(self, batch: Batch) -> list[Sampled]:
        """One pass of each stack; without rows, the encoder's only."""
        if batch.rows:
            return super().run(batch)
        began = time.monotonic()
        self.carry_out(batch.operations)
        self._encode(batch.sources)
        self.report = RunReport(time.monotonic() - began)
        return []

    @torch.inference_mode()
    def _encode(self, sources: Ordered[SourceRow]) -> None:
        going = {source.owner for source in sources}
        self._halfway = {o: hidden for o, hidden in self._halfway.items() if o in going}
        whole = [source for source in sources if source.portions == 1]
        if whole:
            self._encode_portion(self._by_adapter(whole))
        for source in sources:
            if source.portions > 1:
                self._encode_portion([source])

    def _encode_portion(self, sources: list[SourceRow]) -> None:
        """The same layers for all: one portion of a source, or whole sources side by side."""
        counts, part = [len(source.tokens) for source in sources], sources[0]
        depth = len(self._encoder.block)
        first, last = (depth * n // part.portions for n in (part.portion, part.portion + 1))
        step = EncoderStep(counts, self._biases(self._encoder))
        with self._planned([source.adapter for source in sources], counts), use_step(step):
            if first:
                hidden = self._halfway.pop(part.owner)
            else:
                tokens = [token for source in sources for token in source.tokens]
                hidden = self._embedded(self._encoder, tokens)
            hidden = self._through(self._encoder.block[first:last], hidden)
            if last < depth:
                self._halfway[part.owner] = hidden
                return
            hidden = self._encoder.final_layer_norm(hidden)
            for layer, attention in enumerate(self._cross):
                keys, values = attention.k(hidden)[0], attention.v(hidden)[0]
                self._keep(layer, sources, keys.split(counts), values.split(counts))

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
        hidden = self._embedded(self._decoder, packed.ids)
        nothing = hidden.new_empty(0)
        with use_step(step):
            hidden = self._through(
                self._decoder.block,
                hidden,
                encoder_hidden_states=nothing,
                encoder_decoder_position_bias=nothing,
                **{self._block_cache: self._step_cache(nothing)},
            )
        hidden = self._decoder.final_layer_norm(hidden)
        wanted = [entry.token for entry in packed.logits] or [0]
        logits: Tensor = self._head(hidden[0, wanted] * self._scale)
        return logits

    def _embedded(self, stack: Any, ids: list[int]) -> Tensor:
        """`[1, N, D]`."""
        found: Tensor = stack.embed_tokens(torch.tensor([ids], device=self.device))
        return found

    @staticmethod
    def _through(blocks: Any, hidden: Tensor, **given: Any) -> Tensor:
        """hidden `[1, N, D]` after some blocks. Attention finds keys, sources and biases in the
        active step; what stands for them here only tells the layers not to make any."""
        nothing = hidden.new_empty(0)
        for block in blocks:
            hidden = block(hidden, position_bias=nothing, **given)[0]
        return hidden

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
