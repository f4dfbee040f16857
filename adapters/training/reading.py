"""How a kind of backbone reads a batch: the one interface between training and architectures."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from polyhead.adapters.training.answers import AnswersBatch, Encoded
from polyhead.adapters.training.causal import CausalReading
from polyhead.adapters.training.factors import Factors
from polyhead.adapters.training.layers import Board
from polyhead.adapters.training.source_target import SourceTargetReading


class Reading(Protocol):
    """One backbone, which it prepares when it is made and leaves as it was with `restore`."""

    def board(self, module: str, /) -> Board[Any]:
        """Which board the adapted layer of this name reads."""
        ...

    def pack(self, encoded: Sequence[Encoded], example_task: Sequence[int]) -> AnswersBatch:
        """A batch of examples; raises `DataError` as `task_order` does."""
        ...

    def install(self) -> None:
        """Called once the adapted layers are in the backbone."""
        ...

    def logits(self, batch: Any, factors: Factors | None) -> Tensor:
        """`[P, vocabulary]`: what each answer token of a batch that it packed is predicted from.

        Between `install` and `restore` only. factors: those of the batch's tasks; None for the bare
        backbone.
        """
        ...

    def bare(self) -> None:
        """Forget the last batch, so that the backbone alone answers until the next one."""
        ...

    def restore(self) -> None:
        """Undo `install`."""
        ...

    def exchanged(self, batch: Any) -> tuple[AnswersBatch, Tensor]:
        """A batch with another last token in every example, and which of the P predictions may not
        change by that, `[P]` bool."""
        ...


def reading_of(model: PreTrainedModel) -> Reading:
    """Raises `InjectionError` for an encoder-decoder whose positions are not relative."""
    if model.config.is_encoder_decoder:
        return SourceTargetReading(model)
    return CausalReading(model)


def closes_prompts(model: PreTrainedModel) -> bool:
    """Whether what the backbone is given ends as the tokenizer ends a text (see `Encoder`)."""
    return bool(model.config.is_encoder_decoder)
