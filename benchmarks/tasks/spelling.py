"""Tasks on spelling: mistakes, and the two standards of English."""

import ast

from benchmarks.tasks.sources import BREAME, CODESPELL, WORDFREQ
from benchmarks.tasks.spec import Pair, TaskSpec, at_most, rank
from benchmarks.tasks.words import by_frequency, family, frequent, zipf

MISTAKES = 2
"""Of one word: the source has dozens for the most frequent ones."""


def misspellings() -> list[Pair]:
    """A mistake → the one word it can stand for, most frequent word first."""
    found = []
    for line in CODESPELL.text("data", "dictionary.txt").splitlines():
        wrong, right = line.split("->")
        if "," not in right and frequent(right, 3.0) and wrong.isascii() and wrong.isalpha():
            found.append(Pair(wrong, right, family(right)))
    known = zipf()
    ordered = sorted(found, key=lambda p: (-known[p.output], rank("misspelling", p.input)))
    return list(at_most(MISTAKES, ordered))


def british_american() -> list[tuple[str, str]]:
    tree = ast.parse(BREAME.text("data", "spelling_constants.py"))
    tables = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    pairs = ast.literal_eval(tables[0]).items()
    known = [(b, a) for b, a in pairs if frequent(b, 1.5) and frequent(a, 1.5) and a != b]
    # A few rows of the source pair a word with another form of its counterpart.
    return [(b, a) for b, a in known if abs(len(b) - len(a)) <= 2]


def to_american() -> list[Pair]:
    return by_frequency(Pair(b, a, family(a)) for b, a in british_american())


def to_british() -> list[Pair]:
    return by_frequency(Pair(a, b, family(a)) for b, a in british_american())


TASKS = (
    TaskSpec(
        "misspelling",
        "spelling",
        "Correct the misspelled word.",
        (CODESPELL, WORDFREQ),
        misspellings,
    ),
    TaskSpec(
        "british_to_american",
        "spelling",
        "Write the British word in American spelling.",
        (BREAME, WORDFREQ),
        to_american,
    ),
    TaskSpec(
        "american_to_british",
        "spelling",
        "Write the American word in British spelling.",
        (BREAME, WORDFREQ),
        to_british,
        held_out=True,
    ),
)
