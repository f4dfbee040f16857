import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from polyhead.adapters.errors import BackboneMismatch, InventoryError
from polyhead.adapters.inventory import (
    BackboneRef,
    DtypeName,
    Inventory,
    InventoryHeader,
    ModuleShape,
    backbone_fingerprint,
)
from polyhead.adapters.routing import Routing

BACKBONE = BackboneRef(name="tiny", fingerprint="ab" * 32)
MODULES = (
    ModuleShape(name="layers.0.q", in_features=8, out_features=4),
    ModuleShape(name="layers.0.up", in_features=8, out_features=12),
)


def drawn(dtype: DtypeName = "float32", seed: int = 0) -> Inventory:
    inventory = Inventory.random(
        BACKBONE, MODULES, heads=2, skills=3, rank=2, scaling=0.5, seed=seed, dtype=dtype
    )
    for granularity in ("module", "block", "model"):
        shape = inventory.layout.shape(granularity)
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        inventory.tasks[f"of.{granularity}"] = Routing(values, "logits", granularity)
    return inventory


def zeros(**changes: Any) -> Inventory:
    """Nothing but zeros: only the header tells two of them apart."""
    fields: dict[str, Any] = {
        "backbone": BACKBONE,
        "modules": MODULES,
        "heads": 2,
        "skills": 3,
        "rank": 2,
        "scaling": 0.5,
    }
    header = InventoryHeader(**fields | changes)
    dtype = getattr(torch, header.dtype)
    a = {m.name: torch.zeros(header.shape_a(m), dtype=dtype) for m in header.modules}
    b = {m.name: torch.zeros(header.shape_b(m), dtype=dtype) for m in header.modules}
    return Inventory(header, a, b)


class TestShapes:
    def test_every_head_has_its_slice_of_the_features(self) -> None:
        inventory = drawn()
        assert inventory.a["layers.0.q"].shape == (2, 3, 4, 2)
        assert inventory.b["layers.0.q"].shape == (2, 3, 2, 2)
        assert inventory.b["layers.0.up"].shape == (2, 3, 2, 6)
        assert inventory.layout.shape("module") == (2, 2, 3)
        assert inventory.layout.modules == ("layers.0.q", "layers.0.up")

    @pytest.mark.parametrize(
        ("field", "change"),
        [
            ("layers.0.q.A", lambda t: t.mT),
            ("layers.0.q.B", lambda t: t[:1]),
            ("layers.0.q.B", lambda t: t.half()),
            ("layers.0.q.A", lambda t: t.int()),
            ("layers.0.up.B", lambda t: t.index_fill(3, torch.tensor(5), math.nan)),
            ("layers.0.up.A", lambda t: t.index_fill(2, torch.tensor(3), -math.inf)),
            ("layers.0.q.A", None),
            ("layers.0.up.B", None),
        ],
    )
    def test_a_tensor_at_odds_with_the_header_is_named(
        self, field: str, change: Callable[[Tensor], Tensor] | None
    ) -> None:
        sound = drawn()
        tensors, name = (sound.a if field.endswith(".A") else sound.b), field[:-2]
        whole = tensors.pop(name)
        if change is not None:
            tensors[name] = change(whole)
        with pytest.raises(InventoryError) as caught:
            Inventory(sound.header, sound.a, sound.b)
        assert caught.value.field == field

    def test_a_tensor_of_no_module_is_named(self) -> None:
        sound = drawn()
        with pytest.raises(InventoryError, match=r"layers\.9\.q"):
            Inventory(sound.header, sound.a | {"layers.9.q": sound.a["layers.0.q"]}, sound.b)

    @pytest.mark.parametrize(("inputs", "outputs"), [(9, 4), (8, 5)])
    def test_features_that_cannot_be_split_are_named(self, inputs: int, outputs: int) -> None:
        odd = ModuleShape(name="odd", in_features=inputs, out_features=outputs)
        with pytest.raises(InventoryError, match="multiple of 2") as caught:
            zeros(modules=(*MODULES, odd))
        assert caught.value.field == "odd"


class TestHeader:
    @pytest.mark.parametrize(
        "changes",
        [
            {"format": 2},
            {"modules": ()},
            {"modules": (*MODULES, MODULES[0])},
            {"heads": 0},
            {"rank": -1},
            {"scaling": math.nan},
            {"scaling": math.inf},
            {"dtype": "int8"},
            {"surprise": 1},
        ],
    )
    def test_values_without_a_meaning_are_refused(self, changes: dict[str, Any]) -> None:
        with pytest.raises(ValidationError) as caught:
            zeros(**changes)
        assert caught.value.errors()[0]["loc"][0] == next(iter(changes))


class TestFiles:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_round_trip_is_exact(self, tmp_path: Path, dtype: DtypeName) -> None:
        inventory = drawn(dtype)
        inventory.save(tmp_path)
        again = Inventory.load(tmp_path)
        assert again.header == inventory.header
        for name in inventory.layout.modules:
            assert torch.equal(again.a[name], inventory.a[name])
            assert torch.equal(again.b[name], inventory.b[name])
        assert again.tasks.keys() == inventory.tasks.keys()
        for name, routing in inventory.tasks.items():
            assert again.tasks[name].fingerprint == routing.fingerprint
        assert again.fingerprint == inventory.fingerprint

    def test_saving_replaces_what_was_there(self, tmp_path: Path) -> None:
        drawn().save(tmp_path)
        other = drawn(seed=1)
        other.tasks = {"only": other.tasks["of.block"]}
        other.save(tmp_path)
        again = Inventory.load(tmp_path)
        assert list(again.tasks) == ["only"]
        assert again.fingerprint == other.fingerprint

    def test_templates_come_back_with_their_tasks(self, tmp_path: Path) -> None:
        inventory = drawn()
        name = next(iter(inventory.tasks))
        inventory.templates = {name: "Q: {input}\n"}
        inventory.save(tmp_path)
        assert Inventory.load(tmp_path).templates == {name: "Q: {input}\n"}
        inventory.templates = {}
        inventory.save(tmp_path)
        assert Inventory.load(tmp_path).templates == {}

    @pytest.mark.parametrize(
        ("found", "told"),
        [
            ('{"nobody": "{input}"}', "'nobody'"),
            ('{"task-model": "no place"}', "'task-model'"),
            ('{"task-model": 7}', "'task-model'"),
            ("[]", "not an object"),
            ("{", "templates.json"),
        ],
    )
    def test_a_wrong_template_is_named(self, tmp_path: Path, found: str, told: str) -> None:
        inventory = drawn()
        inventory.tasks["task-model"] = next(iter(inventory.tasks.values()))
        inventory.save(tmp_path)
        (tmp_path / "tasks" / "templates.json").write_text(found)
        with pytest.raises(InventoryError, match=told):
            Inventory.load(tmp_path)

    def test_a_loaded_inventory_can_be_saved_over_itself(self, tmp_path: Path) -> None:
        drawn().save(tmp_path)
        Inventory.load(tmp_path).save(tmp_path)
        assert Inventory.load(tmp_path).fingerprint == drawn().fingerprint

    @pytest.mark.parametrize("name", ["../out", "", ".hidden", "a/b", "base", "x" * 129, "a\n"])
    def test_a_task_is_not_written_outside_of_its_folder(self, tmp_path: Path, name: str) -> None:
        inventory = drawn()
        inventory.tasks = {name: inventory.tasks["of.model"]}
        with pytest.raises(InventoryError, match="task name"):
            inventory.save(tmp_path / "inventory")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("file", ["inventory.json", "inventory.safetensors"])
    @pytest.mark.parametrize("spoiled", ["gone", "empty", "halved"])
    def test_a_broken_file_is_named(self, tmp_path: Path, file: str, spoiled: str) -> None:
        drawn().save(tmp_path)
        path = tmp_path / file
        data = path.read_bytes()
        path.unlink()
        if spoiled != "gone":
            path.write_bytes(data[: len(data) // 2] if spoiled == "halved" else b"")
        with pytest.raises(InventoryError, match=re.escape(file)):
            Inventory.load(tmp_path)

    def test_a_header_that_claims_terabytes_is_refused(self, tmp_path: Path) -> None:
        drawn().save(tmp_path)
        path = tmp_path / "inventory.safetensors"
        path.write_bytes(struct.pack("<Q", 1 << 42) + path.read_bytes()[8:])
        with pytest.raises(InventoryError, match=r"inventory\.safetensors"):
            Inventory.load(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"rank": 3}, "layers.0.q.A"),
            ({"heads": 4}, "layers.0.q.A"),
            ({"dtype": "float16"}, "layers.0.q.A"),
            ({"scaling": None}, "scaling"),
            ({"scaling": math.nan}, "scaling"),
            ({"format": 2}, "format"),
            ({"skills": "many"}, "skills"),
            ({"backbone": {"name": "tiny"}}, "backbone.fingerprint"),
            ({"surprise": 1}, "surprise"),
        ],
    )
    def test_a_header_at_odds_with_the_tensors_names_the_field(
        self, tmp_path: Path, changes: dict[str, Any], field: str
    ) -> None:
        drawn().save(tmp_path)
        path = tmp_path / "inventory.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        with pytest.raises(InventoryError) as caught:
            Inventory.load(tmp_path)
        assert caught.value.field == field

    @pytest.mark.parametrize("name", ["surprise", "layers.7.q.A"])
    def test_a_surplus_tensor_is_refused(self, tmp_path: Path, name: str) -> None:
        drawn().save(tmp_path)
        path = tmp_path / "inventory.safetensors"
        save_file(load(path.read_bytes()) | {name: torch.zeros(2)}, path)
        with pytest.raises(InventoryError, match=name.removesuffix(".A")):
            Inventory.load(tmp_path)

    def test_a_broken_task_is_named(self, tmp_path: Path) -> None:
        drawn().save(tmp_path)
        path = tmp_path / "tasks" / "of.block.safetensors"
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(InventoryError, match=r"of\.block\.safetensors"):
            Inventory.load(tmp_path)


CHANGES: dict[str, object] = {
    "backbone": BackboneRef(name="tiny", fingerprint="cd" * 32),
    "modules": (MODULES[0].model_copy(update={"name": "layers.1.q"}), MODULES[1]),
    "heads": 1,
    "skills": 2,
    "rank": 1,
    "scaling": 0.25,
    "dtype": "bfloat16",
    "provenance": {"steps": 1},
}


class TestFingerprint:
    @pytest.mark.parametrize("field", sorted(InventoryHeader.model_fields.keys() - {"format"}))
    def test_changes_with_every_field_of_the_header(self, field: str) -> None:
        changed = zeros(**{field: CHANGES[field]})
        assert changed.fingerprint != zeros().fingerprint
        assert changed.fingerprint == zeros(**{field: CHANGES[field]}).fingerprint

    def test_changes_with_the_order_of_modules(self) -> None:
        assert zeros(modules=MODULES[::-1]).fingerprint != zeros().fingerprint

    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def test_changes_with_any_number(self, data: st.DataObject) -> None:
        inventory = drawn()
        tensors = data.draw(st.sampled_from([inventory.a, inventory.b]))
        flat = tensors[data.draw(st.sampled_from(inventory.layout.modules))].view(-1)
        index = data.draw(st.integers(0, flat.numel() - 1))
        flat[index] = torch.nextafter(flat[index], torch.tensor(9.0))
        assert inventory.fingerprint != drawn().fingerprint

    @pytest.mark.parametrize(
        "provenance",
        [
            {"nested": {"numbers": [0.1, 1e-30, 3], "none": None}},
            {"tuple": (1, 2), "by number": {2: "b", 1: "a"}},
            {"not a number": math.nan, "path": Path("runs") / "7"},
        ],
    )
    def test_is_the_same_after_reloading(self, tmp_path: Path, provenance: dict[str, Any]) -> None:
        inventory = zeros(provenance=provenance)
        inventory.save(tmp_path)
        assert Inventory.load(tmp_path).fingerprint == inventory.fingerprint


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


class TestBackbone:
    def test_another_backbone_is_refused_and_both_are_named(self) -> None:
        other = BackboneRef(name="other", fingerprint="cd" * 32)
        with pytest.raises(BackboneMismatch) as caught:
            drawn().check_backbone(other)
        for part in ("tiny", "abababababab", "other", "cdcdcdcdcdcd"):
            assert part in str(caught.value)

    def test_the_fingerprint_decides_and_not_the_name(self) -> None:
        drawn().check_backbone(BackboneRef(name="renamed", fingerprint=BACKBONE.fingerprint))
        with pytest.raises(BackboneMismatch):
            drawn().check_backbone(BackboneRef(name=BACKBONE.name, fingerprint="cd" * 32))

    def test_one_checkpoint_is_one_backbone_in_either_dtype(self, tmp_path: Path) -> None:
        tiny_llama().save_pretrained(tmp_path)
        whole, half = (
            LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert (whole.dtype, half.dtype) == (torch.float32, torch.bfloat16)
        assert BackboneRef.of(whole, "x") == BackboneRef.of(half, "x")

    def test_other_numbers_shapes_or_names_are_another_backbone(self) -> None:
        found = {backbone_fingerprint(tiny_llama(seed)) for seed in (0, 1)}
        narrow = nn.Sequential(nn.Linear(4, 6, bias=False))
        with torch.no_grad():
            narrow[0].weight.fill_(1.0)
            reshaped = nn.Sequential(nn.Linear(6, 4, bias=False))
            reshaped[0].weight.fill_(1.0)
        renamed = nn.ModuleDict({"layer": narrow[0]})
        found |= {backbone_fingerprint(model) for model in (narrow, reshaped, renamed)}
        assert len(found) == 5

    def test_every_parameter_counts(self) -> None:
        model = tiny_llama()
        before = backbone_fingerprint(model)
        for parameter in model.parameters():
            kept = parameter.detach().clone()
            parameter.data += 0.1
            assert backbone_fingerprint(model) != before
            parameter.data.copy_(kept)
        assert backbone_fingerprint(model) == before
