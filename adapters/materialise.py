"""Any task as an ordinary PEFT LoRA, for use without Polyhead."""

import json
import re
from collections import Counter

import torch
from torch import Tensor

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.peft_lora import CONFIG_FILE, PREFIX, SUFFIX_A, SUFFIX_B, WEIGHTS_FILE
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.tensor_files import dump_tensors


def own_factors(inventory: Inventory, weights: Tensor) -> PrivateAdapter:
    """The A_t and B_t of a task with a routing, as an adapter of its own.

    weights `[M, H, S]`. `A_t = concat over h of sum_s w[h,s] A[h,s]`, B_t likewise, in float32
    (arXiv 2211.03831, section 3); the inventory's scaling is folded into B.
    """
    a, b = {}, {}
    for index, name in enumerate(inventory.layout.modules):
        w = weights[index].float()[..., None, None]  # [H, S, 1, 1]
        a_t = (w * inventory.a[name].float()).sum(1)  # [H, I/H, r]
        b_t = (w * inventory.b[name].float()).sum(1)  # [H, r, O/H]
        a[name] = a_t.flatten(0, 1)
        b[name] = torch.cat(list(b_t), dim=1)
    modules = inventory.header.modules
    return PrivateAdapter.checked(
        a, b, modules, inventory.header.scaling, max_rank=inventory.header.rank
    )


def peft_folder(adapter: PrivateAdapter, backbone: str) -> dict[str, bytes]:
    """The two files of the adapter's PEFT folder, by their names.

    B holds the scaling already, so alpha equals the rank everywhere. Numbers are float32.
    """
    ranks = {name: a.shape[1] for name, a in adapter.a.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(name): rank for name, rank in ranks.items() if rank != usual}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": backbone,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "r": usual,
        "alpha_pattern": others,
        "rank_pattern": others,
        "target_modules": sorted(ranks),
    }
    tensors = {PREFIX + name + SUFFIX_A: a.mT for name, a in adapter.a.items()}
    tensors |= {PREFIX + name + SUFFIX_B: b.mT for name, b in adapter.b.items()}
    return {
        CONFIG_FILE: json.dumps(config, indent=2).encode(),
        WEIGHTS_FILE: dump_tensors(tensors, {"format": "pt"}),
    }
