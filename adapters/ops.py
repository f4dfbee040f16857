"""The routed product in its two exact forms, and the reference both are tested against.

Shapes: N tokens, T tasks, H heads, S skills, r rank, I and O a module's input and output widths,
G modules that read the same input and are computed together (q, k, v; gate, up).
Source of the maths: Multi-Head Adapter Routing, arXiv 2211.03831, section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.adapters.sharding import EVERYTHING, HeadParts


def reference(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, scaling: float) -> Tensor:
    """`scaling * (x A_t) B_t` in float32, literally: average the skills, then multiply.

    x `[N, I]`, a `[H, S, I/H, r]`, b `[H, S, r, O/H]`, weights `[N, H, S]`; answers `[N, O]`.
    """
    w = weights.float()
    a_t = torch.einsum("nhs,hsir->nhir", w, a.float()).flatten(1, 2)  # [N, I, r]
    b_t = torch.einsum("nhs,hsro->nrho", w, b.float()).flatten(2, 3)  # [N, r, O]
    return scaling * torch.einsum("ni,nir,nro->no", x.float(), a_t, b_t)


@dataclass(frozen=True, eq=False)
class SkillGroup:
    """The skills of G modules that read the same input, packed for one shrink product.

    a: `[H, I/H, G*S*r]`, columns ordered (g, s, r). b[g]: `[H, S*r, O_g/H]`, scaling folded in.
    parts: the heads of the H that a and b hold, where the layers are cut over several processes.
    """

    heads: int
    skills: int
    rank: int
    a: Tensor
    b: tuple[Tensor, ...]
    summing: Tensor  # [S*r, S*r], adds up the skills and hands every skill the sum
    parts: HeadParts = EVERYTHING

    @classmethod
    def pack(
        cls,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        scaling: float,
        dtype: torch.dtype,
        parts: HeadParts = EVERYTHING,
    ) -> "SkillGroup":
        """From one `[H, S, I/H, r]` and one `[H, S, r, O_g/H]` per module."""
        heads, skills, _, rank = a[0].shape
        if parts.a is not None:
            a = [tensor[parts.a] for tensor in a]
        if parts.b is not None:
            b = [tensor[parts.b] for tensor in b]
        stacked = torch.stack([tensor.float() for tensor in a])  # [G, H, S, I/H, r]
        packed = stacked.permute(1, 3, 0, 2, 4).flatten(2)  # [H, I/H, G*S*r]
        scaled = tuple((t.float() * scaling).flatten(1, 2).to(dtype).contiguous() for t in b)
        eye = torch.eye(rank, device=packed.device).repeat(skills, skills)
        return cls(heads, skills, rank, packed.to(dtype).contiguous(), scaled, eye, parts)

    @property
    def size(self) -> int:
        """G, the number of modules."""
        return len(self.b)

    @property
    def columns(self) -> int:
        """`S * r`, one module's share of the shrink product's columns."""
        return self.skills * self.rank


def spread(weights: Tensor, rank: int) -> Tensor:
    """Weights as the factored form reads them: `[..., M, H, S]` to `[..., H, M*S*r]`."""
    moved = weights.transpose(-3, -2).unsqueeze(-1)  # [..., H, M, S, 1]
    return moved.expand(*moved.shape[:-1], rank).flatten(-3)


Pieces = Sequence[tuple[slice, slice]]
"""Which rows of weights belong to which tokens: equally many, or one row for all of them."""


def factored_shrink(x: Tensor, group: SkillGroup, spread_weights: Tensor, pieces: Pieces) -> Tensor:
    """First half of the factored form, for all modules of a group at once.

    x `[N, I]`; spread_weights `[n, H, G*S*r]` float32 (see `spread`); pieces cover the N tokens
    in order. Answers `[H, N, G*S*r]`: the mixed low-rank activations, already multiplied by the
    weights that the expand needs.
    """
    tokens = x.shape[0]
    weights = spread_weights.transpose(0, 1)  # [H, n, G*S*r]
    u = torch.bmm(x.view(tokens, len(group.a), -1).transpose(0, 1), group.a)  # [H, N, G*S*r]
    weighed = _weigh(u, _of(weights, group.parts.a), pieces)
    summed = weighed.sum(0)  # over heads: [N, G*S*r], float32
    v = summed.view(-1, group.columns) @ group.summing  # over skills: [N*G, S*r]
    return _weigh(v.view(1, tokens, -1), _of(weights, group.parts.b), pieces).to(x.dtype)


def _of(weights: Tensor, heads: slice | None) -> Tensor:
    return weights if heads is None else weights[heads]


def _weigh(values: Tensor, weights: Tensor, pieces: Pieces) -> Tensor:
    """Each token's values times its row of weights."""
    parts = [values[:, tokens] * weights[:, rows] for tokens, rows in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def factored_expand(y: Tensor, hidden: Tensor, group: SkillGroup, g: int) -> None:
    """Second half: adds module g's delta onto its base product y `[N, O_g]`, in place."""
    own = hidden[:, :, g * group.columns : (g + 1) * group.columns]  # [H, N, S*r]
    y.view(y.shape[0], len(group.b[g]), -1).transpose(0, 1).add_(torch.bmm(own, group.b[g]))


@dataclass(frozen=True, eq=False)
class Factors:
    """One task's own A_t and B_t for a group: a `[I, sum of ranks]`, b[g] `[r_g, O_g]` or None.

    All are contiguous: the compiled kernels know nothing but where they begin.
    """

    a: Tensor
    b: tuple[Tensor | None, ...]

    def __post_init__(self) -> None:
        assert all(t is None or t.is_contiguous() for t in (self.a, *self.b))

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + sum(b.nbytes for b in self.b if b is not None)

    @property
    def ranks(self) -> list[int]:
        """Of each module, 0 where it has none."""
        return [0 if b is None else b.shape[0] for b in self.b]

    def plain(self) -> "Factors":
        """Itself, or the same factors in this order where kernels keep another."""
        return self


def fold_factors(group: SkillGroup, weights: Tensor) -> Factors:
    """Average a group's skills for one task, in float32. weights `[G, H, S]`."""
    w = weights.float().transpose(0, 1).contiguous()  # [H, G, S]
    a_t = torch.bmm(group.a.float(), _averaging(_of(w, group.parts.a), group.rank))  # [H, I/H, G*r]
    b_t = []
    for g, b in enumerate(group.b):
        by_skill = b.view(len(b), group.skills, -1).float()  # [H, S, r*O/H]
        own = _of(w, group.parts.b)[:, g : g + 1]
        mean = torch.bmm(own, by_skill).view(len(b), group.rank, -1)
        b_t.append(mean.transpose(0, 1).reshape(group.rank, -1).to(b.dtype).contiguous())
    return Factors(a_t.flatten(0, 1).to(group.a.dtype), tuple(b_t))


def _averaging(w: Tensor, rank: int) -> Tensor:
    """`[H, G*S*r, G*r]`: what columns (g, s, r) are multiplied by to average over s."""
    heads, size, skills = w.shape
    same_g = torch.eye(size, device=w.device).view(1, size, 1, 1, size, 1)
    same_r = torch.eye(rank, device=w.device).view(1, 1, 1, rank, 1, rank)
    whole = w.view(heads, size, skills, 1, 1, 1) * same_g * same_r
    return whole.reshape(heads, size * skills * rank, size * rank)


def combined_shrink(x: Tensor, factors: Factors) -> Tensor:
    """First half of the combined form for tokens of one task: x `[n, I]` to `[n, sum of ranks]`."""
    return x @ factors.plain().a


def combined_expand(y: Tensor, hidden: Tensor, factors: Factors, g: int) -> None:
    """Second half: adds module g's delta onto y `[n, O_g]`, in place; nothing for a bare module."""
    b = factors.plain().b[g]
    if b is None:
        return
    start = sum(factors.ranks[:g])
    y.addmm_(hidden[:, start : start + b.shape[0]], b)


def factored(
    x: Tensor, a: Tensor, b: Tensor, weights: Tensor, task_of_token: Tensor, scaling: float
) -> Tensor:
    """The factored form for one module: every skill for every token, mixed by the weights.

    x `[N, I]`, a `[H, S, I/H, r]`, b `[H, S, r, O/H]`, weights `[T, H, S]` float32,
    task_of_token `[N]`; answers `[N, O]`. Reads the inventory once, whatever T is.
    """
    group = SkillGroup.pack([a], [b], scaling, x.dtype)
    per_token = spread(weights.float()[task_of_token].unsqueeze(1), group.rank)
    y = x.new_zeros(x.shape[0], b.shape[0] * b.shape[3])
    everything = [(slice(0, len(x)), slice(0, len(x)))]
    factored_expand(y, factored_shrink(x, group, per_token, everything), group, 0)
    return y


def combined(
    x: Tensor, a: Tensor, b: Tensor, weights: Tensor, task_of_token: Tensor, scaling: float
) -> Tensor:
    """The combined form for one module: fold A_t and B_t per task, multiply its tokens by them.

    Same arguments and answer as `factored`. Costs two products per task of the batch.
    """
    group = SkillGroup.pack([a], [b], scaling, x.dtype)
    y = x.new_zeros(x.shape[0], b.shape[0] * b.shape[3])
    for task in sorted(set(task_of_token.tolist())):
        tokens = (task_of_token == task).nonzero().squeeze(1)
        factors = fold_factors(group, weights[task].unsqueeze(0))
        part = x.new_zeros(len(tokens), y.shape[1])
        combined_expand(part, combined_shrink(x[tokens], factors), factors, 0)
        y[tokens] = part
    return y
