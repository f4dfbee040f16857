"""The layer that adds the adapters' part to a frozen linear layer."""

from typing import cast

from torch import Tensor, nn

from polyhead.adapters.plan import GroupSlot, active_plan


class RoutedLinear(nn.Module):
    """A linear layer of the backbone plus the delta of whatever adapter each token belongs to.

    Without an active plan it is the layer it wraps. Serves `nn.Linear` and GPT-2's `Conv1D`.
    """

    def __init__(self, base: nn.Module, slot: GroupSlot, position: int) -> None:
        super().__init__()
        self.base = base
        self.slot = slot
        self.position = position

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., I]` to `[..., O]`."""
        y = cast(Tensor, self.base(x))
        plan = active_plan()
        if plan is not None:
            plan.add_delta(self.slot, self.position, x, y)
        return y

    @property
    def weight(self) -> Tensor:
        """The wrapped layer's weight: some backbones read its dtype."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", self.base.bias)
