"""From candidates to splits: who may use which entity, and what goes where."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.tasks.spec import Pair, TaskSpec, is_held, normal, rank

SPLITS = ("train", "fewshot", "test")
MOST = {"train": 1000, "fewshot": 64, "test": 200}
LEAST_TEST = 60
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Splits:
    """The examples of one task."""

    train: tuple[Pair, ...]
    fewshot: tuple[Pair, ...]
    test: tuple[Pair, ...]


def split_suite(specs: Sequence[TaskSpec]) -> dict[str, Splits]:
    """Held-out tasks choose first: none of their candidates is an input of a training task."""
    held: set[str] = set()
    found = {}
    for spec in sorted(specs, key=lambda spec: not spec.held_out):
        pairs = allowed(spec, held)
        if spec.held_out:
            held.update(normal(pair.input) for pair in pairs)
        found[spec.name] = divide(spec, pairs)
    return {spec.name: found[spec.name] for spec in specs}


def allowed(spec: TaskSpec, held: set[str]) -> list[Pair]:
    """Candidates on the task's side, without the inputs that have two answers."""
    found: dict[str, list[Pair]] = {}
    for pair in spec.candidates():
        if not pair.entity or is_held(pair.entity) == spec.held_out:
            found.setdefault(normal(pair.input), []).append(pair)
    if not spec.held_out:
        found = {key: pairs for key, pairs in found.items() if key not in held}
    return [pairs[0] for pairs in found.values() if len({p.output for p in pairs}) == 1]


def divide(spec: TaskSpec, pairs: list[Pair]) -> Splits:
    """The best candidates, split in a fixed order of their entities.

    All tasks share that order, so what is tested in one is hardly ever trained by its inverse;
    the few-shot examples between the two take up the difference. Held-out tasks test first.
    """
    best = balanced(spec, pairs, sum(MOST.values())) if spec.choices else pairs
    mixed = sorted(best[: sum(MOST.values())], key=order)
    few = MOST["fewshot"] if spec.held_out or len(mixed) >= 4 * MOST["fewshot"] else 32
    room = len(mixed) - few if spec.held_out else int(len(mixed) * TEST_SHARE)
    test = min(MOST["test"], max(LEAST_TEST, room))
    parts = (mixed[test + few :][: MOST["train"]], mixed[test : test + few], mixed[:test])
    return Splits(*(tuple(sorted(part, key=partial(shuffled, spec.name))) for part in parts))


def order(pair: Pair) -> tuple[str, str]:
    key = normal(pair.input)
    return rank("split", pair.entity or key), rank("split", key)


def shuffled(task: str, pair: Pair) -> str:
    """Within a split no order is left, so that its first examples are a fair sample."""
    return rank(task, normal(pair.input))


def balanced(spec: TaskSpec, pairs: Iterable[Pair], limit: int) -> list[Pair]:
    """The first candidates of each choice, in turn, up to twice the rarest choice's number."""
    by_choice: dict[str, list[Pair]] = {choice: [] for choice in spec.choices or ()}
    for pair in pairs:
        by_choice[pair.output].append(pair)
    most = min(limit // len(by_choice), 2 * min(map(len, by_choice.values())))
    return [pair for found in by_choice.values() for pair in found[:most]]
