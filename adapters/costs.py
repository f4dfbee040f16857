"""Which exact form a step should use for which task: a cost model measured on the device."""

from collections.abc import Mapping
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

    def choose_combined(self, tokens: Mapping[str, int], resident: set[str]) -> set[str]:
        """The tasks that are cheaper in the combined form.

        tokens: tokens of each routed task in the step; resident: tasks whose factors are there.
        """
        combined = {key: self._combined(n, key in resident) for key, n in tokens.items()}
        better = {key for key, n in tokens.items() if combined[key] < n * self.factored_token}
        rest = tokens.keys() - better
        factored = self.factored_step + sum(tokens[key] for key in rest) * self.factored_token
        if rest and sum(combined[key] for key in rest) < factored:
            return set(tokens)  # with nothing left to factor, its fixed cost goes too
        return better

    def _combined(self, tokens: int, resident: bool) -> float:
        return self.combined_task + tokens * self.combined_token + (0.0 if resident else self.fold)
