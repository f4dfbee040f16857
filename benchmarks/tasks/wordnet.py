"""WordNet 3.0 as text: which sense of a word comes first, and what it is related to."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from benchmarks.tasks.sources import WORDNET

FOLDER = ("text", "en", "wordnet", "dict")
DATA = {"noun": ("data.noun1", "data.noun2"), "verb": ("data.verb",), "adj": ("data.adj",)}


@dataclass(frozen=True)
class Synset:
    """A sense. `pointers` are (symbol, offset, source word or 0, target word or 0)."""

    category: int
    words: tuple[str, ...]
    pointers: tuple[tuple[str, str, int, int], ...]


def parse(line: str) -> Synset:
    _offset, category, _kind, count, *rest = line.split(" | ", 1)[0].split()
    size = int(count, 16)
    words = tuple(word.split("(")[0] for word in rest[: 2 * size : 2])
    pointers = rest[2 * size + 1 : 2 * size + 1 + 4 * int(rest[2 * size])]
    found = tuple(
        (pointers[i], pointers[i + 1], int(pointers[i + 3][:2], 16), int(pointers[i + 3][2:], 16))
        for i in range(0, len(pointers), 4)
    )
    return Synset(int(category), words, found)


@cache
def rows(part: str) -> dict[str, str]:
    """Offset → row. The source cut the nouns in two at the end of a row."""
    text = "\n".join(WORDNET.text(*FOLDER, name) for name in DATA[part])
    return {line[:8]: line for line in text.split("\n") if line[:8].isdigit()}


@cache
def synset(part: str, offset: str) -> Synset:
    return parse(rows(part)[offset])


@cache
def index(part: str) -> dict[str, str]:
    """Word → row of the index."""
    lines = WORDNET.text(*FOLDER, f"index.{part}").splitlines()
    return {line.partition(" ")[0]: line for line in lines}


def senses(part: str, word: str) -> list[str]:
    """Offsets of the word's senses, the most frequent first."""
    if word not in index(part):
        return []
    _word, _part, count, *rest = index(part)[word].split()
    return rest[-int(count) :]


def antonyms(part: str, words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """A word and its opposite in the first of its two most frequent senses that has one."""
    for word in words:
        offsets = senses(part, word)[:2]
        found = [opposite for offset in offsets for opposite in opposites(part, offset, word)]
        if found:
            yield word, found[0]


def opposites(part: str, offset: str, word: str) -> Iterator[str]:
    if " ! " not in rows(part)[offset]:
        return
    sense = synset(part, offset)
    for symbol, target, here, there in sense.pointers:
        if symbol == "!" and here and sense.words[here - 1].lower() == word:
            yield synset(part, target).words[there - 1].lower()


def hypernyms(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """A noun and the first word of what its most frequent sense is a kind of."""
    for word in words:
        pointers = synset("noun", senses("noun", word)[0]).pointers
        above = [target for symbol, target, _, _ in pointers if symbol == "@"]
        if above:
            yield word, synset("noun", above[0]).words[0].lower()


def categories(words: Iterable[str]) -> Iterator[tuple[str, int]]:
    """A noun and the lexicographers' file, where all its senses lie in one."""
    for word in words:
        found = {synset("noun", offset).category for offset in senses("noun", word)}
        if len(found) == 1:
            yield word, found.pop()
