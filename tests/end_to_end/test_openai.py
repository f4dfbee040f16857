"""What OpenAI's own Python client makes of `/v1`, over a real server."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from live_server import TASKS, LiveServer
from openai_clients import async_client, sync_client

HI: list[Any] = [{"role": "user", "content": "hi"}]
ENDLESS = {"ignore_eos": True}


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with sync_client(live.url) as made:
        yield made


def completed(client: openai.OpenAI, **body: Any) -> Any:
    """A completion of 12 tokens of `amber` after `hello`, greedy unless asked otherwise."""
    whole = {"model": "amber", "prompt": "hello", "max_tokens": 12, "temperature": 0} | body
    return client.completions.create(extra_body=ENDLESS, **whole)


def chatted(client: openai.OpenAI, **body: Any) -> Any:
    whole = {"model": "amber", "messages": HI, "max_tokens": 12, "temperature": 0} | body
    return client.chat.completions.create(extra_body=ENDLESS, **whole)


def test_every_task_is_a_model_and_so_is_the_backbone(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) >= {"base", *TASKS}
    assert models["amber"] == client.models.retrieve("amber")
    assert client.models.retrieve("base").owned_by == "polyhead"


def test_a_completion_is_what_generate_answers(client: openai.OpenAI, live: LiveServer) -> None:
    found = completed(client)
    native = live.generate(max_tokens=12)
    assert found.object == "text_completion"
    assert found.id.startswith("cmpl-")
    assert found.model == "amber"
    assert found.system_fingerprint == native["generation"]
    (choice,) = found.choices
    assert choice.text == native["choices"][0]["text"]
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 12, 17)
    assert completed(client, model="birch").choices[0].text != choice.text
    assert completed(client, model="base").choices[0].text != choice.text


def test_a_chat_is_what_generate_answers_to_messages(
    client: openai.OpenAI, live: LiveServer
) -> None:
    native = live.generate(prompt="user: hi\nassistant:", max_tokens=12)
    for most in ({"max_tokens": 12}, {"max_completion_tokens": 12, "max_tokens": openai.omit}):
        found = chatted(client, **most)
        assert found.object == "chat.completion"
        assert found.id.startswith("chatcmpl-")
        (choice,) = found.choices
        assert choice.message.role == "assistant"
        assert choice.message.content == native["choices"][0]["text"]
        assert choice.finish_reason == "length"
        assert found.usage.completion_tokens == 12


def test_a_developer_is_the_system_and_parts_are_one_text(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    plain = [{"role": "system", "content": "be kind"}, *HI]
    fancy = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    answers = [chatted(client, messages=m).choices[0].message.content for m in (plain, fancy, HI)]
    assert answers[0] == answers[1] != answers[2]


def test_prompts_may_be_text_or_tokens_one_or_several(client: openai.OpenAI) -> None:
    ids = [list(text.encode()) for text in ("hello", "other")]
    alone = [completed(client, prompt=text).choices[0].text for text in ("hello", "other")]
    assert alone[0] != alone[1]
    assert completed(client, prompt=ids[0]).choices[0].text == alone[0]
    for prompts in (["hello", "other"], ids):
        both = completed(client, prompt=prompts, n=2)
        assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in both.choices] == [alone[0]] * 2 + [alone[1]] * 2
        assert both.usage.prompt_tokens == 10
        assert both.usage.completion_tokens == 48


def test_the_temperature_is_one_by_default_unless_the_task_says_otherwise(
    client: openai.OpenAI, live: LiveServer
) -> None:
    def drawn(seed: int, **more: Any) -> Any:
        return completed(client, temperature=openai.omit, seed=seed, **more).choices[0].text

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1) == completed(client, temperature=1, seed=1).choices[0].text
    body = {"id": "cool", "copy_of": "amber", "defaults": {"temperature": 0.0}}
    assert live.client.post("/tasks", json=body).status_code == 201
    try:
        assert drawn(1, model="cool") == drawn(2, model="cool")
    finally:
        live.client.delete("/tasks/cool")


def test_lengths_by_default_are_openai_s(client: openai.OpenAI) -> None:
    assert completed(client, max_tokens=openai.omit).usage.completion_tokens == 16
    room = 512 - len("user: hi\nassistant:")
    assert chatted(client, max_tokens=openai.omit).usage.completion_tokens == room


def test_stop_strings_end_an_answer(client: openai.OpenAI) -> None:
    text = completed(client, max_tokens=40).choices[0].text
    stop = text[5:7]
    (choice,) = completed(client, max_tokens=40, stop=[stop]).choices
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_n_choices_are_drawn_apart(client: openai.OpenAI) -> None:
    found = chatted(client, n=3, seed=7, temperature=1)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in found.choices}) == 3
    again = chatted(client, n=3, seed=7, temperature=1)
    assert [c.message for c in again.choices] == [c.message for c in found.choices]


def test_penalties_forbid_saying_it_again(client: openai.OpenAI) -> None:
    ids = completed(client, max_tokens=40, frequency_penalty=2, presence_penalty=2)
    assert ids.choices[0].text != completed(client, max_tokens=40).choices[0].text


def test_a_completion_s_logprobs(client: openai.OpenAI, live: LiveServer) -> None:
    (choice,) = completed(client, logprobs=3).choices
    native = live.generate(max_tokens=12, logprobs=3)["choices"][0]["logprobs"]
    told = choice.logprobs
    assert told.token_logprobs == pytest.approx([t["logprob"] for t in native], abs=1e-4)
    for token, logprob, top in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, strict=True
    ):
        assert len(top) == 3
        assert top[token] == logprob == max(top.values())  # greedy
    assert told.text_offset == list(range(12))


def test_a_token_that_was_not_among_the_likeliest_is_told_beside_them(
    client: openai.OpenAI,
) -> None:
    (choice,) = completed(client, logprobs=1, temperature=0.8, seed=3, max_tokens=60).choices
    told = choice.logprobs
    sizes = {len(top) for top in told.top_logprobs}
    assert sizes == {1, 2}
    for token, top in zip(told.tokens, told.top_logprobs, strict=True):
        assert token in top


def test_a_chat_s_logprobs_tell_bytes(client: openai.OpenAI) -> None:
    (choice,) = chatted(client, logprobs=True, top_logprobs=2, max_tokens=40).choices
    content = choice.logprobs.content
    assert len(content) == 40
    text = b"".join(bytes(token.bytes) for token in content).decode("utf-8", "replace")
    text = text.replace("<|end|>", "")  # a special token, which no text shows
    assert text.rstrip("\ufffd") == choice.message.content.rstrip("\ufffd")
    assert any(token.token.startswith("bytes:\\x") for token in content)
    for token in content:
        assert len(token.top_logprobs) == 2
        assert len({other.token for other in token.top_logprobs}) == 2
    (plain,) = chatted(client, logprobs=True).choices
    assert all(token.top_logprobs == [] for token in plain.logprobs.content)
    assert chatted(client).choices[0].logprobs is None


@pytest.mark.parametrize("most", [0, 1, 3])
def test_an_echo_tells_what_the_prompt_was_worth(
    client: openai.OpenAI, live: LiveServer, most: int
) -> None:
    """What `lm-eval` asks: the sum over a continuation's tokens, and whether they are greedy."""
    context = "hello"
    (greedy,) = live.generate(max_tokens=4, return_token_ids=True)["choices"]
    prompt = [*context.encode(), *greedy["token_ids"]]
    for text in (prompt, [prompt], [prompt, prompt[:-1]]):
        found = completed(client, prompt=text, echo=True, logprobs=1, max_tokens=most)
        choice = found.choices[0]
        told = choice.logprobs
        assert choice.text.startswith(context)
        assert len(told.tokens) == len(prompt) + most == len(told.text_offset)
        assert told.token_logprobs[0] is None
        assert told.top_logprobs[0] is None
        assert found.usage.completion_tokens == most * len(found.choices)
        wanted = slice(len(context), len(prompt))
        body = {"task": "amber", "prompt": context, "choices": [prompt[len(context) :]]}
        score = live.client.post("/score", json=body).json()["scores"][0]["logprob"]
        assert sum(told.token_logprobs[wanted]) == pytest.approx(score, abs=1e-3)
        for value, top in zip(told.token_logprobs[wanted], told.top_logprobs[wanted], strict=True):
            assert value == max(top.values())


def test_an_echo_without_logprobs_is_the_prompt_and_the_answer(client: openai.OpenAI) -> None:
    answer = completed(client).choices[0].text
    assert completed(client, echo=True).choices[0].text == "hello" + answer
    assert completed(client, echo=True, prompt=list(b"hello")).choices[0].text == "hello" + answer
    silent = completed(client, echo=True, max_tokens=0)
    assert (silent.choices[0].text, silent.choices[0].finish_reason) == ("hello", "length")


def test_a_prompt_of_one_token_may_be_echoed_alone(client: openai.OpenAI) -> None:
    (choice,) = completed(client, prompt="x", echo=True, logprobs=1, max_tokens=0).choices
    assert (choice.text, choice.logprobs.token_logprobs) == ("x", [None])


def test_the_async_client_is_answered_alike(client: openai.OpenAI, live: LiveServer) -> None:
    async def ask() -> list[Any]:
        async with async_client(live.url) as made:
            body = {"prompt": "hello", "max_tokens": 12, "temperature": 0}
            calls = [
                made.completions.create(model=task, extra_body=ENDLESS, **body) for task in TASKS
            ]
            return await asyncio.gather(*calls)

    texts = [found.choices[0].text for found in asyncio.run(ask())]
    assert texts == [completed(client, model=task).choices[0].text for task in TASKS]
    assert len(set(texts)) == len(TASKS)


def test_fields_for_openai_s_operator_are_taken(client: openai.OpenAI) -> None:
    for ask in (completed, chatted):
        plain, told = ask(client), ask(client, user="me")
        assert dict(told.choices[0]) == dict(plain.choices[0])
    chatted(client, metadata={"a": "b"}, safety_identifier="c", prompt_cache_key="d")
