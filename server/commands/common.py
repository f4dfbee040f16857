"""What commands share: how they fail, what they load."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from polyhead.adapters.errors import AdapterError
from polyhead.server.demo.folders import DemoError
from polyhead.server.engine.errors import EngineError
from polyhead.server.tasks.errors import RegistryError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")]


def fail(message: str, status: int) -> NoReturn:
    """End the command with one line on stderr. status: 1 the work failed, 2 a wrong setting."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(status)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What is raised on purpose becomes one line; a traceback is left for what is a bug."""
    try:
        yield
    except (AdapterError, EngineError, RegistryError, DemoError, OSError) as exc:
        fail(str(exc), 1)


def load_for_fitting(backbone: str, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """A backbone, in what fits compute in, and its transformers tokenizer.

    Raises `BackboneError`.
    """
    from transformers import AutoTokenizer

    from polyhead.server.engine.backbone import (
        find_backbone,
        load_backbone,
        pick_device,
        pick_fit_dtype,
    )

    folder: Path = find_backbone(backbone)
    place = pick_device(device)
    model = load_backbone(folder, pick_fit_dtype(dtype, place), place, any_kind=True)
    loose: Any = AutoTokenizer
    return model, loose.from_pretrained(folder, local_files_only=True)
