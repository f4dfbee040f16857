from collections.abc import Sequence

import pytest
import torch
from factories import VOCAB, random_task, tiny_inventory, tiny_model
from oracles import COMBINED, FACTORED, distance, merged
from torch import Tensor, nn
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from polyhead.adapters.costs import FormCosts
from polyhead.adapters.errors import InjectionError, PlanError
from polyhead.adapters.inject import find_modules, inject, linear_shape
from polyhead.adapters.inventory import BackboneRef, Inventory, ModuleShape
from polyhead.adapters.layers import RoutedLinear
from polyhead.adapters.plan import use_plan

FAMILIES = ["llama", "qwen3", "gpt2", "t5"]
EXACT = 1e-5
DIFFERENT = 0.05
LLAMA_BLOCK = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LLAMA_BLOCK += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def tiny_t5() -> PreTrainedModel:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval().requires_grad_(False)


def backbone(family: str) -> PreTrainedModel:
    return tiny_t5() if family == "t5" else tiny_model(family)


def inventory_of(
    model: PreTrainedModel, targets: str | Sequence[str] = "all-linear", heads: int = 4
) -> Inventory:
    modules = find_modules(model, targets, heads)
    return Inventory.random(
        BackboneRef.of(model, "tiny"), modules, heads=heads, skills=3, rank=2, std=0.3
    )


def tokens(rows: int = 2, length: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (rows, length), generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """For an encoder-decoder the decoder reads the same tokens, turned around."""
    extra = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    found: Tensor = model(input_ids=ids, use_cache=False, **extra).logits
    return found


def wrapped(model: PreTrainedModel) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, RoutedLinear)}


class TestFindModules:
    def test_all_linear_layers_in_the_models_order_but_not_the_output_head(self) -> None:
        names = [module.name for module in find_modules(tiny_model())]
        assert names == [f"model.layers.{i}.{part}" for i in range(2) for part in LLAMA_BLOCK]

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("tied", [True, False])
    def test_no_head_whether_tied_or_not(self, family: str, tied: bool) -> None:
        model = backbone(family)
        model.config.tie_word_embeddings = tied
        if not tied:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
        names = {module.name for module in find_modules(model)}
        linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        assert linear - names == {"lm_head"}

    @pytest.mark.parametrize(
        ("targets", "parts"),
        [
            (["q_proj", "v_proj"], ["self_attn.q_proj", "self_attn.v_proj"]),
            ("down_proj", ["mlp.down_proj"]),
            (["mlp.down_proj", "self_attn.o_proj"], ["self_attn.o_proj", "mlp.down_proj"]),
        ],
    )
    def test_targets_are_the_last_parts_of_names(
        self, targets: str | list[str], parts: list[str]
    ) -> None:
        names = [module.name for module in find_modules(tiny_model(), targets)]
        assert names == [f"model.layers.{i}.{part}" for i in range(2) for part in parts]

    def test_one_layer_by_its_whole_name(self) -> None:
        name = "model.layers.1.mlp.up_proj"
        wanted = ModuleShape(name=name, in_features=64, out_features=96)
        assert find_modules(tiny_model(), [name]) == [wanted]

    @pytest.mark.parametrize(
        ("targets", "named"),
        [
            (["q_proj", "queries", "keys"], "['keys', 'queries']"),
            ("proj", "proj"),  # a part of a name, but not a whole one
            ("embed_tokens", "embed_tokens"),  # not linear
            ("lm_head", "lm_head"),
            ([], "[]"),
        ],
    )
    def test_a_target_that_matches_nothing_is_refused(
        self, targets: str | list[str], named: str
    ) -> None:
        with pytest.raises(InjectionError) as caught:
            find_modules(tiny_model(), targets)
        assert caught.value.field == "targets"
        assert caught.value.found == named

    @pytest.mark.parametrize(
        ("heads", "first", "width"),
        [
            (0, "model.layers.0.self_attn.q_proj", 64),
            (3, "model.layers.0.self_attn.q_proj", 64),
            (64, "model.layers.0.self_attn.k_proj", 32),
        ],
    )
    def test_heads_that_do_not_divide_the_features(
        self, heads: int, first: str, width: int
    ) -> None:
        with pytest.raises(InjectionError, match="split into heads") as caught:
            find_modules(tiny_model(), heads=heads)
        assert (caught.value.field, caught.value.found) == (first, f"{width} features")

    def test_shapes_of_both_kinds_of_linear_layer(self) -> None:
        assert linear_shape(nn.Linear(3, 5)) == (3, 5)
        assert linear_shape(Conv1D(5, 3)) == (3, 5)
        assert linear_shape(nn.Embedding(3, 5)) is None


class TestInject:
    @pytest.mark.parametrize(("family", "count"), [("llama", 14), ("gpt2", 8), ("t5", 36)])
    def test_it_counts_what_it_touched(self, family: str, count: int) -> None:
        model = backbone(family)
        inventory = inventory_of(model)
        injection = inject(model, inventory)
        assert injection.count == count
        assert wrapped(model) == set(inventory.layout.modules)

    def test_only_the_inventorys_modules_are_touched(self) -> None:
        model = tiny_model()
        injection = inject(model, inventory_of(model, ["v_proj"]))
        assert injection.count == 2
        assert wrapped(model) == {f"model.layers.{i}.self_attn.v_proj" for i in range(2)}

    @pytest.mark.parametrize("family", FAMILIES)
    def test_without_a_plan_nothing_changes(self, family: str) -> None:
        model = backbone(family)
        before = logits(model, tokens())
        inject(model, inventory_of(model))
        assert torch.equal(logits(model, tokens()), before)

    def test_a_second_injection_is_refused_even_into_other_modules(self) -> None:
        model = tiny_model()
        first, other = inventory_of(model, ["q_proj"]), inventory_of(model, ["o_proj"])
        injection = inject(model, first)
        for inventory in (first, other):
            with pytest.raises(InjectionError, match="already injected") as caught:
                inject(model, inventory)
            assert caught.value.field == "model.layers.0.self_attn.q_proj"
        assert wrapped(model) == set(first.layout.modules)
        injection.remove()
        assert inject(model, other).count == 2

    @pytest.mark.parametrize(
        ("name", "width", "found"),
        [
            ("model.layers.7.mlp.up_proj", 96, "nothing"),
            ("model.layers.1.mlp.up_proj", 64, "Linear (64, 96)"),
            ("model.embed_tokens", 64, "Embedding None"),
        ],
    )
    def test_a_backbone_without_such_a_layer_is_refused_untouched(
        self, name: str, width: int, found: str
    ) -> None:
        model = tiny_model()
        odd = ModuleShape(name=name, in_features=64, out_features=width)
        modules = [*find_modules(model, ["q_proj"]), odd]
        inventory = Inventory.random(
            BackboneRef.of(model, "tiny"), modules, heads=4, skills=2, rank=2
        )
        with pytest.raises(InjectionError, match="no such linear layer") as caught:
            inject(model, inventory)
        error = caught.value
        assert (error.field, error.found) == (name, found)
        assert error.expected == f"a linear layer (64, {width})"
        assert wrapped(model) == set()

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_output_head_and_its_tie_stay(self, family: str) -> None:
        model = backbone(family)
        head, weight = model.lm_head, model.lm_head.weight
        tied = weight is model.get_input_embeddings().weight
        inject(model, inventory_of(model))
        assert model.lm_head is head
        assert head.weight is weight
        assert (weight is model.get_input_embeddings().weight) == tied

    def test_the_tie_of_gpt2_and_t5_is_really_there(self) -> None:
        """So that the test above covers tied heads and, with the Llama, untied ones."""
        for family, tied in [("gpt2", True), ("t5", True), ("llama", False)]:
            model = backbone(family)
            assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


class TestGroups:
    @pytest.mark.parametrize(
        ("family", "sizes"),
        [
            ("llama", [3, 1, 2, 1] * 2),  # q k v, o, gate up, down
            ("qwen3", [3, 1, 2, 1] * 2),
            ("gpt2", [1, 1, 1, 1] * 2),  # c_attn holds q, k and v in one
            ("t5", [3, 1, 2, 1] * 2 + [3, 1, 1, 2, 1, 2, 1] * 2),  # the encoder's k v apart from q
        ],
    )
    def test_layers_that_read_the_same_input(self, family: str, sizes: list[int]) -> None:
        model = backbone(family)
        slots = inject(model, inventory_of(model)).slots
        assert [slot.group.size for slot in slots] == sizes
        ends = [slot.columns.stop for slot in slots]
        assert [slot.columns.start for slot in slots] == [0, *ends[:-1]]

    def test_only_adapted_layers_form_a_group(self) -> None:
        model = tiny_model()
        injection = inject(model, inventory_of(model, ["q_proj", "v_proj", "o_proj"]))
        assert [slot.group.size for slot in injection.slots] == [2, 1, 2, 1]

    def test_layers_that_run_twice_stand_alone_and_are_right(self) -> None:
        """A backbone that shares its blocks, as ALBERT does."""
        bare = tiny_model()
        bare.model.layers[1] = bare.model.layers[0]
        inventory = inventory_of(bare)
        model = merged(bare, inventory, None)
        injection = inject(model, inventory)
        assert injection.count == 7
        assert [slot.group.size for slot in injection.slots] == [1] * 7
        task = random_task(inventory, "task", 0)
        with use_plan(injection.plan([task, None], [5, 5])):
            found = logits(model, tokens())
        assert distance(found[0], logits(merged(bare, inventory, task), tokens())[0]) < EXACT

    def test_looking_for_them_leaves_no_hooks(self) -> None:
        model = tiny_model()
        inject(model, inventory_of(model))
        assert not any(module._forward_pre_hooks for module in model.modules())


class TestRemove:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_backbone_is_bit_identical_again(self, family: str) -> None:
        model = backbone(family)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        modules = dict(model.named_modules())
        answer = logits(model, tokens())
        inventory = inventory_of(model)
        injection = inject(model, inventory, COMBINED)
        assert model.state_dict().keys() != before.keys()
        with use_plan(injection.plan([random_task(inventory, "task", 0)], [10])):
            assert not torch.equal(logits(model, tokens()), answer)
        injection.remove()
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert dict(model.named_modules()) == modules  # the very same objects
        assert torch.equal(logits(model, tokens()), answer)

    def test_the_mode_of_training_is_kept(self) -> None:
        model = tiny_model()
        injection = inject(model, inventory_of(model))
        assert not any(module.training for module in model.modules())
        model.train()
        injection.remove()
        assert all(module.training for module in model.modules())

    def test_removing_twice_and_injecting_again(self) -> None:
        model = tiny_model()
        inventory = inventory_of(model)
        injection = inject(model, inventory)
        injection.remove()
        injection.remove()
        assert wrapped(model) == set()
        assert inject(model, inventory).count == 14


class TestUnderAPlan:
    @pytest.mark.parametrize("costs", [FACTORED, COMBINED], ids=["factored", "combined"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_row_equals_its_merged_model(self, family: str, costs: FormCosts) -> None:
        bare = backbone(family)
        inventory = inventory_of(bare)
        tasks = [random_task(inventory, "a", 1), None, random_task(inventory, "b", 2)]
        model = merged(bare, inventory, None)
        injection = inject(model, inventory, costs)
        ids = tokens(rows=3)
        injection.plan(tasks, [5] * 3)  # builds the factors of one task, the next of the other
        with use_plan(injection.plan(tasks, [5] * 3)):
            found = logits(model, ids)
        answers = [logits(merged(bare, inventory, task), ids) for task in tasks]
        assert torch.equal(found[1], answers[1][1])
        for row in range(3):
            far = [distance(found[row], answer[row]) for answer in answers]
            assert [error < EXACT for error in far] == [other == row for other in range(3)]
            assert sorted(far)[1] > DIFFERENT

    def test_an_encoder_and_a_decoder_of_other_lengths_are_refused(self) -> None:
        """One plan is for one number of tokens; a wrong one must not be answered silently."""
        model = tiny_t5()
        inventory = inventory_of(model)
        injection = inject(model, inventory)
        plan = injection.plan([random_task(inventory, "task", 0)], [5])
        short = tokens(1, 3)
        with torch.no_grad(), use_plan(plan), pytest.raises(PlanError, match="found 3"):
            model(input_ids=tokens(1, 5), decoder_input_ids=short)

    def test_the_inventorys_own_module_order_does_not_matter(self) -> None:
        """A routing follows the inventory's order, the layers follow the forward pass's."""
        bare = tiny_model()
        plain = tiny_inventory(bare)
        backwards = plain.header.model_copy(update={"modules": plain.header.modules[::-1]})
        inventory = Inventory(backwards, plain.a, plain.b)
        task = random_task(inventory, "task", 0)
        expected = logits(merged(bare, inventory, task), tokens())
        for costs in (FACTORED, COMBINED):
            model = merged(bare, inventory, None)
            injection = inject(model, inventory, costs)
            with use_plan(injection.plan([task], [10])):
                assert distance(logits(model, tokens()), expected) < EXACT
        assert distance(logits(merged(bare, plain, task), tokens()), expected) > DIFFERENT
