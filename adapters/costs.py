"""Which exact form a step should use for which task: a model of their costs."""

from collections.abc import Mapping, Set
from dataclasses import dataclass


@dataclass(frozen=True)
class FormCosts:
    """Seconds of one forward pass over all modules. The defaults are in arbitrary units whose
    ratios suit a small backbone; `measure_costs` replaces them by figures of this machine."""

    factored_step: float = 8.0  # once, if any token is factored
    factored_token: float = 1.0  # for each factored token
    combined_task: float = 4.0  # for each combined task
    combined_token: float = 0.15  # for each combined token
    fold: float = 15.0  # to build a task's factors when they are not resident

    def choose_combined(self, tokens: Mapping[str, int], available: Set[str]) -> set[str]:
        """The tasks that are cheaper in the combined form.

        tokens: tokens of each routed task in the step; available: tasks whose factors exist, or
        are to be built now whatever that costs.
        """
        better = {key for key in tokens.keys() & available if self.saving(tokens[key]) > 0}
        rest = tokens.keys() - better
        if rest and rest <= available:
            lost = -sum(self.saving(tokens[key]) for key in rest)
            if lost < self.factored_step:
                return set(tokens)  # with nothing left to factor, its fixed cost goes too
        return better

    def saving(self, tokens: int) -> float:
        """What one task saves in a step by the combined form, if others are factored anyway."""
        combined = self.combined_task + tokens * self.combined_token
        return tokens * self.factored_token - combined


class RentOrBuy:
    """When to build a task's factors: once they would have saved what building them costs.

    The rule of the ski-rental problem: whatever comes, it pays at most twice the best cost.
    """

    def __init__(self, most: int = 4096) -> None:
        self._missed: dict[str, float] = {}
        self._most = most

    def due(self, costs: FormCosts, tokens: Mapping[str, int], resident: Set[str]) -> set[str]:
        """Note what this step misses without the factors; answers whom to build for now.

        Those are the tasks whose building pays in this very step, as long prompts do, and one other
        at most, so that no step is held up by more than one building.
        """
        ideal = costs.choose_combined(tokens, tokens.keys())
        missing = [key for key in tokens if key in ideal and key not in resident]
        everything = len(ideal) == len(tokens)
        share = costs.factored_step / len(missing) if everything and missing else 0.0
        paying = {key for key in missing if costs.saving(tokens[key]) > costs.fold}
        for key in paying:
            self._missed.pop(key, None)
        for key in missing:
            if key in paying:
                continue
            saved = costs.saving(tokens[key]) + share
            missed = max(0.0, self._missed.pop(key, 0.0) + saved)  # a loss is nobody's debt
            self._missed[key] = missed
            if missed >= costs.fold:
                del self._missed[key]
                return paying | {key}
        while len(self._missed) > self._most:
            del self._missed[next(iter(self._missed))]
        return paying
