"""Where a fit may begin: from the routing of the known task that is nearest to its examples.

Near is whose routing answers them best, which needs no embeddings and nothing stored but routings.
One backward pass at uniform weights estimates every known routing to first order,

    loss(w) ~ loss(1/S) + <d loss / d w, w - 1/S>

and only the few best by that estimate are computed: what a search costs hardly grows with the
number of known tasks. Uniform weights, where a fit begins otherwise, are among those compared.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.routing import Layout, Routing
from polyhead.adapters.training.answers import Encoded, micro_batches
from polyhead.adapters.training.factors import Factors
from polyhead.adapters.training.fewshot_methods import Parameters
from polyhead.adapters.training.fewshot_runs import Learner, TaskRun
from polyhead.adapters.training.skills import SharedSkills
from polyhead.adapters.training.trainable import Trainable

SEARCHED = 8
"""Examples that a learner compares routings by; never those that it is scored on."""
SHORTLIST = 6
HIGHEST = 0.5
LOWEST = 1e-4
"""Sigmoids of the logits that a fit begins from: weights fix them up to a factor, and logits far
from zero would hardly move."""


@dataclass(frozen=True, eq=False)
class Start:
    """Whose routing a learner begins from, as logits `[M, H, S]`."""

    task: str
    logits: Tensor


def begin_near(
    trainable: Trainable,
    inventory: Inventory,
    skills: SharedSkills,
    learners: Sequence[Learner],
    runs: Sequence[TaskRun],
    parameters: Parameters,
    pause: Callable[[], None],
) -> None:
    """Let the learners of those tasks that want it begin from the inventory's nearest ones.

    trainable, skills and pause as in `starts`. The search counts to the tasks' seconds.
    """
    wanted = [run for run in runs if run.options.warm_start]
    chosen = [i for run in wanted for i in (*run.scored, run.keeper)]
    if not chosen:
        return
    began = time.monotonic()
    own = [learners[i] for i in chosen]
    found = starts(trainable, skills, own, inventory.tasks, inventory.layout, pause=pause)
    by_learner = dict(zip(chosen, found, strict=True))
    for i, start in by_learner.items():
        if start is not None:
            parameters.begin(i, start.logits)
    spent = (time.monotonic() - began) / len(wanted)
    for run in wanted:
        kept = by_learner[run.keeper]
        run.began_from = None if kept is None else kept.task
        run.seconds += spent


def starts(
    trainable: Trainable,
    skills: SharedSkills,
    learners: Sequence[Learner],
    known: Mapping[str, Routing],
    layout: Layout,
    *,
    micro_tokens: int = 256,
    pause: Callable[[], None] = lambda: None,
) -> list[Start | None]:
    """For each learner its start; None where no known task answers better than uniform weights.

    trainable: over any source, which it has again afterwards. Coefficients are passed over, for no
    logits give them. pause: called before every pass of at most about `micro_tokens` tokens.
    """
    usable = {name: one for name, one in known.items() if one.kind != "coefficients"}
    if not usable:
        return [None] * len(learners)
    device = trainable.model.device
    weights = torch.stack([one.weights(layout) for one in usable.values()]).to(device)
    source = trainable.source
    search = _Search(
        trainable, skills, [one.first(SEARCHED) for one in learners], micro_tokens, pause
    )
    try:
        found = search.nearest(weights)
    finally:
        trainable.source = source
        trainable.bare()
    names = list(usable)
    return [None if c is None else Start(names[c], logits_of(weights[c])) for c in found]


def logits_of(weights: Tensor) -> Tensor:
    """Logits that fold to these weights `[..., S]`, to the rounding of `LOWEST`."""
    s = HIGHEST * weights / weights.amax(-1, keepdim=True).clamp_min(1e-12)
    return s.clamp(LOWEST, HIGHEST).logit()


class _Weighted(nn.Module):
    """Shared skills under given weights `[T, M, H, S]`."""

    def __init__(self, skills: SharedSkills, weights: Tensor) -> None:
        super().__init__()
        self.skills = skills
        self.weights = nn.Parameter(weights)

    def factors(self, tasks: Tensor) -> Factors:
        return self.skills.folded(self.weights[tasks])


@dataclass(frozen=True, eq=False)
class _Search:
    trainable: Trainable
    skills: SharedSkills
    examples: Sequence[Sequence[Encoded]]  # of each learner
    micro_tokens: int
    pause: Callable[[], None]

    def nearest(self, weights: Tensor) -> list[int | None]:
        """Which of the weights `[C, M, H, S]` is best for each learner."""
        count = min(SHORTLIST, len(weights))
        uniform = torch.full_like(weights[0], 1 / weights.shape[-1])
        losses, slopes = self._slopes(uniform)
        estimates = torch.einsum("lmhs,cmhs->lc", slopes, weights - uniform)
        shortlist = estimates.topk(count, largest=False).indices  # [L, K]
        tried = self._losses(weights, shortlist)  # [L, K]
        best = tried.argmin(1)
        return [
            int(shortlist[i, k]) if tried[i, k] < losses[i] else None
            for i, k in enumerate(best.tolist())
        ]

    def _slopes(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Each learner's loss `[L]` at uniform weights, and its gradient `[L, M, H, S]`."""
        count = len(self.examples)
        source = _Weighted(self.skills, uniform.expand(count, *uniform.shape).clone())
        total = self._total(source, dict(enumerate(self.examples)), learn=True)
        assert source.weights.grad is not None
        return total, source.weights.grad

    @torch.no_grad()
    def _losses(self, weights: Tensor, shortlist: Tensor) -> Tensor:
        """The losses `[L, K]` of each learner under its own shortlist of weights."""
        rows, columns = shortlist.shape
        source = _Weighted(self.skills, weights[shortlist.flatten()])
        work = {i * columns + k: self.examples[i] for i in range(rows) for k in range(columns)}
        return self._total(source, work, learn=False).view(rows, columns)

    def _total(
        self, source: _Weighted, work: Mapping[int, Sequence[Encoded]], *, learn: bool
    ) -> Tensor:
        """The mean loss of every row of the source over its examples."""
        self.trainable.source = source
        total = torch.zeros(len(work), device=source.weights.device)
        for part in micro_batches(work, self.micro_tokens):
            self.pause()
            batch = self.trainable.pack([one for _, one in part], [row for row, _ in part])
            owners = torch.tensor(batch.example_task, device=total.device)
            shares = torch.tensor([1 / len(work[row]) for row, _ in part], device=total.device)
            weighted = self.trainable(batch).float() * shares
            if learn:
                weighted.sum().backward()
            total.index_add_(0, owners, weighted.detach())
        return total
