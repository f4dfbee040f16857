"""Small real things for the tests of training."""

import json
import random
from pathlib import Path

import torch
from factories import END, byte_tokenizer, save_backbone, tiny_model
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from polyhead.adapters.inject import find_modules
from polyhead.adapters.inventory import ModuleShape
from polyhead.adapters.routing import Layout
from polyhead.adapters.training.answers import Encoded
from polyhead.adapters.training.data import Example
from polyhead.adapters.training.encode import Encoder
from polyhead.adapters.training.factors import Source
from polyhead.adapters.training.skills import Routings, SharedSkills
from polyhead.adapters.training.sources import RoutedSource
from polyhead.adapters.training.trainable import Trainable

Pairs = dict[str, tuple[Tensor, Tensor]]

HEADS, SKILLS, RANK, SCALING = 4, 3, 2, 1.5


def words(count: int, seed: int = 0, longest: int = 9) -> list[str]:
    chance = random.Random(seed)
    return ["".join(chance.choices("abcdefgh", k=chance.randint(2, longest))) for _ in range(count)]


def examples(tasks: int = 3, each: int = 4, seed: int = 0) -> list[Example]:
    """Task i repeats a word's letter i times: unlike lengths, unlike tasks."""
    found = words(tasks * each, seed)
    return [Example(f"t{i % tasks}", w, w[: 1 + i % tasks] * 2) for i, w in enumerate(found)]


def save_world(folder: Path, tasks: int) -> None:
    """A `backbone` and, of each task, twelve examples in `train.jsonl`."""
    save_backbone(tiny_model(), folder / "backbone")
    lines = [
        {"task": one.task, "input": one.input, "output": one.output}
        for one in examples(tasks, each=12)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def encoded(given: list[Example], *, closed: bool = False) -> tuple[list[Encoded], list[int]]:
    encoder = Encoder(closing_tokenizer() if closed else byte_tokenizer(), closed=closed)
    return encoder.encode(given), [int(e.task[1:]) for e in given]


def closing_tokenizer() -> PreTrainedTokenizerFast:
    """Ends a text by itself, as T5's does."""
    tokenizer = byte_tokenizer()
    ending = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 256)])
    tokenizer.backend_tokenizer.post_processor = ending
    return tokenizer


def strengthen(module: nn.Module, std: float = 0.4, seed: int = 5) -> None:
    """Give every trained number a value that matters, so that wrong routing shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def routed(modules: list[ModuleShape], tasks: int, **options: object) -> RoutedSource:
    """A source of shared skills and logits, both far from their start."""
    skills = SharedSkills.fresh(modules, HEADS, SKILLS, RANK)
    layout = layout_of(modules)
    source = RoutedSource(skills, Routings(layout, tasks, **options))  # type: ignore[arg-type]
    strengthen(source)
    with torch.no_grad():
        source.routings.logits.mul_(8)
    return source


def layout_of(modules: list[ModuleShape]) -> Layout:
    return Layout(tuple(m.name for m in modules), HEADS, SKILLS)


def trainable(model: PreTrainedModel, source: Source | None = None, **options: bool) -> Trainable:
    modules = find_modules(model, heads=HEADS)
    return Trainable(model, modules, source or routed(modules, 3), SCALING, **options)


def plain_losses(logits: Tensor, one: Encoded) -> Tensor:
    """The definition: mean cross-entropy of one unpadded example's answer."""
    start = len(one.prompt) - 1
    rows = logits[0, start : start + len(one.answer)].log_softmax(-1)
    return -rows[torch.arange(len(one.answer)), torch.tensor(one.answer)].mean()


def folded(a: Tensor, b: Tensor, logits: Tensor) -> Tensor:
    """`scaling * A_t B_t` `[I, O]`, literally. a `[H, S, I/H, r]`, b `[H, S, r, O/H]`."""
    s = logits.sigmoid()
    w = s / (s.sum(-1, keepdim=True) + 1e-12)
    a_t = torch.cat([sum(w[h, k] * a[h, k] for k in range(SKILLS)) for h in range(HEADS)])
    b_t = torch.cat([sum(w[h, k] * b[h, k] for k in range(SKILLS)) for h in range(HEADS)], 1)
    return SCALING * a_t @ b_t


def merged_loss(model: PreTrainedModel, deltas: dict[str, Tensor], one: Encoded) -> Tensor:
    """One example's loss by the model with `deltas` added to its weights, read as anyone would."""
    weights = {}
    for name, delta in deltas.items():
        layer = model.get_submodule(name)
        turned = delta if isinstance(layer, Conv1D) else delta.T
        weights[f"{name}.weight"] = layer.weight + turned  # type: ignore[operator]
    if model.config.is_encoder_decoder:
        source, gold = torch.tensor([one.prompt]), torch.tensor([one.answer])
        loss: Tensor = functional_call(
            model, weights, (), {"input_ids": source, "labels": gold}
        ).loss
        return loss
    ids = torch.tensor([one.prompt + one.answer])
    return plain_losses(functional_call(model, weights, (ids,)).logits, one)


def reference(
    model: PreTrainedModel, source: RoutedSource, tokens: list[Encoded], tasks: list[int]
) -> tuple[Tensor, Pairs, Tensor]:
    """Losses, and gradients of their mean with respect to every A, B and logit."""
    a, b = source.skills.export()
    for tensor in (*a.values(), *b.values()):
        tensor.requires_grad_()
    logits = source.routings.logits.detach().clone().requires_grad_()
    losses = []
    for one, task in zip(tokens, tasks, strict=True):
        deltas = {name: folded(a[name], b[name], logits[task, m]) for m, name in enumerate(a)}
        losses.append(merged_loss(model, deltas, one))
    torch.stack(losses).mean().backward()
    grads = {name: (a[name].grad, b[name].grad) for name in a}
    return torch.stack(losses).detach(), grads, logits.grad  # type: ignore[return-value]


def skill_grads(source: RoutedSource) -> Pairs:
    """The gradients of the stacked parameters, in the inventory's shapes."""
    a = {int(w): p.grad.mT.unbind(0) for w, p in source.skills.a.items()}  # type: ignore[union-attr]
    b = {int(w): p.grad.unbind(0) for w, p in source.skills.b.items()}  # type: ignore[union-attr]
    return source.skills.stacks.by_module(a, b)
