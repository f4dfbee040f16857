"""Whether a device's kernels let a token see what comes after it, or another example."""

from dataclasses import replace

import torch
from torch import Tensor

from polyhead.adapters.training.encode import TrainingBatch
from polyhead.adapters.training.errors import TrainingError
from polyhead.adapters.training.trainable import Trainable

TOLERANCE = 0.02
"""Of a loss in nats, for kernels that do not add up in the same order each time."""


@torch.no_grad()
def check_causal(trainable: Trainable, batch: TrainingBatch) -> None:
    """No answer is predicted from an example's last token, so another one there changes no loss.

    One forward pass more, twice. Raises `TrainingError` when it does: attention ignores its mask,
    and what is learned would be worth nothing although its loss falls.
    """
    last = _last_tokens(batch)
    exchanged = batch.input_ids.clone()
    exchanged[0, last] = (exchanged[0, last] + 1) % trainable.model.config.vocab_size
    before = trainable(batch)
    after = trainable(replace(batch, input_ids=exchanged))
    difference = float((before - after).abs().max())
    if not difference <= TOLERANCE:
        raise TrainingError(
            "this device's attention does not keep to its mask",
            field="device",
            found=f"{trainable.model.device}: a later token changes a loss by {difference:.3g}",
            expected=f"at most {TOLERANCE}; another version of torch, or another device",
        )


def _last_tokens(batch: TrainingBatch) -> Tensor:
    """Places among the N tokens: where the next one is another example's."""
    ends = batch.segment[1:] != batch.segment[:-1]
    return torch.cat((ends, ends.new_ones(1))).nonzero()[:, 0]
