"""All that a run learns from: files found, read, hashed and encoded."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyhead.adapters.training.answers import Encoded
from polyhead.adapters.training.config import DataPart
from polyhead.adapters.training.data import Example, by_task, digest, read_examples
from polyhead.adapters.training.encode import Encoder
from polyhead.adapters.training.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tasks in the order of their names, the examples of each, and where they came from."""

    tasks: tuple[str, ...]
    examples: tuple[tuple[Example, ...], ...]
    encoded: tuple[tuple[Encoded, ...], ...]
    sources: tuple[dict[str, Any], ...]  # path, sha256, examples


def read_corpus(config: DataPart, tokenizer: Any, *, closed: bool = False) -> Corpus:
    """closed: see `Encoder`. Raises `ConfigError` for a pattern that matches nothing or a template
    of no task, `DataError` for anything wrong in a file."""
    examples: list[Example] = []
    sources = []
    for path in _paths(config.train):
        found = read_examples(path)
        examples += found
        sources.append({"path": str(path), "sha256": digest(path), "examples": len(found)})
    tasks = by_task(examples)
    odd = sorted(config.templates.keys() - tasks.keys())
    if odd:
        raise ConfigError("no such task", field=f"data.templates.{odd[0]}")
    encoded = tuple(
        tuple(_encoder(config, tokenizer, task, closed).encode(own)) for task, own in tasks.items()
    )
    return Corpus(tuple(tasks), tuple(map(tuple, tasks.values())), encoded, tuple(sources))


def _encoder(config: DataPart, tokenizer: Any, task: str, closed: bool) -> Encoder:
    template = config.templates.get(task, config.template)
    return Encoder(tokenizer, template, config.max_tokens, closed=closed)


def _paths(patterns: Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern))
        if not matches:
            raise ConfigError("nothing matches", field="data.train", found=repr(pattern))
        found += [Path(match) for match in matches]
    return list(dict.fromkeys(found))
