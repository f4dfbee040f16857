"""Tasks on inflected and derived forms of English words."""

from collections.abc import Callable, Iterable
from functools import partial

from benchmarks.tasks.sources import LEMMINFLECT, WORDFREQ, Source
from benchmarks.tasks.spec import Pair, TaskSpec
from benchmarks.tasks.words import by_frequency, family, frequent, inflections, lemmas

BASE, FORM = 3.2, 2.4
ADJECTIVE, COMPARED = 2.0, 1.0
"""Fewer adjectives than verbs and nouns inflect, so rarer ones have to do."""
PAST, _PARTICIPLE, ING, THIRD = range(4)
PLURAL = COMPARATIVE = 0
SUPERLATIVE = 1
SOURCES: tuple[Source, ...] = (LEMMINFLECT, WORDFREQ)


def inflect(part: str, column: int, base: float = BASE, form: float = FORM) -> list[Pair]:
    """Base form → the form in this column, where there is just one and it differs.

    `base` and `form` are the least Zipf frequencies.
    """
    return by_frequency(
        Pair(word, forms[column], family(word))
        for word, forms in inflections(part)
        if column < len(forms)
        and forms[column] != word
        and frequent(word, base)
        and frequent(forms[column], form)
    )


def base_of(part: str, column: int) -> list[Pair]:
    """A form → its base, where it is the form of one word only."""
    found = [Pair(p.output, p.input, p.entity) for p in inflect(part, column)]
    known = lemmas()
    return by_frequency(p for p in found if known.get(p.input, {}).get(part) == (p.output,))


def adverbs() -> list[Pair]:
    """Adjective → adverb in -ly, both in the source's lists."""
    known = lemmas()
    found = []
    for word, parts in known.items():
        if "adv" in parts and word.endswith("ly"):
            adjectives = [a for a in stems(word) if "adj" in known.get(a, {})]
            if len(adjectives) == 1:
                found.append(Pair(adjectives[0], word, family(adjectives[0])))
    return by_frequency(p for p in found if frequent(p.input, 2.8) and frequent(p.output, FORM))


def stems(adverb: str) -> tuple[str, ...]:
    """What may have lost or changed its ending: slow, happy, simple, basic."""
    stem = adverb[:-2]
    changed = stem[:-1] + "y" if stem.endswith("i") else ""
    return (stem, changed, stem + "le", stem.removesuffix("al") if stem.endswith("ical") else "")


def task(
    name: str, description: str, candidates: Callable[[], Iterable[Pair]], *, held_out: bool = False
) -> TaskSpec:
    return TaskSpec(name, "morphology", description, SOURCES, candidates, held_out)


TASKS = (
    task("past_tense", "Give the past tense of the verb.", partial(inflect, "verb", PAST)),
    task("ing_form", "Give the -ing form of the verb.", partial(inflect, "verb", ING)),
    task("past_to_base", "Give the base form of the past tense.", partial(base_of, "verb", PAST)),
    task("ing_to_base", "Give the base form of the -ing form.", partial(base_of, "verb", ING)),
    task("plural", "Give the plural of the noun.", partial(inflect, "noun", PLURAL)),
    task(
        "comparative",
        "Give the comparative of the adjective.",
        partial(inflect, "adj", COMPARATIVE, ADJECTIVE, COMPARED),
    ),
    task("adverb", "Turn the adjective into an adverb.", adverbs),
    task(
        "third_person",
        "Give the third person singular of the verb.",
        partial(inflect, "verb", THIRD),
        held_out=True,
    ),
    task(
        "singular",
        "Give the singular of the noun.",
        partial(base_of, "noun", PLURAL),
        held_out=True,
    ),
    task(
        "superlative",
        "Give the superlative of the adjective.",
        partial(inflect, "adj", SUPERLATIVE, ADJECTIVE, COMPARED),
        held_out=True,
    ),
)
