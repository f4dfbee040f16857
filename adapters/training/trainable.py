"""A frozen backbone with trained adapters in it: losses and exact matches of packed batches."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

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
from polyhead.adapters.training import attention
from polyhead.adapters.training.encode import TrainingBatch
from polyhead.adapters.training.factors import Factors, Source
from polyhead.adapters.training.layers import Board, TrainedLinear, Work


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
        self._board = Board()
        head = _output_head(model)
        self._frozen = [p for p in model.parameters() if p.requires_grad]
        self._keep: Tensor | None = None
        self._originals = _originals(model, modules)
        self._checkpointed = _checkpointed(model) if checkpointing else []
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        for name, layer in self._originals.items():
            model.set_submodule(name, TrainedLinear(layer, name, self._board, scaling))
        self._attention = attention.install(model, self._board)
        self._hook = head.register_forward_pre_hook(self._answer_places)

    @property
    def model(self) -> PreTrainedModel:
        """The backbone."""
        return self._held[0]

    def forward(self, batch: TrainingBatch) -> Tensor:
        """Each example's loss `[E]`: the mean cross-entropy of its answer's tokens."""
        return _losses(self.answer_logits(batch), batch)

    @torch.no_grad()
    def score(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """`[E]` bool, would greedy decoding give exactly the answer, end-of-text included; and the
        losses `[E]` of the same forward pass."""
        logits = self.answer_logits(batch)
        wrong = (logits.argmax(-1) != batch.gold).long()  # [P]
        misses = wrong.new_zeros(batch.examples).index_add(0, batch.example_of, wrong)
        return misses == 0, _losses(logits, batch)

    def answer_logits(self, batch: TrainingBatch) -> Tensor:
        """`[P, vocabulary]`: the logits from which each answer token is predicted."""
        factors = self.source.factors(batch.tasks)
        if self.on_factors is not None:
            self.on_factors(factors)
        if self.model.device.type != "cpu":  # where a kernel's launch costs more than its work
            factors = factors.to(self.model.dtype)
        self._board.work = Work(batch, factors.by_module())
        self._keep = batch.predict_at
        try:
            out = cast(Any, self.model)(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=self._mask(batch),
                use_cache=False,
            )
        finally:
            self._keep = None
        return cast(Tensor, out.logits.flatten(0, 1))  # one index would cost a copy in backward

    def bare(self) -> None:
        """Forget the last batch, so that the backbone alone answers until the next one."""
        self._board.work = None

    def detach(self) -> PreTrainedModel:
        """Put the original layers back and return the backbone."""
        self._hook.remove()
        self.bare()
        if self._attention is not None:
            attention.restore(self.model, self._attention)
        for name, layer in self._originals.items():
            self.model.set_submodule(name, layer)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        for block in self._checkpointed:
            del block.forward
        return self.model

    def _mask(self, batch: TrainingBatch) -> Tensor:
        if self._attention is None:
            return batch.mask(self.model.dtype)
        # Four dimensions keep transformers from making a mask, which nobody would read.
        return batch.input_ids.new_empty(1, 1, 1, 1)

    def _answer_places(self, _head: nn.Module, args: tuple[Tensor, ...]) -> Any:
        """Cuts the output head's input `[1, N, D]` to `[1, P, D]`: the head is a fifth of a small
        model, and most tokens are prompt."""
        if self._keep is None:
            return None
        return (args[0].index_select(1, self._keep), *args[1:])


def _losses(logits: Tensor, batch: TrainingBatch) -> Tensor:
    """logits `[P, vocabulary]` to `[E]`."""
    each = F.cross_entropy(logits.float(), batch.gold, reduction="none")  # [P]
    sums = each.new_zeros(batch.examples).index_add(0, batch.example_of, each)
    return sums / batch.answer_tokens


def _output_head(model: PreTrainedModel) -> nn.Module:
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Module):
        raise InjectionError("the backbone has no output head", field="backbone")
    return head


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
