"""A generator makes a task's routing from a context: examples of the task, or a document.

The context is embedded by the bare backbone, and signed coefficients are a low-rank linear function
of the embedding, so that A and B are generated linearly from it. Linear hyper-networks do that
(HyperFormer, arXiv 2106.04489; prototype-based hyper-adapters, arXiv 2310.11670).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from polyhead.adapters.errors import InventoryError
from polyhead.adapters.routing import Layout, Routing
from polyhead.adapters.tensor_files import dump_tensors, parse_tensors

GENERATOR_FILE = "generator.safetensors"
TENSORS = ("right", "left", "bias", "mean", "scale")
FACTS = "generator"
"""The key of the file's metadata under which its facts stand as JSON."""


def pieces(document: str) -> list[str]:
    """What of a document is embedded, each alone: its lines, without the empty ones."""
    return [line.strip() for line in document.splitlines() if line.strip()]


def piece(input: str, output: str) -> str:
    """An example as a line of a document."""
    return f"{input.strip()} -> {output.strip()}"


class GeneratorFacts(BaseModel):
    """What a generator belongs to and comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    format: Literal[1] = 1
    backbone: str
    """Fingerprint of the backbone whose hidden states it reads."""
    inventory: str
    """Fingerprint of the inventory whose skills its coefficients weigh."""
    template: str
    """What was wrapped around inputs while it was trained."""
    provenance: dict[str, object] = {}


@dataclass(frozen=True, eq=False)
class Generator:
    """`c(e) = bias + left · right (e - mean) / scale`, for an embedding `e [D]`, at rank R.

    An embedding is the mean over the pieces of a context of each one's mean over its tokens of the
    bare backbone's last hidden states.
    """

    bias: Tensor  # [M, H, S]
    left: Tensor  # [M, H, S, R]
    right: Tensor  # [R, D]
    mean: Tensor  # [D]
    scale: Tensor  # [D]
    facts: GeneratorFacts

    @property
    def width(self) -> int:
        """D, the width of the backbone's hidden states."""
        return self.right.shape[1]

    def routing(self, embedding: Tensor, layout: Layout) -> Routing:
        """The task's, of kind `coefficients`; embedding `[D]`.

        Raises `RoutingError` where a coefficient is out of bounds or not finite.
        """
        whole = self.standardised(embedding)[None]
        (found,) = generated(self.bias, self.left, self.right, whole)
        return Routing.checked(found, layout, "coefficients", field="context")

    def routing_of(self, texts: Sequence[Sequence[float]], layout: Layout) -> Routing:
        """The same of the embeddings of a context's pieces, each `[D]`."""
        return self.routing(torch.tensor(texts, dtype=torch.float32).mean(0), layout)

    def standardised(self, embedding: Tensor) -> Tensor:
        """`[..., D]`: of mean 0 and variance 1 over the examples that it was trained on."""
        return (embedding.float() - self.mean) / self.scale

    def to_safetensors(self) -> bytes:
        """The exact inverse of `from_safetensors`."""
        tensors = {name: getattr(self, name) for name in TENSORS}
        return dump_tensors(tensors, {FACTS: self.facts.model_dump_json()})

    @classmethod
    def from_safetensors(cls, data: bytes, layout: Layout, inventory: str, backbone: str) -> Self:
        """inventory, backbone: the fingerprints of what it must have been made for.

        Raises `InventoryError` that names the tensor or the fact, what it is and what it should be.
        """
        try:
            tensors, metadata = parse_tensors(data)
        except ValueError as exc:
            raise InventoryError(str(exc), field=GENERATOR_FILE) from exc
        facts = _facts(metadata)
        for name, own, wanted in (
            ("inventory", facts.inventory, inventory),
            ("backbone", facts.backbone, backbone),
        ):
            if own != wanted:
                raise InventoryError(
                    f"made for another {name}",
                    field=f"{GENERATOR_FILE}: {name}",
                    found=own[:12],
                    expected=wanted[:12],
                )
        return cls(**_checked(tensors, layout), facts=facts)


def generated(bias: Tensor, left: Tensor, right: Tensor, standardised: Tensor) -> Tensor:
    """Coefficients `[T, M, H, S]` of standardised embeddings `[T, D]`."""
    low = standardised @ right.T
    return bias + torch.einsum("mhsr,tr->tmhs", left, low)


def _facts(metadata: Mapping[str, str]) -> GeneratorFacts:
    try:
        return GeneratorFacts.model_validate_json(metadata.get(FACTS, ""))
    except ValidationError as exc:
        error = exc.errors()[0]
        where = ".".join(str(part) for part in (FACTS, *error["loc"]))
        raise InventoryError(error["msg"], field=f"{GENERATOR_FILE}: {where}") from exc


def _checked(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    right = tensors.get("right")
    rank, width = right.shape if right is not None and right.dim() == 2 else (0, 0)
    wanted = {
        "bias": layout.shape("module"),
        "left": (*layout.shape("module"), rank),
        "right": (max(rank, 1), max(width, 1)),
        "mean": (width,),
        "scale": (width,),
    }
    if tensors.keys() != wanted.keys():
        raise InventoryError(
            "wrong tensors",
            field=GENERATOR_FILE,
            found=str(sorted(tensors)),
            expected=str(sorted(wanted)),
        )
    for name in TENSORS:
        _check(name, tensors[name], wanted[name])
    if (tensors["scale"] <= 0).any():
        low = f"{tensors['scale'].min():g}"
        raise InventoryError(
            "unusable scale", field=f"{GENERATOR_FILE}: scale", found=low, expected="above 0"
        )
    return dict(tensors)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    field = f"{GENERATOR_FILE}: {name}"
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
        raise InventoryError(
            "wrong shape or dtype",
            field=field,
            found=f"{tensor.dtype} {list(tensor.shape)}",
            expected=f"{torch.float32} {list(shape)}",
        )
    finite = torch.isfinite(tensor)
    if not finite.all():
        raise InventoryError(
            "not every number is finite",
            field=field,
            found=f"{math.prod(shape) - int(finite.sum())} that are not",
        )
