"""Where the states of interrupted fits lie."""

from collections.abc import Set
from pathlib import Path

SUFFIX = ".fit"


class StateFiles:
    """Files of batches in `folder`; those made for another inventory are never seen."""

    def __init__(self, folder: Path, inventory: str) -> None:
        self._folder = folder
        self._mark = inventory[:12]

    def path(self, batch: str) -> Path:
        """Where the worker puts and finds the state of a batch."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{batch}-{self._mark}{SUFFIX}"

    def drop(self, batch: str) -> None:
        """Forget a batch that is over."""
        self.path(batch).unlink(missing_ok=True)

    def keep(self, batches: Set[str]) -> None:
        """Forget every batch but these."""
        wanted = {self.path(batch) for batch in batches}
        for path in self._folder.glob(f"*{SUFFIX}*"):
            if path not in wanted:
                path.unlink()
