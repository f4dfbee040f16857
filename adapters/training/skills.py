"""The inventory under training: the skills that tasks share, and the tasks' routing logits."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from polyhead.adapters.inventory import Inventory, ModuleShape
from polyhead.adapters.routing import EPSILON, Granularity, Layout
from polyhead.adapters.training.factors import Factors, Stacks, parameters

LOGIT_RANGE = 1e-3
"""New logits are uniform within ± this: the weights start near the average."""


class Routings(nn.Module):
    """The routing logits of T tasks, and their weights.

    relaxed: while in training mode, sample the weights from a relaxed Bernoulli distribution of
    temperature 1 (Polytropon's pre-training). uniform: every weight is 1/S and nothing is trained.
    """

    def __init__(
        self,
        layout: Layout,
        tasks: int,
        *,
        granularity: Granularity = "module",
        relaxed: bool = False,
        uniform: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.granularity: Granularity = granularity
        self.relaxed = relaxed
        self.uniform = uniform
        groups = layout.groups(granularity)
        shape = (tasks, max(groups) + 1, layout.heads, layout.skills)
        start = (torch.rand(shape, generator=generator) * 2 - 1) * LOGIT_RANGE
        self.logits = nn.Parameter(start, requires_grad=not uniform)  # [T, rows, H, S]
        self.groups: Tensor
        self.register_buffer("groups", torch.tensor(groups), persistent=False)  # [M]

    def weights(self, tasks: Tensor) -> Tensor:
        """tasks `[U]` to weights `[U, M, H, S]`, as `routing.fold` computes them."""
        logits = self.logits[tasks].float()
        if self.uniform:
            weights = torch.full_like(logits, 1.0 / logits.shape[-1])
        else:
            s = self._relaxed(logits) if self.relaxed and self.training else logits.sigmoid()
            weights = s / (s.sum(-1, keepdim=True) + EPSILON)
        return weights if self.granularity == "module" else weights[:, self.groups]

    @staticmethod
    def _relaxed(logits: Tensor) -> Tensor:
        tiny = torch.finfo(logits.dtype).tiny
        u = torch.rand_like(logits).clamp(min=tiny, max=1 - torch.finfo(logits.dtype).eps)
        return (logits + u.log() - (-u).log1p()).sigmoid()


class SharedSkills(nn.Module):
    """The skills of an inventory under training: `a[width]` is `[modules, H, S, r, width/H]`.

    Give the same instance to several sources to train them against the same skills; freeze it
    with `requires_grad_(False)` to train logits alone.
    """

    def __init__(
        self, modules: Sequence[ModuleShape], a: Mapping[str, Tensor], b: Mapping[str, Tensor]
    ) -> None:
        """a[name] `[H, S, I/H, r]` and b[name] `[H, S, r, O/H]`, as inventories hold them."""
        super().__init__()
        self.stacks = Stacks(modules)
        turned = {name: tensor.float().transpose(-1, -2) for name, tensor in a.items()}
        whole = {name: tensor.float() for name, tensor in b.items()}
        self.a = parameters(self.stacks.stack_a(turned))
        self.b = parameters(self.stacks.stack_b(whole))

    @classmethod
    def fresh(
        cls,
        modules: Sequence[ModuleShape],
        heads: int,
        skills: int,
        rank: int,
        generator: torch.Generator | None = None,
    ) -> "SharedSkills":
        """As Polytropon starts: A uniform within ±1/sqrt(I/H) for every skill, B zero."""
        a, b = {}, {}
        for module in modules:
            width = module.in_features // heads
            a[module.name] = fresh_a((heads, skills, width, rank), width, generator)
            b[module.name] = torch.zeros(heads, skills, rank, module.out_features // heads)
        return cls(modules, a, b)

    @classmethod
    def of(cls, inventory: Inventory) -> "SharedSkills":
        """A float32 copy of an inventory's skills."""
        return cls(inventory.header.modules, inventory.a, inventory.b)

    def export(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A and B by module, in the inventory's shapes, float32 on the CPU."""
        a = {int(w): p.detach().cpu().transpose(-1, -2).unbind(0) for w, p in self.a.items()}
        b = {int(w): p.detach().cpu().unbind(0) for w, p in self.b.items()}
        pairs = self.stacks.by_module(a, b)
        return (
            {name: pair[0].contiguous() for name, pair in pairs.items()},
            {name: pair[1].contiguous() for name, pair in pairs.items()},
        )

    def folded(self, weights: Tensor) -> Factors:
        """weights `[U, M, H, S]` to those tasks' averaged A and B."""
        a = {
            w: _average(self.a[str(w)], weights[:, rows]) for w, rows in self.stacks.inputs.items()
        }
        b = {
            w: _average(self.b[str(w)], weights[:, rows]) for w, rows in self.stacks.outputs.items()
        }
        return Factors(self.stacks, a, b, weights)


def fresh_a(shape: tuple[int, ...], fan_in: int, generator: torch.Generator | None) -> Tensor:
    """Kaiming-uniform with a = sqrt(5), the default of a linear layer: within ±1/sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def _average(skills: Tensor, weights: Tensor) -> Tensor:
    """skills `[m, H, S, r, W/H]`, weights `[U, m, H, S]` to `[m, U, r, W]`, in float32."""
    m, heads, count, rank, width = skills.shape
    w = weights.permute(1, 2, 0, 3).reshape(m * heads, -1, count)
    with torch.autocast(skills.device.type, enabled=False):
        mean = torch.bmm(w, skills.view(m * heads, count, rank * width))  # [m*H, U, r*W/H]
    whole = mean.view(m, heads, -1, rank, width).permute(0, 2, 3, 1, 4)
    return whole.reshape(m, -1, rank, heads * width)
