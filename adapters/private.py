"""A private adapter: a LoRA that one task owns alone, beside the shared inventory."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from polyhead.adapters.errors import PrivateAdapterError
from polyhead.adapters.inventory import ModuleShape
from polyhead.adapters.tensor_files import dump_tensors, parse_tensors, tensor_bytes

MAX_RANK = 256
"""Of a private adapter, where nobody says another."""


@dataclass(frozen=True, eq=False)
class PrivateAdapter:
    """`a[name]` is `[I, r]`, `b[name]` is `[r, O]`; the scaling is folded into B.

    A module that is not named is left bare. The rank may differ from module to module.
    Build it with `checked` or `from_safetensors`, which validate; the constructor does not.
    """

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]

    @classmethod
    def checked(
        cls,
        a: Mapping[str, Tensor],
        b: Mapping[str, Tensor],
        modules: Sequence[ModuleShape],
        scaling: float = 1.0,
        max_rank: int = MAX_RANK,
    ) -> "PrivateAdapter":
        """Validate shapes and numbers, fold `scaling` into B. Raises `PrivateAdapterError`."""
        shapes = {module.name: module for module in modules}
        if not a or a.keys() != b.keys() or not a.keys() <= shapes.keys():
            odd = sorted((a.keys() ^ b.keys()) | (a.keys() - shapes.keys()))
            raise PrivateAdapterError(
                "A and B must name the same, adapted modules",
                field="private_adapter",
                found=f"odd modules {odd[:3]}" if odd else "none",
                expected="names among the backbone's adapted modules",
            )
        for name in a:
            _check_pair(shapes[name], a[name], b[name], max_rank)
        served = cls(
            {name: tensor.to(torch.float32) for name, tensor in a.items()},
            {name: tensor.to(torch.float32) * scaling for name, tensor in b.items()},
        )
        served._check_finite()
        return served

    @classmethod
    def from_safetensors(
        cls, data: bytes, modules: Sequence[ModuleShape], max_rank: int = MAX_RANK
    ) -> "PrivateAdapter":
        """From a safetensors file with `<module>.A [I, r]` and `<module>.B [r, O]`."""
        try:
            tensors, _ = parse_tensors(data)
        except ValueError as exc:
            raise PrivateAdapterError(str(exc), field="private_adapter.safetensors") from exc
        other = sorted(name for name in tensors if not name.endswith((".A", ".B")))
        if other:
            raise PrivateAdapterError(
                "unknown tensors", field="private_adapter.safetensors", found=str(other[:3])
            )
        a = {name[:-2]: tensor for name, tensor in tensors.items() if name.endswith(".A")}
        b = {name[:-2]: tensor for name, tensor in tensors.items() if name.endswith(".B")}
        return cls.checked(a, b, modules, max_rank=max_rank)

    def to_safetensors(self) -> bytes:
        """The exact inverse of `from_safetensors`."""
        tensors = {f"{name}.A": tensor for name, tensor in self.a.items()}
        tensors |= {f"{name}.B": tensor for name, tensor in self.b.items()}
        return dump_tensors(tensors, {})

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, shapes and numbers."""
        digest = hashlib.sha256()
        for name in sorted(self.a):
            for tensor in (self.a[name], self.b[name]):
                digest.update(f"{name}:{list(tensor.shape)}".encode())
                digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    def _check_finite(self) -> None:
        """After the conversion and the scaling, which can overflow float32."""
        for name in self.a:
            if not (self.a[name].isfinite().all() and self.b[name].isfinite().all()):
                raise PrivateAdapterError("not every number is finite in float32", field=name)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.a.values(), *self.b.values()))


def _check_pair(module: ModuleShape, a: Tensor, b: Tensor, max_rank: int) -> None:
    rank = a.shape[-1] if a.ndim == 2 else 0
    expected = f"A [{module.in_features}, r], B [r, {module.out_features}], 1 <= r <= {max_rank}"
    fits = a.shape == (module.in_features, rank) and b.shape == (rank, module.out_features)
    if not fits or not 1 <= rank <= max_rank:
        raise PrivateAdapterError(
            "wrong shape",
            field=module.name,
            found=f"A {list(a.shape)}, B {list(b.shape)}",
            expected=expected,
        )
    for tensor in (a, b):
        if not tensor.is_floating_point():
            raise PrivateAdapterError(
                "wrong dtype", field=module.name, found=str(tensor.dtype), expected="floating point"
            )
