"""A decode step of a model of Llama-3-8B's shape with random weights, and adapters beside it.

The step is plain torch and the kernels, so that the same graph can be captured with adapters and
without. Attention reads a dense cache of `context` tokens a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.adapters import ops
from polyhead.adapters.compiled import FactorTable

HEADS, SKILLS, RANK = 8, 8, 16
WIDTH = 128  # of an attention head
EPSILON = 1e-5


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, and what is measured of it."""

    layers: int
    hidden: int
    inner: int
    queries: int  # attention heads
    keys: int  # heads of keys and values
    vocabulary: int
    context: int
    batches: Sequence[int]
    tasks: Sequence[int]
    resident: int

    @property
    def groups(self) -> list[tuple[int, tuple[int, ...]]]:
        """(input, outputs) of the modules of a block that read the same input."""
        q, k = self.queries * WIDTH, self.keys * WIDTH
        return [
            (self.hidden, (q, k, k)),
            (q, (self.hidden,)),
            (self.hidden, (self.inner, self.inner)),
            (self.inner, (self.hidden,)),
        ]

    @property
    def modules(self) -> int:
        return self.layers * sum(len(outs) for _, outs in self.groups)


SHAPES = {
    "llama-3-8b": Shape(
        layers=32, hidden=4096, inner=14336, queries=32, keys=8, vocabulary=128256, context=512,
        batches=(1, 16, 64, 256), tasks=(1, 16, 64, 256), resident=100_000,
    ),
    "tiny": Shape(
        layers=1, hidden=128, inner=64, queries=2, keys=1, vocabulary=64, context=8,
        batches=(2,), tasks=(1, 2), resident=50,
    ),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Layer:
    """A group of modules: their base weights as one product, and the skills beside them."""

    base: Tensor  # [sum of O, I]
    outs: tuple[int, ...]
    group: ops.SkillGroup
    first: int  # number of its first module


class Beside(Protocol):
    """What is computed beside a group's base product: low-rank activations, then deltas."""

    def shrink(self, index: int, layer: Layer, x: Tensor) -> Tensor: ...

    def expand(
        self, index: int, layer: Layer, hidden: Tensor, outputs: Sequence[Tensor]
    ) -> None: ...


class Backbone:
    """Random weights and caches on the device, with skills and a table of resident routings."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.side = torch.cuda.Stream() if device.type == "cuda" else None
        self.layers = list(self._layers())
        size = shape.resident, shape.modules, HEADS, SKILLS
        self.weights = torch.rand(size, device=device, dtype=torch.float16)
        self.embedding = self._random(max(shape.batches), shape.hidden) * 50
        self.projected = self._random(max(shape.batches), sum(shape.groups[0][1]))
        self.norm = torch.ones(shape.hidden, device=device, dtype=dtype)
        self.head = self._random(shape.vocabulary, shape.hidden)
        rows = max(shape.batches) * shape.context * shape.keys * WIDTH
        self.cache = [self._random(2, rows) for _ in range(shape.layers)]
        angle = torch.rand(1, 1, WIDTH, device=device)
        self.rotary = angle.cos().to(dtype), angle.sin().to(dtype)

    def _layers(self) -> Iterator[Layer]:
        first = 0
        for _ in range(self.shape.layers):
            for width, outs in self.shape.groups:
                base = self._random(sum(outs), width)
                a = [self._random(HEADS, SKILLS, width // HEADS, RANK) for _ in outs]
                b = [self._random(HEADS, SKILLS, RANK, out // HEADS) for out in outs]
                yield Layer(base, outs, ops.SkillGroup.pack(a, b, 1 / RANK, self.dtype), first)
                first += len(outs)

    def _random(self, *size: int) -> Tensor:
        return torch.randn(size, device=self.device, dtype=self.dtype) * 0.02

    def factors(self) -> list[ops.Factors]:
        """One task's own A_t and B_t, random."""
        return [
            ops.Factors(
                self._random(layer.base.shape[1], RANK * len(layer.outs)),
                tuple(self._random(RANK, out) for out in layer.outs),
            )
            for layer in self.layers
        ]

    @property
    def base_bytes(self) -> int:
        return sum(layer.base.nbytes for layer in self.layers) + self.head.nbytes

    @property
    def skill_bytes(self) -> int:
        return sum(t.nbytes for la in self.layers for t in (la.group.a, *la.group.b))

    def cache_bytes(self, batch: int) -> int:
        shape = self.shape
        numbers = 2 * batch * shape.context * shape.keys * WIDTH * shape.layers
        return numbers * self.dtype.itemsize

    def linear(self, index: int, x: Tensor, beside: Beside | None, forked: bool) -> list[Tensor]:
        """One group's outputs `[batch, O]`. forked: the shrink runs beside the base product."""
        layer = self.layers[index]
        side = self.side if forked else None
        hidden = None
        if beside is not None and side is not None:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                hidden = beside.shrink(index, layer, x)
        outputs = list((x @ layer.base.T).split(layer.outs, dim=1))
        if beside is not None:
            if side is not None:
                torch.cuda.current_stream().wait_stream(side)
            hidden = beside.shrink(index, layer, x) if hidden is None else hidden
            beside.expand(index, layer, hidden, outputs)
        return outputs

    def linears(self, batch: int, beside: Beside | None, forked: bool) -> None:
        """Only the linear layers of a step, the head left out."""
        for index, layer in enumerate(self.layers):
            width = layer.base.shape[1]
            x = self.cache[0][0, : batch * width].view(batch, width)
            self.linear(index, x, beside, forked)

    def step(self, batch: int, beside: Beside | None, forked: bool) -> Tensor:
        """A whole decode step: the next token of every row."""
        x = self.embedding[:batch]
        for block in range(self.shape.layers):
            first = 4 * block
            q, k, v = self.linear(first, self._normed(x), beside, forked)
            (o,) = self.linear(first + 1, self.attend(block, q, k, v), beside, forked)
            x = x + o
            gate, up = self.linear(first + 2, self._normed(x), beside, forked)
            (down,) = self.linear(first + 3, F.silu(gate) * up, beside, forked)
            x = x + down
        return (self._normed(x) @ self.head.T).argmax(-1)

    def attend(self, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the step's keys and values, and read all of them."""
        batch, shape = len(q), self.shape
        size = batch, shape.keys, shape.context, WIDTH
        rows = batch * shape.keys * shape.context * WIDTH
        keys, values = (cache[:rows].view(size) for cache in self.cache[block])
        keys[:, :, -1] = self._rotated(k.reshape(batch, shape.keys, WIDTH))
        values[:, :, -1] = v.reshape(batch, shape.keys, WIDTH)
        turned = self._rotated(q.reshape(batch, shape.queries, WIDTH)).unsqueeze(2)
        found = F.scaled_dot_product_attention(turned, keys, values, enable_gqa=True)
        return found.reshape(batch, -1)

    def attention(self, batch: int) -> None:
        """Only the attention of a step."""
        _, outs = self.shape.groups[0]
        q, k, v = self.projected[:batch].split(outs, dim=1)
        for block in range(self.shape.layers):
            self.attend(block, q, k, v)

    def _normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.shape.hidden,), self.norm, EPSILON)

    def _rotated(self, x: Tensor) -> Tensor:
        cosine, sine = self.rotary
        left, right = x.chunk(2, dim=-1)
        return x * cosine + torch.cat((-right, left), dim=-1) * sine


class Factored:
    """Routed tasks in the factored form; their weights are gathered from all resident ones."""

    def __init__(self, backbone: Backbone, batch: int, tasks: int, resident: int) -> None:
        from polyhead.adapters.triton_step import TritonFactored

        picked = torch.randperm(resident, device=backbone.device)[:tasks]
        rows = picked[torch.arange(batch, device=backbone.device) % tasks]
        every = torch.arange(batch, device=backbone.device)
        self._step = TritonFactored(every, rows, backbone.weights[:resident])

    def shrink(self, _: int, layer: Layer, x: Tensor) -> Tensor:
        return self._step.shrink(layer.group, layer.first, x)

    def expand(self, _: int, layer: Layer, hidden: Tensor, outputs: Sequence[Tensor]) -> None:
        self._step.expand_all(layer.group, layer.first, hidden, outputs)


class Combined:
    """Every task with its own A_t and B_t. known: those made before, which are added to."""

    def __init__(
        self, backbone: Backbone, batch: int, tasks: int, known: list[list[ops.Factors]]
    ) -> None:
        from polyhead.adapters.triton_step import TritonCombined

        known += [backbone.factors() for _ in range(tasks - len(known))]
        sizes = [len(layer.outs) for layer in backbone.layers]
        tables = [FactorTable.of(own, sizes) for own in known[:tasks]]
        positions = [list(range(task, batch, tasks)) for task in range(tasks)]
        self._step = TritonCombined(tables, positions, backbone.device)

    def shrink(self, index: int, _: Layer, x: Tensor) -> Tensor:
        return self._step.shrink(index, x)

    def expand(self, _: int, layer: Layer, hidden: Tensor, outputs: Sequence[Tensor]) -> None:
        for g, y in enumerate(outputs):
            self._step.expand(layer.first + g, hidden, y)


def error(backbone: Backbone, shift: int = 0) -> float:
    """Of the factored and the combined kernels on one group against the float32 reference."""
    from polyhead.adapters.triton_step import TritonCombined, TritonFactored

    tokens, layer = 3, backbone.layers[0]
    x = torch.randn(tokens, layer.base.shape[1], device=backbone.device).to(backbone.dtype)
    rows = (torch.arange(tokens, device=backbone.device) + shift) % tokens
    size = len(layer.outs)
    weights = backbone.weights[:tokens, layer.first : layer.first + size].float()
    expected = [_reference(layer, g, x, weights[:, g]) for g in range(size)]
    step = TritonFactored(torch.arange(tokens, device=backbone.device), rows, backbone.weights)
    own = [ops.fold_factors(layer.group, weights[row]) for row in rows.tolist()]
    tables = [FactorTable.of([factors], [size]) for factors in own]
    grouped = TritonCombined(tables, [[token] for token in range(tokens)], backbone.device)
    ys, zs = (list(x.new_zeros(tokens, sum(layer.outs)).split(layer.outs, 1)) for _ in range(2))
    step.expand_all(layer.group, layer.first, step.shrink(layer.group, layer.first, x), ys)
    hidden = grouped.shrink(0, x)
    for g, z in enumerate(zs):
        grouped.expand(g, hidden, z)
    return max(
        float((found.float() - wanted).norm() / wanted.norm())
        for side in (ys, zs)
        for found, wanted in zip(side, expected, strict=True)
    )


def _reference(layer: Layer, g: int, x: Tensor, weights: Tensor) -> Tensor:
    group = layer.group
    width = x.shape[1] // HEADS
    a = group.a.view(HEADS, width, group.size, SKILLS, RANK)[:, :, g].transpose(1, 2)
    return ops.reference(x, a, group.b[g].view(HEADS, SKILLS, RANK, -1), weights, 1.0)
