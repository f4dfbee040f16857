"""The trained layers against an autograd reference that merges one task at a time."""

import copy

import pytest
import torch
from factories import tiny_model
from torch import Tensor
from training_world import (
    HEADS,
    RANK,
    SCALING,
    SKILLS,
    encoded,
    examples,
    layout_of,
    merged_loss,
    reference,
    routed,
    skill_grads,
    strengthen,
    trainable,
)
from transformers import PreTrainedModel

from polyhead.adapters.errors import InjectionError
from polyhead.adapters.inject import find_modules, inject
from polyhead.adapters.inventory import BackboneRef, Inventory, InventoryHeader, ModuleShape
from polyhead.adapters.plan import RoutedTask, use_plan
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Routing
from polyhead.adapters.training.answers import Encoded
from polyhead.adapters.training.data import Example
from polyhead.adapters.training.encode import pack
from polyhead.adapters.training.layers import TrainedLinear
from polyhead.adapters.training.skills import Routings
from polyhead.adapters.training.sources import OwnSkillsSource, PrivateSource, RoutedSource, export

FAMILIES = ["llama", "qwen3", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_equal_the_reference(family: str, checkpointing: bool) -> None:
    model = tiny_model(family)
    tokens, tasks = encoded(examples())
    source = routed(find_modules(model, heads=HEADS), 3)
    losses, grads, logit_grads = reference(copy.deepcopy(model), source, tokens, tasks)
    trained = trainable(model, source, checkpointing=checkpointing)
    found = trained(pack(tokens, tasks))
    found.mean().backward()
    torch.testing.assert_close(found.detach(), losses, atol=1e-4, rtol=1e-4)
    own = skill_grads(source)
    for name, (a, b) in grads.items():
        torch.testing.assert_close(own[name][0], a, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(own[name][1], b, atol=1e-4, rtol=1e-3)
    assert source.routings.logits.grad is not None
    torch.testing.assert_close(source.routings.logits.grad, logit_grads, atol=1e-5, rtol=1e-3)
    assert logit_grads.abs().amax((1, 2, 3)).min() > 1e-4, "every task's logits matter"


def test_wrong_tasks_give_other_losses() -> None:
    model = tiny_model()
    tokens, tasks = encoded(examples())
    trained = trainable(model)
    right = trained(pack(tokens, tasks)).detach()
    wrong = trained(pack(tokens, [(t + 1) % 3 for t in tasks])).detach()
    assert ((right - wrong).abs() > 0.01).all()


def test_exact_is_what_greedy_decoding_gives() -> None:
    model = tiny_model()
    tokens, tasks = encoded(examples(each=3))
    trained = trainable(model)
    with torch.no_grad():
        logits = trained.answer_logits(pack(tokens, tasks))
    top = logits.argmax(-1)
    batch = pack(tokens, tasks)
    assert torch.equal(trained.score(batch)[1], trained(batch))
    assert not trained.score(batch)[0].any(), "random weights answer nothing by chance"
    # Rewrite the answer of example 0, one token at a time, to what is predicted.
    ids = list(tokens[0].answer)
    for k in range(len(ids)):
        ids[k] = int(top[batch.example_of == 0][k])
        tokens[0] = Encoded(tokens[0].prompt, tuple(ids))
        top = trained.answer_logits(pack(tokens, tasks)).argmax(-1)
    assert trained.score(pack(tokens, tasks))[0].tolist() == [True] + [False] * (len(tokens) - 1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_trained_is_what_is_served(family: str) -> None:
    model = tiny_model(family)
    modules = find_modules(model, heads=HEADS)
    source = routed(modules, 3)
    tokens, tasks = encoded(examples())
    trained = trainable(model, source)
    batch = pack(tokens, tasks)
    wanted = trained.answer_logits(batch)
    inventory = inventory_of(trained.detach(), modules, source)
    injection = inject(model, inventory)
    served = []
    for i, (one, task) in enumerate(zip(tokens, tasks, strict=True)):
        ids = torch.tensor([one.prompt + one.answer])
        own, other = (routed_task(inventory, source, t) for t in (task, (task + 1) % 3))
        places = slice(len(one.prompt) - 1, ids.shape[1] - 1)
        right, wrong = (
            logits_under(model, injection.plan([adapter], [ids.shape[1]]), ids)[places]
            for adapter in (own, other)
        )
        served.append(right)
        torch.testing.assert_close(right, wanted[batch.example_of == i], atol=1e-4, rtol=1e-4)
        assert (right - wrong).abs().max() > 0.05


def logits_under(model: PreTrainedModel, plan: object, ids: Tensor) -> Tensor:
    with use_plan(plan):  # type: ignore[arg-type]
        return model(ids).logits[0]


def inventory_of(
    model: PreTrainedModel, modules: list[ModuleShape], source: RoutedSource
) -> Inventory:
    header = InventoryHeader(
        backbone=BackboneRef.of(model, "tiny"),
        modules=tuple(modules),
        heads=HEADS,
        skills=SKILLS,
        rank=RANK,
        scaling=SCALING,
    )
    return Inventory(header, *source.skills.export())


def routed_task(inventory: Inventory, source: RoutedSource, task: int) -> RoutedTask:
    logits = source.routings.logits[task].detach()
    weights = Routing.checked(logits, inventory.layout).weights(inventory.layout)
    return RoutedTask(f"t{task}", weights)


def test_detaching_leaves_the_backbone_as_it_was() -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(12).view(2, 6)
    wanted = model(ids).logits
    trained = trainable(model, checkpointing=True)
    tokens, tasks = encoded(examples())
    trained(pack(tokens, tasks)).sum().backward()
    trained.bare()
    assert torch.equal(model(ids).logits, wanted), "nothing on the board: the bare backbone"
    assert trained.detach() is model
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(ids).logits, wanted)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_the_source_is_trained() -> None:
    trained = trainable(tiny_model())
    names = {name for name, _ in trained.named_parameters()}
    assert names
    assert all(name.startswith("source.") for name in names)


def test_a_second_attachment_is_refused() -> None:
    trained = trainable(tiny_model())
    with pytest.raises(InjectionError, match="carries adapters already"):
        trainable(trained.model)


def test_private_adapters_start_from_the_average_and_learn_apart() -> None:
    model = tiny_model()
    modules = find_modules(model, heads=HEADS)
    shared = routed(modules, 2, uniform=True)
    uniform = shared.routings.weights(torch.tensor([0, 1]))
    assert torch.all(uniform == 1 / SKILLS)
    private = PrivateSource.averaged(shared.skills, uniform)
    tokens, tasks = encoded(examples(tasks=2))
    trained = trainable(model, shared)
    average = trained(pack(tokens, tasks)).detach()
    trained.source = private
    found = trained(pack(tokens, tasks))
    torch.testing.assert_close(found.detach(), average, atol=1e-5, rtol=1e-5)
    found[torch.tensor(tasks) == 0].sum().backward()
    for stack in (*private.a.values(), *private.b.values()):
        assert stack.grad is not None
        assert stack.grad[:, 0].abs().sum() > 0
        assert stack.grad[:, 1].abs().sum() == 0, "task 1 learns nothing from task 0's loss"


def own_skills(modules: list[ModuleShape]) -> OwnSkillsSource:
    source = OwnSkillsSource(routed(modules, 2).skills, Routings(layout_of(modules), 2))
    strengthen(source)
    return source


def fresh(modules: list[ModuleShape]) -> PrivateSource:
    source = PrivateSource.fresh(modules, rank=3, seeds=[1, 2])
    strengthen(source)
    return source


@pytest.mark.parametrize("make", [own_skills, fresh])
@torch.no_grad()
def test_an_exported_adapter_is_served_as_it_was_trained(make) -> None:  # type: ignore[no-untyped-def]
    model = tiny_model()
    modules = find_modules(model, heads=HEADS)
    source = make(modules)
    tokens, tasks = encoded(examples(tasks=2))
    wanted = trainable(model, source)(pack(tokens, tasks))
    bare = tiny_model()
    adapters = [export(source, task, SCALING) for task in (0, 1)]
    for one, task, loss in zip(tokens, tasks, wanted, strict=True):
        right, wrong = (
            merged_loss(bare, private_deltas(adapters[t]), one) for t in (task, 1 - task)
        )
        torch.testing.assert_close(right, loss, atol=1e-4, rtol=1e-4)
        assert (right - wrong).abs() > 1e-2


def private_deltas(adapter: PrivateAdapter) -> dict[str, Tensor]:
    return {name: adapter.a[name] @ adapter.b[name] for name in adapter.a}


@pytest.mark.parametrize("granularity", ["block", "model"])
def test_coarse_logits_are_shared_by_their_modules(granularity: str) -> None:
    modules = find_modules(tiny_model(), heads=HEADS)
    source = routed(modules, 2, granularity=granularity)
    layout = layout_of(modules)
    weights = source.routings.weights(torch.tensor([1]))[0]
    values = source.routings.logits[1].detach()
    values = values[0] if granularity == "model" else values
    given = Routing.checked(values, layout, granularity=granularity)  # type: ignore[arg-type]
    torch.testing.assert_close(weights, given.weights(layout))
    assert weights.shape == (len(modules), HEADS, SKILLS)


def test_relaxed_weights_are_random_in_training_and_fixed_otherwise() -> None:
    routings = Routings(layout_of(find_modules(tiny_model(), heads=HEADS)), 1, relaxed=True)
    task = torch.tensor([0])
    first, second = routings.weights(task), routings.weights(task)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.sum(-1), torch.ones_like(first.sum(-1)))
    routings.eval()
    assert torch.equal(routings.weights(task), routings.weights(task))
    assert (routings.weights(task) - 1 / SKILLS).abs().max() < 1e-3


def test_relaxed_samples_follow_the_distribution() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, -2.0]).expand(20000, 3)
    own = Routings._relaxed(logits)
    other = torch.distributions.RelaxedBernoulli(torch.tensor(1.0), logits=logits).sample()
    torch.testing.assert_close(own.mean(0), other.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(own.std(0), other.std(0), atol=0.01, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_backbones_with_their_own_attention_and_large_kernels_give_the_same(family: str) -> None:
    """The paths for a GPU and for attention that cannot be exchanged, against the CPU's."""
    tokens, tasks = encoded(examples())
    found = []
    for attention, dense in (("sdpa", False), ("eager", True)):
        model = tiny_model(family)
        model.set_attn_implementation(attention)
        trained = trainable(model)
        if dense:
            for layer in model.modules():
                if isinstance(layer, TrainedLinear):
                    layer._plain = False
        losses = trained(pack(tokens, tasks))
        losses.sum().backward()
        grads = [p.grad for p in trained.parameters()]
        assert trained.detach().config._attn_implementation == attention
        found.append((losses.detach(), grads))
    (losses, grads), (other_losses, other_grads) = found
    torch.testing.assert_close(losses, other_losses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grads, other_grads, atol=1e-4, rtol=1e-3)


def test_a_sliding_window_is_kept() -> None:
    tokens, tasks = encoded([Example("t0", "abcdefgh" * 2, "abcd"), Example("t1", "hgf", "ab")])
    narrow = tiny_model("mistral", sliding_window=4)
    source = routed(find_modules(narrow, heads=HEADS), 2)
    losses, _, _ = reference(copy.deepcopy(narrow), source, tokens, tasks)
    found = trainable(narrow, source)(pack(tokens, tasks)).detach()
    torch.testing.assert_close(found, losses, atol=1e-4, rtol=1e-4)
    wide = trainable(tiny_model("mistral"), source)(pack(tokens, tasks)).detach()
    assert (found[0] - wide[0]).abs() > 0.05


def test_bfloat16_backbones_train_float32_adapters() -> None:
    tokens, tasks = encoded(examples())
    whole = trainable(tiny_model())
    half = trainable(tiny_model().bfloat16(), whole.source)
    wanted = whole(pack(tokens, tasks)).detach()
    found = half(pack(tokens, tasks))
    found.mean().backward()
    torch.testing.assert_close(found.detach(), wanted, atol=0.15, rtol=0.05)
    assert {p.grad.dtype for p in half.parameters() if p.grad is not None} == {torch.float32}
