"""Refusals that more than one call makes: limits, vocabularies, encodings."""

import base64
import binascii
from collections.abc import Sequence

from polyhead.server.config import Settings
from polyhead.server.http.errors import InvalidValue, UnknownTaskNamed, shown
from polyhead.server.http.schemas import Sampling


def unknown_task(field: str, task_id: str) -> UnknownTaskNamed:
    """The refusal of a body whose `field` names a task that is not registered."""
    return UnknownTaskNamed.of(
        field, "no such task", found=repr(task_id), expected="the id of a registered task"
    )


def check_most(field: str, value: float, limit: float, unit: str = "") -> None:
    """Raises `InvalidValue` where `value` is over `limit`."""
    if value > limit:
        raise InvalidValue.of(
            field,
            "over the limit",
            found=f"{value} {unit}".strip(),
            expected=f"at most {limit} {unit}".strip(),
        )


def check_ids(field: str, ids: Sequence[int], vocabulary: int) -> tuple[int, ...]:
    """`ids` as a tuple. Raises `InvalidValue` that names the first one outside `vocabulary`."""
    for place, token in enumerate(ids):
        if not 0 <= token < vocabulary:
            raise InvalidValue.of(
                f"{field}[{place}]",
                "not in the vocabulary",
                found=shown(token),
                expected=f"0 to {vocabulary - 1}",
            )
    return tuple(ids)


def check_sampling(sampling: Sampling, settings: Settings, prefix: str = "") -> None:
    """What the schema cannot know: the limits of this server. Raises `InvalidValue`."""
    check_most(f"{prefix}n", sampling.n, settings.max_n)
    check_most(f"{prefix}logprobs", sampling.logprobs or 0, settings.max_logprobs)
    strings = [sampling.stop] if isinstance(sampling.stop, str) else sampling.stop or []
    check_most(f"{prefix}stop", len(strings), settings.max_stop_strings, "strings")
    for place, text in enumerate(strings):
        path = f"{prefix}stop" if isinstance(sampling.stop, str) else f"{prefix}stop[{place}]"
        if not text:
            raise InvalidValue.of(path, "empty", found="''", expected="at least 1 character")
        check_most(path, len(text), settings.max_stop_length, "characters")


def from_base64(field: str, text: str) -> bytes:
    """The bytes of `text`. Raises `InvalidValue` where it is not base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise InvalidValue.of(
            field, "not base64", found=shown(text), expected="base64 (RFC 4648)"
        ) from exc
