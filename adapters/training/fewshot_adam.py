"""Adam for many owners at once, each as if it were alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.99)
EPSILON = 1e-8
CLIP = 1.0
"""The largest norm of one owner's gradient, over all that it trains."""


@dataclass(frozen=True, eq=False)
class Owned:
    """A parameter that holds a slice for each of T owners along `dim`."""

    name: str
    parameter: nn.Parameter
    dim: int

    def spread(self, values: Tensor) -> Tensor:
        """`[T]` in a shape that multiplies the parameter owner by owner."""
        shape = [1] * self.parameter.ndim
        shape[self.dim] = -1
        return values.view(shape)

    def slice(self, owner: int) -> Tensor:
        """A copy of one owner's part."""
        return self.parameter.detach().select(self.dim, owner).clone()

    def restore(self, owner: int, values: Tensor) -> None:
        """Overwrite one owner's part."""
        self.parameter.data.select(self.dim, owner).copy_(values)


class OwnersAdam:
    """Clips every owner's gradient by itself: what one owner learns never depends on another."""

    def __init__(self, owned: Sequence[Owned]) -> None:
        self.owned = list(owned)
        self.mean = [torch.zeros_like(one.parameter) for one in owned]
        self.square = [torch.zeros_like(one.parameter) for one in owned]

    @torch.no_grad()
    def step(self, count: int, rates: Sequence[Tensor]) -> None:
        """count: how many steps there were, this one included. rates: `[T]` for each parameter; an
        owner with rate 0 stays as it is. The gradients are used up."""
        shrink = self._clipping()
        for i, one in enumerate(self.owned):
            if one.parameter.grad is None:
                continue
            gradient = one.parameter.grad.mul_(one.spread(shrink))
            self.mean[i].lerp_(gradient, 1 - BETAS[0])
            self.square[i].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            scale = (self.square[i] / (1 - BETAS[1] ** count)).sqrt_().add_(EPSILON)
            update = self.mean[i].div(scale).mul_(one.spread(rates[i] / (1 - BETAS[0] ** count)))
            one.parameter.sub_(update)
            one.parameter.grad = None

    def _clipping(self) -> Tensor:
        """`[T]`: what brings each owner's gradient to a norm of at most `CLIP`."""
        squares = [
            one.parameter.grad.square().movedim(one.dim, 0).flatten(1).sum(1)
            for one in self.owned
            if one.parameter.grad is not None
        ]
        norms = torch.stack(squares).sum(0).sqrt()
        return (CLIP / norms.clamp_min(1e-12)).clamp_max(1.0)
