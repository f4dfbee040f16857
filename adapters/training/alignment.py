"""How well the tasks of a batch agree on where the skills should go.

Caccia et al. (arXiv 2211.03831) explain multi-head routing by it: the mean cosine between
the gradients that pairs of tasks give to the skills.

A task reaches the skills only through its own A_t and B_t. Its gradient for skill s of head h is
w[t,h,s] times the gradient of A_t's slice h, so the products of all pairs of tasks follow from one
backward pass, with no gradient per task and skill in memory.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.adapters.training.factors import Factors


def watch(factors: Factors) -> None:
    """Keep the gradients of A_t and B_t when the backward pass comes."""
    for stack in (*factors.a.values(), *factors.b.values()):
        stack.retain_grad()


def gram(factors: Factors) -> Tensor:
    """`[U, U]` float64: inner products of the tasks' gradients of all shared A and B.

    factors: averages of shared skills, watched, after the backward pass.
    """
    if factors.weights is None:
        raise ValueError("only averages of shared skills have an alignment")
    w = factors.weights.detach().double()
    overlap = torch.einsum("tmhs,umhs->mhtu", w, w)
    found = _products(factors.a, factors.stacks.inputs, overlap)
    return found + _products(factors.b, factors.stacks.outputs, overlap)


def mean_cosine(products: Tensor) -> float:
    """The mean over pairs of different tasks; NaN with fewer than two."""
    norms = products.diagonal().clamp(min=1e-300).sqrt()
    cosines = products / norms[:, None] / norms[None]
    count = len(products)
    above = torch.triu(torch.ones_like(cosines), diagonal=1)
    return float((cosines * above).sum() / (count * (count - 1) / 2)) if count > 1 else float("nan")


def _products(
    stacks: Mapping[int, Tensor], widths: Mapping[int, list[int]], overlap: Tensor
) -> Tensor:
    """overlap `[M, H, U, U]`; stacks `[modules, U, r, W]` with their gradients."""
    heads, tasks = overlap.shape[1:3]
    total = overlap.new_zeros(tasks, tasks)
    for width, stack in stacks.items():
        if stack.grad is None:
            raise ValueError("the factors were not watched before the backward pass")
        modules, _, rank, _ = stack.shape
        grads = stack.grad.view(modules, tasks, rank, heads, width // heads)
        flat = grads.permute(0, 3, 1, 2, 4).reshape(modules, heads, tasks, -1)
        products = (flat @ flat.mT).double()  # [modules, H, U, U]
        total += (products * overlap[widths[width]]).sum((0, 1))
    return total
