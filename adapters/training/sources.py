"""The sources of a batch's A and B: shared skills mixed for each task, copies of them, or what a
task owns alone."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from polyhead.adapters.inventory import ModuleShape
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.training.factors import Factors, Stacks, parameters
from polyhead.adapters.training.skills import Routings, SharedSkills, fresh_a


class RoutedSource(nn.Module):
    """Shared skills, mixed for each task by its own routing."""

    def __init__(self, skills: SharedSkills, routings: Routings) -> None:
        super().__init__()
        self.skills = skills
        self.routings = routings

    def factors(self, tasks: Tensor) -> Factors:
        return self.skills.folded(self.routings.weights(tasks))


class PrivateSource(nn.Module):
    """Each of T tasks owns its A and B."""

    def __init__(self, stacks: Stacks, a: Mapping[int, Tensor], b: Mapping[int, Tensor]) -> None:
        """`a[width]` is `[modules, T, r, width]`, `b` alike."""
        super().__init__()
        self.stacks = stacks
        self.a = parameters(a)
        self.b = parameters(b)

    @classmethod
    def of(
        cls,
        modules: Sequence[ModuleShape],
        a: Sequence[Mapping[str, Tensor]],
        b: Sequence[Mapping[str, Tensor]],
    ) -> "PrivateSource":
        """From one A `[I, r]` and B `[r, O]` per module for each task."""
        stacks = Stacks(modules)
        names = [module.name for module in modules]
        turned = {name: torch.stack([own[name].float().mT for own in a]) for name in names}
        whole = {name: torch.stack([own[name].float() for own in b]) for name in names}
        return cls(stacks, stacks.stack_a(turned), stacks.stack_b(whole))

    @classmethod
    def fresh(
        cls, modules: Sequence[ModuleShape], rank: int, seeds: Sequence[int]
    ) -> "PrivateSource":
        """From scratch, A as `SharedSkills.fresh` with one head, B zero; one seed per task."""
        a, b = [], []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            a.append(
                {m.name: fresh_a((m.in_features, rank), m.in_features, generator) for m in modules}
            )
            b.append({m.name: torch.zeros(rank, m.out_features) for m in modules})
        return cls.of(modules, a, b)

    @classmethod
    def averaged(cls, skills: SharedSkills, weights: Tensor) -> "PrivateSource":
        """From the average of shared skills under weights `[T, M, H, S]` (1/S for MHR-mu)."""
        with torch.no_grad():
            folded = skills.folded(weights)
        return cls(skills.stacks, folded.a, folded.b)

    def factors(self, tasks: Tensor) -> Factors:
        return Factors(
            self.stacks,
            {int(w): p.index_select(1, tasks) for w, p in self.a.items()},
            {int(w): p.index_select(1, tasks) for w, p in self.b.items()},
        )


class OwnSkillsSource(nn.Module):
    """Each of T tasks owns a copy of all skills and its logits (full MHR in few-shot fits)."""

    def __init__(self, skills: SharedSkills, routings: Routings) -> None:
        """The routings' T copies of `skills`, which itself stays as it is."""
        super().__init__()
        self.stacks = skills.stacks
        self.routings = routings
        tasks = routings.logits.shape[0]
        self.a = parameters({int(w): _copies(p, tasks) for w, p in skills.a.items()})
        self.b = parameters({int(w): _copies(p, tasks) for w, p in skills.b.items()})

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


def export(source: PrivateSource | OwnSkillsSource, task: int, scaling: float) -> PrivateAdapter:
    """One task's A_t and B_t as they are stored and served, `scaling` folded into B."""
    device = next(source.parameters()).device
    with torch.no_grad():
        found = source.factors(torch.tensor([task], device=device)).by_module()
    a = {name: pair[0][0].mT.cpu().contiguous() for name, pair in found.items()}
    b = {name: pair[1][0].cpu().contiguous() for name, pair in found.items()}
    return PrivateAdapter.checked(a, b, source.stacks.modules, scaling)


def _copies(skills: Tensor, tasks: int) -> Tensor:
    """`[modules, H, S, r, W/H]` to `[modules, T, H, S, r, W/H]`."""
    return skills.detach().unsqueeze(1).repeat(1, tasks, 1, 1, 1, 1)


def _average_own(skills: Tensor, weights: Tensor) -> Tensor:
    """skills `[m, U, H, S, r, W/H]`, weights `[U, m, H, S]` to `[m, U, r, W]`, in float32."""
    m, tasks, heads, count, rank, width = skills.shape
    w = weights.transpose(0, 1).reshape(-1, 1, count)
    with torch.autocast(skills.device.type, enabled=False):
        mean = torch.bmm(w, skills.reshape(-1, count, rank * width))
    whole = mean.view(m, tasks, heads, rank, width).transpose(2, 3)
    return whole.reshape(m, tasks, rank, heads * width)
