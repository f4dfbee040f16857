"""Runs one batch through the backbone: cache operations, plan, forward pass, sampling."""

import inspect
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Ordered
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from polyhead.adapters.inject import Injection
from polyhead.adapters.plan import Adapter, Plan, use_plan
from polyhead.adapters.sharding import ranks_of
from polyhead.server.engine.attention import IMPLEMENTATION, StepAttention, use_step
from polyhead.server.engine.batch import Batch, Row, Sampled, SourceRow
from polyhead.server.engine.kv_cache import KVShape, KVStore, StepCache
from polyhead.server.engine.kv_space import KVOperation, Place, Resize
from polyhead.server.engine.request import Request, TokenLogprob
from polyhead.server.engine.sampler import Draw, logprobs_of, sample
from polyhead.server.engine.sequence import Sequence


@dataclass(frozen=True)
class LogitRow:
    """Which logits a batch needs: of which token in the packed row, for which row of the batch."""

    token: int
    row: Row
    scored: int | None = None  # the given next token, None where one is sampled


@dataclass
class Packed:
    """A batch as one row of tokens."""

    rows: list[Row]
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    logits: list[LogitRow] = field(default_factory=list)
    embedded: list[tuple[Row, slice]] = field(default_factory=list)  # and where its tokens stand


@dataclass(frozen=True)
class RunReport:
    """What a step took, in seconds, and the tasks in it by the form chosen for them."""

    forward: float = 0.0
    sample: float = 0.0
    forms: Mapping[str, int] = field(default_factory=dict)


class Runner:
    """Owns the backbone, its adapters and the key-value store. Belongs to one thread.

    injection: None serves the bare backbone only.
    """

    attention = IMPLEMENTATION

    def __init__(
        self, model: PreTrainedModel, injection: Injection | None, capacities: Ordered[int]
    ) -> None:
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._model = model
        self._cache_keyword = cache_keyword(model)
        self._injection = injection
        self._capacities = capacities
        self._shape = self._shape_of(model)
        self._forms: Mapping[str, int] = {}  # of the step that is being computed
        self._hidden: list[Tensor] = []  # [1, N, D] of that step, where somebody wants it
        self.report = RunReport()  # of the last step
        model.set_attn_implementation(self.attention)
        self.reset()

    def _shape_of(self, model: PreTrainedModel) -> KVShape:
        return KVShape.of(model.config).split(ranks_of(model).size)

    def reset(self) -> None:
        """Throw the key-value store away, as after an error that may have left it half-written."""
        self.store = KVStore(self._shape, self._capacities, self.dtype, self.device)

    def probe(self) -> None:
        """One tiny step on the bare backbone. Raises `UnsupportedAttention` where the backbone's
        attention has something that this engine does not implement."""
        ids = [0, 0, 0]
        sequence = Sequence(Request("probe", "base", "base", tuple(ids)), 0, ids)
        place = Place(0, 0)
        self.run(Batch([Row(sequence, 0, 2, place)], [Resize(0, 1)]))
        self.run(Batch([Row(sequence, 2, 1, place)], []))
        self.reset()

    @torch.inference_mode()
    def carry_out(self, operations: Ordered[KVOperation]) -> None:
        """Resize and move cache rows."""
        self.store.carry_out(operations)

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Sampled]:
        """One forward pass; answers in the order of `batch.rows`."""
        began = time.monotonic()
        self.carry_out(batch.operations)
        self._encode(batch.sources)
        packed = _pack(self._arrange(batch.rows))
        logits = self._forward(packed)
        computed = time.monotonic()
        found = _read(logits, packed.logits)
        for row, place in packed.embedded:
            found[id(row)] = _embedded(self._hidden[-1][0, place])
        self._hidden.clear()
        self.report = RunReport(computed - began, time.monotonic() - computed, self._forms)
        return [found.get(id(row), Sampled()) for row in batch.rows]

    def _encode(self, sources: Ordered[SourceRow]) -> None:
        """Nothing, where a prompt goes through the same layers as its answer."""

    @torch.inference_mode()
    def compute(self, packed: Packed) -> None:
        """The forward pass alone, of rows that are in order already, for its part in other
        processes' sums."""
        self._forward(packed)

    def _arrange(self, rows: Ordered[Row]) -> list[Row]:
        """Rows in the order of their cache rows, or, where adapters are on, in theirs."""
        ordered = sorted(rows, key=lambda row: (row.place.arena, row.place.row))
        if self._injection is None:
            return ordered
        adapters = [row.sequence.request.adapter for row in ordered]
        order = self._injection.arrange(adapters, [row.count for row in ordered])
        return [ordered[i] for i in order]

    def _forward(self, packed: Packed) -> Tensor:
        adapters = [row.sequence.request.adapter for row in packed.rows]
        with self._planned(adapters, [row.count for row in packed.rows]) as plan:
            self._forms = {"bare": 1} if plan is None else plan.forms
            return self._logits(packed)

    def _planned(
        self, adapters: Ordered[Adapter], counts: Ordered[int]
    ) -> AbstractContextManager[Plan | None]:
        """The plan for a packed row of `counts[i]` tokens each, active inside."""
        if self._injection is None:
            return nullcontext()
        return use_plan(self._injection.plan(adapters, counts))

    def _logits(self, packed: Packed) -> Tensor:
        """`[n, V]`, one for each entry of `packed.logits`; any one where there is none."""
        wanted = [entry.token for entry in packed.logits] or [0]
        inputs = {
            "input_ids": torch.tensor([packed.ids], device=self.device),
            "position_ids": torch.tensor([packed.positions], device=self.device),
            "logits_to_keep": torch.tensor(wanted, device=self.device),
        }
        attention = StepAttention(packed.rows, self.store, self.device)
        with use_step(attention), self._keeping_hidden(packed):
            output = self._model(**inputs, **{self._cache_keyword: StepCache()}, use_cache=True)
        logits: Tensor = output.logits
        return logits[0]

    @contextmanager
    def _keeping_hidden(self, packed: Packed) -> Iterator[None]:
        """Inside, the last hidden states are kept where a row wants them; the output head, behind
        them, is given those of the wanted logits only."""
        if not packed.embedded:
            yield
            return
        body = cast(Any, self._model.base_model)
        hook = body.register_forward_hook(
            lambda _body, _args, output: self._hidden.append(output.last_hidden_state)
        )
        try:
            yield
        finally:
            hook.remove()


def cache_keyword(model: PreTrainedModel) -> str:
    """transformers renamed the argument in 5.24, model by model."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _pack(rows: Ordered[Row]) -> Packed:
    packed = Packed(list(rows))
    for row in rows:
        first = len(packed.ids)
        packed.ids += row.sequence.tokens[row.start : row.stop]
        packed.positions += range(row.start, row.stop)
        for position in row.scored:
            given = row.sequence.tokens[position + 1]
            packed.logits.append(LogitRow(first + position - row.start, row, given))
        if row.samples:
            packed.logits.append(LogitRow(len(packed.ids) - 1, row))
        if embedded := row.embedded:
            start = first + embedded.start - row.start
            packed.embedded.append((row, slice(start, start + len(embedded))))
    return packed


def _embedded(hidden: Tensor) -> Sampled:
    """The sum of some tokens' hidden states `[n, D]`."""
    total = hidden.float().sum(0)
    if not torch.isfinite(total).all():
        return Sampled(overflow=True)
    return Sampled(hidden=tuple(total.tolist()))


def _read(logits: Tensor, entries: Ordered[LogitRow]) -> dict[int, Sampled]:
    """Sample or score; by the identity of the batch's row."""
    found: dict[int, Sampled] = {}
    drawn = [i for i, entry in enumerate(entries) if entry.scored is None]
    if drawn:
        own = logits if len(drawn) == len(logits) else logits[drawn]
        rows = [entries[i].row for i in drawn]
        tokens = sample(own, [_draw_of(row) for row in rows])
        chosen = own.gather(1, torch.tensor(tokens, device=own.device)[:, None])
        sound: list[bool] = torch.isfinite(chosen[:, 0]).tolist()
        logprobs = _logprobs(own, rows, tokens)
        for row, token, logprob, fine in zip(rows, tokens, logprobs, sound, strict=True):
            cursor = row.sequence.cursor
            stray = cursor is not None and cursor.failed
            drawn_token = Sampled(token, logprob, stray=stray)
            found[id(row)] = drawn_token if fine else Sampled(overflow=True)
    scored = [i for i, entry in enumerate(entries) if entry.scored is not None]
    if scored:
        given = [entry.scored for entry in entries if entry.scored is not None]
        wanted = [entries[i].row.sequence.request.params.logprobs or 0 for i in scored]
        values = logprobs_of(logits[scored], given, wanted)
        by_row: dict[int, list[TokenLogprob]] = {}
        for i, value in zip(scored, values, strict=True):
            by_row.setdefault(id(entries[i].row), []).append(value)
        for key, parts in by_row.items():
            found[key] = replace(found.get(key, Sampled()), scored=tuple(parts))
    return found


def _draw_of(row: Row) -> Draw:
    sequence = row.sequence
    return Draw(
        sequence.request.params,
        sequence.seed,
        sequence.index,
        len(sequence.tokens),
        sequence.tokens,
        len(sequence.request.prompt),
        sequence.cursor,
    )


def _logprobs(
    logits: Tensor, rows: Ordered[Row], tokens: Ordered[int]
) -> list[TokenLogprob | None]:
    answers: list[TokenLogprob | None] = [None] * len(rows)
    asked = [
        (i, row.sequence.request.params.logprobs)
        for i, row in enumerate(rows)
        if row.sequence.request.params.logprobs is not None
    ]
    if not asked:
        return answers
    places = [i for i, _ in asked]
    values = logprobs_of(logits[places], [tokens[i] for i in places], [k or 0 for _, k in asked])
    for place, value in zip(places, values, strict=True):
        answers[place] = value
    return answers
