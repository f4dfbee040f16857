"""`/health/live`, `/health/ready` and `/metrics`."""

from typing import Annotated

from fastapi import APIRouter, Depends
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from polyhead.server.http.auth import Needs
from polyhead.server.http.problems import problem_response
from polyhead.server.http.service import Service, the_service

router = APIRouter()


@router.get("/health/live")
async def live() -> Response:
    """200 as long as the process turns its event loop."""
    return JSONResponse({"status": "live"})


@router.get("/health/ready")
async def ready(service: Annotated[Service, Depends(the_service)]) -> Response:
    """200 when a request would be taken in; 503 with the reason when not."""
    reason = service.why_not_ready()
    return JSONResponse({"status": "ready"}) if reason is None else problem_response(reason)


@router.get("/metrics", response_class=Response, dependencies=[Depends(Needs("admin"))])
async def metrics(service: Annotated[Service, Depends(the_service)]) -> Response:
    """Prometheus' text format."""
    text = await service.pool.run(service.metrics.exposition)
    return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})
