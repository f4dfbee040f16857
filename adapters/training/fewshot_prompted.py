"""The bare backbone with the examples in its prompt: what a fit has to beat.

All questions share the prompt's examples, so these are computed once: one row holds the common
beginning and after it every question, which sees the beginning and itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from polyhead.adapters.training.answers import Encoded, micro_batches
from polyhead.adapters.training.data import Example
from polyhead.adapters.training.encode import Encoder
from polyhead.adapters.training.reading import closes_prompts, reading_of

MAX_SHOTS = 16
SHOT_TOKENS = 1024
"""Examples that do not fit any more are left out of the prompt."""
SEPARATOR = "\n\n"


def prompt_with_shots(
    encoder: Encoder, shots: Sequence[Example], asked: Example, instruction: str = ""
) -> str:
    """The text before the answer: an instruction, the examples in full, and what is asked."""
    head = f"{instruction}{SEPARATOR}" if instruction else ""
    body = "".join(f"{encoder.prompt_text(s)}{s.output}{SEPARATOR}" for s in shots)
    return head + body + encoder.prompt_text(asked)


def fitting_shots(tokenizer: Any, encoder: Encoder, shots: Sequence[Example]) -> list[Example]:
    """As many examples as the prompt takes, at most `MAX_SHOTS`."""
    chosen: list[Example] = []
    left = SHOT_TOKENS
    for shot in shots[:MAX_SHOTS]:
        left -= len(_ids(tokenizer, f"{encoder.prompt_text(shot)}{shot.output}{SEPARATOR}"))
        if left < 0:
            break
        chosen.append(shot)
    return chosen


def prompted_right(
    model: PreTrainedModel,
    tokenizer: Any,
    encoder: Encoder,
    shots: Sequence[Example],
    asked: Sequence[Example],
    pause: Callable[[], None],
    instruction: str = "",
    row_tokens: int = 1024,
) -> list[bool]:
    """For each question, whether greedy decoding would give exactly the answer and then a new line.

    model: without active adapters. pause: called before each forward pass, which computes at most
    about `row_tokens` tokens beyond the longest question. An encoder-decoder ends its answer with
    end-of-text, and reads every question by itself: what it reads first may depend on what follows.
    """
    if closes_prompts(model):
        read = _closed(tokenizer, encoder, shots, asked, instruction)
        return _right_apart(model, read, pause, row_tokens)
    questions = _questions(tokenizer, encoder, shots, asked, instruction)
    shared = _common(questions)
    found: list[bool] = []
    for part in _parts(questions, shared, row_tokens):
        pause()
        row = _Row.build(part, shared)
        predicted = _predict(model, row).tolist()
        for question, at in zip(part, row.places, strict=True):
            tokens = predicted[at : at + len(question.answer) + 1]
            found.append(tuple(tokens[:-1]) == question.answer and _ends(tokenizer, tokens[-1]))
    return found


def _closed(
    tokenizer: Any,
    encoder: Encoder,
    shots: Sequence[Example],
    asked: Sequence[Example],
    instruction: str,
) -> list[Encoded]:
    texts = [prompt_with_shots(encoder, shots, one, instruction) for one in asked]
    return [
        Encoded(tuple(prompt), (*_ids(tokenizer, one.output), encoder.end))
        for prompt, one in zip(encoder.prompt_ids(texts), asked, strict=True)
    ]


def _right_apart(
    model: PreTrainedModel, asked: Sequence[Encoded], pause: Callable[[], None], row_tokens: int
) -> list[bool]:
    reading = reading_of(model)
    reading.install()
    found: list[bool] = []
    try:
        for part in micro_batches({0: asked}, row_tokens):
            pause()
            batch = reading.pack([one for _, one in part], [0] * len(part)).to(model.device)
            with torch.no_grad():
                right = reading.logits(batch, None).argmax(-1) == batch.gold
            found += [bool(right[batch.example_of == i].all()) for i in range(batch.examples)]
    finally:
        reading.restore()
    return found


@dataclass(frozen=True)
class _Question:
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def tail(self, shared: int) -> tuple[int, ...]:
        return self.prompt[shared:] + self.answer


@dataclass(frozen=True, eq=False)
class _Row:
    ids: Tensor  # [1, L]
    positions: Tensor  # [1, L]
    segment: Tensor  # [L], 0 for what all share
    predict_at: Tensor  # [P]
    places: list[int]  # where each question's predictions begin among the P

    @classmethod
    def build(cls, questions: Sequence[_Question], shared: int) -> "_Row":
        ids = list(questions[0].prompt[:shared])
        positions, segment = list(range(shared)), [0] * shared
        predict: list[int] = []
        places: list[int] = []
        for number, question in enumerate(questions, 1):
            tail = question.tail(shared)
            first = len(ids) + len(question.prompt) - shared - 1
            places.append(len(predict))
            predict += range(first, first + len(question.answer) + 1)
            ids += tail
            positions += range(shared, shared + len(tail))
            segment += [number] * len(tail)
        tensors = [torch.tensor(values) for values in (ids, positions, segment, predict)]
        return cls(tensors[0][None], tensors[1][None], tensors[2], tensors[3], places)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """`[1, 1, L, L]`, added to attention scores."""
        own = self.segment[:, None] == self.segment[None]
        seen = (own | (self.segment == 0)[None]).tril()
        return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[
            None, None
        ]


@torch.no_grad()
def _predict(model: PreTrainedModel, row: _Row) -> Tensor:
    """`[P]`: the likeliest token at every place that predicts one."""
    device = model.device
    loose: Any = model
    out = loose(
        input_ids=row.ids.to(device),
        position_ids=row.positions.to(device),
        attention_mask=row.mask(model.dtype).to(device),
        use_cache=False,
        logits_to_keep=row.predict_at.to(device),
    )
    found: Tensor = out.logits[0].argmax(-1).cpu()
    return found


def _questions(
    tokenizer: Any,
    encoder: Encoder,
    shots: Sequence[Example],
    asked: Sequence[Example],
    instruction: str,
) -> list[_Question]:
    """Whole prompts are encoded, not pieces: tokens may span what joins two pieces."""
    return [
        _Question(
            tuple(_ids(tokenizer, prompt_with_shots(encoder, shots, one, instruction))),
            tuple(_ids(tokenizer, one.output)),
        )
        for one in asked
    ]


def _common(questions: Sequence[_Question]) -> int:
    """How many first tokens all prompts share, leaving each at least one of its own."""
    shortest = min(len(question.prompt) for question in questions) - 1
    first = questions[0].prompt
    same = (all(q.prompt[i] == first[i] for q in questions) for i in range(shortest))
    return next((i for i, holds in enumerate(same) if not holds), shortest)


def _parts(questions: Sequence[_Question], shared: int, row_tokens: int) -> list[list[_Question]]:
    parts: list[list[_Question]] = []
    used = row_tokens
    for question in questions:
        size = len(question.tail(shared))
        if used + size > row_tokens:
            parts.append([])
            used = shared
        parts[-1].append(question)
        used += size
    return parts


def _ends(tokenizer: Any, token: int) -> bool:
    """Whether a token ends an answer: a new line, or the end of the text."""
    text: str = tokenizer.decode([token])
    return bool(token == tokenizer.eos_token_id) or text.startswith("\n")


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids
