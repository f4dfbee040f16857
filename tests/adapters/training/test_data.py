import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from polyhead.adapters.training.data import (
    Example,
    Message,
    by_task,
    digest,
    read_dataset,
    read_examples,
    read_jsonl,
)
from polyhead.adapters.training.errors import DataError

GOOD = {"task": "plural", "input": "cat", "output": "cats"}


def jsonl(folder: Path, *records: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))
    return path


def test_records_become_examples(tmp_path: Path) -> None:
    path = jsonl(tmp_path, GOOD, "", {**GOOD, "choices": ["cats", "cat"]})
    assert read_jsonl(path) == [
        Example("plural", "cat", "cats"),
        Example("plural", "cat", "cats", ("cats", "cat")),
    ]


def test_messages_become_an_example(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    (example,) = read_jsonl(jsonl(tmp_path, {"task": "chat", "messages": turns}))
    assert example == Example(
        "chat", "u", "a", None, (Message("system", "s"), Message("user", "u"))
    )


def test_separators_within_a_text_do_not_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({**GOOD, "input": "a\u2028b"}, ensure_ascii=False) + "\n")
    assert read_jsonl(path)[0].input == "a\u2028b"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", r"data\.jsonl:2: not JSON"),
        ([1], r"data\.jsonl:2: not an object; found list"),
        ({**GOOD, "label": "x"}, r"data\.jsonl:2: unknown fields; .*\['label'\]"),
        ({"input": "cat", "output": "cats"}, r"data\.jsonl:2\.task: .*found nothing"),
        ({**GOOD, "task": "a/b"}, r"data\.jsonl:2\.task: unusable.*'a/b'"),
        ({**GOOD, "task": "base"}, r"data\.jsonl:2\.task: unusable.*'base'"),
        ({**GOOD, "output": 3}, r"data\.jsonl:2\.output: .*found int"),
        ({**GOOD, "input": ""}, r"data\.jsonl:2\.input: .*found an empty text"),
        ({**GOOD, "choices": ["a", "a"]}, r"data\.jsonl:2\.choices: .*two different"),
        ({**GOOD, "messages": []}, r"data\.jsonl:2\.input: given beside messages"),
        ({"task": "t", "messages": "hi"}, r"data\.jsonl:2\.messages: .*found str"),
        (
            {"task": "t", "messages": [{"role": "user", "content": "u"}]},
            r"data\.jsonl:2\.messages: nothing to learn",
        ),
        (
            {"task": "t", "messages": [{"role": "tool", "content": "u"}]},
            r"data\.jsonl:2\.messages\[0\]: wrong turn",
        ),
    ],
)
def test_errors_name_file_line_and_field(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_jsonl(jsonl(tmp_path, GOOD, record))


def test_a_missing_and_an_empty_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read"):
        read_examples(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=r"data\.jsonl: no examples"):
        read_examples(jsonl(tmp_path, "", ""))


def test_a_dataset_on_disk_gives_the_same_examples(tmp_path: Path) -> None:
    rows = [{**GOOD, "choices": None}, {**GOOD, "choices": ["cats", "cat"]}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    assert read_examples(tmp_path / "set") == read_jsonl(jsonl(tmp_path, *rows))
    Dataset.from_list([GOOD, {**GOOD, "output": ""}]).save_to_disk(tmp_path / "bad")
    with pytest.raises(DataError, match=r"bad\[1\]\.output"):
        read_dataset(tmp_path / "bad")
    with pytest.raises(DataError, match=r"nowhere: not a dataset on disk"):
        read_dataset(tmp_path / "nowhere")


def test_the_digest_follows_the_bytes(tmp_path: Path) -> None:
    path = jsonl(tmp_path, GOOD)
    before = digest(path), digest(tmp_path)
    path.write_text(path.read_text() + "\n")
    after = digest(path), digest(tmp_path)
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_tasks_stand_in_the_order_of_their_names() -> None:
    found = by_task([Example("b", "1", "x"), Example("a", "2", "x"), Example("b", "3", "x")])
    assert {task: [e.input for e in own] for task, own in found.items()} == {
        "a": ["2"],
        "b": ["1", "3"],
    }
    assert list(found) == ["a", "b"]
