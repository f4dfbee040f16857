"""`polyhead generate`: one question to a running server."""

import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from polyhead.server.commands.calling import Url, connected, print_json, print_table
from polyhead.server.commands.common import AsJson


class Form(StrEnum):
    """How a text is put to the model."""

    input = "input"
    prompt = "prompt"
    message = "message"


def generate_command(
    task: Annotated[str, typer.Argument(help="Who answers; base is the bare backbone")],
    text: Annotated[
        str | None, typer.Argument(help="What is asked; without it, the standard input")
    ] = None,
    form: Annotated[
        Form,
        typer.Option(
            "--as", help="input fills the task's template, a prompt is seen exactly as it is"
        ),
    ] = Form.input,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens at most")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from this share of what is likely")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Draws the same again")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text to end at; may be repeated")] = None,
    n: Annotated[int | None, typer.Option("--n", help="So many answers")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Ask a task of a running server; a single answer is printed while it is written."""
    given = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or None,
        "n": n,
    }
    asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    asked |= _asked(form, sys.stdin.read() if text is None else text)
    with connected(url) as client:
        if as_json:
            print_json(client.generate(task, **asked))
        elif n is not None and n > 1:
            choices = client.generate(task, **asked).choices
            rows = [(str(one.index), one.finish_reason, one.text) for one in choices]
            print_table(("answer", "ended", "text"), rows)
        else:
            with client.stream(task, **asked) as pieces:
                for piece in pieces:
                    typer.echo(piece.text, nl=False)
            typer.echo()


def _asked(form: Form, text: str) -> dict[str, Any]:
    if form is Form.message:
        return {"messages": [{"role": "user", "content": text}]}
    return {form.value: text}
