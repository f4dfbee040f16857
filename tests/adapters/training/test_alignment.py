"""The alignment from one backward pass against gradients taken task by task."""

import pytest
import torch
from factories import tiny_model
from training_world import HEADS, encoded, examples, routed, trainable

from polyhead.adapters.inject import find_modules
from polyhead.adapters.training import alignment
from polyhead.adapters.training.encode import pack
from polyhead.adapters.training.factors import Factors


@pytest.mark.parametrize("uniform", [False, True])
def test_it_equals_the_cosines_of_separate_gradients(uniform: bool) -> None:
    model = tiny_model()
    source = routed(find_modules(model, heads=HEADS), 3, uniform=uniform)
    trained = trainable(model, source)
    tokens, tasks = encoded(examples())
    batch = pack(tokens, tasks)
    seen: list[Factors] = []
    trained.on_factors = lambda factors: (alignment.watch(factors), seen.append(factors))[0]
    trained(batch).sum().backward()
    found = alignment.gram(seen[0])
    trained.on_factors = None
    skills = list(source.skills.parameters())
    losses = trained(batch)
    separate = []
    for task in range(3):
        own = losses[torch.tensor(tasks) == task].sum()
        grads = torch.autograd.grad(own, skills, retain_graph=True)
        separate.append(torch.cat([g.flatten() for g in grads]).double())
    wanted = torch.stack(separate) @ torch.stack(separate).T
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    unit = torch.nn.functional.normalize(torch.stack(separate))
    cosines = unit @ unit.T
    mean = (cosines.sum() - 3) / 6
    assert alignment.mean_cosine(found) == pytest.approx(float(mean), abs=1e-4)


def test_equal_and_opposite_tasks() -> None:
    assert alignment.mean_cosine(torch.tensor([[4.0, 2.0], [2.0, 1.0]])) == pytest.approx(1)
    assert alignment.mean_cosine(torch.tensor([[4.0, -2.0], [-2.0, 1.0]])) == pytest.approx(-1)
    assert torch.isnan(torch.tensor(alignment.mean_cosine(torch.ones(1, 1))))
