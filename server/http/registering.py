"""What a client registers: from a JSON body or a multipart form to a checked content."""

from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from polyhead.adapters.errors import PrivateAdapterError
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.peft_lora import CONFIG_FILE, WEIGHTS_FILE, read_peft_lora
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Routing
from polyhead.server.config import Settings
from polyhead.server.http.answerers import read_routing
from polyhead.server.http.bodies import Pool, json_body, parsed, takes
from polyhead.server.http.callers import the_caller
from polyhead.server.http.checks import check_sampling, from_base64, unknown_task
from polyhead.server.http.errors import FieldError, InvalidValue, MalformedBody
from polyhead.server.http.folders import read_folder
from polyhead.server.http.limits import JSON, MULTIPART, content_type
from polyhead.server.http.schemas import TaskBody, TaskFields
from polyhead.server.tasks.contents import Content, Precision

TASK_PART = "task"
ROUTING_PART, ADAPTER_PART = "routing", "private_adapter"


@dataclass(frozen=True)
class Generated:
    """What became of a context: the routing, and what a task has where the body does not say."""

    routing: Routing
    template: str
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Registration:
    """A body and, where it came as a form, the bytes of a routing's file or of an archive with a
    PEFT LoRA's folder. generated: of the body's context, once it has been read."""

    body: TaskBody
    routing_file: bytes | None = None
    adapter_archive: bytes | None = None
    generated: Generated | None = None

    def content(self, inventory: Inventory, settings: Settings) -> Content | None:
        """The numbers, checked against `inventory`; None where they are to come from elsewhere:
        a copy's source, a fit.

        Raises `InvalidValue`, `RoutingError`, `PrivateAdapterError`, `BadArchive`,
        `ArchiveTooLarge`.
        """
        self.check_sources()
        if self.generated is not None:
            return self.generated.routing
        if self.routing_file is not None:
            return Routing.from_safetensors(self.routing_file, inventory.layout)
        if self.adapter_archive is not None:
            return read_archive(self.adapter_archive, inventory, settings)
        if self.body.routing is not None:
            return read_routing(self.body.routing, inventory)
        if self.body.private_adapter is not None:
            text = self.body.private_adapter.safetensors
            return read_private(text, inventory, settings.max_adapter_rank)
        return None

    @property
    def precision(self) -> Precision | None:
        """What the routing is to be stored as; None where the body does not say."""
        return self.body.routing.precision if self.body.routing is not None else None

    def fields(self, settings: Settings) -> dict[str, Any]:
        """What the task carries beside its numbers, as the registry takes it.

        Raises `InvalidValue`.
        """
        given = given_fields(self.body, settings)
        if self.generated is None:
            return given
        made = {"template": self.generated.template, "provenance": self.generated.provenance}
        return {**made, **given}

    def check_sources(self) -> None:
        """Raises `InvalidValue` unless exactly one source of numbers is given."""
        body = self.body
        sources = {
            "routing": body.routing is not None,
            "the file part routing": self.routing_file is not None,
            "copy_of": body.copy_of is not None,
            "private_adapter": body.private_adapter is not None,
            "the file part private_adapter": self.adapter_archive is not None,
            "examples": body.examples is not None,
            "context": body.context is not None,
        }
        given = [name for name, there in sources.items() if there]
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
        task, routing, archive = await _parts(form)
    finally:
        await form.close()
    pool: Pool = request.app.state.service.pool
    body = await pool.run(parsed, TaskBody, task.encode("utf-8", "surrogatepass"))
    return Registration(body, routing, archive)


async def _parts(form: FormData) -> tuple[str, bytes | None, bytes | None]:
    """The task, and the file of a routing or an archive."""
    parts = dict(form.multi_items())
    task = parts.pop(TASK_PART, None)
    files = [parts.pop(name, None) for name in (ROUTING_PART, ADAPTER_PART)]
    if parts:
        raise _wrong_part(next(iter(parts)), "unknown part", "no such part")
    if not isinstance(task, str):
        raise _wrong_part(TASK_PART, "missing", "a part with the task as JSON")
    routing, archive = [await f.read() if isinstance(f, UploadFile) else None for f in files]
    if routing is None and archive is None:
        expected = f"a file, as {ROUTING_PART} safetensors, or an archive as {ADAPTER_PART}"
        raise _wrong_part(ROUTING_PART, "missing", expected)
    return task, routing, archive


def takes_registration() -> dict[str, Any]:
    """`openapi_extra` of a call that reads a `Registration`."""
    described = takes(TaskBody)
    binary = {"type": "string", "contentMediaType": "application/octet-stream"}
    text = {"type": "string", "contentMediaType": JSON}
    form = {
        "type": "object",
        "oneOf": [{"required": [TASK_PART, part]} for part in (ROUTING_PART, ADAPTER_PART)],
        "additionalProperties": False,
        "properties": {TASK_PART: text, ROUTING_PART: binary, ADAPTER_PART: binary},
    }
    described["requestBody"]["content"][MULTIPART] = {"schema": form}
    return described


def read_archive(data: bytes, inventory: Inventory, settings: Settings) -> PrivateAdapter:
    """The LoRA of a PEFT folder. Raises `BadArchive`, `ArchiveTooLarge`, `PrivateAdapterError`."""
    files = read_folder(data, (CONFIG_FILE, WEIGHTS_FILE), settings.max_unpacked_bytes)
    modules = inventory.header.modules
    return read_peft_lora(
        files[CONFIG_FILE], files[WEIGHTS_FILE], modules, settings.max_adapter_rank
    )


def read_private(text: str, inventory: Inventory, max_rank: int) -> PrivateAdapter:
    """Raises `InvalidValue` and `PrivateAdapterError`, with paths from the body's root."""
    data = from_base64("private_adapter.safetensors", text)
    try:
        return PrivateAdapter.from_safetensors(data, inventory.header.modules, max_rank)
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
