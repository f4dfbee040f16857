import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from polyhead.server.engine.request import SamplingParams
from polyhead.server.engine.sampler import (
    BLOCK,
    FIRST_CANDIDATES,
    Draw,
    likeliest,
    logprobs_of,
    sample,
)

VOCAB = 40
DRAWS = 3000
PROMPT = [3, 3, 7, 11, 39]


def logits(seed: int = 0, vocab: int = VOCAB, spread: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(vocab, generator=generator)


def transformers_probabilities(row: Tensor, params: SamplingParams, seen: list[int]) -> Tensor:
    """What `generate` would draw from, in float64."""
    steps: list[Any] = [RepetitionPenaltyLogitsProcessor(params.repetition_penalty)]
    if params.temperature != 1:
        steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    scores = LogitsProcessorList(steps)(torch.tensor([seen]), row[None].clone())
    probabilities: Tensor = torch.softmax(scores[0].double(), -1)
    return probabilities


def drawn(row: Tensor, params: SamplingParams, count: int = DRAWS, seed: int = 5) -> list[int]:
    tokens: list[int] = []
    for start in range(0, count, 500):
        size = min(500, count - start)
        draws = [Draw(params, seed, 0, start + i, PROMPT) for i in range(size)]
        tokens += sample(row.expand(size, -1), draws)
    return tokens


def chi_square(tokens: list[int], probabilities: Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; cells below 5 expected are joined."""
    counts = Counter(tokens)
    total, freedom, rest_seen, rest_due = 0.0, -1, 0, 0.0
    for token, p in enumerate(probabilities.tolist()):
        due, seen = p * len(tokens), counts[token]
        if due >= 5:
            total, freedom = total + (seen - due) ** 2 / due, freedom + 1
        else:
            rest_seen, rest_due = rest_seen + seen, rest_due + due
    if rest_due > 1:
        total, freedom = total + (rest_seen - rest_due) ** 2 / rest_due, freedom + 1
    return total, freedom


CASES = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=2.0),
    SamplingParams(temperature=1.0, top_k=5),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.3, top_p=0.7),
    SamplingParams(temperature=1.0, top_p=0.01),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=1.5, top_k=12, top_p=0.8),
    SamplingParams(temperature=1.5, top_k=12, top_p=0.9, min_p=0.15),
    SamplingParams(temperature=1.0, repetition_penalty=1.7),
    SamplingParams(temperature=0.8, repetition_penalty=0.5, top_k=9, min_p=0.02),
]


@pytest.mark.parametrize("params", CASES, ids=lambda p: f"{p.temperature}-{p.top_k}-{p.top_p}")
def test_draws_follow_transformers_distribution(params: SamplingParams) -> None:
    row = logits()
    probabilities = transformers_probabilities(row, params, PROMPT)
    tokens = drawn(row, params)
    possible = {i for i, p in enumerate(probabilities.tolist()) if p > 0}
    assert set(tokens) <= possible
    likely = {i for i, p in enumerate(probabilities.tolist()) if p > 0.01}
    assert likely <= set(tokens)
    statistic, freedom = chi_square(tokens, probabilities)
    # Five standard deviations of the chi-square distribution, whose variance is twice its mean.
    assert statistic <= freedom + 5 * math.sqrt(2 * max(1, freedom))


def test_the_chi_square_tells_distributions_apart() -> None:
    row = logits()
    near = SamplingParams(temperature=1.15)
    tokens = drawn(row, SamplingParams(temperature=1.0))
    statistic, freedom = chi_square(tokens, transformers_probabilities(row, near, PROMPT))
    assert statistic > freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("spread", [0.001, 6.0])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.9999])
def test_top_p_over_a_vocabulary_larger_than_the_first_candidates(
    spread: float, top_p: float
) -> None:
    row = logits(3, vocab=3 * FIRST_CANDIDATES, spread=spread)
    params = SamplingParams(temperature=1.0, top_p=top_p)
    probabilities = transformers_probabilities(row, params, PROMPT)
    tokens = drawn(row, params, 500)
    assert all(probabilities[token] > 0 for token in tokens)
    assert {i for i, p in enumerate(probabilities.tolist()) if p > 0.03} <= set(tokens)
    assert len(set(tokens)) > 300 or spread > 1


def test_greedy_is_the_penalised_maximum_and_changes_no_logits() -> None:
    row = torch.stack([logits(seed) for seed in range(4)])
    before = row.clone()
    plain = [Draw(SamplingParams(), 0, 0, 9, PROMPT)] * 4
    assert sample(row, plain) == row.argmax(-1).tolist()
    top = int(row[0].argmax())
    penalised = Draw(SamplingParams(repetition_penalty=50.0), 0, 0, 9, [top])
    mixed = sample(row, [penalised, *plain[1:]])
    assert mixed[0] == int(row[0].topk(2).indices[1])
    assert mixed[1:] == row[1:].argmax(-1).tolist()
    assert torch.equal(row, before)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(6, VOCAB, generator=generator)
    draws = [
        Draw(CASES[i], seed=100 + i, choice=i % 2, position=10 + i, tokens=PROMPT) for i in range(6)
    ]
    together = sample(rows, draws)
    alone = [sample(rows[i : i + 1], [draws[i]])[0] for i in range(6)]
    backwards = sample(rows.flip(0), draws[::-1])[::-1]
    assert together == alone == backwards


def test_seed_choice_and_position_each_make_a_difference() -> None:
    row, params = torch.zeros(1000), SamplingParams(temperature=1.0)

    def series(seed: int, choice: int, first: int) -> list[int]:
        return sample(
            row.expand(40, -1), [Draw(params, seed, choice, first + i, PROMPT) for i in range(40)]
        )

    base = series(1, 0, 0)
    assert series(1, 0, 0) == base
    for other in (series(2, 0, 0), series(1, 1, 0), series(1, 0, 1000), series(2**63 - 1, 0, 0)):
        assert sum(a == b for a, b in zip(base, other, strict=True)) <= 2
    assert len(set(base)) > 30


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("temperature", [1e-4, 0.01, 100.0])
def test_extreme_parameters_never_fail(temperature: float, scale: float) -> None:
    row = logits() * scale
    for extra in (
        {},
        {"top_k": 10 * VOCAB},
        {"top_k": 2**31 - 1, "top_p": 1e-9},
        {"min_p": 1.0},
        {"top_p": 1e-9},
        {"repetition_penalty": 100.0},
        {"repetition_penalty": 0.01},
        {"top_k": 1, "top_p": 0.5, "min_p": 1.0, "repetition_penalty": 0.01},
    ):
        params = SamplingParams(temperature=temperature, **extra)
        tokens = drawn(row, params, 20)
        assert all(0 <= token < VOCAB for token in tokens)


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-40])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    row = logits()
    assert set(drawn(row, SamplingParams(temperature=temperature), 50)) == {int(row.argmax())}


def test_half_precision_logits_are_sampled_in_float32() -> None:
    row = logits().to(torch.bfloat16)
    params = SamplingParams(temperature=1.0, top_p=0.95)
    assert drawn(row, params, 50) == drawn(row.float(), params, 50)


def test_logprobs_are_the_models_own() -> None:
    rows = torch.stack([logits(seed) for seed in range(3)])
    table = torch.log_softmax(rows.double(), -1)
    found = logprobs_of(rows, [1, 2, 3], [0, 4, VOCAB + 5])
    for row, (entry, count) in enumerate(zip(found, [0, 4, VOCAB], strict=True)):
        assert entry.token_id == row + 1
        assert entry.logprob == pytest.approx(table[row, row + 1].item(), abs=1e-5)
        assert len(entry.top) == count
        values = [value for _, value in entry.top]
        assert values == sorted(values, reverse=True)
        assert [i for i, _ in entry.top] == table[row].topk(count).indices.tolist()
        for token, value in entry.top:
            assert value == pytest.approx(table[row, token].item(), abs=1e-5)
    assert all(entry.top == () for entry in logprobs_of(rows, [0, 0, 0], [0, 0, 0]))


def test_presence_and_frequency_look_at_the_answer_only() -> None:
    row = logits()
    said = [4, 4, 4, 9]
    params = SamplingParams(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.75)
    expected = row.clone()
    expected[4] -= 0.5 + 3 * 0.75
    expected[9] -= 0.5 + 0.75
    probabilities = torch.softmax(expected.double(), -1)

    def tokens(params: SamplingParams) -> list[int]:
        draws = [Draw(params, 5, 0, i, PROMPT + said, len(PROMPT)) for i in range(DRAWS)]
        return sample(row.expand(DRAWS, -1), draws)

    statistic, freedom = chi_square(tokens(params), probabilities)
    assert statistic <= freedom + 5 * math.sqrt(2 * freedom)
    statistic, freedom = chi_square(tokens(SamplingParams(temperature=1.0)), probabilities)
    assert statistic > freedom + 5 * math.sqrt(2 * freedom)


def test_a_penalty_alone_changes_what_is_greedy() -> None:
    row = logits()[None]
    first, second = row[0].topk(2).indices.tolist()
    lead = float(row[0, first] - row[0, second])
    for name, times in (("presence_penalty", 1), ("frequency_penalty", 3)):
        for share, wanted in ((0.9, first), (1.1, second)):
            params = SamplingParams(**{name: share * lead / times})
            draw = Draw(params, 0, 0, 9, [first, *[first] * 3], 1)
            assert sample(row, [draw]) == [wanted]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 5 * BLOCK + 7])
def test_the_likeliest_is_what_argmax_says(size: int, dtype: torch.dtype) -> None:
    """Few values, so that many are equal; infinities; a slice, whose rows are not adjacent."""
    generator = torch.Generator().manual_seed(size)
    table = torch.randint(-9, 3, (200, size + 3), generator=generator).to(dtype)
    table[::7] = -torch.inf
    table[3, size // 2] = torch.inf
    found = table[:, :size]
    assert likeliest(found) == found.argmax(-1).tolist()
    assert size == 1 or len(set(likeliest(found))) > 1


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_row_that_holds_a_nan_shows_it(sign: float) -> None:
    """So that its request fails instead of going on with whatever token."""
    found = torch.zeros(2, 3 * BLOCK + 5)
    found[0, BLOCK + 9] = math.copysign(math.nan, sign)
    found[1, -1] = 1.0
    assert likeliest(found) == [BLOCK + 9, 3 * BLOCK + 4]
