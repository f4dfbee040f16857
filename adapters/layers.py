"""The layer that adds the adapters' part to a frozen linear layer."""

from typing import cast

from torch import Tensor, nn

from polyhead.adapters.plan import GroupSlot, active_plan
from polyhead.adapters.sharding import ShardedLinear


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
        base, plan = self.base, active_plan()
        sharded = base if isinstance(base, ShardedLinear) else None
        y = cast(Tensor, base(x)) if sharded is None else sharded.part(x)
        if plan is not None:
            plan.add_delta(self.slot, self.position, x, y)
        return y if sharded is None else sharded.whole(y)

    @property
    def weight(self) -> Tensor:
        """The wrapped layer's weight: some backbones read its dtype."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", self.base.bias)
