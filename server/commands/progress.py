"""Progress bars of long commands, on stderr so that what is printed can be piped."""

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from polyhead.adapters.training.fewshot import FitProgress


Item = TypeVar("Item")


def bar(items: Sequence[Item], name: Callable[[Item], str]) -> Iterator[Item]:
    """The items, with a bar that names the one at hand."""
    with Progress(console=Console(stderr=True)) as progress:
        whole = progress.add_task("", total=len(items))
        for item in items:
            progress.update(whole, description=name(item))
            yield item
            progress.advance(whole)


class FitBars:
    """One bar for each task and method of a fit; given to `fit` as its `report`."""

    def __init__(self) -> None:
        self._bars: dict[tuple[str, str], TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} steps, {task.fields[told]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )

    def __enter__(self) -> "FitBars":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def report(self, progress: "FitProgress") -> None:
        """Move a task's bar to its step, with the loss and the last held-out score."""
        key = (progress.task, progress.method)
        told = f"loss {progress.loss:.3f}"
        if progress.score is not None:
            told += f", held out {progress.score:.2f}"
        if key not in self._bars:
            name = f"{progress.task} ({progress.method})"
            self._bars[key] = self._progress.add_task(name, total=progress.steps, told=told)
        self._progress.update(
            self._bars[key], completed=progress.step, total=progress.steps, told=told
        )
