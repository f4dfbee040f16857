"""Bodies and answers of the native calls. Values that depend on settings are checked later."""

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError, to_json

from polyhead.adapters.routing import Granularity, RoutingKind
from polyhead.server.engine.request import FinishReason
from polyhead.server.http.errors import InvalidValue

TASK_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
MAX_METADATA_BYTES = 65536
MAX_TEMPLATE = 65536
MAX_MEMBERS = 16384
"""Of one object; each wrong one makes an error, which takes a hundred times its bytes."""
INPUT = "{input}"

Scalar = str | int | float | bool | None


class Body(BaseModel):
    """Strict: nothing is coerced, unknown fields and numbers that are not finite are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _few_members(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, value in (("", data), *data.items()):
                if isinstance(value, dict) and len(value) > MAX_MEMBERS:
                    _refuse_members(name, len(value))
        return data


def _refuse_members(field: str, count: int) -> None:
    raise InvalidValue.of(
        field,
        "too many members",
        found=f"an object of {count}",
        expected=f"at most {MAX_MEMBERS} members",
    )


def exactly_one(body: BaseModel, *names: str, prefix: str = "") -> str:
    """The one of `names` that is given; `prefix` is the path of `body`.

    Raises `InvalidValue` on none and on more.
    """
    given = [name for name in names if getattr(body, name) is not None]
    if len(given) == 1:
        return given[0]
    found = " and ".join(given) or "none"
    wanted = "exactly one of " + ", ".join(names)
    field = prefix + (given[1] if given else names[0])
    raise InvalidValue.of(field, "give one of these fields", found=found, expected=wanted)


def _usable_temperature(value: float) -> float:
    if 0 < value < 0.01:
        raise PydanticCustomError("temperature", "Input should be 0 (greedy) or at least 0.01")
    return value


def _holds_input(value: str) -> str:
    if INPUT not in value:
        raise PydanticCustomError("template", "Template should hold {text}", {"text": INPUT})
    return value


def _scalar(value: Any) -> Scalar:
    if isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError("metadata", "Input should be a finite number")
    if value is None or isinstance(value, str | int | float):
        return value
    raise PydanticCustomError("metadata", "Input should be text, a number, true, false or null")


def _small_metadata(value: dict[str, Scalar]) -> dict[str, Scalar]:
    if len(to_json(value)) > MAX_METADATA_BYTES:
        raise PydanticCustomError(
            "metadata",
            "Metadata should be at most {most} bytes of JSON",
            {"most": MAX_METADATA_BYTES},
        )
    return value


def _text_or_ids(value: object) -> str:
    return "<token ids>" if isinstance(value, Sequence) and not isinstance(value, str) else "<text>"


def _text_or_list(value: object) -> str:
    return "<list>" if isinstance(value, Sequence) and not isinstance(value, str) else "<text>"


TaskId = Annotated[str, Field(pattern=TASK_ID)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]
# Tags in angle brackets keep the branch of a union out of an error's field path.
TextOrIds = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[TokenIds, Tag("<token ids>")],
    Discriminator(_text_or_ids),
]
StopStrings = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[str], Field(fail_fast=True), Tag("<list>")],
    Discriminator(_text_or_list),
]
MetadataKey = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^:]+$")]
Template = Annotated[str, Field(max_length=MAX_TEMPLATE), AfterValidator(_holds_input)]
Value = Annotated[
    Any,
    AfterValidator(_scalar),
    WithJsonSchema({"type": ["string", "number", "boolean", "null"]}),
]
Metadata = Annotated[dict[MetadataKey, Value], AfterValidator(_small_metadata)]
Base64 = Annotated[str, Field(description="safetensors bytes as base64")]


class Sampling(Body):
    """How tokens are drawn. Also a task's `defaults`."""

    max_tokens: int | None = Field(None, ge=1, description="Default: 128, or the room left if less")
    temperature: Annotated[float, AfterValidator(_usable_temperature)] = Field(0.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31 - 1, description="0 is off")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    stop: StopStrings | None = None
    n: int = Field(1, ge=1)
    logprobs: int | None = Field(None, ge=0, description="Alternatives per token")


class RoutingBody(Body):
    """A routing as nested lists or as a safetensors file; exactly one of the four forms."""

    logits: list[Any] | None = Field(
        default=None, description="Folded to weights: their sigmoids over the sum of a row"
    )
    weights: list[Any] | None = Field(default=None, description="Not negative; every row sums to 1")
    coefficients: list[Any] | None = Field(
        default=None, description="Signed and not normalised; used as they are"
    )
    safetensors: Base64 | None = None
    granularity: Granularity = "module"
    precision: Literal["float32", "float16"] | None = Field(
        default=None, description="Numbers that a task stores; null is the server's choice"
    )


class PrivateAdapterBody(Body):
    """A LoRA that the task owns alone: `<module>.A [I, r]` and `<module>.B [r, O]`."""

    safetensors: Base64


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Asking(Body):
    """Who answers (one of `task`, `mixture`, `routing`) and what is asked (one of the rest)."""

    task: TaskId | None = None
    mixture: dict[TaskId, Annotated[float, Field(gt=0, le=1e6)]] | None = Field(None, min_length=1)
    routing: RoutingBody | None = None
    prompt: TextOrIds | None = None
    input: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    deadline: float | None = Field(None, gt=0, description="Seconds")
    priority: int = Field(0, ge=-100, le=100, description="Lower runs earlier")

    @model_validator(mode="after")
    def _one_of_each(self) -> "Asking":
        exactly_one(self, "task", "mixture", "routing")
        exactly_one(self, "prompt", "input", "messages")
        return self


class JsonSchema(Body):
    """A schema that the answer is to fit. Answers are held to it whatever `strict` says."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    body: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer is held to: nothing, any JSON object, or a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(None, description="With type json_schema")

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InvalidValue.of(
                "response_format.json_schema",
                "does not go with the type",
                found=f"{'a' if self.json_schema else 'no'} schema with type {self.type}",
                expected="a schema with type json_schema, and none with another",
            )
        return self


class GenerateBody(Asking, Sampling):
    """`POST /generate`."""

    response_format: ResponseFormat | None = None
    stream: bool = False
    ignore_eos: bool = False
    return_token_ids: bool = False

    @model_validator(mode="after")
    def _can_end(self) -> "GenerateBody":
        held = self.response_format is not None and self.response_format.type != "text"
        if held and self.ignore_eos:
            raise InvalidValue.of(
                "ignore_eos",
                "an answer that is held to a format ends with it",
                found="true with response_format",
                expected="false, or no response_format",
            )
        return self


class ScoreBody(Asking):
    """`POST /score`."""

    choices: Annotated[list[TextOrIds], Field(fail_fast=True)] = Field(min_length=1)


class ExampleBody(Body):
    """An input and the answer that the task is to give."""

    input: str
    output: str


Examples = Annotated[list[ExampleBody], Field(min_length=1, fail_fast=True)]
Context = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Examples, Tag("<list>")],
    Discriminator(_text_or_list),
]


class FitOptionsBody(Body):
    """How a task is fitted; what is left out suits most tasks."""

    method: Literal["auto", "z", "mhr", "mu", "lora"] = "auto"
    steps: int | None = Field(None, ge=1, le=10_000)
    rate: float | None = Field(None, gt=0, le=1, description="Learning rate of skills")
    logits_rate: float | None = Field(None, gt=0, le=10, description="Of the routing's logits")
    seed: int | None = Field(None, ge=0, le=2**31 - 1)
    holdout: float | None = Field(
        None, gt=0, lt=1, description="Share of the examples that the score is taken on"
    )
    folds: int | None = Field(
        None, ge=2, le=20, description="Parts that take turns at being held out"
    )
    warm_start: bool = Field(
        False, description="Begin from the routing of the inventory's nearest tasks (z and mhr)"
    )
    prompted: bool = Field(False, description="Score the bare backbone, prompted, as well")

    @model_validator(mode="after")
    def _one_way_of_scoring(self) -> "FitOptionsBody":
        if self.holdout is not None and self.folds is not None:
            raise InvalidValue.of(
                "fit.folds",
                "give one of these fields",
                found="holdout and folds",
                expected="at most one of holdout, folds",
            )
        return self

    @model_validator(mode="after")
    def _has_a_routing_to_begin_from(self) -> "FitOptionsBody":
        if self.warm_start and self.method in ("mu", "lora"):
            raise InvalidValue.of(
                "fit.warm_start",
                "this method learns no routing",
                found=f"true with {self.method}",
                expected="auto, z or mhr, or false",
            )
        return self


class TaskFields(Body):
    """What a task may carry beside its adapter."""

    template: Template | None = None
    defaults: Sampling | None = None
    metadata: Metadata | None = None


class TaskBody(TaskFields):
    """`POST /tasks` and `PUT /tasks/{id}`: exactly one of `routing`, `copy_of`, `private_adapter`,
    `context` and, in `POST` only, `examples`.

    In a multipart form the numbers are a file instead: a routing's as the part `routing`, or an
    archive (tar, tar.gz, zip) of a PEFT LoRA's folder as the part `private_adapter`.
    """

    id: TaskId | None = None
    routing: RoutingBody | None = None
    copy_of: TaskId | None = None
    private_adapter: PrivateAdapterBody | None = None
    examples: Examples | None = None
    fit: FitOptionsBody | None = Field(None, description="With examples only")
    context: Context | None = Field(
        None,
        description="A document, of which every line is read alone, or examples, of which nothing "
        "is fitted: the inventory's generator makes the routing. Without a `template`, the task "
        "has the one that the generator was trained with",
    )


class EditBody(TaskFields):
    """`PATCH /tasks/{id}`: what is given replaces what was there, null removes it."""


class TaskAnswer(BaseModel):
    """A task as it is now. `granularity` and `routing_kind` are null without a routing."""

    id: str
    generation: str
    kind: Literal["routing", "private", "base"]
    granularity: Granularity | None
    routing_kind: RoutingKind | None
    template: str | None
    defaults: dict[str, Any]
    metadata: dict[str, Scalar]
    provenance: dict[str, Any]
    created_at: datetime
    updated_at: datetime


class TaskPage(BaseModel):
    """`next` is the cursor of the page after this one, null on the last."""

    tasks: list[TaskAnswer]
    next: str | None


class Neighbour(BaseModel):
    """A task with a similar routing: the cosine of the weights minus the uniform average."""

    id: str
    cosine: float


class SimilarAnswer(BaseModel):
    """The answer of `GET /tasks/{id}/similar`, nearest first."""

    similar: list[Neighbour]


class Candidate(BaseModel):
    """One token and its natural log-probability."""

    token_id: int
    token: str
    logprob: float


class TokenAnswer(Candidate):
    """A chosen token, with the likeliest ones at its place."""

    top: list[Candidate]


class Usage(BaseModel):
    """Tokens, summed over all choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Choice(BaseModel):
    """One of the `n` answers."""

    index: int
    text: str
    token_ids: list[int] | None = None
    finish_reason: FinishReason
    logprobs: list[TokenAnswer] | None = None


class GenerateAnswer(BaseModel):
    """The answer of `POST /generate`. `task` is `(mixture)` or `(routing)` where none was named."""

    id: str
    task: str
    generation: str
    choices: list[Choice]
    usage: Usage


class Score(BaseModel):
    """`logprob` is the sum over the choice's tokens, `normalised` their mean."""

    choice: str | list[int]
    logprob: float
    tokens: int
    normalised: float


class ScoreAnswer(BaseModel):
    """The answer of `POST /score`; `best` is the index of the highest `normalised`."""

    scores: list[Score]
    best: int


class InventoryAnswer(BaseModel):
    """The answer of `GET /inventory`."""

    backbone: str
    kind: Literal["causal", "encoder-decoder"]
    modules: list[str]
    heads: int
    skills: int
    rank: int
    fingerprint: str
    quantize: Literal["int8", "int4"] | None = Field(description="What the backbone is held in")
    contexts: bool = Field(description="Whether a task can be made from a `context`")
