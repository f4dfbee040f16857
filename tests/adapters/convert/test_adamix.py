"""AdaMix's formula, written out here from its definition, is the oracle."""

from pathlib import Path

import pytest
import torch
from factories import save_backbone, tiny_model
from torch import Tensor
from typer.testing import CliRunner

from polyhead.adapters.convert.adamix import convert_adamix
from polyhead.adapters.errors import ConversionError, PrivateAdapterError
from polyhead.adapters.inject import find_modules
from polyhead.adapters.peft_lora import CONFIG_FILE, WEIGHTS_FILE, read_peft_lora
from polyhead.server.cli import app

EXPERTS, RANK, WIDTH, ALPHA = 4, 3, 64, 16.0
FILES = (CONFIG_FILE, WEIGHTS_FILE)
LAYERS = ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]


def trained(share_a: bool = False, share_b: bool = False, tuned: bool = True) -> dict[str, Tensor]:
    """What `lora_state_dict` keeps of a model with `AdamixMergedLinear`."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for layer in LAYERS:
        for e in range(1 if share_a else EXPERTS):
            drawn = torch.randn(2 * RANK, WIDTH, generator=generator)
            state[f"{layer}.experts_lora_A.{e}"] = drawn
        for e in range(1 if share_b else EXPERTS):
            drawn = torch.randn(2 * WIDTH, RANK, generator=generator)
            state[f"{layer}.experts_lora_B.{e}"] = drawn
        scores = torch.randn(EXPERTS, generator=generator) if tuned else torch.zeros(EXPERTS)
        state[f"{layer}.lora_expert_score_weight"] = scores
    return state


def by_definition(state: dict[str, Tensor], layer: str, x: Tensor) -> Tensor:
    """What is added to q, k and v of one token x `[I]`, number by number."""
    scores = state[f"{layer}.lora_expert_score_weight"].exp()
    shares = (scores / scores.sum()).tolist()
    sides = []
    for side in "AB":
        found = [t for name, t in state.items() if name.startswith(f"{layer}.experts_lora_{side}.")]
        total = torch.zeros_like(found[0])
        for e, tensor in enumerate(found):
            total = total + (tensor * shares[e] if len(found) > 1 else tensor)
        sides.append(total)
    a, b = sides
    added = torch.zeros(3 * WIDTH)
    for o in range(WIDTH):
        added[o] = sum(b[o, k] * (a[k] @ x) for k in range(RANK))
        added[2 * WIDTH + o] = sum(b[WIDTH + o, k] * (a[RANK + k] @ x) for k in range(RANK))
    return added * (ALPHA / RANK)


@pytest.mark.parametrize("tuned", [False, True], ids=["uniform", "tuned"])
@pytest.mark.parametrize("share_a", [False, True], ids=["own-a", "shared-a"])
@pytest.mark.parametrize("share_b", [False, True], ids=["own-b", "shared-b"])
def test_the_formula_is_kept(tmp_path: Path, share_a: bool, share_b: bool, tuned: bool) -> None:
    state = trained(share_a, share_b, tuned)
    torch.save({"model_state_dict": state}, tmp_path / "model.1000.pt")
    adapter = convert_adamix(tmp_path / "model.1000.pt", tiny_model("gpt2"), ALPHA)
    assert list(adapter.a) == LAYERS
    for layer in LAYERS:
        x = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))
        found = x @ adapter.a[layer] @ adapter.b[layer]
        torch.testing.assert_close(found, by_definition(state, layer, x), rtol=1e-4, atol=1e-3)
        other = LAYERS[1 - LAYERS.index(layer)]
        assert (found - by_definition(state, other, x)).abs().max() > 1
        assert torch.all(found[WIDTH : 2 * WIDTH] == 0), "k has no adapter"


def test_the_sum_of_products_is_another_function(tmp_path: Path) -> None:
    """The control: A and B are averaged apart, so the mean of the modules' outputs differs."""
    state = trained(tuned=False)
    torch.save({"model_state_dict": state}, tmp_path / "model.pt")
    adapter = convert_adamix(tmp_path / "model.pt", tiny_model("gpt2"), ALPHA)
    layer, x = LAYERS[0], torch.ones(WIDTH)
    each = []
    for e in range(EXPERTS):
        own = {name: t for name, t in state.items() if name.endswith((f".{e}", "_weight"))}
        each.append(by_definition(own, layer, x))
    found = x @ adapter.a[layer] @ adapter.b[layer]
    assert (found - torch.stack(each).mean(0)).abs().max() > 1


def test_a_whole_checkpoint_must_hold_the_same_backbone(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    whole = {f"module.{n}": t for n, t in (model.state_dict() | trained()).items()}
    whole["module.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    whole["module.lm_head.decoder.weight"] = model.state_dict()["lm_head.weight"]
    torch.save({"model_state_dict": whole}, tmp_path / "model.final.pt")
    assert list(convert_adamix(tmp_path / "model.final.pt", model, ALPHA).a) == LAYERS
    with pytest.raises(ConversionError, match="not the one that was given"):
        convert_adamix(tmp_path / "model.final.pt", tiny_model("gpt2", seed=1), ALPHA)


def refused(tmp_path: Path, match: str, **change: Tensor | None) -> None:
    changed = {name: t for name, t in (trained() | change).items() if t is not None}
    torch.save({"model_state_dict": changed}, tmp_path / "model.pt")
    with pytest.raises(ConversionError, match=match):
        convert_adamix(tmp_path / "model.pt", tiny_model("gpt2"), ALPHA)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("transformer.h.0.mlp.ExpertSoup.MoA_A.deepspeed_experts.0.weight", "not linear"),
        ("transformer.h.0.mlp.ExpertSoup.MoA_A.expert_score_weight", "not linear"),
        ("bert.encoder.layer.0.output.ExpertSoup.MoA_B.deepspeed_experts.1.bias", "not linear"),
        ("transformer.h.0.attn.c_attn.lora_A", "lora_only"),
        ("transformer.h.0.attn.c_attn.lora_B", "lora_only"),
        ("transformer.h.0.attn.c_attn.elsewhere", "none of the mixture's"),
    ],
)
def test_other_variants_are_refused_by_name(tmp_path: Path, name: str, match: str) -> None:
    refused(tmp_path, match, **{name: torch.zeros(2, 2)})


def test_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    first = LAYERS[0]
    refused(tmp_path, "are missing", **{f"{first}.lora_expert_score_weight": None})
    refused(tmp_path, "are missing", **{f"{first}.experts_lora_A.{e}": None for e in range(4)})
    refused(tmp_path, "wrong number of modules", **{f"{first}.experts_lora_B.2": None})
    refused(tmp_path, "different shapes", **{f"{first}.experts_lora_A.1": torch.zeros(2, WIDTH)})
    odd = {f"{first}.experts_lora_A.{e}": torch.zeros(3 * RANK, WIDTH) for e in range(EXPERTS)}
    refused(tmp_path, r"wrong shape.*A \[2\*r, 64\], B \[128, r\]", **odd)
    lost = {name.replace("h.1.", "h.9."): t for name, t in trained().items()}
    refused(tmp_path, "no such module", **lost)
    torch.save({"model_state_dict": {}}, tmp_path / "model.pt")
    with pytest.raises(ConversionError, match="none of the mixture's"):
        convert_adamix(tmp_path / "model.pt", tiny_model("gpt2"), ALPHA)
    state = trained()
    state[f"{first}.experts_lora_A.0"][0, 0] = float("nan")
    torch.save({"model_state_dict": state}, tmp_path / "model.pt")
    with pytest.raises(PrivateAdapterError, match="not every number is finite"):
        convert_adamix(tmp_path / "model.pt", tiny_model("gpt2"), ALPHA)
    with pytest.raises(ConversionError, match="alpha"):
        convert_adamix(tmp_path / "model.pt", tiny_model("gpt2"), 0.0)


def test_the_command_writes_a_folder_that_a_task_can_own(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    save_backbone(model, tmp_path / "gpt2")
    torch.save({"model_state_dict": trained()}, tmp_path / "model.pt")
    given = [str(tmp_path / "model.pt"), str(tmp_path / "lora")]
    how = ["--backbone", str(tmp_path / "gpt2"), "--alpha", str(ALPHA)]
    done = CliRunner().invoke(app, ["convert", "adamix", *given, *how])
    assert done.exit_code == 0, done.stderr
    wanted = convert_adamix(tmp_path / "model.pt", model, ALPHA)
    config, weights = ((tmp_path / "lora" / name).read_bytes() for name in FILES)
    found = read_peft_lora(config, weights, find_modules(model))
    assert found.fingerprint == wanted.fingerprint
    again = CliRunner().invoke(app, ["convert", "adamix", *given, *how])
    assert again.exit_code == 2
    assert "expected a new or an empty folder" in again.stderr
