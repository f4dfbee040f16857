"""Several tasks' LoRAs as one: what each way of merging keeps of them, on the suite.

The LoRAs are those of training tasks: materialised from the demo's inventory, whose components
stand in one order because all are mixtures of the same skills; or fitted alone from scratch, each
from its own seed. A merged LoRA answers the test examples of all of its tasks; the plain average
is what to beat.
"""

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import options, timing
from polyhead.adapters.convert.merging import Method, merge_loras
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.materialise import own_factors, peft_folder
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.training.answers import micro_batches
from polyhead.adapters.training.encode import Encoder
from polyhead.adapters.training.evaluate import EvalOptions, shots_of
from polyhead.adapters.training.fewshot import FitOptions, FitTask, fit
from polyhead.adapters.training.sources import PrivateSource
from polyhead.adapters.training.suite import SuiteTask, read_suite
from polyhead.adapters.training.trainable import Trainable
from polyhead.server.commands.fit import MICRO_TOKENS

GROUPS = {
    "alike": ("ing_form", "past_tense", "plural", "comparative"),
    "unlike": ("part_of_speech", "snake_to_camel", "number_words", "city_continent"),
}
OWN, BARE = "each its own", "none"


def main(
    backbone: options.Backbone = options.BACKBONE,
    inventory: options.Inventory = options.INVENTORY,
    suite: Annotated[Path, typer.Option(help="Folder of the suite")] = Path("data/suite"),
    test: Annotated[int, typer.Option(help="Test examples of a task")] = 30,
    steps: Annotated[int, typer.Option(help="Of a fit from scratch; 0 leaves those out")] = 60,
    threads: Annotated[int, typer.Option(help="Compute threads")] = 1,
) -> None:
    """Exact match by the training layers, which decide as greedy decoding does."""
    console = Console()
    torch.set_num_threads(threads)
    bench = Bench(backbone, Inventory.load(inventory), read_suite(suite), test)
    for group, names in GROUPS.items():
        console.log(f"{group}, materialised")
        own = bench.scores(bench.materialised(names), bench.trained_templates)
        show(console, f"{group}, materialised", own)
        if steps:
            fitted = bench.fitted(names, steps)
            console.log(f"{group}, fitted")
            show(console, f"{group}, fitted", bench.scores(fitted, bench.templates))


class Bench:
    """The backbone, loaded once."""

    def __init__(
        self, backbone: Path, inventory: Inventory, suite: Sequence[SuiteTask], test: int
    ) -> None:
        loose: Any = AutoModelForCausalLM
        self._model = loose.from_pretrained(backbone, dtype=torch.float32, local_files_only=True)
        self._model.eval().requires_grad_(False)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(backbone, local_files_only=True)
        self._inventory = inventory
        self._tasks = {task.name: task for task in suite}
        self._test = test
        self.templates = {task.name: task.template for task in suite}
        self.trained_templates = {**self.templates, **inventory.templates}

    def materialised(self, names: Sequence[str]) -> dict[str, PrivateAdapter]:
        """The LoRAs that the inventory's own tasks amount to."""
        layout = self._inventory.layout
        return {
            name: own_factors(self._inventory, self._inventory.tasks[name].weights(layout))
            for name in names
        }

    def fitted(self, names: Sequence[str], steps: int) -> dict[str, PrivateAdapter]:
        """LoRAs from scratch, on a task's few-shot examples."""
        wanted = [
            FitTask(
                name,
                tuple(shots_of(self._tasks[name], EvalOptions(examples=64), seed)),
                self._tasks[name].template,
                FitOptions(method="lora", steps=steps, seed=seed, patience=steps, holdout=0.05),
            )
            for seed, name in enumerate(names)
        ]
        found: dict[str, PrivateAdapter] = {}
        for one in fit(
            self._model, self._inventory, self._tokenizer, wanted, micro_tokens=MICRO_TOKENS
        ):
            assert one.private is not None
            found[one.task] = one.private
        return found

    def scores(
        self, loras: Mapping[str, PrivateAdapter], templates: Mapping[str, str]
    ) -> dict[str, dict[str, float]]:
        """Exact match by way of merging and task."""
        merged: dict[str, PrivateAdapter] = {}
        with tempfile.TemporaryDirectory() as folder:
            folders = {name: Path(folder, name) for name in loras}
            for name, path in folders.items():
                path.mkdir()
                for file, data in peft_folder(loras[name], "backbone").items():
                    (path / file).write_bytes(data)
            for method in get_args(Method):
                merged[method] = merge_loras(folders, self._model, method)
        first = next(iter(loras.values()))
        nothing = {name: torch.zeros_like(b) for name, b in first.b.items()}
        merged[BARE] = PrivateAdapter(first.a, nothing)
        rows = [(OWN, name, loras[name]) for name in loras]
        rows += [(way, name, one) for way, one in merged.items() for name in loras]
        asked = [(name, templates[name]) for _, name, _ in rows]
        exact = self._exact(asked, [one for _, _, one in rows])
        found: dict[str, dict[str, float]] = {}
        for (way, name, _), value in zip(rows, exact, strict=True):
            found.setdefault(way, {})[name] = value
        return found

    def _exact(
        self, asked: Sequence[tuple[str, str]], adapters: Sequence[PrivateAdapter]
    ) -> list[float]:
        """asked: of each adapter its task and that task's template."""
        modules = self._inventory.header.modules
        source = PrivateSource.of(modules, [o.a for o in adapters], [o.b for o in adapters])
        trainable = Trainable(self._model, modules, source.requires_grad_(False), 1.0)
        work = {
            number: Encoder(self._tokenizer, template).encode(self._tasks[name].test[: self._test])
            for number, (name, template) in enumerate(asked)
        }
        right = torch.zeros(len(asked))
        for part in micro_batches(work, MICRO_TOKENS):
            batch = trainable.pack([one for _, one in part], [i for i, _ in part])
            exact, _ = trainable.score(batch)
            right.index_add_(0, torch.tensor(batch.example_task), exact.float())
        trainable.detach()
        counts = torch.tensor([len(one) for one in work.values()])
        return [float(value) for value in right / counts]


def show(console: Console, title: str, scores: Mapping[str, Mapping[str, float]]) -> None:
    names = list(next(iter(scores.values())))
    rows = [
        [way, *[f"{own[name]:.2f}" for name in names], f"{statistics.mean(own.values()):.3f}"]
        for way, own in scores.items()
    ]
    columns = ("merged by", *names, "average")
    timing.print_table(console, f"{title}\n{timing.machine()}", columns, rows)


if __name__ == "__main__":
    typer.run(main)
