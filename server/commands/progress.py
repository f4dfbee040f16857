"""Progress bars of long commands, on stderr so that what is printed can be piped."""

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from polyhead.adapters.training.fewshot import FitProgress

Item = TypeVar("Item")


class Stage(Protocol):
    """How far a fit is, told by the method itself or by a server."""

    @property
    def step(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def loss(self) -> float | None: ...
    @property
    def score(self) -> float | None: ...


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
        self.show(progress.task, progress.method, progress)

    def show(self, task: str, method: str, at: Stage) -> None:
        """Move the bar of this task and method."""
        told = "no loss yet" if at.loss is None else f"loss {at.loss:.3f}"
        if at.score is not None:
            told += f", held out {at.score:.2f}"
        if (task, method) not in self._bars:
            name = f"{task} ({method})"
            self._bars[task, method] = self._progress.add_task(name, total=at.steps, told=told)
        bar = self._bars[task, method]
        self._progress.update(bar, completed=at.step, total=at.steps, told=told)
