"""How much of everything is deployed."""

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from polyhead.server.config import Settings


class Scale(BaseModel, frozen=True):
    """How many replicas, and what each takes of its machine."""

    min_replicas: int = Field(1, ge=1, description="Replicas that always run")
    max_replicas: int = Field(1, ge=1, description="Replicas at the highest load")
    gateways: int = Field(1, ge=1, description="Processes that take calls in")
    cpus: float = Field(1.0, gt=0, description="Cores of a replica, as Ray counts them")
    gpus: float = Field(0.0, ge=0, description="GPUs of a replica")
    listen: Literal["head", "every"] = Field(
        "head", description="Machines that listen on the port; every is for a balancer in front"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "Scale":
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, expected at least min_replicas, "
                f"{self.min_replicas}"
            )
        return self

    def check(self, settings: Settings) -> None:
        """Raises `ValueError` where these replicas would not share a registry."""
        if self.max_replicas > 1 and settings.database_url is None:
            raise ValueError(
                f"--database-url is needed with {self.max_replicas} replicas: a PostgreSQL that "
                "all of them share, since in SQLite each would have tasks of its own"
            )
