"""Where the A and B of the tasks of a batch come from, and what of it is trained.

Every source answers `factors(tasks)`: for U tasks, each module's A `[U, r, I]` and B `[U, r, O]`,
differentiable with respect to whatever the source trains. A is kept with I last, unlike in files:
the skinny products of a training step read it three times faster so.

Modules of equal width are stacked, so that all of them are folded by one product.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from polyhead.adapters.inventory import Inventory, ModuleShape
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import EPSILON, Granularity, Layout

LOGIT_RANGE = 1e-3
"""New logits are uniform within ± this: the weights start near the average."""


class Factors:
    """A and B of U tasks: `a[width]` is `[modules of that input width, U, r, width]`, `b` alike.

    weights: `[U, M, H, S]`, where they are averages of shared skills.
    """

    def __init__(
        self,
        stacks: "Stacks",
        a: Mapping[int, Tensor],
        b: Mapping[int, Tensor],
        weights: Tensor | None = None,
    ) -> None:
        self.stacks = stacks
        self.a = a
        self.b = b
        self.weights = weights

    def by_module(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Each module's A `[U, r, I]` and B `[U, r, O]`."""
        # `unbind`, for the gradient of one index is a zero tensor as large as the whole stack.
        return self.stacks.by_module(
            {width: stack.unbind(0) for width, stack in self.a.items()},
            {width: stack.unbind(0) for width, stack in self.b.items()},
        )


class Source(Protocol):
    """Gives the tasks' A and B."""

    def factors(self, tasks: Tensor) -> Factors:
        """tasks `[U]` long, distinct."""
        ...


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


def _by_width(widths: Sequence[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for m, width in enumerate(widths):
        found.setdefault(width, []).append(m)
    return found


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
        self.a = _parameters(self.stacks.stack_a(turned))
        self.b = _parameters(self.stacks.stack_b(whole))

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


class RoutedSource(nn.Module):
    """Shared skills, mixed for each task by its own routing."""

    def __init__(self, skills: SharedSkills, routings: Routings) -> None:
        super().__init__()
        self.skills = skills
        self.routings = routings

    def factors(self, tasks: Tensor) -> Factors:
        return self.skills.folded(self.routings.weights(tasks))


class PrivateSource(nn.Module):
    """Each of T tasks owns its A and B: `a[width]` is `[modules, T, r, width]`."""

    def __init__(
        self,
        modules: Sequence[ModuleShape],
        a: Sequence[Mapping[str, Tensor]],
        b: Sequence[Mapping[str, Tensor]],
    ) -> None:
        """One A `[I, r]` and B `[r, O]` per module for each task."""
        super().__init__()
        self.stacks = Stacks(modules)
        names = [module.name for module in modules]
        turned = {name: torch.stack([own[name].float().mT for own in a]) for name in names}
        whole = {name: torch.stack([own[name].float() for own in b]) for name in names}
        self.a = _parameters(self.stacks.stack_a(turned))
        self.b = _parameters(self.stacks.stack_b(whole))

    @classmethod
    def fresh(
        cls, modules: Sequence[ModuleShape], tasks: int, rank: int, seeds: Sequence[int]
    ) -> "PrivateSource":
        """From scratch, A as `SharedSkills.fresh` with one head, B zero; one seed per task."""
        a, b = [], []
        for seed in seeds[:tasks]:
            generator = torch.Generator().manual_seed(seed)
            a.append(
                {m.name: fresh_a((m.in_features, rank), m.in_features, generator) for m in modules}
            )
            b.append({m.name: torch.zeros(rank, m.out_features) for m in modules})
        return cls(modules, a, b)

    @classmethod
    def averaged(cls, skills: SharedSkills, weights: Tensor) -> "PrivateSource":
        """From the average of shared skills under weights `[T, M, H, S]` (1/S for MHR-mu)."""
        with torch.no_grad():
            folded = skills.folded(weights)
        empty = cls.__new__(cls)
        nn.Module.__init__(empty)
        empty.stacks = skills.stacks
        empty.a = _parameters(folded.a)
        empty.b = _parameters(folded.b)
        return empty

    def factors(self, tasks: Tensor) -> Factors:
        return Factors(
            self.stacks,
            {int(w): p.index_select(1, tasks) for w, p in self.a.items()},
            {int(w): p.index_select(1, tasks) for w, p in self.b.items()},
        )

    def export(self, task: int, scaling: float) -> PrivateAdapter:
        """One task's adapter as it is stored and served, `scaling` folded into B."""
        return _private(self.factors(torch.tensor([task])), self.stacks, scaling)


class OwnSkillsSource(nn.Module):
    """Each of T tasks owns a copy of all skills and its logits (full MHR in few-shot fits)."""

    def __init__(self, skills: SharedSkills, routings: Routings) -> None:
        """The routings' T copies of `skills`, which itself stays as it is."""
        super().__init__()
        self.stacks = skills.stacks
        self.routings = routings
        tasks = routings.logits.shape[0]
        self.a = _parameters({int(w): _copies(p, tasks) for w, p in skills.a.items()})
        self.b = _parameters({int(w): _copies(p, tasks) for w, p in skills.b.items()})

    def factors(self, tasks: Tensor) -> Factors:
        weights = self.routings.weights(tasks)
        a = {
            w: _average_own(self.a[str(w)].index_select(1, tasks), weights[:, rows])
            for w, rows in self.stacks.inputs.items()
        }
        b = {
            w: _average_own(self.b[str(w)].index_select(1, tasks), weights[:, rows])
            for w, rows in self.stacks.outputs.items()
        }
        return Factors(self.stacks, a, b)

    def export(self, task: int, scaling: float) -> PrivateAdapter:
        """One task's averaged A and B as a private adapter, `scaling` folded into B."""
        return _private(self.factors(torch.tensor([task])), self.stacks, scaling)


def fresh_a(shape: tuple[int, ...], fan_in: int, generator: torch.Generator | None) -> Tensor:
    """Kaiming-uniform with a = sqrt(5), the default of a linear layer: within ±1/sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def _parameters(stacks: Mapping[int, Tensor]) -> nn.ParameterDict:
    return nn.ParameterDict(
        {str(width): nn.Parameter(stack.contiguous()) for width, stack in stacks.items()}
    )


def _copies(skills: Tensor, tasks: int) -> Tensor:
    """`[modules, H, S, r, W/H]` to `[modules, T, H, S, r, W/H]`."""
    return skills.detach().unsqueeze(1).repeat(1, tasks, 1, 1, 1, 1)


def _average(skills: Tensor, weights: Tensor) -> Tensor:
    """skills `[m, H, S, r, W/H]`, weights `[U, m, H, S]` to `[m, U, r, W]`, in float32."""
    m, heads, count, rank, width = skills.shape
    w = weights.permute(1, 2, 0, 3).reshape(m * heads, -1, count)
    with torch.autocast(skills.device.type, enabled=False):
        mean = torch.bmm(w, skills.view(m * heads, count, rank * width))  # [m*H, U, r*W/H]
    whole = mean.view(m, heads, -1, rank, width).permute(0, 2, 3, 1, 4)
    return whole.reshape(m, -1, rank, heads * width)


def _average_own(skills: Tensor, weights: Tensor) -> Tensor:
    """skills `[m, U, H, S, r, W/H]`, weights `[U, m, H, S]` to `[m, U, r, W]`, in float32."""
    m, tasks, heads, count, rank, width = skills.shape
    w = weights.transpose(0, 1).reshape(-1, 1, count)
    with torch.autocast(skills.device.type, enabled=False):
        mean = torch.bmm(w, skills.reshape(-1, count, rank * width))
    whole = mean.view(m, tasks, heads, rank, width).transpose(2, 3)
    return whole.reshape(m, tasks, rank, heads * width)


def _private(factors: Factors, stacks: Stacks, scaling: float) -> PrivateAdapter:
    with torch.no_grad():
        rows = factors.by_module()
    a = {name: pair[0][0].detach().mT.cpu().contiguous() for name, pair in rows.items()}
    b = {name: pair[1][0].detach().cpu().contiguous() for name, pair in rows.items()}
    return PrivateAdapter.checked(a, b, stacks.modules, scaling)
