"""What each form costs on this machine, measured on plans as they are served."""

import time
from collections.abc import Callable, Sequence

import torch

from polyhead.adapters import ops
from polyhead.adapters.costs import FormCosts
from polyhead.adapters.plan import GroupSlot, RoutedTask
from polyhead.adapters.planner import Planner

FEW, MANY, REPEATS = 1, 32, 3
"""Tokens of the two measured batches, and how often each is timed."""
TASKS = 4
"""Combined tasks of a measured step: one would find its factors in the cache, time after time,
where in service the backbone's weights have passed through since."""
ONLY_FACTORED = FormCosts(factored_step=0, factored_token=0)
ONLY_COMBINED = FormCosts(combined_task=0, combined_token=0, fold=0)


@torch.inference_mode()
def measure_costs(groups: Sequence[ops.SkillGroup]) -> FormCosts:
    """Time both forms over all modules on the device that holds the skills.

    Takes about a second for a small backbone; the least of a few runs counts, since
    whatever else the machine does only ever adds.
    """
    step = _Step(groups)
    few, many = (step.seconds(ONLY_FACTORED, [1] * n) for n in (FEW, MANY))
    own_few, own_many = (step.seconds(ONLY_COMBINED, [n] * TASKS) for n in (FEW, MANY // TASKS))
    factored_token = max(many - few, 0.0) / (MANY - FEW)
    combined_token = max(own_many - own_few, 0.0) / (MANY - FEW * TASKS)
    return FormCosts(
        factored_step=few - FEW * factored_token,
        factored_token=factored_token,
        combined_task=own_few / TASKS - FEW * combined_token,
        combined_token=combined_token,
        fold=_seconds(step.fold, groups[0].a.device),
    )


class _Step:
    """The adapters' part of a forward pass, without the backbone."""

    def __init__(self, groups: Sequence[ops.SkillGroup]) -> None:
        self._slots = _slots(groups)
        self._device = groups[0].a.device
        # As wide as the heads at hand, which are a part where layers are cut over processes.
        self._x = [g.a.new_ones(MANY, g.a.shape[0] * g.a.shape[1]) for g in groups]
        self._y = [[b.new_zeros(MANY, b.shape[0] * b.shape[2]) for b in g.b] for g in groups]
        shape = sum(g.size for g in groups), groups[0].heads, groups[0].skills
        weights = torch.full(shape, 1 / groups[0].skills)
        self._tasks = [RoutedTask(str(i), weights) for i in range(MANY)]
        members = [[""] * g.size for g in groups]  # names matter to private adapters only
        self._planner = Planner(self._slots, members, range(shape[0]), self._device)

    def seconds(self, costs: FormCosts, counts: Sequence[int]) -> float:
        """Of a step of one task for each of the counts, in the form that is the cheaper one."""
        self._planner.costs = costs
        tasks = self._tasks[: len(counts)]
        for _ in tasks:  # a step builds the factors of one task
            plan = self._planner.build(tasks, counts)
        x = [own[: plan.tokens] for own in self._x]

        def run() -> None:
            for slot, own, outputs in zip(self._slots, x, self._y, strict=True):
                for g, y in enumerate(outputs):
                    plan.add_delta(slot, g, own, y[: plan.tokens])

        run()  # compiles what was not compiled yet
        return _seconds(run, self._device)

    def fold(self) -> None:
        self._planner.fold(self._tasks[0])


def _slots(groups: Sequence[ops.SkillGroup]) -> list[GroupSlot]:
    slots: list[GroupSlot] = []
    for group in groups:
        start = slots[-1].columns.stop if slots else 0
        columns = slice(start, start + group.size * group.columns)
        slots.append(GroupSlot(len(slots), group, columns))
    return slots


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    # Beside other work the clock tells how often this process had to wait.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    least = float("inf")
    for _ in range(REPEATS):
        _settle(device)
        started = clock()
        run()
        _settle(device)
        least = min(least, clock() - started)
    return least


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
