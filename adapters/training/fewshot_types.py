"""What a fit is asked and what it answers."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Routing
from polyhead.adapters.training.data import Example
from polyhead.adapters.training.encode import DEFAULT_TEMPLATE
from polyhead.adapters.training.errors import ConfigError

TrainedMethod = Literal["z", "mhr", "mu", "lora"]
Method = Literal["auto", "z", "mhr", "mu", "lora"]


@dataclass(frozen=True)
class FitOptions:
    """How one task is fitted. Raises `ConfigError` naming the option that is out of range.

    method: `z` learns a routing over the inventory; `mhr` skills and routing, `mu` an adapter that
    starts from the skills' average, `lora` one from scratch, each the task's own afterwards;
    `auto` learns a routing and, where that does not beat the prompted backbone, tries `mu` too.
    holdout: the fraction of examples to score on. folds: score every example, in that many turns.
    At most one of the two; neither chooses by the number of examples (`holdout.choose_splits`).
    warm_start: of the methods that learn a routing, `z` and `mhr`; `mu` and `lora` have none.
    """

    method: Method = "auto"
    steps: int = 60
    logits_rate: float = 0.5  # of a routing alone; beside skills a hundred times `rate`
    rate: float = 3e-3  # of A and B
    batch_examples: int = 4  # a step
    patience: int = 3  # scorings without improvement before it stops
    holdout: float | None = None
    folds: int | None = None
    warm_start: bool = False  # begin from the routing of the nearest known task
    prompted: bool = False  # score the bare backbone with the examples in its prompt; auto does
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.method in get_args(Method), "method", self.method, f"one of {METHODS}")
        for name in ("steps", "batch_examples", "patience"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("logits_rate", "rate"):
            value = getattr(self, name)
            _require(0 < value <= 100, name, value, "above 0 and at most 100")
        if self.holdout is not None:
            _require(0 < self.holdout < 1, "holdout", self.holdout, "between 0 and 1")
        if self.folds is not None:
            _require(self.folds >= 2, "folds", self.folds, "at least 2")
            _require(self.holdout is None, "folds", self.folds, "nothing beside holdout")
        if self.warm_start:
            _require(self.method not in ("mu", "lora"), "warm_start", True, f"no {self.method}")
        _require(self.seed >= 0, "seed", self.seed, "at least 0")


METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True)
class FitTask:
    """One task of a joint fit: its name, what to learn from, and how."""

    name: str
    examples: tuple[Example, ...]
    template: str = DEFAULT_TEMPLATE
    options: FitOptions = field(default_factory=FitOptions)


@dataclass(frozen=True)
class FitProgress:
    """How far one task is. loss: of the last step, mean over examples of the mean over an answer's
    tokens. score: held-out exact match of the last scoring, None before the first."""

    task: str
    method: TrainedMethod
    step: int
    steps: int
    loss: float
    score: float | None


@dataclass(frozen=True)
class MethodScore:
    """Held-out exact match in [0, 1] of one way to do the task; None where nothing was held out.

    method: a `TrainedMethod`, or "prompted" for the bare backbone with the examples before it.
    """

    method: str
    score: float | None
    seconds: float


@dataclass(frozen=True)
class FitResult:
    """The better of what was tried: a routing or a private adapter, the other is None."""

    task: str
    method: TrainedMethod
    routing: Routing | None
    private: PrivateAdapter | None
    score: float | None
    prompted_score: float | None
    methods: tuple[MethodScore, ...]
    seconds: float
    began_from: tuple[str, ...] = ()  # the known tasks that a warm start found near


def _require(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise ConfigError("out of range", field=name, found=str(found), expected=expected)
