"""Examples to fit a task from: every wrong one is named before anything is stored."""

from collections.abc import Sequence

from polyhead.adapters.training.data import Example
from polyhead.adapters.training.encode import INPUT, Encoder
from polyhead.adapters.training.fewshot_check import ExampleProblem, check_examples
from polyhead.server.config import Settings
from polyhead.server.engine.tokenizer import Tokenizer
from polyhead.server.http.errors import FieldError, InvalidValue, shown
from polyhead.server.http.schemas import ExampleBody
from polyhead.server.tasks.job import FitExample


def sound_examples(
    given: Sequence[ExampleBody], template: str, tokenizer: Tokenizer, settings: Settings
) -> tuple[FitExample, ...]:
    """Raises `InvalidValue` that names the template, or each wrong example by index and field."""
    if template.count(INPUT) != 1:
        raise InvalidValue.of(
            "template",
            "a fit needs one place for the input",
            found=shown(template),
            expected=f"exactly one {INPUT}",
        )
    closed = tokenizer.decoder_start is not None
    encoder = Encoder(tokenizer.transformers, template, settings.max_fit_tokens, closed=closed)
    examples = [Example("task", one.input, one.output) for one in given]
    problems = check_examples(examples, encoder, settings.max_fit_examples)
    if problems:
        raise InvalidValue([_field_error(problem, len(given)) for problem in problems])
    return tuple(FitExample(one.input, one.output) for one in given)


def _field_error(problem: ExampleProblem, count: int) -> FieldError:
    path = f"examples[{problem.index}]" + (f".{problem.field}" if problem.field else "")
    if problem.index >= count:  # there are none at all
        path = "examples"
    return FieldError(path, problem.message, problem.found, problem.expected)
