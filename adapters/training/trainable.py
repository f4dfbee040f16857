"""A frozen backbone with trained adapters in it: losses and exact matches of packed batches."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from polyhead.adapters.errors import InjectionError
from polyhead.adapters.inject import layers_of
from polyhead.adapters.inventory import ModuleShape
from polyhead.adapters.layers import RoutedLinear
from polyhead.adapters.training.answers import AnswersBatch, Encoded
from polyhead.adapters.training.factors import Factors, Source
from polyhead.adapters.training.layers import TrainedLinear
from polyhead.adapters.training.reading import reading_of


class Trainable(nn.Module):
    """A backbone whose adapted layers take their A and B from `source`, which may be exchanged.

    The backbone is frozen and stays in evaluation mode. `detach` gives it back bit-identical.
    Its parameters are the source's; the backbone's own do not appear, so optimisers, gradient
    synchronisation and state dictionaries see only what is trained.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        modules: Sequence[ModuleShape],
        source: Source,
        scaling: float,
        *,
        checkpointing: bool = False,
    ) -> None:
        """checkpointing: keep no activations inside a block, compute them again in backward.

        Raises `InjectionError` when the backbone lacks a module or carries adapters already.
        """
        super().__init__()
        model.train(False)
        self.source = source
        self.on_factors: Callable[[Factors], None] | None = None  # sees those of every batch
        self._held = [model]  # in a list, for nn.Module must not register it
        self.reading = reading_of(model)
        self._frozen = [p for p in model.parameters() if p.requires_grad]
        self._originals = _originals(model, modules)
        self._checkpointed = _checkpointed(model) if checkpointing else []
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        for name, layer in self._originals.items():
            model.set_submodule(name, TrainedLinear(layer, name, self.reading.board(name), scaling))
        self.reading.install()

    @property
    def model(self) -> PreTrainedModel:
        """The backbone."""
        return self._held[0]

    def forward(self, batch: AnswersBatch) -> Tensor:
        """Each example's loss `[E]`: the mean cross-entropy of its answer's tokens."""
        return answer_means(self.token_losses(batch), batch)

    def token_losses(self, batch: AnswersBatch) -> Tensor:
        """`[P]`: the cross-entropy of every answer token."""
        return _token_losses(self.answer_logits(batch), batch)

    @torch.no_grad()
    def score(self, batch: AnswersBatch) -> tuple[Tensor, Tensor]:
        """`[E]` bool, would greedy decoding give exactly the answer, end-of-text included; and the
        losses `[E]` of the same forward pass."""
        logits = self.answer_logits(batch)
        wrong = (logits.argmax(-1) != batch.gold).long()  # [P]
        misses = wrong.new_zeros(batch.examples).index_add(0, batch.example_of, wrong)
        return misses == 0, answer_means(_token_losses(logits, batch), batch)

    def answer_logits(self, batch: AnswersBatch) -> Tensor:
        """`[P, vocabulary]`: the logits from which each answer token is predicted."""
        factors = self.source.factors(batch.tasks)
        if self.on_factors is not None:
            self.on_factors(factors)
        if self.model.device.type != "cpu":  # where a kernel's launch costs more than its work
            factors = factors.to(self.model.dtype)
        return self.reading.logits(batch, factors)

    def pack(self, encoded: Sequence[Encoded], example_task: Sequence[int]) -> AnswersBatch:
        """Examples of tasks as a batch for this backbone, on its device. Raises `DataError`."""
        return self.reading.pack(encoded, example_task).to(self.model.device)

    def bare(self) -> None:
        """Forget the last batch, so that the backbone alone answers until the next one."""
        self.reading.bare()

    def detach(self) -> PreTrainedModel:
        """Put the original layers back and return the backbone."""
        self.bare()
        self.reading.restore()
        for name, layer in self._originals.items():
            self.model.set_submodule(name, layer)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        for block in self._checkpointed:
            del block.forward
        return self.model


def answer_means(each: Tensor, batch: AnswersBatch) -> Tensor:
    """`[P]` to the mean over each example's answer `[E]`."""
    sums = each.new_zeros(batch.examples).index_add(0, batch.example_of, each)
    return sums / batch.answer_tokens


def _token_losses(logits: Tensor, batch: AnswersBatch) -> Tensor:
    """logits `[P, vocabulary]` to `[P]`."""
    return F.cross_entropy(logits.float(), batch.gold, reduction="none")


def _originals(model: PreTrainedModel, modules: Sequence[ModuleShape]) -> dict[str, nn.Module]:
    for name, layer in model.named_modules():
        if isinstance(layer, RoutedLinear | TrainedLinear):
            raise InjectionError("the backbone carries adapters already", field=name)
    return layers_of(model, modules)


def _checkpointed(model: PreTrainedModel) -> list[nn.Module]:
    """Checkpoint every block, without transformers' own switch: that asks for training mode, which
    would turn on dropout in the frozen backbone as well."""
    blocks: list[nn.Module] = [
        m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)
    ]
    if not blocks:
        raise InjectionError("the backbone has no blocks to checkpoint", field="checkpointing")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return blocks
