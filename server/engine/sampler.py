"""Drawing tokens from logits, each row by its own parameters."""

from collections import Counter
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polyhead.server.engine.constraint import Cursor
from polyhead.server.engine.request import SamplingParams, TokenLogprob

FIRST_CANDIDATES = 1024
"""Likeliest tokens looked at for top-p before the whole vocabulary is sorted."""
BLOCK = 512
"""Logits whose maximum is found together, in a search for the likeliest token."""


@dataclass(frozen=True)
class Draw:
    """What the sampler must know of one row: how to draw, and what has been said."""

    params: SamplingParams
    seed: int
    choice: int
    position: int
    tokens: Ordered[int]
    prompt: int = 0  # how many of the tokens were asked, not answered
    cursor: Cursor | None = None  # in the grammar that the answer is held to


def sample(logits: Tensor, draws: Ordered[Draw]) -> list[int]:
    """One token per row. logits `[n, V]`, of any float dtype; they are not changed.

    The order of filters is transformers': repetition penalty, temperature, top-k, top-p, min-p;
    presence and frequency penalties (OpenAI's) follow the repetition penalty, then the grammar.
    A row's randomness depends on its seed, choice and position only, never on its neighbours.
    """
    if all(draw.cursor is None and _plain(draw.params) for draw in draws):
        return likeliest(logits)
    scores = logits.float().clone()
    for row, draw in enumerate(draws):
        _penalise(scores[row], draw)
        _constrain(scores[row], draw)
    tokens = likeliest(scores)
    for row, draw in enumerate(draws):
        if draw.params.temperature > 0:
            tokens[row] = _draw(scores[row], draw)
        if draw.cursor is not None and not draw.cursor.failed:
            draw.cursor.take(tokens[row])
    return tokens


def likeliest(logits: Tensor) -> list[int]:
    """`logits.argmax(-1)` `[n]`: the first of equals, and of NaNs where there are any.

    On a CPU torch's argmax took an eighth of a decode step, its maximum is vectorised: so it looks
    only for the block, and for the place in the block. logits `[n, V]`.
    """
    size = logits.shape[1]
    whole = size - size % BLOCK
    if logits.device.type != "cpu" or not whole:
        found: list[int] = logits.argmax(-1).tolist()
        return found
    best = logits[:, :whole].view(len(logits), -1, BLOCK).amax(-1)
    if whole < size:
        best = torch.cat([best, logits[:, whole:].amax(-1, keepdim=True)], 1)
    first = best.argmax(-1, keepdim=True) * BLOCK
    # In a short last block its last place stands several times, the first of which counts.
    places = (first + torch.arange(BLOCK)).clamp_(max=size - 1)
    within = logits.gather(1, places).argmax(-1, keepdim=True)
    chosen: list[int] = (first + within)[:, 0].tolist()
    return chosen


def logprobs_of(
    logits: Tensor, tokens: Ordered[int], alternatives: Ordered[int]
) -> list[TokenLogprob]:
    """Log-probabilities of chosen tokens under the model's own distribution.

    logits `[n, V]`; alternatives: how many of the likeliest tokens to name, per row.
    """
    table = torch.log_softmax(logits.float(), dim=-1)
    chosen = table.gather(1, torch.tensor(tokens, device=table.device)[:, None])[:, 0].tolist()
    most = min(max(alternatives, default=0), table.shape[1])
    if most == 0:
        return [TokenLogprob(token, value) for token, value in zip(tokens, chosen, strict=True)]
    values, ids = (part.tolist() for part in table.topk(most, dim=-1))
    return [
        TokenLogprob(token, chosen[row], tuple(zip(ids[row][:k], values[row][:k], strict=True)))
        for row, (token, k) in enumerate(zip(tokens, alternatives, strict=True))
    ]


def _plain(params: SamplingParams) -> bool:
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    return params.temperature == 0 and penalties == (1, 0, 0)


def _penalise(scores: Tensor, draw: Draw) -> None:
    """Divide positive and multiply negative scores of tokens already there (CTRL, 1909.05858);
    then subtract from those of the answer's own tokens, once and by their number."""
    params = draw.params
    penalty = params.repetition_penalty
    if penalty != 1:
        seen = torch.tensor(sorted(set(draw.tokens)), device=scores.device)
        old = scores[seen]
        scores[seen] = torch.where(old < 0, old * penalty, old / penalty)
    counts = Counter(draw.tokens[draw.prompt :])
    if counts and (params.presence_penalty or params.frequency_penalty):
        said = torch.tensor(list(counts), device=scores.device)
        times = torch.tensor(list(counts.values()), device=scores.device)
        scores[said] -= params.presence_penalty + params.frequency_penalty * times


def _constrain(scores: Tensor, draw: Draw) -> None:
    """Rule out every token that the grammar does not allow next. scores `[V]`."""
    if draw.cursor is not None:
        allowed = torch.from_numpy(draw.cursor.allowed(draw.tokens[draw.prompt :]))
        scores[: len(allowed)].masked_fill_(~allowed.to(scores.device), -torch.inf)
        scores[len(allowed) :] = -torch.inf  # rows of the output head without a token


def _draw(scores: Tensor, draw: Draw) -> int:
    params = draw.params
    # From the maximum down, so that a tiny temperature overflows to -inf and never to NaN.
    probabilities = torch.softmax((scores - scores.max()) / params.temperature, dim=-1)
    ids: Tensor | None = None
    if params.top_k or params.top_p < 1:
        probabilities, ids = _likeliest(probabilities, params.top_k, params.top_p)
    if params.min_p > 0:
        floor = params.min_p * probabilities.max()
        probabilities = torch.where(probabilities < floor, 0.0, probabilities)
    cumulative = probabilities.double().cumsum(0)
    target = _uniform(draw) * cumulative[-1]
    place = int(torch.searchsorted(cumulative, target, right=True))
    place = min(place, int(probabilities.nonzero()[-1]))
    return place if ids is None else int(ids[place])


def _likeliest(probabilities: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """The candidates that top-k and then top-p leave, likeliest first, with their ids."""
    size = probabilities.numel()
    count = min(top_k or FIRST_CANDIDATES, size)
    values, ids = probabilities.topk(count)
    if not top_k and count < size and float(values.sum()) < top_p:
        values, ids = probabilities.sort(descending=True)
    if top_p < 1:
        total = values.sum() if top_k else probabilities.sum()
        before = values.cumsum(0) - values
        kept = max(1, int((before < top_p * total).sum()))
        values, ids = values[:kept], ids[:kept]
    return values, ids


def _uniform(draw: Draw) -> float:
    """A number in [0, 1) that only the seed, the choice and the position decide."""
    key = (draw.seed & (2**64 - 1)) | (draw.choice << 64)
    bits = np.random.Philox(key=key, counter=draw.position)
    return float(np.random.Generator(bits).random())
