"""What the server answers, as pydantic models.

Fields that a newer server adds are kept and do no harm; `model_extra` holds them.
"""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Granularity = Literal["module", "block", "model"]
RoutingKind = Literal["logits", "weights", "coefficients"]
FinishReason = Literal["stop", "length", "abort", "deadline"]
JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Scalar = str | int | float | bool | None


class Answer(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Candidate(Answer):
    """One token and its natural log-probability."""

    token_id: int
    token: str
    logprob: float


class Token(Candidate):
    """A chosen token, with the likeliest ones at its place."""

    top: list[Candidate]


class Usage(Answer):
    """Tokens, summed over all choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Choice(Answer):
    """One of the `n` answers."""

    index: int
    text: str
    token_ids: list[int] | None = None
    finish_reason: FinishReason
    logprobs: list[Token] | None = None


class Generated(Answer):
    """The answer of `generate`."""

    id: str
    task: str
    generation: str
    choices: list[Choice]
    usage: Usage

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


class Piece(Answer):
    """One event of `stream`: the next text of the choice `index`. `finish_reason` ends a choice,
    `usage` comes with the last piece of all."""

    index: int
    text: str
    token_ids: list[int] | None = None
    logprobs: list[Token] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


class Score(Answer):
    """`logprob` is the sum over the choice's tokens, `normalised` their mean."""

    choice: str | list[int]
    logprob: float
    tokens: int
    normalised: float


class Scored(Answer):
    """The answer of `score`; `best` is the index of the highest `normalised`."""

    scores: list[Score]
    best: int

    @property
    def choice(self) -> str | list[int]:
        """The best choice."""
        return self.scores[self.best].choice


class Task(Answer):
    """A task as it is now. `granularity` and `routing_kind` are None without a routing."""

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


class TaskPage(Answer):
    """A part of the list of tasks; `next` is the cursor of the part after it."""

    tasks: list[Task]
    next: str | None


class Version(Task):
    """What a task is (`ended` is None) or was until then."""

    ended: Literal["replaced", "deleted"] | None
    ended_at: datetime | None


class History(Answer):
    """The answer of `tasks.history`, newest first."""

    versions: list[Version]


class Neighbour(Answer):
    """A task with a similar routing."""

    id: str
    cosine: float


class Similar(Answer):
    """The answer of `tasks.similar`, nearest first."""

    similar: list[Neighbour]


class Progress(Answer):
    """How far a fit has come. `score` is of the held-out examples, in [0, 1]."""

    step: int = 0
    steps: int = 0
    loss: float | None = None
    score: float | None = None


class Point(Progress):
    """One step of a running fit. `seconds_left` follows from the pace so far."""

    method: str
    seconds_left: float | None = None


class MethodScore(Answer):
    """What one method came to on the held-out examples."""

    method: str
    score: float | None = None
    seconds: float


class FitResult(Answer):
    """What a job has made. `prompted_score` is the bare backbone's, with examples in its prompt;
    `began_from` the tasks that a warm start found near, the nearest first."""

    generation: str
    method: str
    score: float | None = None
    prompted_score: float | None = None
    methods: list[MethodScore] | None = None
    seconds: float
    began_from: list[str] | None = None


class Job(Answer):
    """A job as it is now. `result` once it has succeeded, `error` once it has failed."""

    id: str
    task: str
    state: JobState
    progress: Progress
    result: FitResult | None = None
    error: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether it can still change."""
        return self.state in ("queued", "running")


class JobPage(Answer):
    """A part of the list of jobs; `next` is the cursor of the part after it."""

    jobs: list[Job]
    next: str | None


class Inventory(Answer):
    """What the server has loaded."""

    backbone: str
    kind: str = "causal"
    modules: list[str]
    heads: int
    skills: int
    rank: int
    fingerprint: str
    quantize: str | None = None
    contexts: bool = False


class Health(Answer):
    """Whether the server takes requests; `code` and `detail` say why not."""

    ready: bool
    code: str | None = None
    detail: str | None = None
