"""Where a fit may begin: from the routings of the known tasks that are nearest to its examples.

Near is whose routing answers them best, which needs no embeddings and nothing stored but routings.
All known routings are tried on one example, the best eight on four (successive halving). On eight
examples the nearest, the mean of the nearest two, and uniform weights, where a fit begins
otherwise, are compared: some ninety examples forward, in time as much as ten steps of four. Where
more than 32 are known, one backward pass at uniform weights picks whom to try, by the first order
of the loss:

    loss(w) ~ loss(1/S) + <d loss / d w, w - 1/S>
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

TRIED = 32
"""Routings that are tried at all; of more, those that the estimate prefers."""
ROUNDS = ((1, 8), (4, 2))
"""On how many examples, and how many routings are kept by that."""
SEARCHED = 8
"""Examples that a learner compares by in the end; it learns from all, and is scored on none."""
HIGHEST = 0.5
LOWEST = 1e-4
"""Sigmoids of the logits that a fit begins from: weights fix them up to a factor, and logits far
from zero would hardly move."""


@dataclass(frozen=True, eq=False)
class Start:
    """Whose routings a learner begins from, the nearest first, and their mean as logits
    `[M, H, S]`."""

    tasks: tuple[str, ...]
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
        run.began_from = () if kept is None else kept.tasks
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
    return [
        Start(tuple(names[c] for c in own), logits_of(weights[own].mean(0))) if own else None
        for own in found
    ]


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

    def nearest(self, weights: Tensor) -> list[list[int]]:
        """From the mean of which weights `[C, M, H, S]` each learner is to begin, the nearest
        first; none where uniform weights are better."""
        found = self._preferred(weights)
        for count, kept in ROUNDS:
            losses = self._losses(weights, found, count)
            order = losses.topk(min(kept, losses.shape[1]), largest=False).indices
            found = found.gather(1, order)
        ways = [found[:, :count] for count in range(1, found.shape[1] + 1)]
        uniform = torch.full_like(weights[0], 1 / weights.shape[-1])
        means = [weights[way].mean(1) for way in ways]
        tried = torch.stack([*means, uniform.expand_as(means[0])], 1)  # [L, ways, M, H, S]
        places = torch.arange(tried.shape[0] * tried.shape[1], device=weights.device)
        last = self._losses(tried.flatten(0, 1), places.view(tried.shape[:2]), SEARCHED)
        best = last.argmin(1).tolist()
        return [ways[way][i].tolist() if way < len(ways) else [] for i, way in enumerate(best)]

    def _preferred(self, weights: Tensor) -> Tensor:
        """`[L, K]`: whom each learner tries."""
        learners = len(self.examples)
        if len(weights) <= TRIED:
            every = torch.arange(len(weights), device=weights.device)
            return every.expand(learners, -1)
        uniform = torch.full_like(weights[0], 1 / weights.shape[-1])
        _, slopes = self._slopes(uniform)
        estimates = torch.einsum("lmhs,cmhs->lc", slopes, weights - uniform)
        return estimates.topk(TRIED, largest=False).indices

    def _slopes(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Each learner's loss `[L]` at uniform weights, and its gradient `[L, M, H, S]`."""
        count = len(self.examples)
        source = _Weighted(self.skills, uniform.expand(count, *uniform.shape).clone())
        total = self._total(source, dict(enumerate(self.examples)), learn=True)
        assert source.weights.grad is not None
        return total, source.weights.grad

    @torch.no_grad()
    def _losses(self, weights: Tensor, shortlist: Tensor, count: int) -> Tensor:
        """The losses `[L, K]` of each learner's first examples under its own shortlist."""
        rows, columns = shortlist.shape
        source = _Weighted(self.skills, weights[shortlist.flatten()])
        work = {
            i * columns + k: self.examples[i][:count] for i in range(rows) for k in range(columns)
        }
        found = self._total(source, work, learn=False).view(rows, columns)
        return found.nan_to_num(nan=float("inf"))  # overflowed, and not the least of all

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
