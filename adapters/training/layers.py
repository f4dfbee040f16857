"""A frozen linear layer plus the tasks' low-rank part, for training: gradients flow to A and B."""

from typing import cast

import torch
from torch import Tensor, nn

from polyhead.adapters.errors import InjectionError


class Board:
    """What the layers need to know about the batch at hand, written before the forward pass.

    It stays until the next batch: gradient checkpointing computes layers again during backward.
    """

    def __init__(self) -> None:
        self.factors: dict[str, tuple[Tensor, Tensor]] | None = None


class TrainedLinear(nn.Module):
    """`base(x) + scaling * (x A_t) B_t`, each row of the batch with its own task's A and B.

    With nothing on the board it is the layer that it wraps.
    """

    def __init__(self, base: nn.Module, name: str, board: Board, scaling: float) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.scaling = scaling
        self._board = board

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, L, I]` to `[B, L, O]`. Raises `InjectionError` on any other shape."""
        y = cast(Tensor, self.base(x))
        if self._board.factors is None:
            return y
        a, b = self._board.factors[self.name]  # [B, r, I], [B, r, O]
        if x.ndim != 3 or x.shape[0] != a.shape[0]:
            raise InjectionError(
                "the layer does not see the batch's rows",
                field=self.name,
                found=str(list(x.shape)),
                expected=f"[{a.shape[0]}, tokens, {a.shape[2]}]",
            )
        # The backbone's own numbers: it may compute in bfloat16 while A and B stay float32.
        hidden = torch.bmm(x.to(y.dtype), a.to(y.dtype).mT)
        return torch.baddbmm(y, hidden, b.to(y.dtype), alpha=self.scaling)

    @property
    def weight(self) -> Tensor:
        """The wrapped layer's weight: some backbones read its dtype."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", self.base.bias)
