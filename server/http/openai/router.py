"""All calls below `/v1`."""

from fastapi import APIRouter

from polyhead.server.http.openai import chat, completions, models

PREFIX = "/v1"

router = APIRouter(prefix=PREFIX)
for part in (models.router, completions.router, chat.router):
    router.include_router(part)
