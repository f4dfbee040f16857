"""`GET /tasks/{id}/lora`: a task as a PEFT LoRA, to take elsewhere."""

import io
import tarfile
from collections.abc import Mapping

from fastapi import APIRouter
from starlette.responses import Response

from polyhead.adapters.materialise import own_factors, peft_folder
from polyhead.adapters.routing import Routing
from polyhead.server.http.parameters import TaskId, TheService
from polyhead.server.http.service import Service
from polyhead.server.tasks.task import Task

router = APIRouter(prefix="/tasks")

MEDIA_TYPE = "application/x-tar"


@router.get("/{task_id}/lora", response_class=Response)
async def lora(task_id: TaskId, service: TheService) -> Response:
    """Any task as the two files of a PEFT LoRA's folder, in a tar file."""
    task, archive = await service.pool.run(_archive, service, task_id)
    headers = {
        "ETag": f'"{task.generation}"',
        "Content-Disposition": f'attachment; filename="{task.id}.tar"',
    }
    return Response(archive, 200, headers, MEDIA_TYPE)


def _archive(service: Service, task_id: str) -> tuple[Task, bytes]:
    task, content = service.registry.load(task_id)
    inventory = service.inventory
    if isinstance(content, Routing):
        content = own_factors(inventory, content.weights(inventory.layout))
    return task, _tar(peft_folder(content, inventory.header.backbone.name))


def _tar(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()
