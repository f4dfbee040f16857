import pytest
import torch
from factories import byte_tokenizer, tiny_model
from torch import Tensor
from training_world import encoded, examples, plain_losses
from transformers import PreTrainedModel

from polyhead.adapters.training.answers import Encoded
from polyhead.adapters.training.data import Example, Message
from polyhead.adapters.training.encode import Encoder, TrainingBatch, pack
from polyhead.adapters.training.errors import DataError

END = 256


def test_prompt_and_answer_are_encoded_apart_and_the_answer_is_closed() -> None:
    (one,) = Encoder(byte_tokenizer(), "Q: {input}\nA:").encode([Example("t", "ab", "cd")])
    assert bytes(one.prompt) == b"Q: ab\nA:"
    assert one.answer == (ord("c"), ord("d"), END)


def test_braces_of_an_input_are_left_alone() -> None:
    (one,) = Encoder(byte_tokenizer()).encode([Example("t", "{input} {x}", "y")])
    assert bytes(one.prompt) == b"{input} {x}\n"


def test_messages_go_through_the_chat_template() -> None:
    turns = (Message("system", "be brief"), Message("user", "hi"))
    (one,) = Encoder(byte_tokenizer()).encode([Example("t", "hi", "ho", messages=turns)])
    assert bytes(one.prompt) == b"system: be brief\nuser: hi\nassistant:"
    assert bytes(one.answer[:-1]) == b"ho"


@pytest.mark.parametrize("template", ["no place", "{input}{input}"])
def test_a_template_holds_the_input_once(template: str) -> None:
    with pytest.raises(DataError, match=r"template: .* expected exactly one \{input\}"):
        Encoder(byte_tokenizer(), template)


def test_an_example_that_is_too_long_is_named() -> None:
    given = [Example("t", "ab", "c"), Example("t", "x" * 20, "c")]
    with pytest.raises(DataError, match=r"examples\[1\].*1 to 22 tokens.*found 23 tokens.*'t'"):
        Encoder(byte_tokenizer(), max_tokens=22).encode(given)
    assert len(Encoder(byte_tokenizer(), max_tokens=23).encode(given)) == 2


def test_tasks_are_slices_and_every_example_stands_once() -> None:
    tokens, tasks = encoded(examples(tasks=3, each=7))
    batch = pack(tokens, tasks)
    owners = [tasks[i] for i in batch.segment.tolist()]
    assert owners == sorted(owners)
    assert batch.counts == tuple(owners.count(int(task)) for task in batch.tasks)
    lengths = [int((batch.segment == i).sum()) for i in range(len(tokens))]
    assert lengths == [len(one) for one in tokens]
    assert batch.tokens == sum(lengths)


def test_attention_rows_hold_every_token_once_and_are_well_filled() -> None:
    tokens, tasks = encoded(examples(tasks=3, each=20))
    batch = pack(tokens, tasks)
    rows, length = batch.rows
    assert len(set(batch.places.tolist())) == batch.tokens
    assert batch.tokens > 0.9 * rows * length
    assert rows > 1
    row_of = batch.places // length
    for i in range(batch.examples):
        assert len(set(row_of[batch.segment == i].tolist())) == 1


def test_packing_refuses_what_does_not_match() -> None:
    tokens, tasks = encoded(examples())
    with pytest.raises(DataError, match="expected 12; found 11"):
        pack(tokens, tasks[1:])
    with pytest.raises(DataError, match="wrong number"):
        pack([], [])


def test_gold_tokens_are_those_that_follow_their_places() -> None:
    tokens, tasks = encoded(examples())
    batch = pack(tokens, tasks)
    assert torch.equal(batch.input_ids[0, batch.predict_at + 1], batch.gold)
    for i, one in enumerate(tokens):
        assert tuple(batch.gold[batch.example_of == i].tolist()) == one.answer


@torch.no_grad()
def packed_losses(model: PreTrainedModel, batch: TrainingBatch, mask: Tensor) -> Tensor:
    out = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=mask,
        use_cache=False,
    )
    logits = out.logits.flatten(0, 1)[batch.predict_at].log_softmax(-1)
    each = -logits.gather(1, batch.gold[:, None])[:, 0]
    return torch.stack([each[batch.example_of == i].mean() for i in range(batch.examples)])


@torch.no_grad()
def alone(model: PreTrainedModel, tokens: list[Encoded]) -> Tensor:
    whole = [torch.tensor([one.prompt + one.answer]) for one in tokens]
    pairs = zip(whole, tokens, strict=True)
    return torch.stack([plain_losses(model(ids).logits, one) for ids, one in pairs])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_is_exact(family: str, attention: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    tokens, tasks = encoded(examples(tasks=2, each=6))
    batch = pack(tokens, tasks)
    wanted = alone(model, tokens)
    mask = batch.mask(torch.float32)
    torch.testing.assert_close(packed_losses(model, batch, mask), wanted, atol=1e-5, rtol=1e-5)
    causal = torch.full_like(mask, torch.finfo(torch.float32).min).triu(1)
    leaky = packed_losses(model, batch, causal)
    assert (leaky - wanted).abs().max() > 1e-2, "without the mask examples see their neighbours"
