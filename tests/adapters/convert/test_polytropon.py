"""Polytropon's formula, written out here from its definition, is the oracle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from polyhead.adapters.convert.polytropon import convert_polytropon
from polyhead.adapters.errors import ConversionError

TASKS, SKILLS, RANK = 3, 4, 2
LAYERS = [
    "encoder.block.0.layer.0.SelfAttention.q",
    "decoder.block.0.layer.0.SelfAttention.k",
    "decoder.block.0.layer.1.EncDecAttention.o",
]


def t5(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 3}
    return T5ForConditionalGeneration(T5Config(**sizes, num_layers=1)).eval()


def trained(model: PreTrainedModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    state = {}
    for layer in LAYERS:
        linear: Any = model.get_submodule(layer)
        for side, width in (("A", linear.in_features), ("B", linear.out_features)):
            drawn = torch.randn(SKILLS, RANK * width, generator=generator)
            state[f"{layer}.skills_weight_{side}"] = drawn
        state[f"{layer}.skill_logits"] = 3 * torch.randn(TASKS, SKILLS, generator=generator)
    return state


def by_definition(state: dict[str, Tensor], layer: str, task: int, x: Tensor) -> Tensor:
    """Weights over skills, flat A and B mixed, then reshaped to `[I, r]` and `[r, O]`."""
    z = torch.sigmoid(state[f"{layer}.skill_logits"][task])
    z = z / (z.sum() + 1e-12)
    a = (z @ state[f"{layer}.skills_weight_A"]).view(x.shape[-1], RANK)
    b = (z @ state[f"{layer}.skills_weight_B"]).view(RANK, -1)
    return x @ a @ b / RANK


@pytest.mark.parametrize("saved", ["adapters", "wrapper", "everything", "safetensors"])
def test_the_formula_is_kept(tmp_path: Path, saved: str) -> None:
    model = t5()
    state = trained(model)
    written = dict(state)
    if saved == "everything":
        written |= model.state_dict()
    if saved in ("wrapper", "everything"):
        written = {f"model.{name}": tensor for name, tensor in written.items()}
    path = tmp_path / ("state.safetensors" if saved == "safetensors" else "state.pt")
    save_file(written, path) if saved == "safetensors" else torch.save(written, path)
    inventory = convert_polytropon(path, model, "t5")
    assert list(inventory.tasks) == ["task-0", "task-1", "task-2"]
    for layer in LAYERS:
        index = inventory.layout.modules.index(layer)
        x = torch.randn(4, inventory.header.modules[index].in_features)
        for task in range(TASKS):
            w = inventory.tasks[f"task-{task}"].weights(inventory.layout)[index, 0]
            a = torch.tensordot(w, inventory.a[layer][0], 1)
            b = torch.tensordot(w, inventory.b[layer][0], 1)
            found = inventory.header.scaling * (x @ a @ b)
            assert (found - by_definition(state, layer, task, x)).abs().max() < 1e-4
            assert (found - by_definition(state, layer, task - 1, x)).abs().max() > 1e-2


def test_other_variants_and_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    model = t5()
    state = trained(model)

    def refused(match: str, **change: Tensor | None) -> None:
        changed = {name: t for name, t in (state | change).items() if t is not None}
        torch.save(changed, tmp_path / "state.pt")
        with pytest.raises(ConversionError, match=match):
            convert_polytropon(tmp_path / "state.pt", model, "t5")

    first = LAYERS[0]
    refused("hyper-network", **{f"{first}.hyper_weight_A.weight": torch.zeros(2, 2)})
    refused("sparse skills", **{f"{first}.skills_weight": torch.zeros(2, 2)})
    refused("skill_logits are missing", **{f"{first}.skill_logits": None})
    refused("A or B is missing", **{f"{first}.skills_weight_B": None})
    refused("wrong shape", **{f"{first}.skills_weight_A": torch.zeros(SKILLS, 33)})
    shared = model.state_dict()["shared.weight"]
    refused("stayed frozen", **{"shared.weight": shared + 1e-4})
    torch.save(state | {"shared.weight": shared.bfloat16()}, tmp_path / "state.pt")
    convert_polytropon(tmp_path / "state.pt", model, "t5")
    refused("none of the adapters'", **{"elsewhere.weight": torch.zeros(2)})
    (tmp_path / "state.pt").write_bytes(b"no pickle")
    with pytest.raises(ConversionError, match=r"state\.pt: not a checkpoint"):
        convert_polytropon(tmp_path / "state.pt", model, "t5")
