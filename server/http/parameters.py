"""Parts of a call that several calls read: ids in the path, tags in the head, the service."""

import re
from typing import Annotated

from fastapi import Depends, Header, Query

from polyhead.server.http.callers import the_caller
from polyhead.server.http.errors import InvalidValue, shown
from polyhead.server.http.service import Service, the_service
from polyhead.server.tasks.errors import UnknownTask
from polyhead.server.tasks.task import ID_PATTERN


async def _known_form(task_id: str) -> str:
    """The id in the path, if the caller may see such a task. Nothing has been looked up then, so
    neither the answer nor its time tells whether another's task is there."""
    if not ID_PATTERN.fullmatch(task_id) or not the_caller().may_see(task_id):
        raise UnknownTask(task_id)
    return task_id


async def _if_match(if_match: Annotated[str | None, Header()] = None) -> str | None:
    """The generation that the task must be at; None where any will do."""
    if if_match is None or if_match.strip() == "*":
        return None
    quoted = re.fullmatch(r'\s*"([^"]*)"\s*', if_match)
    if quoted is None:
        raise InvalidValue.of(
            "header.If-Match",
            "not one strong tag",
            found=shown(if_match),
            expected="a task's generation in double quotes, or *",
        )
    return quoted[1]


TheService = Annotated[Service, Depends(the_service)]
TaskId = Annotated[str, Depends(_known_form)]
IfMatch = Annotated[str | None, Depends(_if_match)]
Holdout = Annotated[
    float | None,
    Query(gt=0, lt=1, description="Share of the examples that the score is taken on"),
]
