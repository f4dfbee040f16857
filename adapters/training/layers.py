"""A frozen linear layer plus the tasks' low-rank part, for training: gradients flow to A and B.

The tokens of a batch are one row, ordered by task, so a task's tokens are one slice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from polyhead.adapters.errors import InjectionError


class Row(Protocol):
    """N tokens that layers see as `[1, N, width]`, ordered by task."""

    @property
    def counts(self) -> tuple[int, ...]:
        """`[U]`: how many of them each task has."""
        ...

    @property
    def input_ids(self) -> Tensor:
        """`[1, N]`."""
        ...


RowKind = TypeVar("RowKind", bound=Row)


@dataclass(frozen=True, eq=False)
class Work(Generic[RowKind]):
    """One batch as the layers of one row see it: where the tokens are, every module's A and B."""

    row: RowKind
    factors: Mapping[str, tuple[Tensor, Tensor]]  # A [U, r, I], B [U, r, O]

    @cached_property
    def owners(self) -> Tensor:
        """`[N, U, 1]`, 1 where a token belongs to a task."""
        counts = torch.tensor(self.row.counts, device=self.row.input_ids.device)
        slots = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        return F.one_hot(slots, len(counts)).unsqueeze(-1)


class Board(Generic[RowKind]):
    """What the layers of one row need to know about the batch at hand, written before the pass.

    It stays until the next batch: gradient checkpointing computes layers again during backward.
    """

    def __init__(self) -> None:
        self.work: Work[RowKind] | None = None


class TrainedLinear(nn.Module):
    """`base(x) + scaling * (x A_t) B_t`, each token with its own task's A and B.

    With nothing on the board it is the layer that it wraps.
    """

    def __init__(self, base: nn.Module, name: str, board: Board[Any], scaling: float) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.scaling = scaling
        self._board = board
        self._plain = type(base) in (nn.Linear, Conv1D)

    def forward(self, x: Tensor) -> Tensor:
        """x `[1, N, I]` to `[1, N, O]`. Raises `InjectionError` on any other shape."""
        work = self._board.work
        if work is None:
            return cast(Tensor, self.base(x))
        a, b = work.factors[self.name]
        tokens = work.row.input_ids.shape[1]
        if x.shape != (1, tokens, a.shape[2]):
            raise InjectionError(
                "the layer does not see the batch's tokens",
                field=self.name,
                found=str(list(x.shape)),
                expected=str([1, tokens, a.shape[2]]),
            )
        if self._plain and x.device.type == "cpu" and self.weight.dtype == x.dtype == a.dtype:
            return self._sliced(x[0], a, b, work.row.counts).unsqueeze(0)
        return self._dense(x, a, b, work.owners)

    def _sliced(self, x: Tensor, a: Tensor, b: Tensor, counts: Sequence[int]) -> Tensor:
        weight = self.weight.T if isinstance(self.base, Conv1D) else self.weight
        return cast(Tensor, _sliced_product(x, weight, self.bias, a, b, counts, self.scaling))

    def _dense(self, x: Tensor, a: Tensor, b: Tensor, owners: Tensor) -> Tensor:
        """Every task's product for every token, all but the token's own set to 0: few and large
        kernels, which suits a GPU, and any kind of base layer and number type."""
        y = cast(Tensor, self.base(x))
        hidden = x[0].to(y.dtype) @ a.to(y.dtype).flatten(0, 1).T  # [N, U*r]
        own = (hidden.view(-1, *a.shape[:2]) * owners).flatten(1)
        whole = torch.addmm(y[0], own, b.to(y.dtype).flatten(0, 1), alpha=self.scaling)
        return whole.unsqueeze(0)

    @property
    def weight(self) -> Tensor:
        """The wrapped layer's weight: some backbones read its dtype."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", self.base.bias)


class SlicedProduct(torch.autograd.Function):
    """`x W^T + bias + scaling * (x A_t^T) B_t` with tokens in slices, one for each task.

    Everything small is written into place: what the tasks add to the time of the frozen product
    is little more than reading its input and output once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [N, I]
        weight: Tensor,  # [O, I], frozen
        bias: Tensor | None,
        a: Tensor,  # [U, r, I]
        b: Tensor,  # [U, r, O]
        counts: Sequence[int],
        scaling: float,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        hidden = x.new_empty(x.shape[0], a.shape[1])
        for own_x, own_h, own_a in _slices(counts, x, hidden, each=a.mT):
            torch.mm(own_x, own_a, out=own_h)
        hidden.mul_(scaling)
        for own_y, own_h, own_b in _slices(counts, y, hidden, each=b):
            own_y.addmm_(own_h, own_b)
        ctx.save_for_backward(x, weight, a, b, hidden)
        ctx.counts, ctx.scaling = counts, scaling
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, hidden = ctx.saved_tensors
        g, counts = grads[0].contiguous(), ctx.counts
        grad_h, grad_a, grad_b = (torch.empty_like(t) for t in (hidden, a, b))
        for own_g, own_gh, own_b in _slices(counts, g, grad_h, each=b.mT):
            torch.mm(own_g, own_b, out=own_gh)
        grad_h.mul_(ctx.scaling)
        for own_g, own_h, own_gb in _slices(counts, g, hidden, each=grad_b):
            torch.mm(own_h.T, own_g, out=own_gb)
        for own_x, own_gh, own_ga in _slices(counts, x, grad_h, each=grad_a):
            torch.mm(own_gh.T, own_x, out=own_ga)
        if not ctx.needs_input_grad[0]:
            return None, None, None, grad_a, grad_b, None, None
        grad_x = g @ weight
        for own_gx, own_gh, own_a in _slices(counts, grad_x, grad_h, each=a):
            own_gx.addmm_(own_gh, own_a)
        return grad_x, None, None, grad_a, grad_b, None, None


_sliced_product: Callable[..., Any] = SlicedProduct.apply


def _slices(
    counts: Sequence[int], *tokens: Tensor, each: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each task its tokens' rows of two tensors, and its own row of `each`."""
    parts = [torch.split(tensor, list(counts)) for tensor in tokens]
    return zip(*parts, each.unbind(0), strict=True)
