"""Both forms on a GPU: kernels against the reference, then decode steps of Llama-3-8B's shape."""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_model import SHAPES, SKILLS, Backbone, Beside, Combined, Factored, error
from polyhead.adapters import ops

LARGEST_ERROR = 0.03
"""Relative, of the kernels in bfloat16."""
ROUNDS = 5
REPLAYS = 10
PARTS = ("linears", "attention", "step")


@dataclass(frozen=True)
class Figure:
    """Milliseconds of what `part` names: `median` of the rounds, with the least and the most."""

    part: str
    form: str
    batch: int
    tasks: int
    resident: int
    median: float
    least: float
    most: float
    bytes_read: int

    @property
    def bandwidth(self) -> float:
        """GB/s, counting what must be read once."""
        return self.bytes_read / self.median / 1e6


def timed(run: Callable[[], object], device: torch.device) -> list[float]:
    """Milliseconds of each round; on a GPU a replayed graph, so that no launch is waited for."""
    run()  # compiles
    if device.type != "cuda":
        return [_clocked(run)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return _rounds(graph.replay)


def _rounds(run: Callable[[], object]) -> list[float]:
    times = []
    for _ in range(ROUNDS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / REPLAYS)
    return times[1:]


def _clocked(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


Side = tuple[str, int, int, Beside | None]
"""Form, resident tasks, bytes that it reads beside the backbone's, what it adds."""


def sides(
    backbone: Backbone, batch: int, tasks: int, known: list[list[ops.Factors]]
) -> Iterator[Side]:
    everyone, skills = backbone.shape.resident, backbone.skill_bytes
    if tasks == 1:
        yield "bare", everyone, 0, None
    yield "factored", everyone, skills, Factored(backbone, batch, tasks, everyone)
    yield "factored, forked", everyone, skills, Factored(backbone, batch, tasks, everyone)
    yield "factored, forked", tasks, skills, Factored(backbone, batch, tasks, tasks)
    yield (
        "combined, forked",
        tasks,
        tasks * skills // SKILLS,
        Combined(backbone, batch, tasks, known),
    )


def measure(backbone: Backbone, report: Callable[[Figure], None]) -> None:
    known: list[list[ops.Factors]] = []
    for batch in backbone.shape.batches:
        read = backbone.cache_bytes(batch)
        for tasks in (t for t in backbone.shape.tasks if t <= batch):
            for form, resident, more, beside in sides(backbone, batch, tasks, known):
                forked = "forked" in form
                runs = {
                    "linears": partial(backbone.linears, batch, beside, forked),
                    "step": partial(backbone.step, batch, beside, forked),
                }
                if beside is None:
                    runs["attention"] = partial(backbone.attention, batch)
                bytes_read = {
                    "linears": backbone.base_bytes - backbone.head.nbytes + more,
                    "attention": read,
                    "step": backbone.base_bytes + read + more,
                }
                for part, run in runs.items():
                    ms = timed(run, backbone.device)
                    span = statistics.median(ms), min(ms), max(ms)
                    report(Figure(part, form, batch, tasks, resident, *span, bytes_read[part]))


def tune(backbone: Backbone) -> dict[str, float]:
    """Milliseconds of the linear layers by the kernels' two sizes, of which the best are kept."""
    from polyhead.adapters import triton_step

    batch = sorted(backbone.shape.batches)[len(backbone.shape.batches) // 2]
    found = {}
    for most_parts in (8, 16, 32, 64):
        for tile in (64, 128, 256):
            triton_step.MOST_PARTS, triton_step.EXPAND_TILE = most_parts, tile
            beside = Factored(backbone, batch, batch, backbone.shape.resident)
            ms = timed(partial(backbone.linears, batch, beside, True), backbone.device)
            found[f"{most_parts} {tile}"] = statistics.median(ms)
            print(f"parts {most_parts}, tile {tile}: {found[f'{most_parts} {tile}']:.3f} ms")
    best = min(found, key=lambda key: found[key]).split()
    triton_step.MOST_PARTS, triton_step.EXPAND_TILE = map(int, best)
    return found


def row(figure: Figure) -> str:
    span = f"{figure.median:.3f} ({figure.least:.3f}–{figure.most:.3f})"
    who = figure.part, figure.form, figure.batch, figure.tasks, figure.resident
    return f"| {' | '.join(map(str, (*who, span, f'{figure.bandwidth:.0f}')))} |"


def ratios(figures: Sequence[Figure]) -> list[str]:
    """What the goals ask, from the whole step."""
    found = {(f.part, f.form, f.batch, f.tasks, f.resident): f.median for f in figures}
    everyone = max(f.resident for f in figures)
    largest = max(f.batch for f in figures)
    most = max(f.tasks for f in figures)
    lines = ["| ratio | linears | step |", "|---|---|---|"]

    def add(name: str, one: tuple[str, int, int, int], other: tuple[str, int, int, int]) -> None:
        cells = [found.get((part, *one), 0) / found.get((part, *other), 1e9)
                 for part in ("linears", "step")]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")

    for form in ("factored", "factored, forked"):
        for batch in sorted({f.batch for f in figures}):
            bare = "bare", batch, 1, everyone
            add(f"{form} over bare, batch {batch}, as many tasks",
                (form, batch, batch, everyone), bare)  # fmt: skip
        add(f"{form}: {most} tasks over 1, batch {largest}",
            (form, largest, most, everyone), (form, largest, 1, everyone))  # fmt: skip
    form = "factored, forked"
    add(f"combined over factored, {most} tasks",
        ("combined, forked", largest, most, most), (form, largest, most, most))  # fmt: skip
    add(f"{everyone} resident over as many as there are rows",
        (form, largest, most, everyone), (form, largest, most, most))  # fmt: skip
    return lines


def section(figures: Sequence[Figure], facts: dict[str, object]) -> str:
    """What belongs into RESULTS.md."""
    head = (
        f"## GPU\n\n`python -m benchmarks gpu`, {facts['device']}, torch {torch.__version__}. "
        f"Kernels against the float32 reference: {facts['error']:.1e}, another task's weights: "
        f"{facts['wrong']:.1e}. A copy moves {facts['copy']:.0f} GB/s. Routings of all resident "
        f"tasks: {facts['routing_bytes']:,} bytes. Milliseconds of replayed graphs.\n\n"
    )
    lines = [
        *ratios(figures),
        "",
        "| part | form | batch | tasks | resident | ms | GB/s |",
        "|---|---|---|---|---|---|---|",
        *map(row, figures),
    ]
    return head + "\n".join(lines) + "\n"


def copy_bandwidth(device: torch.device) -> float:
    """GB/s read and written by a copy far larger than the caches; not in a graph, which copies
    more slowly."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**20, device=device)
    target = torch.empty_like(source)
    if device.type != "cuda":
        return 2 * source.nbytes / _clocked(lambda: target.copy_(source)) / 1e6
    return 2 * source.nbytes / min(_rounds(lambda: target.copy_(source))) / 1e6


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", choices=SHAPES, default="llama-3-8b", help="whose shape")
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md")
    parser.add_argument("--tune", action="store_true", help="try the kernels' sizes first")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and options.backbone != "tiny":
        print("no CUDA device: not measured")
        return 0
    if not cuda:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    device = torch.device("cuda" if cuda else "cpu")
    copy = copy_bandwidth(device)
    backbone = Backbone(SHAPES[options.backbone], device, torch.bfloat16)
    found, wrong = error(backbone), error(backbone, shift=1)
    print(f"copy {copy:.0f} GB/s; error {found:.1e}, another task's {wrong:.1e}", flush=True)
    if not found < LARGEST_ERROR < wrong:
        print("the kernels are wrong")
        return 1
    figures: list[Figure] = []
    tuned = tune(backbone) if options.tune else {}
    facts: dict[str, object] = {
        "device": torch.cuda.get_device_name() if cuda else "CPU, interpreted",
        "error": found, "wrong": wrong, "copy": copy,
        "routing_bytes": backbone.weights.nbytes, "tuned": tuned,
    }  # fmt: skip

    def report(figure: Figure) -> None:
        figures.append(figure)
        print(row(figure), flush=True)
        if options.out is not None:  # kept as they come: a run may be cut off
            options.out.mkdir(parents=True, exist_ok=True)
            told = {**facts, "figures": [asdict(f) for f in figures]}
            (options.out / "gpu.json").write_text(json.dumps(told, indent=1))
            (options.out / "gpu.md").write_text(section(figures, facts))

    measure(backbone, report)
    print("\n".join(ratios(figures)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
