"""An ordinary LoRA as PEFT writes it (`peft_type` "LORA"): a configuration and a safetensors file.

Layout and maths: `peft/tuners/lora/layer.py` of PEFT 0.21.2. Per adapted module

    lora_A.weight    [r, I]
    lora_B.weight    [O, r]

with `y = base(x) + alpha / r * (x A^T) B^T`, or `alpha / sqrt(r)` for rsLoRA. `rank_pattern` and
`alpha_pattern` give modules an r and an alpha of their own. `fan_in_fan_out` says how the base
layer (GPT-2's `Conv1D`) stores its weight; A and B lie the same way for both.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from polyhead.adapters.errors import PrivateAdapterError
from polyhead.adapters.inventory import ModuleShape
from polyhead.adapters.name_patterns import NamePatterns
from polyhead.adapters.private import MAX_RANK, PrivateAdapter
from polyhead.adapters.tensor_files import parse_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIX_A, SUFFIX_B = ".lora_A.weight", ".lora_B.weight"
LEAVES_BACKBONE = (None, True, False, "gaussian", "orthogonal", "eva")
"""`init_lora_weights` that start A and B only; all others take something out of the backbone's own
weights, so that the adapter does not fit the backbone that everybody else has."""

Size = Annotated[int, Field(gt=0, strict=True)]
Alpha = Annotated[float, Field(allow_inf_nan=False, strict=True)]


class LoraConfig(BaseModel):
    """The part of `adapter_config.json` that defines the function, and what may be ignored.

    Which modules are adapted is read from the tensors, so what selects them is ignored, and so is
    what only training uses.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    peft_type: Literal["LORA"]
    r: Size
    lora_alpha: Alpha
    rank_pattern: dict[str, Size] = Field(default_factory=dict)
    alpha_pattern: dict[str, Alpha] = Field(default_factory=dict)
    use_rslora: bool = False
    bias: Literal["none"] = "none"
    init_lora_weights: object = True
    auto_mapping: object = None
    base_model_name_or_path: object = None
    eva_config: object = None
    exclude_modules: object = None
    fan_in_fan_out: object = None
    inference_mode: object = None
    layers_pattern: object = None
    layers_to_transform: object = None
    lora_dropout: object = None
    megatron_core: object = None
    peft_version: object = None
    qalora_group_size: object = None
    revision: object = None
    runtime_config: object = None
    target_modules: object = None
    task_type: object = None

    @classmethod
    def parse(cls, data: bytes) -> "LoraConfig":
        """Raises `PrivateAdapterError` for another PEFT method and for any option that changes
        the function and is not implemented, such as DoRA."""
        try:
            config = cls.model_validate(_json_object(data))
        except ValidationError as exc:
            error = exc.errors()[0]
            path = ".".join(str(part) for part in error["loc"])
            found = "" if error["type"] == "missing" else _shown(error["input"])
            raise PrivateAdapterError(
                error["msg"], field=f"adapter_config.{path}", found=found
            ) from exc
        started = config.init_lora_weights
        if not any(started is known or started == known for known in LEAVES_BACKBONE):
            raise PrivateAdapterError(
                "this way to start changes the backbone's own weights",
                field="adapter_config.init_lora_weights",
                found=_shown(started),
                expected="an adapter that was converted to an ordinary LoRA",
            )
        for name, value in (config.model_extra or {}).items():
            if value:
                raise PrivateAdapterError(
                    "this option is not implemented",
                    field=f"adapter_config.{name[:60]}",
                    found=_shown(value),
                    expected="nothing",
                )
        return config

    def scaling(self, rank: int, alpha: float) -> float:
        """What the product of A and B is multiplied by."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_peft_lora(
    config_data: bytes, weights: bytes, modules: Sequence[ModuleShape], max_rank: int = MAX_RANK
) -> PrivateAdapter:
    """The adapter in the two files of a PEFT folder, whose bytes may come from a stranger.

    Raises `PrivateAdapterError` that names the option or the tensor.
    """
    config = LoraConfig.parse(config_data)
    try:
        tensors, _ = parse_tensors(weights)
    except ValueError as exc:
        raise PrivateAdapterError(str(exc), field=WEIGHTS_FILE) from exc
    read = unscaled_factors(config, tensors)
    scaled = {
        name: b * read.scaling[name] if name in read.scaling else b for name, b in read.b.items()
    }
    return PrivateAdapter.checked(read.a, scaled, modules, max_rank=max_rank)


@dataclass(frozen=True)
class LoraFactors:
    """A LoRA as it was trained: `a[name]` `[I, r]`, `b[name]` `[r, O]`, and what their product is
    multiplied by, for every module that has both."""

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    scaling: Mapping[str, float]


def unscaled_factors(config: LoraConfig, tensors: Mapping[str, Tensor]) -> LoraFactors:
    """A PEFT checkpoint's tensors by module, turned to `[I, r]` and `[r, O]`, B in float32.

    Raises `PrivateAdapterError` that names a tensor which is not a LoRA's, or not of its rank.
    """
    a, b = _named(tensors, SUFFIX_A), _named(tensors, SUFFIX_B)
    odd = sorted(name for name in tensors if not name.endswith((SUFFIX_A, SUFFIX_B)))
    if odd:
        raise PrivateAdapterError(
            "a tensor that no ordinary LoRA has", field=odd[0][:200], found=f"{len(odd)} such"
        )
    ranks = NamePatterns("adapter_config.rank_pattern", config.rank_pattern)
    alphas = NamePatterns("adapter_config.alpha_pattern", config.alpha_pattern)
    scaling: dict[str, float] = {}
    for name in a.keys() & b.keys():
        rank = ranks.find(name, config.r)
        _check_rank(PREFIX + name + SUFFIX_A, a[name], rank)
        scaling[name] = config.scaling(rank, alphas.find(name, config.lora_alpha))
    turned = {name: b[name].float().mT if name in scaling else b[name] for name in b}
    return LoraFactors({name: tensor.mT for name, tensor in a.items()}, turned, scaling)


def _named(tensors: Mapping[str, Tensor], suffix: str) -> dict[str, Tensor]:
    """By module. Raises `PrivateAdapterError` for one that cannot be transposed or is no number."""
    found = {}
    for key, tensor in tensors.items():
        if not key.endswith(suffix):
            continue
        if not key.startswith(PREFIX):
            raise PrivateAdapterError(
                "unexpected tensor", field=key[:200], expected=f"a name that begins with {PREFIX}"
            )
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise PrivateAdapterError(
                "wrong shape or dtype",
                field=key[:200],
                found=f"{tensor.dtype} {list(tensor.shape)}",
                expected="two dimensions, floating point",
            )
        found[key.removeprefix(PREFIX).removesuffix(suffix)] = tensor
    return found


def _check_rank(field: str, a: Tensor, rank: int) -> None:
    if a.shape[0] != rank:
        raise PrivateAdapterError(
            "the rank is not the configuration's",
            field=field,
            found=str(a.shape[0]),
            expected=str(rank),
        )


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise PrivateAdapterError("not JSON", field=CONFIG_FILE) from exc
    if not isinstance(found, dict):
        raise PrivateAdapterError("not a JSON object", field=CONFIG_FILE, found=_shown(found))
    return found


def _shown(value: object) -> str:
    return repr(value)[:80]
