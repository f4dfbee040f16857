"""Whether a device's kernels let a token see what comes after it, or another example."""

import torch

from polyhead.adapters.training.answers import AnswersBatch
from polyhead.adapters.training.errors import TrainingError
from polyhead.adapters.training.trainable import Trainable, answer_means

TOLERANCE = 0.02
"""Of a loss in nats, for kernels that do not add up in the same order each time."""


@torch.no_grad()
def check_causal(trainable: Trainable, batch: AnswersBatch) -> None:
    """Another token at the end of an example changes nothing that is predicted before it.

    One forward pass more, twice. Raises `TrainingError` when it does: attention ignores its mask,
    and what is learned would be worth nothing although its loss falls.
    """
    exchanged, same = trainable.reading.exchanged(batch)
    changes = (trainable.token_losses(batch) - trainable.token_losses(exchanged)) * same
    difference = float(answer_means(changes, batch).abs().max())
    if not difference <= TOLERANCE:
        raise TrainingError(
            "this device's attention does not keep to its mask",
            field="device",
            found=f"{trainable.model.device}: a later token changes a loss by {difference:.3g}",
            expected=f"at most {TOLERANCE}; another version of torch, or another device",
        )
