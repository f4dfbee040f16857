"""What a pre-training run is: one TOML file, read into one checked value."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from polyhead.adapters.inject import ALL_LINEAR
from polyhead.adapters.inventory import DtypeName
from polyhead.adapters.routing import Granularity
from polyhead.adapters.training.encode import DEFAULT_TEMPLATE
from polyhead.adapters.training.errors import ConfigError

Method = Literal["lora", "poly", "mhr", "mu-zero-shot", "generator"]
Count = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """A table of the file; a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataPart(Part):
    """`[data]`: what is learned from."""

    train: tuple[str, ...] = Field(
        min_length=1,
        description="JSONL files or `datasets` folders; patterns such as */train.jsonl",
    )
    template: str = Field(
        default=DEFAULT_TEMPLATE, description="What the backbone reads, with {input}"
    )
    templates: dict[str, str] = Field(default={}, description="By task, instead of `template`")
    max_tokens: Count = Field(default=512, description="The longest example, answer included")
    sampling: Literal["balanced", "proportional"] = Field(
        default="balanced", description="Every task equally often, or in proportion to its examples"
    )


class SkillsPart(Part):
    """`[skills]`: the inventory's shape."""

    heads: Count = Field(default=8, description="H; 1 for `poly` and `lora`")
    skills: Count = Field(default=8, description="S; 1 for `lora`")
    rank: Count = Field(default=4, description="r of every skill")
    scaling: float = Field(default=1.0, gt=0, description="What x A B is multiplied by")
    targets: str | tuple[str, ...] = Field(
        default=ALL_LINEAR, description="Names of layers to adapt"
    )
    granularity: Granularity = Field(
        default="module", description="Which modules share their logits"
    )
    relaxed: bool = Field(
        default=False, description="Sample weights from a relaxed Bernoulli distribution"
    )
    dtype: DtypeName = Field(default="float32", description="Numbers of the written inventory")


class GeneratorPart(Part):
    """`[generator]`: of `method = "generator"`, which makes routings of contexts."""

    rank: Count = Field(default=32, description="R of the map from embeddings to coefficients")
    context: Count = Field(default=16, description="Examples of a context at most; 1 at least")
    pool: Count = Field(default=64, description="Examples of each task that contexts are made of")


class OptimiserPart(Part):
    """`[optimiser]`: AdamW with two learning rates."""

    steps: Count = 1000
    rate: float = Field(default=1e-3, gt=0, description="Learning rate of A and B")
    logits_rate: float | None = Field(
        default=None, gt=0, description="Learning rate of the logits; not given, 100 times `rate`"
    )
    warm_up: float = Field(
        default=0.06, ge=0, lt=1, description="Share of the steps that rises from 0"
    )
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    clip: float | None = Field(default=1.0, gt=0, description="Largest norm of the gradient")
    weight_decay: float = Field(default=0.0, ge=0, description="Of A and B; the logits have none")


class BatchPart(Part):
    """`[batch]`: how much one step looks at and how it is computed."""

    examples: Count = Field(default=32, description="Examples of a step, over all processes")
    tasks: Count = Field(default=8, description="Tasks of a step; each gives equally many examples")
    accumulate: Count = Field(default=1, description="Forward and backward passes of a step")
    checkpointing: bool = Field(
        default=False, description="Compute blocks again instead of keeping them"
    )
    bfloat16: bool = Field(default=False, description="bf16 autocast; A, B and logits stay float32")
    threads: Count | None = Field(
        default=None, description="CPU threads; not given, torch's choice"
    )

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.examples % self.tasks:
            raise ValueError(f"examples ({self.examples}) is no multiple of tasks ({self.tasks})")
        return self


class RecordsPart(Part):
    """`[records]`: what is written while training."""

    every: Count = Field(default=1, description="Steps between two lines of metrics.jsonl")
    checkpoint_every: Count = Field(default=50, description="Steps between two checkpoints")
    keep: Count = Field(default=2, description="Checkpoints kept")
    alignment_every: Count | None = Field(
        default=None, description="Steps between two measurements of gradient alignment"
    )
    tensorboard: bool = True


class TrainingConfig(Part):
    """The whole file."""

    backbone: str = Field(description="Folder of a transformers model")
    output: Path = Field(description="Folder of the run; its `inventory` is the result")
    method: Method = "mhr"
    start: Path | None = Field(
        default=None, description="Inventory whose skills and routings training goes on from"
    )
    seed: int = 0
    data: DataPart
    skills: SkillsPart = SkillsPart()
    generator: GeneratorPart = GeneratorPart()
    optimiser: OptimiserPart = OptimiserPart()
    batch: BatchPart = BatchPart()
    records: RecordsPart = RecordsPart()

    @model_validator(mode="after")
    def _method_fits(self) -> Self:
        one_head = self.method in ("lora", "poly") and self.skills.heads != 1
        if one_head or (self.method == "lora" and self.skills.skills != 1):
            wanted = "heads = 1, skills = 1" if self.method == "lora" else "heads = 1"
            raise ValueError(f"method {self.method!r} means {wanted} in [skills]")
        if self.method in ("mu-zero-shot", "generator") and self.start is None:
            raise ValueError(f"{self.method} needs an inventory to `start` from")
        return self

    @property
    def logits_rate(self) -> float:
        """Learning rate of the logits: 100 times that of the skills, as published."""
        given = self.optimiser.logits_rate
        return 100 * self.optimiser.rate if given is None else given


def read_config(path: Path | str, method: str | None = None) -> TrainingConfig:
    """Read a TOML file. Raises `ConfigError` that names the file, the key and what was expected.

    method: instead of the file's. Relative paths in the file start at the working folder.
    """
    try:
        plain = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"cannot be read: {exc.strerror}", field=str(path)) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"not TOML: {exc}", field=str(path)) from exc
    return parse_config(plain if method is None else {**plain, "method": method}, str(path))


def parse_config(plain: dict[str, Any], where: str) -> TrainingConfig:
    """Check what a file holds. Raises `ConfigError` naming the first wrong key."""
    try:
        return TrainingConfig.model_validate(plain)
    except ValidationError as exc:
        error = exc.errors()[0]
        key = ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            raise ConfigError("unknown key", field=f"{where}: {key}") from exc
        found = "" if error["type"] == "missing" or not key else repr(error["input"])[:80]
        message = error["msg"].removeprefix("Value error, ")
        raise ConfigError(message, field=f"{where}: {key}".rstrip(": "), found=found) from exc
