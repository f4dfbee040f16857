"""The prompted backbone, scored in shared rows, against decoding one question at a time."""

import pytest
import torch
from factories import byte_tokenizer, tiny_model
from fit_world import WORDS
from transformers import PreTrainedModel

from polyhead.adapters.training.data import Example
from polyhead.adapters.training.encode import Encoder
from polyhead.adapters.training.fewshot_prompted import (
    MAX_SHOTS,
    fitting_shots,
    prompt_with_shots,
    prompted_right,
)

TOKENIZER = byte_tokenizer()
ENCODER = Encoder(TOKENIZER)
SHOTS = [Example("t", word, word[0]) for word in WORDS[:4]]


def continuation(
    model: PreTrainedModel, asked: str, shots: list[Example], length: int
) -> list[int]:
    """What the backbone goes on with, computed alone and without a cache."""
    ids = TOKENIZER.encode(
        prompt_with_shots(ENCODER, shots, Example("t", asked, "?")), add_special_tokens=False
    )
    start = len(ids)
    for _ in range(length):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


def spelling_model() -> PreTrainedModel:
    """A random backbone that only ever says a few letters and new lines."""
    model = tiny_model(tie_word_embeddings=False)
    head = model.get_output_embeddings()
    silent = [i for i in range(head.weight.shape[0]) if i not in {*b"abcde\n"}]
    head.weight.data[silent] = 0
    return model


@pytest.mark.parametrize("row_tokens", [40, 4096])
def test_right_is_what_decoding_one_by_one_gives(row_tokens: int) -> None:
    model = spelling_model()
    asked, wanted = [], []
    for word in WORDS:
        ids = continuation(model, word, SHOTS, 12)
        text = TOKENIZER.decode(ids).split("\n")[0]
        if not text or len(text) == len(ids):
            continue  # it says nothing, or does not come to an end
        # Once as the backbone says it, once cut short: then it does not end where it should.
        asked += [Example("t", word, text), Example("t", word, text + "x")]
        wanted += [True, False]
    assert wanted.count(True) >= 2
    passes = []
    found = prompted_right(
        model, TOKENIZER, ENCODER, SHOTS, asked, lambda: passes.append(1), row_tokens=row_tokens
    )
    assert found == wanted
    assert (len(passes) > 1) == (row_tokens == 40)


def test_a_prompt_is_an_instruction_the_examples_and_the_question() -> None:
    text = prompt_with_shots(ENCODER, SHOTS[:2], Example("t", "moon", "m"), "First letters.")
    assert text == "First letters.\n\ncat\nc\n\ndog\nd\n\nmoon\n"


def test_only_so_many_examples_go_into_a_prompt() -> None:
    many = [Example("t", f"word {i}", "x") for i in range(40)]
    assert fitting_shots(TOKENIZER, ENCODER, many) == many[:MAX_SHOTS]
    long = [Example("t", "w" * 400, "x") for _ in range(4)]
    assert len(fitting_shots(TOKENIZER, ENCODER, long)) == 2
