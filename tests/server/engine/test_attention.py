import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from factories import Collector, alone, make_engine, tiny_model
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from polyhead.adapters.compiled import MOST_THREADS
from polyhead.server.engine.attention import StepAttention
from polyhead.server.engine.batch import Row
from polyhead.server.engine.kv_cache import KVShape, KVStore
from polyhead.server.engine.kv_space import KVSpace
from polyhead.server.engine.request import Failure, Request, SamplingParams
from polyhead.server.engine.sequence import Sequence

CPU = torch.device("cpu")
LAYERS, WIDTH = 2, 16


@dataclass(eq=False)
class Text:
    """A sequence whose queries, keys and values are all known beforehand."""

    sequence: Sequence
    q: Tensor  # [layers, heads, tokens, d]
    k: Tensor  # [layers, kv_heads, tokens, d]
    v: Tensor
    done: int = 0

    @property
    def length(self) -> int:
        return self.q.shape[2]


def text_of(length: int, heads: int, kv_heads: int, generator: torch.Generator) -> Text:
    def normal(count: int) -> Tensor:
        return torch.randn(LAYERS, count, length, WIDTH, generator=generator)

    request = Request("r", "t", "g", (1,) * length)
    sequence = Sequence(request, 0, list(request.prompt))
    return Text(sequence, normal(heads), normal(kv_heads), normal(kv_heads))


def plain(text: Text, layer: int, scale: float | None, window: int | None) -> Tensor:
    """Ordinary attention of the whole sequence: `[tokens, heads, d]`."""
    repeat = text.q.shape[1] // text.k.shape[1]
    place = torch.arange(text.length)
    seen = place[None] <= place[:, None]
    if window is not None:
        seen &= place[None] > place[:, None] - window
    out = F.scaled_dot_product_attention(
        text.q[layer],
        text.k[layer].repeat_interleave(repeat, 0),
        text.v[layer].repeat_interleave(repeat, 0),
        attn_mask=seen,
        scale=scale,
    )
    return out.transpose(0, 1)


def steps(texts: list[Text], space: KVSpace, rnd: random.Random) -> Iterator[list[Row]]:
    """Random steps until all is computed: chunks, single tokens, and rows that sit one out."""
    while open_texts := [t for t in texts if t.done < t.length]:
        rows = []
        for text in rnd.sample(open_texts, rnd.randint(1, len(open_texts))):
            count = min(rnd.choice([1, 1, 1, 2, 7, 60]), text.length - text.done)
            assert space.reserve(text.sequence, text.done + count)
            rows.append((text, count))
        yield [Row(t.sequence, t.done, n, space.place(t.sequence)) for t, n in rows]


def parts(rows: list[Row], owners: dict[Sequence, Text], name: str, layer: int) -> Tensor:
    pieces = [getattr(owners[r.sequence], name)[layer, :, r.start : r.stop] for r in rows]
    return torch.cat(pieces, 1).unsqueeze(0)


BOUNDS = {
    torch.float32: {"atol": 2e-5, "rtol": 1e-4},
    torch.bfloat16: {"atol": 1e-2, "rtol": 1e-2},  # its last bit, and that of what torch rounds
}


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1), (10, 1)]
)  # the last: more than share a tile
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("threads", [1, MOST_THREADS + 1], ids=["compiled", "torch"])
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
def test_random_steps_equal_plain_attention(
    heads: int, kv_heads: int, window: int | None, seed: int, threads: int, dtype: torch.dtype
) -> None:
    torch.set_num_threads(threads)
    rnd, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    texts = [
        text_of(rnd.choice([1, 20, 127, 129, 300]), heads, kv_heads, generator) for _ in range(7)
    ]
    for text in texts:  # the reference sees what the dtype can say
        text.q, text.k, text.v = (t.to(dtype).float() for t in (text.q, text.k, text.v))
    owners = {text.sequence: text for text in texts}
    scale = rnd.choice([None, 0.2])
    space = KVSpace(20_000, 400)
    shape = KVShape(LAYERS, kv_heads, WIDTH)
    store = KVStore(shape, space.capacities, dtype, CPU)
    wanted = {
        text.sequence: [plain(text, layer, scale, window) for layer in range(LAYERS)]
        for text in texts
    }
    for rows in steps(texts, space, rnd):
        store.carry_out(space.drain())
        if rnd.random() < 0.7:  # the runner's order; any other must do as well
            rows.sort(key=lambda r: (r.count > 1, r.place.arena, r.place.row))
        attention = StepAttention(rows, store, CPU)
        for layer in range(LAYERS):
            q, k, v = (parts(rows, owners, name, layer).to(dtype) for name in "qkv")
            out = attention.attend(layer, q, k, v, scale, window)[0].float()
            due = torch.cat([wanted[r.sequence][layer][r.start : r.stop] for r in rows])
            torch.testing.assert_close(out, due, **BOUNDS[dtype])
        for row in rows:
            owners[row.sequence].done = row.stop
        for text in texts:  # those that are through leave holes behind
            if text.done == text.length and rnd.random() < 0.3:
                space.release(text.sequence)


@pytest.mark.parametrize("threads", [1, MOST_THREADS + 1], ids=["compiled", "torch"])
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
def test_an_overflow_stays_visible_and_in_its_own_row(threads: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    texts = [text_of(9, 4, 2, generator) for _ in range(3)]
    space = KVSpace(2_000, 400)
    store = KVStore(KVShape(LAYERS, 2, WIDTH), space.capacities, dtype, CPU)
    texts[1].q[0, 3, 5:] = torch.tensor([float("nan"), float("inf"), 3e38, -3e38])[:, None]
    for position in range(9):
        for text in texts:
            assert space.reserve(text.sequence, position + 1)
        rows = [Row(t.sequence, position, 1, space.place(t.sequence)) for t in texts]
        store.carry_out(space.drain())
        owners = {t.sequence: t for t in texts}
        q, k, v = (parts(rows, owners, name, 0).to(dtype) for name in "qkv")
        out = StepAttention(rows, store, CPU).attend(0, q, k, v, None, None)[0]
        sound = torch.isfinite(out).all(-1)
        assert sound[[0, 2]].all()
        assert sound[1].tolist() == [True, True, True, position < 5]


def greedy(model: PreTrainedModel, requests: list[Request]) -> list[list[int]]:
    collector = Collector()
    engine = make_engine(model, None, collector)
    for request in requests:
        engine.submit(request)
    engine.start()
    answers = [collector.tokens(request) for request in requests]
    engine.stop()
    return answers


def asked() -> list[Request]:
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    lengths = [1, 3, 20, 70]
    return [
        Request(f"r{n}", f"t{n}", "g", tuple((7 * i + n) % 256 for i in range(n)), params=params)
        for n in lengths
    ]


SLIDING: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 8}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
]


@pytest.mark.parametrize(("family", "changes"), SLIDING)
def test_sliding_windows_are_the_models_own(family: str, changes: dict[str, Any]) -> None:
    model = tiny_model(family, **changes)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    wanted = [alone(model, request) for request in asked()]
    assert greedy(model, asked()) == wanted


def test_a_window_makes_a_difference() -> None:
    wide = greedy(tiny_model("mistral", sliding_window=None), asked())
    narrow = greedy(tiny_model("mistral", sliding_window=8), asked())
    assert sum(a != b for a, b in zip(wide, narrow, strict=True)) >= 3


def test_attention_with_an_unknown_feature_is_refused() -> None:
    shape = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    config = Gemma2Config(
        **shape, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    collector = Collector()
    engine = make_engine(Gemma2ForCausalLM(config).eval(), None, collector)
    engine.start()
    request = asked()[1]
    engine.submit(request)
    (event,) = collector.wait(request)
    assert isinstance(event, Failure)
    assert "UnsupportedAttention: Gemma2Attention uses ['softcap']" in event.message
    engine.stop()


def test_outside_of_a_step_a_model_answers_as_before() -> None:
    ids = torch.arange(20)[None]
    before = tiny_model("mistral", sliding_window=8)(ids).logits
    model = tiny_model("mistral", sliding_window=8)
    greedy(model, asked()[:1])
    torch.testing.assert_close(model(ids).logits, before)
