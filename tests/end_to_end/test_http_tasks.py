"""`/tasks` and `/inventory` over a real server and a real registry."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from factories import random_private
from live_server import TASKS, LiveServer, serving, settings_for
from safetensors.torch import load, save

Task = dict[str, Any]
SHAPE = (14, 4, 4)


def logits(seed: int) -> torch.Tensor:
    return 4 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def fresh(live: LiveServer) -> Iterator[LiveServer]:
    """The shared server; what the test registers is removed after it."""
    yield live
    for task in live.client.get("/tasks").json()["tasks"]:
        if task["id"] not in TASKS:
            live.client.delete(f"/tasks/{task['id']}")


def register(live: LiveServer, **body: Any) -> httpx.Response:
    answer = live.client.post("/tasks", json=body)
    assert answer.status_code == 201, answer.text
    return answer


def tokens(live: LiveServer, task: str, **body: Any) -> Any:
    whole = {"max_tokens": 16, "return_token_ids": True} | body
    return live.generate(task=task, **whole)["choices"][0]["token_ids"]


def test_a_new_task_is_answered_for_at_once(fresh: LiveServer) -> None:
    answer = register(fresh, id="new", routing={"logits": logits(9).tolist()})
    task = answer.json()
    assert answer.headers["location"] == "/tasks/new"
    assert answer.headers["etag"] == f'"{task["generation"]}"'
    assert (task["id"], task["kind"], task["granularity"]) == ("new", "routing", "module")
    assert fresh.client.get("/tasks/new").json() == task
    assert fresh.generate(task="new")["generation"] == task["generation"]
    assert tokens(fresh, "new") != tokens(fresh, "amber")


@pytest.mark.parametrize("form", ["json", "base64", "multipart"])
def test_coefficients_are_registered_replaced_and_given_back(fresh: LiveServer, form: str) -> None:
    given = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    file = save({"coefficients": given}, {"granularity": "module"})
    if form == "multipart":
        parts = {"task": (None, '{"id": "new"}'), "routing": ("r.safetensors", file)}
        assert fresh.client.post("/tasks", files=parts).status_code == 201
    elif form == "base64":
        register(fresh, id="new", routing={"safetensors": base64.b64encode(file).decode()})
    else:
        register(fresh, id="new", routing={"coefficients": given.tolist()})
    task = fresh.client.get("/tasks/new").json()
    assert (task["kind"], task["routing_kind"]) == ("routing", "coefficients")
    answer = fresh.client.get("/tasks/new/routing")
    assert torch.equal(load(answer.content)["coefficients"], given)
    inline = {"coefficients": given.tolist()}
    asked = {"max_tokens": 16, "return_token_ids": True}
    found = tokens(fresh, "new")
    assert fresh.generate(task=None, routing=inline, **asked)["choices"][0]["token_ids"] == found
    folded = fresh.generate(task=None, routing={"logits": given.tolist()}, **asked)
    assert folded["choices"][0]["token_ids"] != found
    register(fresh, id="near", routing={"coefficients": (2 * given).tolist()})
    similar = fresh.client.get("/tasks/new/similar").json()["similar"]
    assert similar[0]["id"] == "near"
    coarse = {"coefficients": given[0].tolist(), "granularity": "model"}
    assert fresh.client.put("/tasks/new", json={"routing": coarse}).status_code == 200
    again = fresh.client.get("/tasks/new").json()
    assert (again["routing_kind"], again["granularity"]) == ("coefficients", "model")
    assert tokens(fresh, "new") != found


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"coefficients": [[1.0, 2.0]]}, "routing.coefficients"),
        (
            {"coefficients": [[1e6, 0, 0, 0]] * 4, "granularity": "model"},
            "routing.coefficients[0][0]",
        ),
        ({"coefficients": [[1, 0, 0, 0]] * 4, "weights": [[1.0]]}, "routing.coefficients"),
    ],
)
def test_unusable_coefficients_are_refused_by_path(
    fresh: LiveServer, change: Task, field: str
) -> None:
    answer = fresh.client.post("/tasks", json={"id": "new", "routing": change})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == field


@pytest.mark.parametrize("form", ["logits", "weights", "base64", "multipart"])
def test_every_form_of_a_routing_comes_back_as_given(fresh: LiveServer, form: str) -> None:
    given = torch.softmax(logits(5), -1) if form == "weights" else logits(5)
    name = "weights" if form == "weights" else "logits"
    file = save({name: given}, {"granularity": "module"})
    if form == "multipart":
        parts = {"task": (None, '{"id": "new"}'), "routing": ("r.safetensors", file)}
        assert fresh.client.post("/tasks", files=parts).status_code == 201
    elif form == "base64":
        register(fresh, id="new", routing={"safetensors": base64.b64encode(file).decode()})
    else:
        register(fresh, id="new", routing={form: given.tolist()})
    answer = fresh.client.get("/tasks/new/routing")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert torch.equal(load(answer.content)[name], given)
    assert answer.headers["etag"] == fresh.client.get("/tasks/new").headers["etag"]


@pytest.mark.parametrize(("granularity", "shape"), [("block", (2, 4, 4)), ("model", (4, 4))])
def test_coarser_routings_are_taken(
    fresh: LiveServer, granularity: str, shape: tuple[int, ...]
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).tolist()
    routing = {"logits": values, "granularity": granularity}
    task = register(fresh, id="new", routing=routing).json()
    assert task["granularity"] == granularity
    assert tokens(fresh, "new")


def test_a_copy_answers_like_its_source(fresh: LiveServer) -> None:
    register(fresh, id="new", copy_of="amber", metadata={"from": "amber"})
    assert tokens(fresh, "new") == tokens(fresh, "amber") != tokens(fresh, "birch")
    assert fresh.client.get("/tasks/new").json()["metadata"] == {"from": "amber"}


def test_a_private_adapter_is_served_but_has_no_routing(fresh: LiveServer) -> None:
    private = random_private(fresh.service.inventory, seed=1)
    file = base64.b64encode(private.to_safetensors()).decode()
    task = register(fresh, id="own", private_adapter={"safetensors": file}).json()
    assert (task["kind"], task["granularity"]) == ("private", None)
    assert tokens(fresh, "own") not in (tokens(fresh, "base"), tokens(fresh, "amber"))
    for path in ("routing", "similar"):
        answer = fresh.client.get(f"/tasks/own/{path}")
        assert (answer.status_code, answer.json()["code"]) == (422, "not_a_routing")
    body = {"mixture": {"amber": 1, "own": 1}, "prompt": "x"}
    problem = fresh.client.post("/generate", json=body).json()
    assert (problem["status"], problem["errors"][0]["field"]) == (422, "mixture.own")


def test_a_template_is_filled_as_plain_text(fresh: LiveServer) -> None:
    template = "Q: {input} %s {0} {input}\nA:"
    register(fresh, id="new", copy_of="amber", template=template)
    body = {"task": "new", "max_tokens": 8, "ignore_eos": True, "input": "{input}$1\\1"}
    filled = fresh.client.post("/generate", json=body).json()
    prompt = "Q: {input}$1\\1 %s {0} {input}$1\\1\nA:"
    assert filled["choices"] == fresh.generate(task="new", prompt=prompt)["choices"]
    assert filled["usage"]["prompt_tokens"] == len(prompt)


def test_input_without_a_template_is_the_prompt(live: LiveServer) -> None:
    body = {"task": "amber", "max_tokens": 8, "ignore_eos": True, "input": "hello"}
    answer = live.client.post("/generate", json=body).json()
    assert answer["choices"] == live.generate(prompt="hello")["choices"]


def test_defaults_stand_under_the_values_of_a_body(fresh: LiveServer) -> None:
    defaults = {"max_tokens": 3, "temperature": 1.0, "seed": 7}
    register(fresh, id="new", copy_of="amber", defaults=defaults)
    body = {"task": "new", "prompt": "hello", "ignore_eos": True, "return_token_ids": True}

    def drawn(**change: Any) -> Any:
        answer = fresh.client.post("/generate", json=body | change)
        return answer.json()["choices"][0]["token_ids"]

    assert len(drawn()) == 3
    assert drawn(max_tokens=16)[:3] == drawn()
    assert drawn(max_tokens=16, temperature=0.0) == tokens(fresh, "amber")
    assert drawn(max_tokens=16, seed=8) != drawn(max_tokens=16)
    # A default is a wish, an explicit value an order: only the latter is refused for lack of room.
    assert len(drawn(prompt="x" * 510)) == 2


def test_put_replaces_and_a_stale_tag_is_412(fresh: LiveServer) -> None:
    etag = register(fresh, id="new", copy_of="amber", template="a{input}").headers["etag"]
    body = {"routing": {"logits": logits(3).tolist()}}
    first = fresh.client.put("/tasks/new", json=body, headers={"If-Match": etag})
    assert first.status_code == 200
    assert first.headers["etag"] != etag
    assert first.json()["template"] is None
    stale = fresh.client.put("/tasks/new", json=body, headers={"If-Match": etag})
    assert (stale.status_code, stale.json()["code"]) == (412, "stale_generation")
    for method in ("PATCH", "DELETE"):
        content = {"json": {"template": None}} if method == "PATCH" else {}
        stale = fresh.client.request(method, "/tasks/new", headers={"If-Match": etag}, **content)
        assert (stale.status_code, stale.json()["code"]) == (412, "stale_generation")
    assert fresh.client.get("/tasks/new").json() == first.json()
    assert fresh.client.put("/tasks/new", json=body).status_code == 200


@pytest.mark.parametrize("tag", ["*", '"{}"'])
def test_a_tag_that_holds_lets_a_change_through(fresh: LiveServer, tag: str) -> None:
    generation = register(fresh, id="new", copy_of="amber").json()["generation"]
    headers = {"If-Match": tag.format(generation)}
    assert fresh.client.delete("/tasks/new", headers=headers).status_code == 204


@pytest.mark.parametrize("tag", ['W/"a"', "a", '"a", "b"', ""])
def test_another_form_of_tag_is_422(fresh: LiveServer, tag: str) -> None:
    answer = fresh.client.delete("/tasks/amber", headers={"If-Match": tag})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "header.If-Match"


def test_put_copies_and_refuses_another_id(fresh: LiveServer) -> None:
    register(fresh, id="new", copy_of="amber")
    copied = fresh.client.put("/tasks/new", json={"id": "new", "copy_of": "birch"})
    assert copied.json()["provenance"]["from"] == "birch"
    assert tokens(fresh, "new") == tokens(fresh, "birch")
    other = fresh.client.put("/tasks/new", json={"id": "other", "copy_of": "birch"})
    assert (other.status_code, other.json()["errors"][0]["field"]) == (422, "id")
    nobody = fresh.client.put("/tasks/nobody", json={"copy_of": "birch"})
    assert (nobody.status_code, nobody.json()["code"]) == (404, "unknown_task")


def test_patch_changes_what_it_names(fresh: LiveServer) -> None:
    before = register(
        fresh, id="new", copy_of="amber", template="a{input}", metadata={"x": 1, "y": True}
    ).json()
    answer = fresh.client.patch("/tasks/new", json={"metadata": {"x": 2}})
    assert answer.json()["metadata"] == {"x": 2}
    assert answer.json()["generation"] == before["generation"]
    answer = fresh.client.patch("/tasks/new", json={"template": None, "metadata": None})
    assert (answer.json()["template"], answer.json()["metadata"]) == (None, {})
    assert answer.json()["generation"] != before["generation"]
    answer = fresh.client.patch("/tasks/new", json={"defaults": {"top_p": 0.5}})
    assert answer.json()["defaults"] == {"top_p": 0.5}
    refused = fresh.client.patch("/tasks/new", json={"routing": {}})
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "routing")


def test_a_deleted_task_is_unknown(fresh: LiveServer) -> None:
    register(fresh, id="new", copy_of="amber")
    assert tokens(fresh, "new")
    answer = fresh.client.delete("/tasks/new")
    assert (answer.status_code, answer.content) == (204, b"")
    body = {"task": "new", "prompt": "x"}
    assert fresh.client.post("/generate", json=body).status_code == 404
    assert fresh.client.get("/tasks/new").status_code == 404


def test_lists_go_page_by_page(fresh: LiveServer) -> None:
    for number in range(5):
        register(fresh, id=f"t{number}", copy_of="amber", metadata={"even": number % 2 == 0})
    found, query = [], {"limit": 2, "prefix": "t"}
    while True:
        page = fresh.client.get("/tasks", params=query).json()
        found += [task["id"] for task in page["tasks"]]
        if page["next"] is None:
            break
        query["cursor"] = page["next"]
    assert found == ["t0", "t1", "t2", "t3", "t4"]
    even = fresh.client.get("/tasks", params={"metadata": ["even:true"]}).json()["tasks"]
    assert [task["id"] for task in even] == ["t0", "t2", "t4"]


def test_similar_tasks_are_near(fresh: LiveServer) -> None:
    register(fresh, id="near", routing={"logits": (logits(0) + 0.1).tolist()})
    (first, *rest) = fresh.client.get("/tasks/amber/similar").json()["similar"]
    assert first["id"] == "near"
    assert first["cosine"] > 0.95 > max(other["cosine"] for other in rest)
    assert len(fresh.client.get("/tasks/amber/similar?limit=1").json()["similar"]) == 1


def test_the_backbone_is_a_task_that_nobody_changes(live: LiveServer) -> None:
    assert live.client.get("/tasks/base").json()["kind"] == "base"
    assert "base" not in [task["id"] for task in live.client.get("/tasks").json()["tasks"]]
    for method in ("DELETE", "PATCH"):
        content = {"json": {"template": None}} if method == "PATCH" else {}
        assert live.client.request(method, "/tasks/base", **content).status_code == 404


def test_the_inventory_says_what_is_loaded(live: LiveServer) -> None:
    found = live.client.get("/inventory").json()
    told = {"backbone", "kind", "modules", "heads", "skills", "rank", "fingerprint"}
    assert set(found) == told | {"quantize", "contexts"}
    assert (found["quantize"], found["contexts"]) == (None, False)
    assert (found["heads"], found["skills"], found["rank"]) == (4, 4, 3)
    assert len(found["modules"]) == SHAPE[0]
    assert found["fingerprint"] == live.service.inventory.fingerprint


def test_tasks_outlive_the_server(model_folder: Path, tmp_path: Path) -> None:
    settings = settings_for(model_folder, tmp_path)
    with serving(settings) as first:
        task = register(first, id="new", routing={"logits": logits(9).tolist()}).json()
        answer = first.generate(task="new")["choices"]
    with serving(settings) as second:
        assert second.client.get("/tasks/new").json() == task
        assert second.generate(task="new")["choices"] == answer
        assert second.generate(task="amber")["choices"] != answer


def test_the_description_names_every_call_and_body(live: LiveServer) -> None:
    described = live.client.get("/openapi.json").json()
    assert described["paths"].keys() >= {"/generate", "/score", "/tasks", "/tasks/{task_id}"}
    body = described["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
    name = body["schema"]["$ref"].rpartition("/")[2]
    assert "ignore_eos" in described["components"]["schemas"][name]["properties"]
    references = set(_references(described))
    names = {f"#/components/schemas/{key}" for key in described["components"]["schemas"]}
    assert references <= names


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)
