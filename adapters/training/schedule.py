"""How the learning rates rise and fall, as a share of their highest value."""

import math

from polyhead.adapters.training.config import OptimiserPart


def rate_share(step: int, options: OptimiserPart) -> float:
    """For step `step` (from 0): rises over the warm-up, then falls to 0 at the last step's end."""
    rising = round(options.warm_up * options.steps)
    if step < rising:
        return (step + 1) / rising
    if options.schedule == "constant":
        return 1.0
    done = (step - rising) / max(1, options.steps - rising)
    return 1.0 - done if options.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
