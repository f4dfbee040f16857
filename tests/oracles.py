"""What tests compare the served computation with, and how they force its two forms."""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from polyhead.adapters.costs import FormCosts
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.plan import Adapter, PreparedAdapter, RoutedTask
from polyhead.adapters.private import PrivateAdapter

FACTORED = FormCosts(0.0, 0.0, combined_task=1.0, combined_token=1.0, fold=0.0)
COMBINED = FormCosts(1.0, 1.0, combined_task=0.0, combined_token=0.0, fold=0.0)
BY_LENGTH = FormCosts(0.0, 1.0, combined_task=3.5, combined_token=0.0, fold=0.0)
"""Tasks of at most three tokens in a step are factored, longer ones combined."""
FORMS = {"factored": FACTORED, "combined": COMBINED, "by length": BY_LENGTH}


def deltas(inventory: Inventory, adapter: Adapter) -> dict[str, Tensor]:
    """What an adapter adds to each module's `[I, O]` weight, in float64, by the definition."""
    if adapter is None:
        return {}
    assert not isinstance(adapter, PreparedAdapter), "give the adapter that it was made of"
    if isinstance(adapter, PrivateAdapter):
        return {name: adapter.a[name].double() @ adapter.b[name].double() for name in adapter.a}
    return {
        name: _routed_delta(inventory, adapter, index)
        for index, name in enumerate(inventory.layout.modules)
    }


def _routed_delta(inventory: Inventory, task: RoutedTask, index: int) -> Tensor:
    name = inventory.layout.modules[index]
    w = task.weights[index].double()[..., None, None]  # [H, S, 1, 1]
    a = (w * inventory.a[name].double()).sum(1)  # [H, I/H, r]
    b = (w * inventory.b[name].double()).sum(1)  # [H, r, O/H]
    return inventory.header.scaling * torch.cat(list(a), 0) @ torch.cat(list(b), 1)


def merged(model: PreTrainedModel, inventory: Inventory, adapter: Adapter) -> PreTrainedModel:
    """A copy of a bare model with one adapter added into its weights."""
    model = copy.deepcopy(model)
    for name, delta in deltas(inventory, adapter).items():
        layer = model.get_submodule(name)
        turned = delta if isinstance(layer, Conv1D) else delta.T
        layer.weight.data = (layer.weight.double() + turned).to(layer.weight.dtype)
    return model


def distance(found: Tensor, expected: Tensor) -> float:
    """`|found - expected| / |expected|` in the Euclidean norm, in float64."""
    expected = expected.detach().double()
    return float((found.detach().double() - expected).norm() / expected.norm())
