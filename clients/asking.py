"""What can be asked for: the keyword arguments of `generate`, `stream`, `score` and of fits.

Values are the server's to check; what is left out is the server's to choose.
"""

from collections.abc import Sequence
from typing import Any, Literal, Required, TypedDict

from polyhead.clients.routing import Routing

FitMethod = Literal["auto", "z", "mhr", "mu", "lora"]


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Example(TypedDict):
    """An input and the answer that a task is to give."""

    input: str
    output: str


class Sampling(TypedDict, total=False):
    """How tokens are drawn. Also a task's `defaults`."""

    max_tokens: int
    temperature: float  # 0, the default, is greedy
    top_p: float
    top_k: int  # 0 is off
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    seed: int
    stop: str | list[str]
    n: int
    logprobs: int  # alternatives per token


class JSONSchema(TypedDict):
    """A schema that an answer keeps to, and its name."""

    name: str
    schema: dict[str, Any]


class ResponseFormat(TypedDict, total=False):
    """What an answer is held to, in OpenAI's form."""

    type: Required[Literal["text", "json_object", "json_schema"]]
    json_schema: JSONSchema  # with that type only


class Asking(TypedDict, total=False):
    """Who answers, unless a task is named, and what is asked: one of prompt, input, messages."""

    mixture: dict[str, float]  # shares of tasks; they need not sum to 1
    routing: Routing
    prompt: str | list[int]  # text or token ids, seen by the model exactly so
    input: str  # fills the task's template
    messages: Sequence[Message]  # the backbone's chat template
    deadline: float  # seconds
    priority: int  # lower runs earlier


class Generating(Asking, Sampling, total=False):
    """What `generate` and `stream` take beside the task."""

    response_format: ResponseFormat
    ignore_eos: bool
    return_token_ids: bool


class FitOptions(TypedDict, total=False):
    """How a task is fitted; what is left out suits most tasks."""

    method: FitMethod
    steps: int
    rate: float  # learning rate of skills
    logits_rate: float  # learning rate of the routing's logits
    seed: int
    holdout: float  # share of the examples that the score is taken on
    folds: int  # parts that take turns at being held out
    warm_start: bool  # begin from the routings of the inventory's nearest tasks
    prompted: bool  # score the bare backbone, prompted, as well
