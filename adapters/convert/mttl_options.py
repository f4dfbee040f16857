"""The options of mttl that change what a checkpoint computes."""

from collections.abc import Mapping
from typing import Any

from polyhead.adapters.errors import ConversionError

REFUSED = {
    "module_logits_straight_through": "straight-through routing",
    "module_logits_l2_norm": "L2-normalised logits",
    "module_logits_dropout": "logits dropout",
    "poly_use_shared_skill": "a shared skill",
    "poly_average_correction": "average correction",
    "lora_warmup": "LoRA warm-up",
    "uniform_interp_steps": "interpolation to uniform routing",
    "switch_to_avg_modules": "average selectors",
    "merge_after_op": "merging after the outer product",
}
"""Of the camera-ready code; each is off at 0, false and null."""
ALLOWED: dict[str, tuple[object, ...]] = {
    "model_modifier": (None, "poly"),
    "router_selector": (None, "poly"),
    "adapter_type": (None, "lora"),
}


def check_camera_ready(config: Mapping[str, Any]) -> None:
    """Raises `ConversionError` that names the first option which is not implemented."""
    for name, meaning in REFUSED.items():
        if config.get(name):
            raise ConversionError(
                f"{meaning} is not implemented", field=f"config.{name}", found=repr(config[name])
            )
    for name, values in ALLOWED.items():
        if config.get(name) not in values:
            raise ConversionError(
                "this method is not implemented",
                field=f"config.{name}",
                found=repr(config[name]),
                expected=repr(values[-1]),
            )


def number(config: Mapping[str, Any], name: str, default: float) -> float:
    """A positive number among the options. Raises `ConversionError` for anything else."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConversionError(
            "unusable option",
            field=f"config.{name}",
            found=repr(value),
            expected="a number above 0",
        )
    return value


def poly_selector(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of the Poly selector in the main branch's `mttl_config.json`.

    Raises `ConversionError` for any other selector and for several.
    """
    selector = config.get("selector_config")
    if isinstance(selector, dict) and _class(selector) == "MultiSelectorConfig":
        several = selector.get("selectors") or {}
        selector = next(iter(several.values())) if len(several) == 1 else several
    if not isinstance(selector, dict) or _class(selector) != "PolySelectorConfig":
        raise ConversionError(
            "this selector is not implemented",
            field="mttl_config.selector_config",
            found=repr(_class(selector) if isinstance(selector, dict) else selector),
            expected="one PolySelectorConfig",
        )
    if selector.get("lora_merge_after"):
        raise ConversionError(
            "merging after the outer product is not implemented",
            field="mttl_config.selector_config.lora_merge_after",
            found=repr(selector["lora_merge_after"]),
        )
    return selector


def common_alpha(config: Mapping[str, Any]) -> float:
    """`lora_alpha` of all experts, 16 where none says. Raises `ConversionError` where they differ
    and for an expert that is no LoRA."""
    alphas = set()
    for index, info in enumerate(config.get("expert_infos") or []):
        expert = info.get("expert_config") or {}
        field = f"mttl_config.expert_infos[{index}].expert_config"
        if expert and _class(expert) not in ("LoRAConfig", "SkilledLoRAConfig"):
            raise ConversionError(
                "this kind of expert is not implemented",
                field=field,
                found=repr(_class(expert)),
                expected="LoRAConfig or SkilledLoRAConfig",
            )
        alphas.add(number(expert, "lora_alpha", 16.0))
        if len(alphas) > 1:
            raise ConversionError(
                "experts of different alphas", field=f"{field}.lora_alpha", found=str(alphas)
            )
    return alphas.pop() if alphas else 16.0


def _class(config: Mapping[str, Any]) -> str:
    return str(config.get("class_name", "")).rsplit(".", 1)[-1]
