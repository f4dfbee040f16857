"""Tasks on the names that CLDR gives to emoji in several languages."""

import json
from collections.abc import Iterator
from functools import cache, partial

from benchmarks.tasks.sources import EMOJI
from benchmarks.tasks.spec import Pair, TaskSpec

FULLY_QUALIFIED = 2
JOINERS = {"\u200d", "\u20e3"}
SKIN_TONES = range(0x1F3FB, 0x1F400)
FLAGS = range(0x1F1E6, 0x1F200)
MOST_WORDS = 3


@cache
def names(language: str) -> dict[str, str]:
    """Emoji → name with spaces, for emoji of one character (and a variation selector)."""
    file = "emoji.json" if language == "en" else f"emoji_{language}.json"
    table = json.loads(EMOJI.text("unicode_codes", file))
    if language == "en":
        table = {e: row["en"] for e, row in table.items() if row["status"] == FULLY_QUALIFIED}
    return {e: n.strip(":").replace("_", " ") for e, n in table.items() if is_simple(e)}


def is_simple(emoji: str) -> bool:
    composed = any(c in JOINERS or ord(c) in SKIN_TONES or ord(c) in FLAGS for c in emoji)
    return not composed and emoji[0] not in "0123456789#*"


def is_short(name: str) -> bool:
    """Lower-case letters and spaces, in no more than a few words."""
    return name.replace(" ", "").isalpha() and name.islower() and len(name.split()) <= MOST_WORDS


def english() -> Iterator[tuple[str, str]]:
    found = ((emoji, name) for emoji, name in names("en").items() if is_short(name))
    return ((emoji, name) for emoji, name in found if name.isascii())


def entity(emoji: str) -> str:
    return f"emoji {emoji}"


def named() -> Iterator[Pair]:
    return (Pair(emoji, name, entity(emoji)) for emoji, name in english())


def translated(language: str) -> Iterator[Pair]:
    other = names(language)
    found = ((e, name, other.get(e, "")) for e, name in english())
    return (Pair(n, o, entity(e)) for e, n, o in found if is_short(o) and n != o)


def several_words() -> Iterator[tuple[str, list[str]]]:
    return ((e, name.split()) for e, name in english() if " " in name)


def camel() -> Iterator[Pair]:
    for emoji, words in several_words():
        joined = "".join(word.capitalize() for word in words)
        yield Pair("_".join(words), joined[0].lower() + joined[1:], entity(emoji))


def snake() -> Iterator[Pair]:
    return (Pair(pair.output, pair.input, pair.entity) for pair in camel())


def translation(name: str, language: str, *, held_out: bool = False) -> TaskSpec:
    return TaskSpec(
        f"english_to_{name.lower()}",
        "translation",
        f"Translate the words into {name}.",
        (EMOJI,),
        partial(translated, language),
        held_out,
    )


TASKS = (
    translation("Italian", "it"),
    translation("Portuguese", "pt"),
    translation("Spanish", "es"),
    translation("French", "fr", held_out=True),
    TaskSpec("emoji_name", "translation", "Name the emoji.", (EMOJI,), named),
    TaskSpec("snake_to_camel", "format", "Write the name in camelCase.", (EMOJI,), camel),
    TaskSpec("camel_to_snake", "format", "Write the name in snake_case.", (EMOJI,), snake, True),
)
