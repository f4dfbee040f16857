"""AdaMix with LoRA (github.com/microsoft/AdaMix, `NLG`): GPT-2 whose q and v have several modules.

Per attention layer, under `<layer>.attn.c_attn`, a `Conv1D` that gives q, k and v side by side:

    experts_lora_A.<e>          [2*r, I]       of q, then of v; one where `share_A` is on
    experts_lora_B.<e>          [2*O/3, r]     likewise
    lora_expert_score_weight    [E]

While it trains each batch takes one module at random. Afterwards (arXiv 2205.12410, section 3.4,
and `AdamixMergedLinear.forward`) A and B are averaged apart, by the softmax of the scores, which
are zero unless they were tuned:

    A = sum_e softmax(score)_e A_e,   B likewise,   q += alpha/r B_q A_q x,   v += alpha/r B_v A_v x

What is left is one LoRA of rank 2r for the whole layer: its first r components reach q alone, the
others v alone. The file may hold the frozen backbone too, which must be the one that is given.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from polyhead.adapters.convert.sources import (
    check_frozen,
    module_shape,
    read_pickled_object,
    state_dict,
)
from polyhead.adapters.errors import ConversionError
from polyhead.adapters.private import PrivateAdapter

STATE = "model_state_dict"
ENTRY = re.compile(r"(?:module\.)?(.+)\.(?:experts_lora_([AB])\.(\d+)|lora_expert_score_weight)")
BOTTLENECK = "AdaMix's bottleneck adapters (adamix_only), which are not linear"
PLAIN = "a plain LoRA of loralib (lora_only), not a mixture"
REFUSED = {
    "deepspeed_experts": BOTTLENECK,
    "expert_score_weight": BOTTLENECK,
    "lora_A": PLAIN,
    "lora_B": PLAIN,
}
"""What parts of a tensor's name mean."""
IGNORED = (".attn.bias", "lm_head.decoder.weight")
"""The causal mask and the tied output head, which whole checkpoints hold beside the backbone."""
PARTS, ENABLED = 3, (0, 2)
"""q, k and v; those that AdaMix adapts."""


def convert_adamix(source: Path, model: nn.Module, alpha: float) -> PrivateAdapter:
    """The averaged adapter in the file `source`, a pickle with the tensors under `STATE`.

    model: the bare GPT-2. alpha: the `--lora_alpha` of the training run, which no checkpoint holds.
    Raises `ConversionError` that names the tensor, or `PrivateAdapterError`.
    """
    if not alpha > 0:
        raise ConversionError("unusable", field="alpha", found=str(alpha), expected="above 0")
    found = read_pickled_object(Path(source))
    tensors = state_dict(Path(source), found.get(STATE, found))
    layers, a, b, shapes = dict(model.named_modules()), {}, {}, []
    for name, mixture in _mixtures(tensors, model.state_dict()).items():
        if name not in layers:
            raise ConversionError("the backbone has no such module", field=name)
        shapes.append(module_shape(name, layers[name]))
        sides = mixture.averaged("A"), mixture.averaged("B")
        a[name], b[name] = _laid_out(name, *sides, shapes[-1].in_features, shapes[-1].out_features)
    rank = next(iter(b.values())).shape[0] // len(ENABLED)
    return PrivateAdapter.checked(a, b, shapes, alpha / rank)


class _Mixture:
    """The modules of one layer."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.sides: dict[str, dict[int, Tensor]] = {"A": {}, "B": {}}
        self.scores: Tensor | None = None

    def averaged(self, side: str) -> Tensor:
        """One side's average in float32; a shared side is as it is."""
        modules = self.sides[side]
        if self.scores is None or not modules:
            raise ConversionError("the scores, A or B are missing", field=self._name)
        count = len(self.scores)
        if sorted(modules) not in (list(range(count)), [0]):
            raise ConversionError(
                "wrong number of modules",
                field=f"{self._name}.experts_lora_{side}",
                found=str(sorted(modules)),
                expected=f"0 to {count - 1}, as there are scores, or 0 alone, shared",
            )
        if len({tensor.shape for tensor in modules.values()}) > 1:
            raise ConversionError(
                "modules of different shapes", field=f"{self._name}.experts_lora_{side}"
            )
        share = self.scores.float().softmax(0) if len(modules) == count else torch.ones(1)
        stacked = torch.stack([modules[i].float() for i in range(len(modules))])
        return (share.view(-1, 1, 1) * stacked).sum(0)


def _mixtures(tensors: Mapping[str, Tensor], backbone: Mapping[str, Tensor]) -> dict[str, _Mixture]:
    found: dict[str, _Mixture] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for part in REFUSED.keys() & set(name.split(".")):
            raise ConversionError("this variant is not read", field=name, found=REFUSED[part])
        match = ENTRY.fullmatch(name)
        if match is None:
            others[name.removeprefix("module.")] = tensor
            continue
        mixture = found.setdefault(match[1], _Mixture(match[1]))
        if match[2] is None:
            mixture.scores = tensor
        else:
            mixture.sides[match[2]][int(match[3])] = tensor
    odd = sorted(n for n in others if n not in backbone and not n.endswith(IGNORED))
    if odd or not found:
        raise ConversionError(
            "none of the mixture's",
            field=odd[0] if odd else "experts_lora_A",
            expected="tensors of AdamixMergedLinear, and of the backbone",
        )
    check_frozen(others, backbone)
    return found


def _laid_out(name: str, a: Tensor, b: Tensor, width: int, out: int) -> tuple[Tensor, Tensor]:
    """A `[I, 2r]` and B `[2r, O]`: B is zero where a component does not reach."""
    rank = b.shape[-1]
    part, groups = out // PARTS, len(ENABLED)
    if a.shape != (groups * rank, width) or b.shape != (groups * part, rank) or out % PARTS:
        raise ConversionError(
            "wrong shape",
            field=name,
            found=f"A {list(a.shape)}, B {list(b.shape)}",
            expected=f"A [{groups}*r, {width}], B [{groups * part}, r]",
        )
    whole = torch.zeros(groups * rank, out)
    for group, place in enumerate(ENABLED):
        rows = slice(group * rank, (group + 1) * rank)
        whole[rows, place * part : (place + 1) * part] = b[group * part : (group + 1) * part].mT
    return a.mT.contiguous(), whole
