"""What a client registers: from a JSON body or a multipart form to a checked content."""

from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from polyhead.adapters.errors import PrivateAdapterError
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Routing
from polyhead.server.config import Settings
from polyhead.server.http.answerers import read_routing
from polyhead.server.http.bodies import Pool, json_body, parsed, takes
from polyhead.server.http.callers import the_caller
from polyhead.server.http.checks import check_sampling, from_base64, unknown_task
from polyhead.server.http.errors import FieldError, InvalidValue, MalformedBody
from polyhead.server.http.limits import JSON, MULTIPART, content_type
from polyhead.server.http.schemas import TaskBody, TaskFields
from polyhead.server.tasks.contents import Content, Precision

TASK_PART = "task"
FILE_PART = "routing"


@dataclass(frozen=True)
class Registration:
    """A body and, where it came as a form, the bytes of the routing's file."""

    body: TaskBody
    file: bytes | None = None

    def content(self, inventory: Inventory) -> Content | None:
        """The numbers, checked against `inventory`; None where they are to come from elsewhere:
        a copy's source, a fit.

        Raises `InvalidValue`, `RoutingError`, `PrivateAdapterError`.
        """
        self.check_sources()
        if self.file is not None:
            return Routing.from_safetensors(self.file, inventory.layout)
        if self.body.routing is not None:
            return read_routing(self.body.routing, inventory)
        if self.body.private_adapter is not None:
            return read_private(self.body.private_adapter.safetensors, inventory)
        return None

    @property
    def precision(self) -> Precision | None:
        """What the routing is to be stored as; None where the body does not say."""
        return self.body.routing.precision if self.body.routing is not None else None

    def check_sources(self) -> None:
        """Raises `InvalidValue` unless exactly one source of numbers is given."""
        body = self.body
        sources = {
            "routing": body.routing is not None or self.file is not None,
            "copy_of": body.copy_of is not None,
            "private_adapter": body.private_adapter is not None,
            "examples": body.examples is not None,
        }
        given = [name for name, there in sources.items() if there]
        if body.routing is not None and self.file is not None:
            given.append("the file part routing")
        if len(given) != 1:
            raise InvalidValue.of(
                given[1] if given else "routing",
                "give one of these fields",
                found=" and ".join(given) or "none",
                expected="exactly one of " + ", ".join(sources),
            )
        if body.fit is not None and body.examples is None:
            raise InvalidValue.of(
                "fit", "given without examples", found="fit", expected="examples beside it"
            )


async def registration(request: Request) -> Registration:
    """A dependency that reads either form of the body.

    Raises what `json_body` raises, `MalformedBody` for a form that is not one, and
    `UnknownTaskNamed` or `OutsidePrefix` for ids that are not the caller's.
    """
    found = await _read(request)
    check_ids(found.body)
    return found


def check_ids(body: TaskBody) -> None:
    """Raises `UnknownTaskNamed` where `body` copies a task that the caller may not see, and
    `OutsidePrefix` where the new one would be such a task; neither depends on what is there."""
    caller = the_caller()
    if body.copy_of is not None and not caller.may_see(body.copy_of):
        raise unknown_task("copy_of", body.copy_of)
    if body.id is not None:
        caller.check_owns(body.id)


async def _read(request: Request) -> Registration:
    if content_type(request, JSON, MULTIPART) == JSON:
        return Registration(await json_body(TaskBody)(request))
    try:
        form = await request.form(max_files=1, max_fields=1)
    except HTTPException as exc:
        raise MalformedBody(str(exc.detail)) from exc
    try:
        task, data = await _parts(form)
    finally:
        await form.close()
    pool: Pool = request.app.state.service.pool
    return Registration(
        await pool.run(parsed, TaskBody, task.encode("utf-8", "surrogatepass")), data
    )


async def _parts(form: FormData) -> tuple[str, bytes]:
    parts = dict(form.multi_items())
    task, file = parts.pop(TASK_PART, None), parts.pop(FILE_PART, None)
    if parts:
        raise _wrong_part(next(iter(parts)), "unknown part", "no such part")
    if not isinstance(task, str):
        raise _wrong_part(TASK_PART, "missing", "a part with the task as JSON")
    if not isinstance(file, UploadFile):
        raise _wrong_part(FILE_PART, "missing", "a part with a safetensors file")
    return task, await file.read()


def takes_registration() -> dict[str, Any]:
    """`openapi_extra` of a call that reads a `Registration`."""
    described = takes(TaskBody)
    binary = {"type": "string", "contentMediaType": "application/octet-stream"}
    text = {"type": "string", "contentMediaType": JSON}
    form = {
        "type": "object",
        "required": [TASK_PART, FILE_PART],
        "additionalProperties": False,
        "properties": {TASK_PART: text, FILE_PART: binary},
    }
    described["requestBody"]["content"][MULTIPART] = {"schema": form}
    return described


def read_private(text: str, inventory: Inventory) -> PrivateAdapter:
    """Raises `InvalidValue` and `PrivateAdapterError`, with paths from the body's root."""
    data = from_base64("private_adapter.safetensors", text)
    try:
        return PrivateAdapter.from_safetensors(data, inventory.header.modules)
    except PrivateAdapterError as exc:
        if exc.field.startswith("private_adapter"):
            raise
        field = f"private_adapter.{exc.field}"
        raise PrivateAdapterError(
            exc.message, field=field, found=exc.found, expected=exc.expected
        ) from exc


def given_fields(body: TaskFields, settings: Settings) -> dict[str, Any]:
    """Those of template, defaults and metadata that `body` sets, as the registry takes them.

    Raises `InvalidValue` for defaults over this server's limits.
    """
    if body.defaults is not None:
        check_sampling(body.defaults, settings, prefix="defaults.")
    fields: dict[str, Any] = {}
    if "template" in body.model_fields_set:
        fields["template"] = body.template
    if "defaults" in body.model_fields_set:
        set_ones = body.defaults and body.defaults.model_dump(exclude_unset=True, exclude_none=True)
        fields["defaults"] = set_ones or {}
    if "metadata" in body.model_fields_set:
        fields["metadata"] = body.metadata or {}
    return fields


def _wrong_part(part: str, message: str, expected: str) -> InvalidValue:
    return InvalidValue([FieldError(part, message, expected=expected)])
