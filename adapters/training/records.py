"""What a run writes about itself: metrics.jsonl, and the same figures for TensorBoard."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class Records:
    """Appends a line per logged step. Lines after `step` are dropped first: a run that goes on
    from a checkpoint writes them again, so the file always tells one story."""

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        """step: steps that are already done."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept))
        unfinished.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._board = _board(folder / TENSORBOARD_FOLDER, step) if tensorboard else None

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """figures: numbers, or tables of numbers by name."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()
        if self._board is None:
            return
        for name, value in figures.items():
            table = value if isinstance(value, Mapping) else {"": value}
            for key, number in table.items():
                self._board.add_scalar(f"{name}/{key}".rstrip("/"), number, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; one that a killed run left half written is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _board(folder: Path, step: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it imports is deprecated in places
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(folder), purge_step=step + 1)
