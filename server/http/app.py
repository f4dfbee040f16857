"""The application: routes, middleware, and the lifespan that starts and stops the engine."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware

from polyhead.server.config import Settings
from polyhead.server.engine.constraint import Grammars
from polyhead.server.engine.loading import Loaded
from polyhead.server.fitting.board import Board
from polyhead.server.fitting.lane import Lane, LaneOptions
from polyhead.server.fitting.process import WorkerOptions
from polyhead.server.http import (
    audit,
    fitting,
    generate,
    health,
    history,
    inventory,
    jobs,
    materialising,
    problems,
    score,
    tasks,
)
from polyhead.server.http.admission import Admission
from polyhead.server.http.answerers import Answerers
from polyhead.server.http.auth import Needs, Turns
from polyhead.server.http.bodies import Pool, document
from polyhead.server.http.bridge import Bridge
from polyhead.server.http.callers import Callers
from polyhead.server.http.described import OPENAI_ERRORS, PROBLEMS, OpenAIRefusal
from polyhead.server.http.history import RollbackBody
from polyhead.server.http.job_schemas import FitBody
from polyhead.server.http.keys import KeyRing
from polyhead.server.http.limits import BodyLimit
from polyhead.server.http.observing import watch, witnesses
from polyhead.server.http.openai import router as openai
from polyhead.server.http.openai.errors import error_body
from polyhead.server.http.openai.schemas import ChatBody, CompletionBody
from polyhead.server.http.request_ids import RequestIds
from polyhead.server.http.room import Room
from polyhead.server.http.schemas import EditBody, GenerateBody, ScoreBody, TaskBody
from polyhead.server.http.service import Service
from polyhead.server.metrics import Metrics
from polyhead.server.tasks.catalogue import Catalogue
from polyhead.server.tasks.jobs import Jobs
from polyhead.server.tasks.registry import Registry
from polyhead.server.tasks.slots import Slots

KEYS_SECONDS = 1.0
"""Between two looks at the keys file: how long a revoked key is good at most."""


def create_app(
    settings: Settings,
    loaded: Loaded,
    registry: Registry,
) -> FastAPI:
    """The service over a loaded backbone and an open registry.

    The engine runs for as long as the app's lifespan; `app.state.service` holds the parts.
    """
    metrics = Metrics(settings.task_series, {kind.code for kind in problems.KINDS.values()})
    callers = Callers(KeyRing(settings.api_keys_file) if settings.api_keys_file else None)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        told = witnesses(settings, loaded.tokenizer)
        bridge = Bridge(asyncio.get_running_loop(), metrics, told.all, settings.max_unread_outputs)
        app.state.service = service = _service(settings, loaded, registry, bridge, metrics, callers)
        watch(service)
        registry.follow()
        service.engine.start()
        service.lane.start()
        following = asyncio.create_task(_follow_keys(callers))
        try:
            yield
        finally:
            following.cancel()
            await asyncio.to_thread(service.lane.stop)
            await asyncio.to_thread(service.engine.stop)
            await asyncio.to_thread(told.close)

    app = FastAPI(
        title="Polyhead",
        version=version("polyhead"),
        lifespan=lifespan,
        redirect_slashes=False,
        # Their pages would load scripts from elsewhere; /openapi.json stays.
        docs_url=None,
        redoc_url=None,
        responses=PROBLEMS,
    )
    _add_middleware(app, settings)
    problems.install(app, metrics, {openai.PREFIX: error_body})
    _add_routes(app)
    document(
        app,
        GenerateBody,
        ScoreBody,
        TaskBody,
        EditBody,
        RollbackBody,
        FitBody,
        CompletionBody,
        ChatBody,
        problems.Problem,
        OpenAIRefusal,
    )
    return app


def _add_middleware(app: FastAPI, settings: Settings) -> None:
    """From the inside out."""
    app.add_middleware(Turns)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "If-Match"],
            expose_headers=["ETag", "Location", "Retry-After", "X-Request-Id"],
        )
    app.add_middleware(RequestIds)


def _add_routes(app: FastAPI) -> None:
    """Every router with the scope that its routes need, except `health`, whose routes say so."""
    app.include_router(health.router)
    for router, needs in (
        (generate.router, Needs("generate")),
        (score.router, Needs("generate")),
        (tasks.router, Needs("tasks")),
        (materialising.router, Needs("tasks")),
        (fitting.router, Needs("tasks")),
        (jobs.router, Needs("tasks")),
        (history.router, Needs("tasks")),
        (audit.router, Needs("admin")),
        (inventory.router, Needs("generate", "tasks")),
    ):
        app.include_router(router, dependencies=[Depends(needs)])
    generates = [Depends(Needs("generate"))]
    app.include_router(openai.router, dependencies=generates, responses=OPENAI_ERRORS)


async def _follow_keys(callers: Callers) -> None:
    while True:
        await asyncio.sleep(KEYS_SECONDS)
        await asyncio.to_thread(callers.refresh)


def _service(
    settings: Settings,
    loaded: Loaded,
    registry: Registry,
    bridge: Bridge,
    metrics: Metrics,
    callers: Callers,
) -> Service:
    embeddings: Any = loaded.model.get_input_embeddings()
    slots = Slots(loaded.injection.planner.prepare, settings.private_cache_bytes)
    layout = loaded.inventory.layout
    catalogue = Catalogue(registry, layout, slots, settings.task_cache_bytes)
    admission = Admission(
        settings=settings,
        tokenizer=loaded.tokenizer,
        answerers=Answerers(catalogue, loaded.inventory, settings.max_mixture),
        grammars=Grammars(loaded.tokenizer),
        max_context=loaded.max_context,
        vocabulary=min(embeddings.num_embeddings, loaded.tokenizer.vocab_size),
    )
    engine = loaded.engine(bridge.publish, bridge.died, metrics.step)
    board, job_list = Board(), Jobs(registry, settings.max_fit_jobs)
    pool = Pool()
    return Service(
        settings=settings,
        engine=engine,
        bridge=bridge,
        tokenizer=loaded.tokenizer,
        inventory=loaded.inventory,
        registry=registry,
        jobs=job_list,
        board=board,
        lane=Lane(
            job_list,
            loaded.inventory,
            board,
            metrics,
            lambda: bool(engine.stats().requests),
            _lane_options(settings, loaded),
        ),
        admission=admission,
        callers=callers,
        metrics=metrics,
        pool=pool,
        slots=slots,
        room=Room(pool, catalogue, settings.private_wait_seconds, settings.max_waiting),
    )


def _lane_options(settings: Settings, loaded: Loaded) -> LaneOptions:
    worker = WorkerOptions(
        backbone=str(loaded.folder),
        inventory=str(settings.inventory),
        device=str(loaded.model.device),
        dtype=settings.dtype,
        share=settings.fit_share,
        threads=settings.threads,
        max_tokens=settings.max_fit_tokens,
    )
    return LaneOptions(
        worker, settings.data_dir / "fits", settings.fit_batch_jobs, settings.fit_idle_seconds
    )
