from collections.abc import Iterator

import pytest
import torch
from factories import tiny_inventory, tiny_model
from transformers import PreTrainedModel

from polyhead.adapters.inject import Injection, inject


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Before every test: some compute with more, for which there are no compiled kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    """A tiny llama with an inventory in it; see `injection`."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def injection(model: PreTrainedModel) -> Injection:
    return inject(model, tiny_inventory(model))
