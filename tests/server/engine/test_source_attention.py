"""One layer's attention of an encoder-decoder's step against its definition, row by row."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from polyhead.server.engine import source_attention
from polyhead.server.engine.batch import Row
from polyhead.server.engine.kv_cache import KVShape, KVStore
from polyhead.server.engine.kv_space import Place, Resize
from polyhead.server.engine.request import Request
from polyhead.server.engine.sequence import Sequence
from polyhead.server.engine.source_attention import DecoderStep, EncoderStep

HEADS, WIDTH = 3, 8
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
CPU = torch.device("cpu")


def biases(distances: Tensor) -> Tensor:
    """Another one for each head, distance and direction."""
    heads = torch.arange(1.0, HEADS + 1).view(-1, *[1] * distances.dim())
    return torch.sin(heads * distances) * 2


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """q `[heads, n, d]`, k and v `[heads, L, d]`, bias `[heads, n, L]`; answers `[n, heads, d]`."""
    weights = torch.softmax(q.double() @ k.double().mT + bias.double(), -1)
    return (weights @ v.double()).transpose(0, 1)


def row(start: int, count: int, place: Place, source: int, at: Place) -> Row:
    request = Request("r", "t", "g", (0,), source=(1,) * source)
    return Row(Sequence(request, 0, [0] * (start + count)), start, count, place, at)


ROWS = [  # decoding and prefilling rows, in two arenas; two of them read one source
    row(5, 1, Place(0, 1), 9, Place(2, 0)),
    row(0, 4, Place(0, 0), 9, Place(2, 0)),
    row(20, 1, Place(1, 0), 14, Place(2, 1)),
    row(3, 2, Place(1, 1), 30, Place(3, 0)),
]


class World:
    def __init__(self, dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(0)
        self.store = KVStore(KVShape(1, HEADS, WIDTH), [16, 32] * 2, dtype, CPU)
        self.store.carry_out([Resize(arena, 2) for arena in range(4)])
        for side in (self.store.keys, self.store.values):
            side[0] = [torch.randn(t.shape, generator=draw).to(dtype) for t in side[0]]
        tokens = sum(entry.count for entry in ROWS)
        self.q, self.k, self.v = (
            torch.randn(1, HEADS, tokens, WIDTH, generator=draw).to(dtype) for _ in range(3)
        )
        self.before = [
            [t.clone() for t in side[0]] for side in (self.store.keys, self.store.values)
        ]
        self.step = DecoderStep(ROWS, self.store, biases(-torch.arange(32)).contiguous())

    def attend(self, *, cross: bool) -> Tensor:
        module = SimpleNamespace(layer_idx=0, is_causal=not cross)
        return self.step.attend(module, self.q, self.k, self.v)[0]

    def expected(self, *, cross: bool) -> Tensor:
        found, token = [], 0
        for entry in ROWS:
            new = slice(token, token + entry.count)
            place = entry.source if cross else entry.place
            assert place is not None
            length = len(entry.sequence.request.source) if cross else entry.stop
            k, v = (side[place.arena][place.row, :, :length].clone() for side in self.before)
            bias = torch.zeros(HEADS, entry.count, length)
            if not cross:
                k[:, entry.start :], v[:, entry.start :] = self.k[0, :, new], self.v[0, :, new]
                distances = torch.arange(length) - torch.arange(entry.start, entry.stop)[:, None]
                bias = biases(distances).masked_fill(distances > 0, -torch.inf)
            found.append(plain(self.q[0, :, new], k, v, bias))
            token += entry.count
        return torch.cat(found)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_rows_look_at_their_own_keys_or_at_their_sources(
    compiled: bool, dtype: torch.dtype, cross: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(source_attention, "compiled_for", lambda *_: False)
        monkeypatch.setattr(source_attention, "GATHERED", 3)
    world = World(dtype)
    found, other = world.attend(cross=cross), world.expected(cross=not cross)
    torch.testing.assert_close(
        found.double(), world.expected(cross=cross), rtol=0, atol=BOUNDS[dtype]
    )
    assert (found.double() - other).abs().amax((1, 2)).min() > 0.1


@pytest.mark.parametrize("queries", [512, 7], ids=["whole", "in pieces"])
def test_sources_side_by_side_see_themselves_only_from_both_sides(
    queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_attention, "QUERIES", queries)
    draw, lengths = torch.Generator().manual_seed(1), [10, 1, 25, 10]
    q, k, v = (torch.randn(1, HEADS, sum(lengths), WIDTH, generator=draw) for _ in range(3))
    found = EncoderStep(lengths, biases).attend(None, q, k, v)[0]
    first = 0
    for length in lengths:
        own = slice(first, first + length)
        place = torch.arange(length)
        bias = biases(place - place[:, None])
        right = plain(q[0, :, own], k[0, :, own], v[0, :, own], bias)
        torch.testing.assert_close(found[own].double(), right, rtol=0, atol=1e-5)
        turned = plain(q[0, :, own], k[0, :, own], v[0, :, own], bias.mT)
        assert length == 1 or (found[own] - turned).abs().max() > 0.1
        first += length
