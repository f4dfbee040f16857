"""T5 under training against a plain loop of `model(input_ids, labels=...)` on merged models."""

import copy

import pytest
import torch
from factories import tiny_model, tiny_t5
from training_world import (
    HEADS,
    closing_tokenizer,
    encoded,
    examples,
    folded,
    reference,
    routed,
    skill_grads,
    trainable,
    words,
)
from transformers import BartConfig, BartForConditionalGeneration

from polyhead.adapters.errors import InjectionError
from polyhead.adapters.inject import find_modules
from polyhead.adapters.training.answers import Encoded
from polyhead.adapters.training.causality import check_causal
from polyhead.adapters.training.data import Example
from polyhead.adapters.training.encode import Encoder
from polyhead.adapters.training.errors import TrainingError
from polyhead.adapters.training.fewshot_prompted import prompt_with_shots, prompted_right
from polyhead.adapters.training.layers import TrainedLinear
from polyhead.adapters.training.reading import closes_prompts

KINDS = ["relu", "gated-gelu"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_equal_the_reference(kind: str, checkpointing: bool) -> None:
    model = tiny_t5(kind, 1.0)
    tokens, tasks = encoded(examples(), closed=True)
    source = routed(find_modules(model, heads=HEADS), 3)
    losses, grads, logit_grads = reference(copy.deepcopy(model), source, tokens, tasks)
    trained = trainable(model, source, checkpointing=checkpointing)
    found = trained(trained.pack(tokens, tasks))
    found.mean().backward()
    torch.testing.assert_close(found.detach(), losses, atol=1e-4, rtol=1e-4)
    own = skill_grads(source)
    for name, (a, b) in grads.items():
        torch.testing.assert_close(own[name][0], a, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(own[name][1], b, atol=1e-4, rtol=1e-3)
        assert a.abs().max() > 1e-6, f"{name} matters"
    assert source.routings.logits.grad is not None
    torch.testing.assert_close(source.routings.logits.grad, logit_grads, atol=1e-5, rtol=1e-3)
    assert logit_grads.abs().amax((1, 2, 3)).min() > 1e-4, "every task's logits matter"
    assert trained.detach() is model


def test_wrong_tasks_give_other_losses() -> None:
    tokens, tasks = encoded(examples(), closed=True)
    trained = trainable(tiny_t5("relu", 1.0))
    right = trained(trained.pack(tokens, tasks)).detach()
    wrong = trained(trained.pack(tokens, [(t + 1) % 3 for t in tasks])).detach()
    assert ((right - wrong).abs() > 0.01).all()


def test_layers_that_read_the_wrong_row_are_refused() -> None:
    """Cross attention's keys are made of the source."""
    tokens, tasks = encoded(examples(), closed=True)
    trained = trainable(tiny_t5("relu", 1.0))
    cross = trained.model.get_submodule("decoder.block.0.layer.1.EncDecAttention.k")
    assert isinstance(cross, TrainedLinear)
    cross._board = trained.reading.board("decoder.block.0.layer.1.EncDecAttention.q")
    with pytest.raises(InjectionError, match="does not see the batch's tokens"):
        trained(trained.pack(tokens, tasks))


def test_large_kernels_and_eager_attention_give_the_same() -> None:
    tokens, tasks = encoded(examples(), closed=True)
    found = []
    for attention, plain in (("sdpa", True), ("eager", False)):
        model = tiny_t5("gated-gelu", 1.0)
        model.set_attn_implementation(attention)
        trained = trainable(model)
        for layer in model.modules():
            if isinstance(layer, TrainedLinear):
                layer._plain = plain
        losses = trained(trained.pack(tokens, tasks))
        losses.sum().backward()
        found.append((losses.detach(), [p.grad for p in trained.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-3)


def test_bfloat16_backbones_train_float32_adapters() -> None:
    tokens, tasks = encoded(examples(), closed=True)
    whole = trainable(tiny_t5("gated-gelu", 1.0))
    half = trainable(tiny_t5("gated-gelu", 1.0).bfloat16(), whole.source)
    wanted = whole(whole.pack(tokens, tasks)).detach()
    found = half(half.pack(tokens, tasks))
    found.mean().backward()
    torch.testing.assert_close(found.detach(), wanted, atol=0.15, rtol=0.05)
    assert {p.grad.dtype for p in half.parameters() if p.grad is not None} == {torch.float32}


def test_right_answers_are_those_of_greedy_decoding() -> None:
    """The merged model's own `generate` writes an answer; it, and no other, is then right."""
    model = tiny_t5(eos_token_id=256, pad_token_id=0)
    source = routed(find_modules(model, heads=HEADS), 3)
    tokens, tasks = encoded(examples(), closed=True)
    answers = []
    for one, task in zip(tokens, tasks, strict=True):
        alone = copy.deepcopy(model)
        a, b = source.skills.export()
        for m, name in enumerate(a):
            delta = folded(a[name], b[name], source.routings.logits[task, m])
            alone.get_submodule(name).weight.add_(delta.T.detach())  # type: ignore[union-attr,operator]
        found = alone.generate(torch.tensor([one.prompt]), max_new_tokens=6, do_sample=False)
        answers.append(tuple(int(token) for token in found[0, 1:]))
    assert len(set(answers)) > 6
    trained = trainable(model, source)
    right = [Encoded(one.prompt, answer) for one, answer in zip(tokens, answers, strict=True)]
    assert trained.score(trained.pack(right, tasks))[0].all()
    turned = [(task + 1) % 3 for task in tasks]
    assert not trained.score(trained.pack(right, turned))[0].any()


def test_another_kind_of_positions_is_refused() -> None:
    config = BartConfig(
        vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2
    )
    with pytest.raises(InjectionError) as caught:
        trainable(BartForConditionalGeneration(config))
    assert (caught.value.found, caught.value.expected) == ("bart", "t5 or mt5")


def test_attention_that_leaks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trainable(tiny_t5("relu", 1.0))
    batch = trained.pack(*encoded(examples(), closed=True))
    check_causal(trained, batch)
    monkeypatch.setattr(torch.Tensor, "tril", lambda seen: seen)
    with pytest.raises(TrainingError, match="does not keep to its mask"):
        check_causal(trained, batch)


def test_the_prompted_backbone_is_right_where_generate_gives_the_answer() -> None:
    """The answers are what it writes itself, as far as they can be text at all."""
    model = tiny_t5(eos_token_id=256, pad_token_id=0)
    tokenizer = closing_tokenizer()
    encoder = Encoder(tokenizer, closed=True)
    shots = [Example("t", "ab", "x"), Example("t", "cd", "y")]
    # So that the first token is a letter and the next one ends the answer.
    model.lm_head.weight[encoder.end] *= 3  # type: ignore[union-attr,index,operator]
    asked, written = [], []
    for word in words(40, longest=4):
        text = prompt_with_shots(encoder, shots, Example("t", word, "?"))
        ids = torch.tensor([tokenizer(text).input_ids])
        found = model.generate(ids, max_new_tokens=8, do_sample=False)[0, 1:].tolist()
        if found[-1] == encoder.end and all(0 < token < 128 for token in found[:-1]) and found[1:]:
            asked.append(word)
            written.append(tokenizer.decode(found[:-1]))
    assert len(set(written)) > 1
    right = [Example("t", word, answer) for word, answer in zip(asked, written, strict=True)]
    wrong = [Example("t", one.input, f"{one.output}a") for one in right]
    found = prompted_right(model, tokenizer, encoder, shots, right + wrong, lambda: None)
    assert found == [True] * len(right) + [False] * len(wrong)


def test_a_source_ends_as_the_tokenizer_ends_a_text() -> None:
    (one,), _ = encoded([Example("t0", "ab", "c")], closed=True)
    (plain,), _ = encoded([Example("t0", "ab", "c")])
    assert one == Encoded((*plain.prompt, 256), plain.answer)
    assert closes_prompts(tiny_t5())
    assert not closes_prompts(tiny_model())
