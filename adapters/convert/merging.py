"""Several LoRAs of one rank as one: what each method makes of their A and B.

mean   the averages of A and of B, as AdaMix does with its modules (arXiv 2205.12410)
ot     the averages after every LoRA's rank components were put in the first one's order by optimal
       transport, as MerA aligns adapters (arXiv 2308.15982)
ties   trim, elect a sign, average those that agree (arXiv 2306.01708), by PEFT's function
dare   drop at random, rescale, average (arXiv 2311.03099), by PEFT's function

Every LoRA's scaling goes to A and B in equal parts first. Averaging A and B apart is not averaging
their products: components that stand in another order, or with another sign, cancel each other.
Only `ot` is immune to that.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polyhead.adapters.convert.loras import inventory_from_loras
from polyhead.adapters.errors import ConversionError
from polyhead.adapters.private import PrivateAdapter

Method = Literal["ot", "mean", "ties", "dare"]
EXTRA = "pip install 'polyhead[merge]'"


def merge_loras(
    loras: Mapping[str, Path],
    model: nn.Module,
    method: Method,
    density: float = 0.5,
    seed: int = 0,
) -> PrivateAdapter:
    """One adapter out of the PEFT LoRAs in the folders, by name; the first is `ot`'s reference.

    model: the bare backbone. A module that a LoRA leaves bare counts as zeros. density: the share
    of entries that `ties` and `dare` keep; seed: of what `dare` drops. Raises `ConversionError`
    where the LoRAs do not fit together or the method's library is missing.
    """
    if not 0 < density <= 1:
        raise ConversionError(
            "unusable share", field="density", found=f"{density:g}", expected="above 0, at most 1"
        )
    inventory = inventory_from_loras(loras, model, "")
    root = abs(inventory.header.scaling) ** 0.5
    sign = 1.0 if inventory.header.scaling >= 0 else -1.0
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)  # PEFT draws from the global generator
    a, b = {}, {}
    try:
        for name in inventory.layout.modules:
            sides = list(inventory.a[name][0] * root), list(inventory.b[name][0] * root * sign)
            a[name], b[name] = _merged(*sides, method, density)
    finally:
        torch.random.set_rng_state(generator_state)
    rank = inventory.header.rank
    return PrivateAdapter.checked(a, b, inventory.header.modules, max_rank=rank)


def _merged(
    a: Sequence[Tensor], b: Sequence[Tensor], method: Method, density: float
) -> tuple[Tensor, Tensor]:
    """One module's `[I, r]` and `[r, O]` of several."""
    if method == "ot":
        a, b = _aligned(a, b)
    if method in ("mean", "ot"):
        return torch.stack(list(a)).mean(0), torch.stack(list(b)).mean(0)
    utils = _library("peft.utils.merge_utils")
    if method == "ties":
        each = torch.ones(len(a))
        return utils.ties(list(a), each, density), utils.ties(list(b), each, density)
    each = torch.full((len(a),), 1 / len(a))
    return utils.dare_linear(list(a), each, density), utils.dare_linear(list(b), each, density)


def _aligned(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The same functions, their rank components in the order and with the signs of the first's.

    Component k is column k of A and row k of B. Its scale may be anywhere between the two, so
    both get equal norms first; turning both signs changes nothing, so the nearer of the two counts.
    """
    ot = _library("ot")
    balanced = [_balanced(one_a, one_b) for one_a, one_b in zip(a, b, strict=True)]
    reference = torch.cat(balanced[0])  # [I + O, r]
    found = []
    for pair in balanced:
        other = torch.cat(pair)
        plus = torch.cdist(reference.mT.double(), other.mT.double()) ** 2  # [r, r]
        minus = torch.cdist(reference.mT.double(), -other.mT.double()) ** 2
        uniform = torch.full((len(plus),), 1 / len(plus), dtype=torch.float64).numpy()
        transport = ot.emd(uniform, uniform, torch.minimum(plus, minus).numpy())
        # Between uniform measures of one size the plan is a permutation, over r.
        order = torch.from_numpy(transport).argmax(1)
        rows = torch.arange(len(order))
        turned = torch.where(minus[rows, order] < plus[rows, order], -1.0, 1.0)
        found.append((pair[0][:, order] * turned, pair[1][:, order] * turned))
    return [one for one, _ in found], [other.mT for _, other in found]


def _balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`[I, r]` and B transposed, `[O, r]`, each component of equal norm in both; zero if one is."""
    size_a, size_b = a.norm(dim=0), b.norm(dim=1)
    both = (size_a * size_b).sqrt()
    return a * _ratio(both, size_a), b.mT * _ratio(both, size_b)


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    return torch.where(under > 0, over / under, torch.zeros_like(under))


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        raise ConversionError(
            f"this method needs {name.partition('.')[0]}", field="method", expected=EXTRA
        ) from exc
