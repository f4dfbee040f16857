"""Both exact forms against the reference, and the reference against the definition."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from oracles import distance
from torch import Tensor

from polyhead.adapters import ops

Popularity = Literal["identical", "distinct", "uniform", "zipf"]
Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
FORMS: dict[str, Form] = {"factored": ops.factored, "combined": ops.combined}
# Unit roundoffs u are 2^-24, 2^-8 and 2^-11. The factored form rounds to the dtype four times
# (scaled B, shrink, mixed activations, expand), the combined form five times (scaled B, A_t, B_t,
# shrink, expand). The roundings are independent, so their errors add up like sqrt(5) u = 2.2 u;
# 6 u leaves room for small cases, where a norm has few terms to average over. In float32 the
# accumulation counts as well, which is not rounded to the dtype but of the same precision: 64 u.
BOUNDS = {torch.float32: 64 * 2**-24, torch.bfloat16: 6 * 2**-8, torch.float16: 6 * 2**-11}
WRONG = 0.1
"""How far at least the answer of another task is, in the same measure."""
MOST_NUMBERS = 1 << 21
"""Limit on `N * H * S * r`, the factored form's intermediate, so that no example is slow."""


@dataclass(frozen=True)
class Case:
    rank: int
    skills: int
    heads: int
    tokens: int
    popularity: Popularity
    seed: int = 0


def sizes(*usual: int) -> st.SearchStrategy[int]:
    """Mostly the sizes where shapes change their character, sometimes any in between."""
    return st.one_of(st.sampled_from(usual), st.integers(usual[0], usual[-1]))


CASES = st.builds(
    Case,
    rank=sizes(1, 2, 8, 16, 64),
    skills=sizes(1, 2, 8, 16),
    heads=sizes(1, 2, 4, 16, 64),
    tokens=sizes(1, 2, 3, 32, 512),
    popularity=st.sampled_from(get_args(Popularity)),
    seed=st.integers(0, 2**16),
)
PUBLISHED = Case(rank=1, skills=8, heads=64, tokens=48, popularity="zipf")  # the T0 models' shape


@dataclass(frozen=True)
class Operands:
    x: Tensor  # [N, I]
    a: Tensor  # [H, S, I/H, r]
    b: Tensor  # [H, S, r, O/H]
    weights: Tensor  # [T, H, S]
    task_of_token: Tensor  # [N]
    scaling: float

    def run(self, form: Form, task_of_token: Tensor | None = None) -> Tensor:
        owners = self.task_of_token if task_of_token is None else task_of_token
        return form(self.x, self.a, self.b, self.weights, owners, self.scaling)

    def expected(self) -> Tensor:
        weights = self.weights[self.task_of_token]
        return ops.reference(self.x, self.a, self.b, weights, self.scaling)

    def error(self, found: Tensor) -> Tensor:
        """For each token the error's norm, relative to the answer's.

        Where the answer cancels out by chance, its terms count: their root sum of squares is the
        answer's size on average over signs, and what their rounding errors are proportional to.
        """
        weights = self.weights[self.task_of_token]
        squares = (t.float().square() for t in (self.x, self.a, self.b, weights))
        terms = ops.reference(*squares, self.scaling**2).sum(1).sqrt()
        expected = self.expected()
        size = torch.maximum(terms, expected.norm(dim=1))
        return (found.float() - expected).norm(dim=1) / size


def tasks_of(case: Case, tokens: int) -> list[int]:
    """The task of every token: as many tasks as tokens unless all are identical."""
    draw = random.Random(case.seed)
    everyone = range(tokens)
    if case.popularity == "identical":
        return [0] * tokens
    if case.popularity == "distinct":
        return draw.sample(everyone, tokens)
    if case.popularity == "uniform":
        return draw.choices(everyone, k=tokens)
    return draw.choices(everyone, [1 / (1 + rank) for rank in everyone], k=tokens)


def operands(case: Case, dtype: torch.dtype) -> Operands:
    """Weights need not sum to 1 here, so that tasks differ even where there is one skill only."""
    generator = torch.Generator().manual_seed(case.seed)
    tokens = max(1, min(case.tokens, MOST_NUMBERS // (case.heads * case.skills * case.rank)))
    wide = -(-16 // case.heads)  # features of one head: at least 16 over all heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    a = normal(case.heads, case.skills, wide + case.seed % 3, case.rank)
    b = normal(case.heads, case.skills, case.rank, wide + case.seed % 2)
    x = normal(tokens, a.shape[0] * a.shape[2])
    sharp = torch.softmax(4 * normal(tokens, case.heads, case.skills), -1)
    size = 0.5 + torch.rand(tokens, case.heads, 1, generator=generator)
    owners = torch.tensor(tasks_of(case, tokens))
    return Operands(x.to(dtype), a.to(dtype), b.to(dtype), sharp * size, owners, 0.7)


def definition(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, scaling: float) -> Tensor:
    """The reference, one token, head and skill at a time, in float64."""
    rows = []
    for token, w in zip(x.double(), weights.double(), strict=True):
        heads, skills = w.shape
        a_t = [sum(w[h, s] * a[h, s].double() for s in range(skills)) for h in range(heads)]
        b_t = [sum(w[h, s] * b[h, s].double() for s in range(skills)) for h in range(heads)]
        rows.append(scaling * (token @ torch.cat(a_t, 0)) @ torch.cat(b_t, 1))
    return torch.stack(rows)


@pytest.mark.parametrize("case", [Case(3, 4, 2, 5, "distinct"), Case(1, 8, 64, 3, "distinct")])
def test_the_reference_is_the_definition(case: Case) -> None:
    given_ = operands(case, torch.float32)
    weights = given_.weights[given_.task_of_token]
    args = (given_.x, given_.a, given_.b, weights, given_.scaling)
    assert distance(ops.reference(*args), definition(*args)) < BOUNDS[torch.float32]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=CASES)
@example(case=PUBLISHED)
@example(case=Case(1, 1, 1, 1, "identical"))
@example(case=Case(64, 16, 64, 512, "zipf"))
@example(case=Case(64, 1, 1, 512, "uniform"))
def test_both_forms_compute_the_reference(case: Case, dtype: torch.dtype) -> None:
    o = operands(case, dtype)
    found = {name: o.run(form) for name, form in FORMS.items()}
    for name, y in found.items():
        assert y.dtype == dtype
        # Every token by itself: a norm over all of them could hide one that is wrong.
        assert o.error(y).max() < 2 * BOUNDS[dtype], name
        assert o.error(y).square().mean().sqrt() < BOUNDS[dtype], name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(case=CASES)
@example(case=PUBLISHED)
def test_another_tasks_weights_are_told_apart(form: str, dtype: torch.dtype, case: Case) -> None:
    """Control of the test above: its bounds do not hide tokens that got another's weights."""
    o = operands(case, dtype)
    assume(len(o.weights) > 1)
    wrong = (o.task_of_token + 1) % len(o.weights)
    error = o.error(o.run(FORMS[form], wrong))
    assert error.square().mean().sqrt() > max(WRONG, 4 * BOUNDS[dtype])


@pytest.mark.parametrize("case", [PUBLISHED, Case(16, 8, 4, 24, "uniform")])
def test_the_two_forms_are_one_function_and_averaged_products_another(case: Case) -> None:
    o = operands(case, torch.float64)
    w = torch.softmax(4 * o.weights[o.task_of_token].double(), -1)  # [N, H, S], rows sum to 1
    x = o.x.view(len(o.x), case.heads, -1)  # [N, H, I/H]
    a_t = torch.einsum("nhs,hsir->nhir", w, o.a)
    b_t = torch.einsum("nhs,hsro->nhro", w, o.b)
    v = torch.einsum("nhi,nhir->nr", x, a_t)
    combined = o.scaling * torch.einsum("nr,nhro->nho", v, b_t)

    u = torch.einsum("nhi,hsir->nhsr", x, o.a)
    mixed = torch.einsum("nhs,nhsr->nr", w, u)
    z = torch.einsum("nr,hsro->nhso", mixed, o.b)
    factored = o.scaling * torch.einsum("nhs,nhso->nho", w, z)
    assert distance(factored, combined) < 1e-12


def test_averaging_products_is_another_function() -> None:
    """What X-LoRA, Arrow and per-request LoRA scales compute: `sum_s w_s A_s B_s`."""
    o = operands(Case(4, 6, 1, 24, "distinct"), torch.float32)
    sharp, one_hot = o.weights, torch.eye(6).repeat(4, 1).unsqueeze(1)  # [N, H = 1, S]
    for weights, same in [(sharp, False), (one_hot, True)]:
        products = torch.einsum("ni,sir,sro,ns->no", o.x, o.a[0], o.b[0], weights[:, 0])
        found = ops.factored(o.x, o.a, o.b, weights, torch.arange(24), 1.0)
        far = distance(products, found)
        assert far < 1e-5 if same else far > WRONG
