"""Flags of a command from the fields of models: one for every setting, with its description."""

import inspect
import os
from collections.abc import Callable, Mapping
from tomllib import TOMLDecodeError
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

from polyhead.server.commands.common import fail
from polyhead.server.config import Settings, unknown_variables

Model = TypeVar("Model", bound=BaseModel)
Command = TypeVar("Command", bound=Callable[..., None])


def with_flags_of(*models: type[BaseModel]) -> Callable[[Command], Command]:
    """Give a command one flag for every field of `models`, besides its own parameters.

    The command takes them as `**flags`; one that is not given is None and stays out of the way of
    the environment and of the default.
    """

    def add(command: Command) -> Command:
        fields = {name: field for model in models for name, field in model.model_fields.items()}
        flags = [_flag(name, field) for name, field in fields.items()]
        own = list(inspect.signature(command).parameters.values())[:-1]
        command.__signature__ = inspect.Signature(flags + own)  # type: ignore[attr-defined]
        return command

    return add


def read(model: type[Model], flags: Mapping[str, Any]) -> Model:
    """The model that its own flags, out of `flags`, make. Ends the command where one is wrong."""
    given = {k: v for k, v in flags.items() if k in model.model_fields and v is not None}
    if issubclass(model, Settings):
        _check_environment()
    try:
        return model(**given)
    except (OSError, TOMLDecodeError) as exc:
        fail(f"--config: {exc}", 2)
    except ValidationError as exc:
        for error in exc.errors()[:-1]:
            typer.echo(f"error: {_told(model, error)}", err=True)
        fail(_told(model, exc.errors()[-1]), 2)


def _check_environment() -> None:
    unknown = unknown_variables(os.environ)
    if unknown:
        fail(f"{', '.join(unknown)}: no such setting; `polyhead serve --help` lists them", 2)


def _told(model: type[BaseModel], error: Any) -> str:
    if not error["loc"]:
        return str(error["msg"])
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return f"--config: {name} is no setting; `polyhead serve --help` lists them"
    flag = f"--{name.replace('_', '-')}"
    if error["type"] == "missing":
        return f"{flag}{_variable(model, name)} is needed"
    return f"{flag}: {error['msg']}, found {error['input']!r}"


def _variable(model: type[BaseModel], name: str) -> str:
    if not issubclass(model, BaseSettings):
        return ""
    return f" (or {model.model_config.get('env_prefix', '')}{name.upper()})"


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    help_text = field.description or name.replace("_", " ").capitalize()
    if field.default not in (None, PydanticUndefined):
        help_text += f" [default: {field.default}]"
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[field.annotation | None, typer.Option(help=help_text)],  # type: ignore[operator, unused-ignore]
    )
