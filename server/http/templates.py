"""Prompt templates: a text with places for the input. Nothing else in it means anything."""

from polyhead.server.http.schemas import INPUT


def filled_length(template: str, text: str) -> int:
    """Characters of `filled(template, text)`, without building it: two small texts can make a
    large one, because a template may hold many places."""
    return len(template) + template.count(INPUT) * (len(text) - len(INPUT))


def filled(template: str, text: str) -> str:
    """`template` with `text` in each of its places; a place inside of `text` stays as it is."""
    return template.replace(INPUT, text)
