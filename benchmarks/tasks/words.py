"""English words: how frequent they are, how they inflect, and which belong together."""

import gzip
from collections.abc import Iterable, Iterator
from functools import cache

import msgpack  # type: ignore[import-untyped]

from benchmarks.tasks.sources import LEMMINFLECT, WORDFREQ
from benchmarks.tasks.spec import Pair

FAMILY_LETTERS = 4
SMALL_LISTS = 3.0
"""The Zipf frequency that the source's small lists end at."""
ABUSIVE = ("bitch", "cunt", "faggot", "fuck", "nigg", "retard", "slut", "spastic", "whore")
"""No served task should be shown answering these."""


@cache
def zipf(language: str = "en", least: float = 1.0) -> dict[str, float]:
    """Word → Zipf frequency, from `least` up: 3 is once, 6 a thousand times in a million words."""
    size = "small" if least >= SMALL_LISTS else "large"
    raw = gzip.decompress(WORDFREQ.path("data", f"{size}_{language}.msgpack.gz").read_bytes())
    _header, *buckets = msgpack.unpackb(raw)
    buckets = buckets[: round((9 - least) * 100) + 1]
    return {word: 9 - index / 100 for index, bucket in enumerate(buckets) for word in bucket}


def frequent(word: str, least: float) -> bool:
    """Whether this is a plain lower-case English word and at least so frequent."""
    return zipf().get(word, 0.0) >= least and is_plain(word)


@cache
def is_plain(word: str) -> bool:
    shaped = word.isascii() and word.isalpha() and word.islower() and len(word) > 2
    return shaped and not word.startswith(ABUSIVE)


def by_frequency(pairs: Iterable[Pair]) -> list[Pair]:
    """Most frequent input first."""
    return sorted(pairs, key=lambda pair: (-zipf().get(pair.input, 0.0), pair.input, pair.output))


@cache
def lines(name: str) -> list[list[str]]:
    packed = LEMMINFLECT.path("resources", name).read_bytes()
    return [line.split(",") for line in gzip.decompress(packed).decode().splitlines()]


def inflections(part: str) -> Iterator[tuple[str, list[str]]]:
    """Base form and its inflected forms, in the order of the source's columns."""
    return ((word, forms) for word, kind, *forms in lines("infl_lu.csv.gz") if kind == part)


@cache
def lemmas() -> dict[str, dict[str, tuple[str, ...]]]:
    """Word → part of speech → base forms."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for word, part, bases in lines("lemma_lu.csv.gz"):
        found.setdefault(word, {})[part] = tuple(bases.split("/"))
    return found


@cache
def family(word: str) -> str:
    """What a word shares with its relatives: the first letters of its base form.

    So `colour`, `colourful` and `colouring` never meet across training and held-out tasks.
    """
    bases = sorted(base for found in lemmas().get(word, {}).values() for base in found)
    return f"word {(bases[0] if bases else word).casefold()[:FAMILY_LETTERS]}"
