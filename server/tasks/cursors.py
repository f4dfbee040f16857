"""Cursors: where a page ended, in a form that nobody is tempted to build."""

import binascii
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode

from polyhead.server.tasks.errors import InvalidCursor
from polyhead.server.tasks.task import ID_PATTERN


def encode_cursor(last_id: str) -> str:
    return urlsafe_b64encode(last_id.encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> str:
    """The id of the last task of the earlier page. Raises `InvalidCursor`."""
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        last_id = urlsafe_b64decode(padded).decode("ascii")
    except (UnicodeError, binascii.Error) as exc:
        raise InvalidCursor(cursor) from exc
    if not ID_PATTERN.fullmatch(last_id):
        raise InvalidCursor(cursor)
    return last_id


def encode_number(last: int) -> str:
    return encode_cursor(f"{last:x}")


def decode_number(cursor: str) -> int:
    """The number of the last entry of the earlier page. Raises `InvalidCursor`."""
    text = decode_cursor(cursor)
    if not re.fullmatch("[0-9a-f]{1,15}", text):
        raise InvalidCursor(cursor)
    return int(text, 16)
