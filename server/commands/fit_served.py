"""`polyhead tasks fit`: a few examples in, a task of a running server out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyhead.server.commands.calling import Url, connected, print_json, print_table
from polyhead.server.commands.common import AsJson, fail
from polyhead.server.commands.served_tasks import TaskId, Template, unescaped

if TYPE_CHECKING:
    from polyhead.clients import Client, Job


def fit_served_command(
    id: TaskId,
    examples: Annotated[
        Path, typer.Option(help="JSONL with input and output; with task, only those of ID")
    ],
    method: Annotated[str | None, typer.Option(help="auto, z, mhr, mu or lora")] = None,
    template: Template = None,
    steps: Annotated[int | None, typer.Option(help="Steps at most")] = None,
    holdout: Annotated[float | None, typer.Option(help="Part of the examples to score on")] = None,
    folds: Annotated[int | None, typer.Option(help="Score every example in so many turns")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything that is drawn")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Fit a task on the server and wait for it: a new one, or a new generation of one there.

    Ending the command early does not end the fit.
    """
    records = list(_records(examples, id))
    given = {"method": method, "steps": steps, "holdout": holdout, "folds": folds, "seed": seed}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if template is not None:
        options["template"] = unescaped(template)
    with connected(url) as client:
        job = _ordered(client, id, records, options)
        _follow(client, job)
        done = client.jobs.wait(job)
    if as_json:
        print_json(done)
        return
    assert done.result is not None
    kept = done.result.method
    rows = [
        (one.method, "kept" if one.method == kept else "", one.score, f"{one.seconds:.1f}")
        for one in done.result.methods or []
    ]
    print_table(("method", "", "score", "seconds"), rows)


def _ordered(client: "Client", id: str, records: list[Any], options: dict[str, Any]) -> "Job":
    from polyhead.clients import NotFoundError

    try:
        client.tasks.get(id)
    except NotFoundError:
        return client.tasks.fit_new(id, records, **options)
    return client.tasks.fit(id, records, **options)


def _follow(client: "Client", job: "Job") -> None:
    from polyhead.clients import Point
    from polyhead.server.commands.progress import FitBars

    with FitBars() as bars, client.jobs.events(job) as events:
        for event in events:
            if isinstance(event, Point):
                bars.show(job.task, event.method, event)


def _records(path: Path, id: str) -> Iterator[dict[str, Any]]:
    """The file's examples; their values are the server's to check."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        fail(f"{path}: {exc}", 1)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as exc:
            fail(f"{path}:{number}: not JSON: {exc}", 1)
        if not isinstance(record, dict) or not {"input", "output"} <= record.keys():
            fail(f"{path}:{number}: found {line[:80]!r}, expected an input and an output", 1)
        if record.get("task", id) == id:
            yield {"input": record["input"], "output": record["output"]}
