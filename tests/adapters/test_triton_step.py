"""The Triton kernels, interpreted on the CPU, against the float32 reference."""

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is made for Linux only")

from factories import random_private, random_task, tiny_inventory, tiny_model
from oracles import FORMS

from polyhead.adapters import ops
from polyhead.adapters.compiled import FactorTable
from polyhead.adapters.inject import inject
from polyhead.adapters.kernels import TritonKernels, kernels_for
from polyhead.adapters.plan import use_plan
from polyhead.adapters.triton_step import TritonCombined, TritonFactored

CPU = torch.device("cpu")
# Unit roundoffs 2^-24, 2^-8, 2^-11, as in test_ops: the forms round as often as those in torch.
# The interpreter cuts bfloat16 off where a GPU rounds it, which is up to twice as far.
BOUNDS = {torch.float32: 64 * 2**-24, torch.bfloat16: 12 * 2**-8, torch.float16: 6 * 2**-11}
WRONG = 0.1
TASKS = 6
POPULARITY = ("identical", "distinct", "uniform", "zipf")


@dataclass(frozen=True)
class Shape:
    heads: int
    skills: int
    rank: int
    wide: int  # features of one head


SHAPES = [
    Shape(heads=4, skills=8, rank=16, wide=24),
    Shape(heads=64, skills=8, rank=1, wide=3),  # the published T0 models' heads and rank
    Shape(heads=2, skills=3, rank=5, wide=70),  # nothing is a power of two
    Shape(heads=1, skills=8, rank=64, wide=130),  # skills in several tiles
    Shape(heads=1, skills=1, rank=32, wide=16),
]


def owners_of(tokens: int, popularity: str) -> list[int]:
    draw = random.Random(tokens)
    everyone = range(TASKS)
    if popularity == "identical":
        return [0] * tokens
    if popularity == "distinct":
        return [i % TASKS for i in range(tokens)]
    if popularity == "uniform":
        return draw.choices(everyone, k=tokens)
    return draw.choices(everyone, [1 / (1 + rank) for rank in everyone], k=tokens)


@dataclass(frozen=True)
class Case:
    """A group of two modules that read the same input, and tokens of several tasks."""

    a: list[Tensor]
    b: list[Tensor]
    x: Tensor  # [N, I]
    weights: Tensor  # [T, G, H, S]
    owners: list[int]
    group: ops.SkillGroup

    @classmethod
    def draw(cls, shape: Shape, tokens: int, popularity: str, dtype: torch.dtype) -> "Case":
        generator = torch.Generator().manual_seed(shape.rank * 1000 + tokens)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(dtype)

        heads, skills, rank, wide = shape.heads, shape.skills, shape.rank, shape.wide
        a = [normal(heads, skills, wide, rank) for _ in range(2)]
        b = [normal(heads, skills, rank, wide + g) for g in range(2)]
        weights = torch.softmax(4 * normal(TASKS, 2, heads, skills).float(), -1)
        weights = weights * (0.5 + torch.rand(TASKS, 1, 1, 1, generator=generator))
        group = ops.SkillGroup.pack(a, b, 0.7, dtype)
        owners = owners_of(tokens, popularity)
        return cls(a, b, normal(tokens, heads * wide), weights, owners, group)

    def errors(self, form: str, shift: int = 0) -> list[float]:
        """Of each module, when every token is answered as the task `shift` further."""
        owners = [(own + shift) % TASKS for own in self.owners]
        step = self._factored(owners) if form == "factored" else self._combined(owners)
        errors = []
        hidden = step.shrink(*self._where(form), self.x)
        for g, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            y = torch.zeros(len(self.x), b.shape[0] * b.shape[3], dtype=self.x.dtype)
            if isinstance(step, TritonFactored):
                step.expand(self.group, 0, g, hidden, y)
            else:
                step.expand(g, hidden, y)
            expected = ops.reference(self.x, a, b, self.weights[self.owners, g], 0.7)
            errors.append(float((y.float() - expected).norm() / expected.norm()))
        return errors

    def _where(self, form: str) -> tuple[object, ...]:
        return (self.group, 0) if form == "factored" else (0,)

    def _factored(self, owners: list[int]) -> TritonFactored:
        return TritonFactored(torch.arange(len(owners)), torch.tensor(owners), self.weights)

    def _combined(self, owners: list[int]) -> TritonCombined:
        factors = [ops.fold_factors(self.group, self.weights[t]) for t in range(TASKS)]
        self.kept.extend(factors)
        present = sorted(set(owners))
        positions = [[p for p, own in enumerate(owners) if own == t] for t in present]
        tables = [FactorTable.of([factors[t]], [2]) for t in present]
        return TritonCombined(tables, positions, CPU)

    @property
    def kept(self) -> list[ops.Factors]:
        """Factors are read by their address, so they must live."""
        return self.__dict__.setdefault("_kept", [])


@pytest.mark.parametrize("form", ["factored", "combined"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_compute_the_reference(shape: Shape, dtype: torch.dtype, form: str) -> None:
    sizes = [(20, "zipf"), (1, "identical"), (5, "distinct")]
    for tokens, popularity in sizes[2 * (shape.heads == 64) :]:  # many heads are many programs
        case = Case.draw(shape, tokens, popularity, dtype)
        assert max(case.errors(form)) < BOUNDS[dtype]
    assert min(case.errors(form, shift=1)) > WRONG  # control: another task is told apart


@pytest.mark.parametrize("form", ["factored", "combined"])
@pytest.mark.parametrize("popularity", POPULARITY)
def test_more_tokens_than_a_block_holds(popularity: str, form: str) -> None:
    case = Case.draw(Shape(2, 4, 8, 40), 70, popularity, torch.float32)
    assert max(case.errors(form)) < BOUNDS[torch.float32]


@pytest.mark.parametrize("modules", [2, 3, 4])
def test_a_group_is_expanded_at_once_onto_columns_of_one_product(modules: int) -> None:
    generator = torch.Generator().manual_seed(modules)
    heads, skills, rank, tokens = 4, 8, 4, 5
    outs = [24, 8, 40, 16][:modules]
    a = [torch.randn(heads, skills, 12, rank, generator=generator) for _ in outs]
    b = [torch.randn(heads, skills, rank, o // heads, generator=generator) for o in outs]
    x = torch.randn(tokens, heads * 12, generator=generator)
    weights = torch.rand(tokens, modules, heads, skills, generator=generator)
    group = ops.SkillGroup.pack(a, b, 0.7, torch.float32)
    step = TritonFactored(torch.arange(tokens), torch.arange(tokens), weights)
    whole = torch.randn(tokens, sum(outs), generator=generator)
    base, outputs = whole.clone(), whole.split(outs, dim=1)
    step.expand_all(group, 0, step.shrink(group, 0, x), outputs)
    found = (whole - base).split(outs, dim=1)
    for g, delta in enumerate(found):
        expected = ops.reference(x, a[g], b[g], weights[:, g], 0.7)
        assert (delta - expected).norm() / expected.norm() < 1e-5
        wrong = ops.reference(x, a[g], b[g], weights[:, g].roll(1, 0), 0.7)
        assert (delta - wrong).norm() / wrong.norm() > WRONG  # control: tokens' tasks exchanged


def test_weights_are_read_where_they_lie_in_half_precision_too() -> None:
    """A table of all resident tasks, of which a step reads a few rows."""
    case = Case.draw(SHAPES[0], 5, "distinct", torch.float32)
    halves = case.weights.half()
    step = TritonFactored(torch.arange(5), torch.tensor(case.owners), halves)
    y = torch.zeros(5, case.b[1].shape[0] * case.b[1].shape[3])
    step.expand(case.group, 0, 1, step.shrink(case.group, 0, case.x), y)
    own = halves.float()[case.owners, 1]
    expected = ops.reference(case.x, case.a[1], case.b[1], own, 0.7)
    assert (y - expected).norm() / expected.norm() < BOUNDS[torch.float32]


@pytest.mark.parametrize("counts", [[1] * 8, [3, 1, 20, 1, 2, 1, 1, 2]], ids=["decode", "mixed"])
@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_a_routed_model_answers_as_with_the_torch_forms(form: str, counts: list[int]) -> None:
    """Shared tasks, private adapters of another rank on some modules, and bare rows."""
    model = tiny_model(num_hidden_layers=1)
    inventory = tiny_inventory(model, 4, 4, 3)
    tasks = [random_task(inventory, f"task-{i}", i) for i in range(3)]
    rows = [tasks[0], None, tasks[1], random_private(inventory, 0), tasks[2], tasks[0], None]
    rows.append(random_private(inventory, 1, rank=20))
    ids = torch.randint(0, 250, (1, sum(counts)), generator=torch.Generator().manual_seed(0))
    logits = {}
    for name, kernels in [("triton", TritonKernels(torch.float32)), ("torch", None)]:
        torch.set_num_threads(1 if kernels else 3)  # three: no compiled kernels either
        injection = inject(model, inventory, FORMS[form], kernels)
        for _ in range(3):  # a step builds the factors of one task
            plan = injection.plan(rows, counts)
        assert (plan.step is not None) == (kernels is not None)
        with use_plan(plan):
            logits[name] = model(input_ids=ids).logits[0]
        injection.remove()
    torch.set_num_threads(1)
    bare = model(input_ids=ids).logits[0]
    scale = float(logits["torch"].norm())
    assert float((logits["triton"] - logits["torch"]).norm()) < 1e-5 * scale
    assert float((bare - logits["torch"]).norm()) > WRONG * scale


def test_other_devices_than_cuda_do_without_triton() -> None:
    torch.set_num_threads(3)
    assert kernels_for(torch.bfloat16, CPU, []) is None
    assert isinstance(kernels_for(torch.bfloat16, torch.device("cuda"), []), TritonKernels)
