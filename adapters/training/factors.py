"""A and B of the tasks of a batch, and how they are stacked.

Modules of equal width are stacked, so that all of them are folded by one product. A is kept with
I last, unlike in files: the skinny products of a training step read it three times faster so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from polyhead.adapters.inventory import ModuleShape


class Stacks:
    """Which modules are stacked together: by input width for A, by output width for B."""

    def __init__(self, modules: Sequence[ModuleShape]) -> None:
        self.modules = tuple(modules)
        self.inputs = _by_width([m.in_features for m in modules])
        self.outputs = _by_width([m.out_features for m in modules])

    def by_module(
        self, a: Mapping[int, Sequence[Tensor]], b: Mapping[int, Sequence[Tensor]]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Undo the stacking: each module's A and B under its name."""
        of_a = {m: a[w][k] for w, rows in self.inputs.items() for k, m in enumerate(rows)}
        of_b = {m: b[w][k] for w, rows in self.outputs.items() for k, m in enumerate(rows)}
        return {module.name: (of_a[m], of_b[m]) for m, module in enumerate(self.modules)}

    def stack_a(self, tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """`tensors[name]` of equal input width stacked along a new first dimension."""
        return self._stacked(self.inputs, tensors)

    def stack_b(self, tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """The same by output width."""
        return self._stacked(self.outputs, tensors)

    def _stacked(
        self, widths: Mapping[int, list[int]], tensors: Mapping[str, Tensor]
    ) -> dict[int, Tensor]:
        return {
            width: torch.stack([tensors[self.modules[m].name] for m in rows])
            for width, rows in widths.items()
        }


@dataclass(frozen=True, eq=False)
class Factors:
    """A and B of U tasks."""

    stacks: Stacks
    a: Mapping[int, Tensor]  # by input width: [modules of that width, U, r, width]
    b: Mapping[int, Tensor]  # by output width, alike
    weights: Tensor | None = None  # [U, M, H, S], where they are averages of shared skills

    def to(self, dtype: torch.dtype) -> "Factors":
        """The same in another number type; whole stacks are cast, not every module's share."""
        a, b = ({w: s.to(dtype) for w, s in stacks.items()} for stacks in (self.a, self.b))
        return Factors(self.stacks, a, b, self.weights)

    def by_module(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Each module's A `[U, r, I]` and B `[U, r, O]`."""
        # `unbind`, for the gradient of one index is a zero tensor as large as the whole stack.
        return self.stacks.by_module(
            {width: stack.unbind(0) for width, stack in self.a.items()},
            {width: stack.unbind(0) for width, stack in self.b.items()},
        )


class Source(Protocol):
    """Where A and B come from, and what of it is trained. See `sources`."""

    def factors(self, tasks: Tensor) -> Factors:
        """A and B of tasks `[U]` (long, distinct), differentiable in whatever is trained."""
        ...


def _by_width(widths: Sequence[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for m, width in enumerate(widths):
        found.setdefault(width, []).append(m)
    return found


def parameters(stacks: Mapping[int, Tensor]) -> nn.ParameterDict:
    """Stacks as what is trained, under their widths as text: names of parameters are texts."""
    return nn.ParameterDict(
        {str(width): nn.Parameter(stack.contiguous()) for width, stack in stacks.items()}
    )
