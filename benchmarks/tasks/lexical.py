"""Tasks on what words mean and how they relate."""

from benchmarks.tasks import wordnet
from benchmarks.tasks.sources import LEMMINFLECT, VADER, WORDFREQ, WORDNET
from benchmarks.tasks.spec import Pair, TaskSpec, rank
from benchmarks.tasks.words import by_frequency, family, frequent, lemmas, zipf

CATEGORIES = {
    5: "animal",
    6: "object",
    8: "body",
    10: "communication",
    12: "feeling",
    13: "food",
    15: "place",
    18: "person",
    20: "plant",
    28: "time",
}
"""WordNet's lexicographer files that have enough frequent nouns, in everyday words."""
CONCRETE = frozenset({5, 6, 8, 13, 18, 20, 27})
MOST_SENSES = 2
PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
CLEAR_SENTIMENT = 1.0
"""Of VADER's mean ratings from -4 to 4; below it raters disagree about the sign."""


def antonyms() -> list[Pair]:
    """Each pair in one direction only, so that no test item is a training item reversed."""
    words = {word: None for word in zipf() if frequent(word, 3.0)}
    found = {pair for part in wordnet.DATA for pair in wordnet.antonyms(part, words)}
    one_way = {min((a, b), (b, a), key=lambda p: rank(*p)) for a, b in found}
    return by_frequency(Pair(a, b, family(a)) for a, b in one_way if a in words and b in words)


def nouns(least: float) -> list[str]:
    """Frequent nouns in the singular."""
    known = lemmas()
    return [w for w in known if frequent(w, least) and known[w].get("noun") == (w,)]


def hypernyms() -> list[Pair]:
    """Of things one can touch: what an abstract noun is a kind of is a matter of taste."""
    things = (word for word, number in wordnet.categories(nouns(2.8)) if number in CONCRETE)
    clear = [word for word in things if len(wordnet.senses("noun", word)) <= MOST_SENSES]
    return by_frequency(
        Pair(word, above, family(word))
        for word, above in wordnet.hypernyms(clear)
        if frequent(above, 3.3) and word != above
    )


def categories() -> list[Pair]:
    return by_frequency(
        Pair(word, CATEGORIES[number], family(word))
        for word, number in wordnet.categories(nouns(2.8))
        if number in CATEGORIES
    )


def parts_of_speech() -> list[Pair]:
    """Words, inflected ones too, that the source knows as one part of speech only."""
    return by_frequency(
        Pair(word, PARTS[next(iter(parts))], family(word))
        for word, parts in lemmas().items()
        if len(parts) == 1 and parts.keys() <= PARTS.keys() and frequent(word, 3.0)
    )


def sentiments() -> list[Pair]:
    rows = [line.split("\t") for line in VADER.text("vader_lexicon.txt").splitlines() if line]
    return by_frequency(
        Pair(word, "positive" if float(mean) > 0 else "negative", family(word))
        for word, mean, *_ in rows
        if abs(float(mean)) >= CLEAR_SENTIMENT and frequent(word, 3.0)
    )


TASKS = (
    TaskSpec("antonym", "lexical relation", "Give the opposite.", (WORDNET, WORDFREQ), antonyms),
    TaskSpec(
        "hypernym",
        "lexical relation",
        "Name what the thing is a kind of.",
        (WORDNET, WORDFREQ),
        hypernyms,
    ),
    TaskSpec(
        "noun_category",
        "classification",
        f"Say what kind of thing the noun names: {', '.join(sorted(CATEGORIES.values()))}.",
        (WORDNET, WORDFREQ),
        categories,
        choices=tuple(sorted(CATEGORIES.values())),
    ),
    TaskSpec(
        "part_of_speech",
        "classification",
        "Name the word's part of speech.",
        (LEMMINFLECT, WORDFREQ),
        parts_of_speech,
        choices=tuple(sorted(PARTS.values())),
    ),
    TaskSpec(
        "word_sentiment",
        "classification",
        "Say whether the word is positive or negative.",
        (VADER, WORDFREQ),
        sentiments,
        held_out=True,
        choices=("negative", "positive"),
    ),
)
