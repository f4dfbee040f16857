"""What `/generate` and `/score` answer, over a real server."""

import json
from typing import Any

import httpx
import pytest
from live_server import LiveServer

Event = dict[str, Any]


def events_of(live: LiveServer, **body: Any) -> tuple[list[Event], httpx.Response]:
    """The events of a stream, which must end with `[DONE]`."""
    whole = {"task": "amber", "prompt": "hello", "max_tokens": 12, "ignore_eos": True} | body
    answer = live.client.post("/generate", json={**whole, "stream": True})
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]], answer


def test_the_answer_has_its_fixed_form(live: LiveServer) -> None:
    answer = live.generate(prompt="hello", max_tokens=8)
    assert set(answer) == {"id", "task", "generation", "choices", "usage"}
    assert answer["task"] == "amber"
    assert answer["generation"] == live.client.get("/tasks/amber").json()["generation"]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 8, "cached_tokens": 0}
    (choice,) = answer["choices"]
    assert set(choice) == {"index", "text", "finish_reason"}
    assert (choice["index"], choice["finish_reason"]) == (0, "length")


def test_the_request_id_is_in_header_and_body(live: LiveServer) -> None:
    body = {"task": "base", "prompt": "x", "max_tokens": 1}
    answers = [live.client.post("/generate", json=body) for _ in range(2)]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert ids == [answer.json()["id"] for answer in answers]
    assert len(set(ids)) == 2


def test_tasks_answer_differently(live: LiveServer) -> None:
    texts = {
        task: live.generate(task=task, max_tokens=16, return_token_ids=True)["choices"][0]
        for task in ("amber", "birch", "coral", "base")
    }
    assert len({tuple(choice["token_ids"]) for choice in texts.values()}) == 4


def test_text_and_token_ids_are_seen_alike(live: LiveServer) -> None:
    as_text = live.generate(prompt="héllo")
    as_ids = live.generate(prompt=list("héllo".encode()))
    assert as_text["choices"] == as_ids["choices"]
    assert as_text["choices"] != live.generate(prompt="hello")["choices"]


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 1.0, "seed": 3, "n": 3},
        {"logprobs": 2},
        {"stop": "e", "max_tokens": 60},
    ],
)
def test_a_stream_adds_up_to_the_whole_answer(live: LiveServer, sampling: Event) -> None:
    body = {"max_tokens": 24, "return_token_ids": True} | sampling
    whole = live.generate(**body)
    events, _ = events_of(live, **body)
    for choice in whole["choices"]:
        own = [event for event in events if event["index"] == choice["index"]]
        assert "".join(event["text"] for event in own) == choice["text"]
        assert [t for event in own for t in event["token_ids"]] == choice["token_ids"]
        assert [event.get("finish_reason") for event in own][-1] == choice["finish_reason"]
        assert all("finish_reason" not in event for event in own[:-1])
        assert [p for e in own for p in e.get("logprobs", [])] == choice.get("logprobs", [])
    assert events[-1]["usage"] == whole["usage"]
    assert all("usage" not in event for event in events[:-1])


def test_a_stream_is_not_buffered_anywhere(live: LiveServer) -> None:
    events, answer = events_of(live, max_tokens=12)
    assert len(events) > 1
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "content-length" not in answer.headers


def test_seeds_are_honoured(live: LiveServer) -> None:
    def drawn(seed: int) -> str:
        body = {"temperature": 1.0, "seed": seed, "max_tokens": 24, "return_token_ids": True}
        return str(live.generate(**body)["choices"][0]["token_ids"])

    assert drawn(2**63 - 1) == drawn(2**63 - 1)
    assert drawn(1) != drawn(2)


def test_logprobs_come_with_their_tokens(live: LiveServer) -> None:
    (choice,) = live.generate(max_tokens=3, logprobs=2, return_token_ids=True)["choices"]
    assert [token["token_id"] for token in choice["logprobs"]] == choice["token_ids"]
    for token in choice["logprobs"]:
        assert set(token) == {"token_id", "token", "logprob", "top"}
        assert token["top"][0]["logprob"] == token["logprob"] <= 0  # greedy takes the likeliest
        assert len(token["top"]) == 2


def test_messages_go_through_the_chat_template(live: LiveServer) -> None:
    body = {"task": "amber", "max_tokens": 8, "ignore_eos": True}
    turns = [{"role": "user", "content": "hi"}]
    chat = live.client.post("/generate", json={**body, "messages": turns}).json()
    assert chat["choices"] == live.generate(prompt="user: hi\nassistant:")["choices"]


def test_max_tokens_defaults_to_128_or_the_room_left(live: LiveServer) -> None:
    body = {"task": "amber", "ignore_eos": True}
    wide = live.client.post("/generate", json={**body, "prompt": "x"}).json()
    tight = live.client.post("/generate", json={**body, "prompt": "x" * 500}).json()
    assert wide["usage"]["completion_tokens"] == 128
    assert tight["usage"]["completion_tokens"] == 12


def test_the_longest_prompt_that_fits_is_answered(live: LiveServer) -> None:
    answer = live.generate(prompt="x" * 511, max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == 511


def test_a_deadline_ends_a_request(live: LiveServer) -> None:
    answer = live.generate(max_tokens=500, deadline=0.02)
    assert answer["choices"][0]["finish_reason"] == "deadline"
    assert answer["usage"]["completion_tokens"] < 500


def test_an_inline_routing_answers_as_the_task_that_has_it(live: LiveServer) -> None:
    file = live.client.get("/tasks/amber/routing").content
    import base64

    routing = {"safetensors": base64.b64encode(file).decode()}
    inline = live.client.post(
        "/generate",
        json={"routing": routing, "prompt": "hello", "max_tokens": 16, "ignore_eos": True},
    ).json()
    assert inline["task"] == "(routing)"
    assert inline["choices"] == live.generate(max_tokens=16)["choices"]
    assert inline["choices"] != live.generate(task="birch", max_tokens=16)["choices"]


def test_a_mixture_of_one_is_that_task_and_of_two_is_neither(live: LiveServer) -> None:
    def mixed(**mixture: float) -> Any:
        body = {"mixture": mixture, "prompt": "hello", "max_tokens": 16, "ignore_eos": True}
        answer = live.client.post("/generate", json=body).json()
        assert answer["task"] == "(mixture)"
        return answer["choices"]

    amber = live.generate(task="amber", max_tokens=16)["choices"]
    birch = live.generate(task="birch", max_tokens=16)["choices"]
    assert mixed(amber=3.0) == amber
    assert mixed(amber=0.5, birch=0.5) not in (amber, birch)


def test_scores_rank_the_choices(live: LiveServer) -> None:
    body = {"task": "amber", "prompt": "hello", "choices": ["a", "bcd", [101, 102]]}
    answer = live.client.post("/score", json=body).json()
    assert set(answer) == {"scores", "best"}
    assert [score["choice"] for score in answer["scores"]] == body["choices"]
    assert [score["tokens"] for score in answer["scores"]] == [1, 3, 2]
    for score in answer["scores"]:
        assert score["normalised"] == pytest.approx(score["logprob"] / score["tokens"])
    means = [score["normalised"] for score in answer["scores"]]
    assert answer["best"] == means.index(max(means))


def test_the_score_of_the_greedy_token_is_its_logprob(live: LiveServer) -> None:
    (choice,) = live.generate(max_tokens=1, logprobs=0, return_token_ids=True)["choices"]
    body = {"task": "amber", "prompt": "hello", "choices": [choice["token_ids"], [0]]}
    answer = live.client.post("/score", json=body).json()
    assert answer["best"] == 0
    expected = choice["logprobs"][0]["logprob"]
    assert answer["scores"][0]["logprob"] == pytest.approx(expected, abs=1e-4)
    other = live.client.post("/score", json={**body, "task": "birch"}).json()
    assert other["scores"][0]["logprob"] != pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "text",
    ["\x00", "\u2028\u2029", "𝕬\U0010ffff", "e\u0301" * 20, "\u202eright", "<|end|>", "{input}"],
)
def test_odd_text_is_answered(live: LiveServer, text: str) -> None:
    live.generate(prompt=text)
    live.client.post("/score", json={"task": "amber", "prompt": text, "choices": [text]})
    events_of(live, prompt=text, stop=text)
