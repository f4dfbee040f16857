"""Whether examples can be fitted at all: every problem by the index of its example."""

from collections.abc import Sequence
from dataclasses import dataclass

from polyhead.adapters.training.data import Example
from polyhead.adapters.training.encode import Encoder
from polyhead.adapters.training.errors import DataError

MAX_EXAMPLES = 1024


@dataclass(frozen=True)
class ExampleProblem:
    """What is wrong with one example. field: "input", "output", or "" for the whole example."""

    index: int
    field: str
    message: str
    found: str
    expected: str

    def __str__(self) -> str:
        path = f"examples[{self.index}]" + (f".{self.field}" if self.field else "")
        return f"{path}: {self.message}; expected {self.expected}; found {self.found}"


def check_examples(
    examples: Sequence[Example], encoder: Encoder, limit: int = MAX_EXAMPLES
) -> list[ExampleProblem]:
    """Empty texts, too many tokens, the same input with another answer, too many examples.

    The encoder knows the template and the most tokens an example may have. Sound examples give an
    empty list; problems come in the order of their examples.
    """
    if not examples:
        return [ExampleProblem(0, "", "no examples", "0 examples", f"1 to {limit}")]
    if len(examples) > limit:
        found = f"{len(examples)} examples"
        return [ExampleProblem(limit, "", "too many examples", found, f"at most {limit}")]
    problems: list[ExampleProblem] = []
    first: dict[object, int] = {}
    for index, example in enumerate(examples):
        found_here = _empty(index, example) or _unencodable(index, example, encoder)
        earlier = first.setdefault(example_key(example), index)
        if not found_here and examples[earlier].output != example.output:
            found_here = [_contradiction(index, example, earlier, examples[earlier])]
        problems += found_here
    return problems


def example_key(example: Example) -> object:
    """Equal for examples that ask the same."""
    return example.messages or example.input


def refuse_problems(task: str, problems: Sequence[ExampleProblem]) -> None:
    """Raises `DataError` naming the first problems of a task's examples; without any, nothing."""
    if problems:
        shown = "; ".join(str(problem) for problem in problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError(f"{shown}{more}", field=task)


def _empty(index: int, example: Example) -> list[ExampleProblem]:
    return [
        ExampleProblem(index, field, "empty", repr(text[:40]), "a text that is not blank")
        for field, text in (("input", example.input), ("output", example.output))
        if not text.strip()
    ]


def _unencodable(index: int, example: Example, encoder: Encoder) -> list[ExampleProblem]:
    try:
        encoder.encode([example])
    except DataError as exc:
        return [ExampleProblem(index, "", exc.message, exc.found, exc.expected)]
    return []


def _contradiction(index: int, example: Example, earlier: int, other: Example) -> ExampleProblem:
    return ExampleProblem(
        index,
        "output",
        f"the input of examples[{earlier}] with another answer",
        repr(example.output[:40]),
        repr(other.output[:40]),
    )
