"""Which adapter each token of a forward pass belongs to."""

from dataclasses import dataclass

from torch import Tensor

from polyhead.adapters.private import PrivateAdapter


@dataclass(frozen=True, eq=False)
class RoutedTask:
    """A task's routing weights, ready to serve; `key` names the generation they came from."""

    key: str
    weights: Tensor  # [M, H, S] float32, rows sum to 1


Adapter = RoutedTask | PrivateAdapter | None
"""What answers one row of a batch; None is the bare backbone."""
