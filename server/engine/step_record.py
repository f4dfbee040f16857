"""What one step did, in plain numbers, for whoever counts them."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepRecord:
    """tokens are those computed, prompt and answer; seconds are by phase.

    The phases: `schedule`; `forward`, the cache operations, the plan and the model; `sample`, from
    logits to tokens; `publish`, from tokens to text and to whoever waits. A GPU computes while the
    CPU goes on, so there `forward` is handing the work over and `sample` waits for its end.
    """

    rows: int
    tokens: int
    tasks: int
    forms: Mapping[str, int]
    """Tasks of the step by the exact form that was chosen for them."""
    seconds: Mapping[str, float]
