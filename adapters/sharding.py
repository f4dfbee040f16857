"""Linear layers cut over several processes, for backbones that one device cannot hold.

Which layers are cut, and how, is the backbone's own `tp_plan`: column-parallel layers hold a part
of their outputs, row-parallel ones a part of their inputs, and those add their parts up. Adapters
follow: a column-parallel layer needs all heads of A and its own of B, a row-parallel one its own
of A and all of B. Their part is added before the sum, so it costs no message of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from polyhead.adapters.errors import InjectionError

Cut = Literal["colwise", "rowwise"]


@dataclass(frozen=True)
class Ranks:
    """This process among those that hold a part of the same backbone."""

    rank: int
    size: int

    @classmethod
    def of_world(cls) -> Ranks:
        """All processes of torch's default group, which has to be there."""
        return cls(dist.get_rank(), dist.get_world_size())

    def own(self, whole: int) -> slice:
        """This process's part of `whole` equal things."""
        each = whole // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def add_up(self, part: Tensor) -> Tensor:
        """The sum of everybody's `part`, in its place."""
        dist.all_reduce(part)
        return part


class ShardedLinear(nn.Linear):
    """A process's part of a linear layer; `in_features` and `out_features` are the whole one's."""

    def __init__(self, whole: nn.Linear, cut: Cut, ranks: Ranks) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.cut, self.ranks = cut, ranks
        bias: Tensor | None = whole.bias
        if cut == "colwise":
            own = ranks.own(whole.out_features)
            weight, bias = whole.weight[own], None if bias is None else bias[own]
        else:
            weight = whole.weight[:, ranks.own(whole.in_features)]
            bias = bias if ranks.rank == 0 else None  # it is summed with the parts, once
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        kept = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
        self.register_parameter("bias", kept)

    def part(self, x: Tensor) -> Tensor:
        """x `[..., I]` to own outputs `[..., O/P]`, or x `[..., I/P]` to a summand `[..., O]`."""
        return functional.linear(x, self.weight, self.bias)

    def whole(self, part: Tensor) -> Tensor:
        """What the next layer reads."""
        return part if self.cut == "colwise" else self.ranks.add_up(part)

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(self.part(x))


def shard(model: PreTrainedModel, ranks: Ranks) -> int:
    """Replace the linear layers of the model's `tp_plan` by this process's parts of them.

    Before injection, and before the model is moved to its device. Embeddings and the output head
    stay whole. Returns how many were cut. Raises `InjectionError` where the backbone has no plan or
    its heads or features cannot be split.
    """
    cuts = {name: cut for name, cut in _planned(model).items() if cut in ("colwise", "rowwise")}
    if not cuts:
        raise InjectionError(
            "the backbone has no plan for tensor parallelism",
            field=type(model).__name__,
            expected="a tp_plan of transformers with colwise and rowwise linear layers",
        )
    _check_attention(model, ranks)
    for name, cut in cuts.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise InjectionError("only nn.Linear is cut", field=name, found=type(layer).__name__)
        width = layer.out_features if cut == "colwise" else layer.in_features
        _check_divides(width, ranks, name, "features")
        model.set_submodule(name, ShardedLinear(layer, cast(Cut, cut), ranks))
    return len(cuts)


def check_heads(heads: int, ranks: Ranks) -> None:
    """Raises `InjectionError` where an inventory's heads cannot be split over the processes."""
    _check_divides(heads, ranks, "heads", "the inventory's heads")


def ranks_of(model: nn.Module) -> Ranks:
    """Who holds parts of this model; one process alone where it was not cut."""
    parts = (module for module in model.modules() if isinstance(module, ShardedLinear))
    first = next(parts, None)
    return Ranks(0, 1) if first is None else first.ranks


def _planned(model: PreTrainedModel) -> dict[str, str]:
    """The plan's word for each module, by the module's name. A star stands for a number."""
    patterns = {
        re.compile(re.escape(pattern).replace(r"\*", r"\d+")): cut
        for pattern, cut in (model.tp_plan or {}).items()
    }
    return {
        name: cut
        for name, _ in model.named_modules()
        for pattern, cut in patterns.items()
        if pattern.fullmatch(name)
    }


def _check_attention(model: PreTrainedModel, ranks: Ranks) -> None:
    text = model.config.get_text_config(decoder=True)
    for field in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(text, field, None)
        if count is not None:
            _check_divides(count, ranks, field, "attention heads")


def _check_divides(count: int, ranks: Ranks, field: str, things: str) -> None:
    if count % ranks.size:
        raise InjectionError(
            f"{things} cannot be split over processes",
            field=field,
            found=str(count),
            expected=f"a multiple of {ranks.size}",
        )


@dataclass(frozen=True)
class HeadParts:
    """Which heads of A and of B a layer needs of its skills; None is all of them."""

    a: slice | None = None
    b: slice | None = None

    @classmethod
    def of(cls, layer: nn.Module, heads: int) -> HeadParts:
        """Raises `InjectionError` where the heads cannot be split over the processes."""
        if not isinstance(layer, ShardedLinear):
            return cls()
        check_heads(heads, layer.ranks)
        own = layer.ranks.own(heads)
        return cls(b=own) if layer.cut == "colwise" else cls(a=own)

    @property
    def is_whole(self) -> bool:
        return self.a is None and self.b is None

    def rows(self, a: Tensor, heads: int) -> Tensor:
        """A task's own A `[I, r]`, as far as the layer needs it."""
        return a if self.a is None else a[_features(self.a, a.shape[0] // heads)]

    def columns(self, b: Tensor, heads: int) -> Tensor:
        """A task's own B `[r, O]`, as far as the layer needs it."""
        return b if self.b is None else b[:, _features(self.b, b.shape[1] // heads)]


def _features(heads: slice, width: int) -> slice:
    return slice(heads.start * width, heads.stop * width)


EVERYTHING = HeadParts()
