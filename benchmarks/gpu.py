"""Both forms on a GPU: kernels against the reference, then decode steps of Llama-3-8B's linears."""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from polyhead.adapters import ops
from polyhead.adapters.compiled import FactorTable

HEADS, SKILLS, RANK = 8, 8, 16
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 0.03}
ROUNDS = 5


@dataclass(frozen=True)
class Shape:
    """The linear layers of one transformer block: groups of (input, outputs) by shared input."""

    layers: int
    groups: Sequence[tuple[int, Sequence[int]]]
    batches: Sequence[int]
    tasks: Sequence[int]
    resident: int

    @property
    def modules(self) -> int:
        return self.layers * sum(len(outs) for _, outs in self.groups)


SHAPES = {
    "llama-3-8b": Shape(
        32,
        [(4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,))],
        batches=(1, 16, 64, 256),
        tasks=(1, 16, 256),
        resident=100_000,
    ),
    "tiny": Shape(1, [(64, (64, 32)), (64, (64,))], batches=(1, 4), tasks=(1, 4), resident=50),
}


@dataclass(frozen=True, eq=False)
class Layer:
    """A group of modules: base weights, and the skills beside them."""

    base: list[Tensor]  # [O, I]
    group: ops.SkillGroup
    first: int  # number of its first module


@dataclass(frozen=True)
class Figure:
    """Milliseconds of one step: `median` of the rounds, with the least and the most."""

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
        """GB/s, counting what the step must read once."""
        return self.bytes_read / self.median / 1e6


class Backbone:
    """Random linears of a shape on the device, with skills and a table of resident routings."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.layers = list(self._layers())
        size = shape.resident, shape.modules, HEADS, SKILLS
        self.weights = torch.rand(size, device=device, dtype=torch.float16)
        self.inputs = {
            width: torch.randn(max(shape.batches), width, device=device).to(dtype)
            for width in {width for width, _ in shape.groups}
        }

    def _layers(self) -> Iterator[Layer]:
        first = 0
        for _ in range(self.shape.layers):
            for width, outs in self.shape.groups:
                base = [self._random(out, width) for out in outs]
                a = [self._random(HEADS, SKILLS, width // HEADS, RANK) for _ in outs]
                b = [self._random(HEADS, SKILLS, RANK, out // HEADS) for out in outs]
                yield Layer(base, ops.SkillGroup.pack(a, b, 1 / RANK, self.dtype), first)
                first += len(outs)

    def _random(self, *size: int) -> Tensor:
        return torch.randn(size, device=self.device, dtype=self.dtype) * 0.02

    def factors(self) -> list[ops.Factors]:
        """One task's own A_t and B_t, random."""
        found = []
        for layer in self.layers:
            width = layer.base[0].shape[1]
            b = tuple(self._random(RANK, len(base)) for base in layer.base)
            found.append(ops.Factors(self._random(width, RANK * len(b)), b))
        return found

    def run(self, batch: int, add: Callable[[Layer, int, Tensor, list[Tensor]], None]) -> None:
        """The linears of one step."""
        for index, layer in enumerate(self.layers):
            x = self.inputs[layer.base[0].shape[1]][:batch]
            add(layer, index, x, [x @ base.T for base in layer.base])


def bare(*_: object) -> None:
    """What is added without adapters."""


def factored(backbone: Backbone, batch: int, tasks: int, resident: int) -> Callable[..., None]:
    from polyhead.adapters.triton_step import TritonFactored

    picked = torch.randperm(resident, device=backbone.device)[:tasks]
    rows = picked[torch.arange(batch, device=backbone.device) % len(picked)]
    step = TritonFactored(
        torch.arange(batch, device=backbone.device), rows, backbone.weights[:resident]
    )

    def add(layer: Layer, _: int, x: Tensor, outputs: list[Tensor]) -> None:
        mixed = step.shrink(layer.group, layer.first, x)
        for g, y in enumerate(outputs):
            step.expand(layer.group, layer.first, g, mixed, y)

    return add


def combined(
    backbone: Backbone, batch: int, tasks: int, factors: list[list[ops.Factors]]
) -> Callable[..., None]:
    from polyhead.adapters.triton_step import TritonCombined

    factors += [backbone.factors() for _ in range(tasks - len(factors))]
    sizes = [len(layer.base) for layer in backbone.layers]
    tables = [FactorTable.of(own, sizes) for own in factors[:tasks]]
    positions = [list(range(task, batch, tasks)) for task in range(tasks)]
    step = TritonCombined(tables, positions, backbone.device)

    def add(layer: Layer, index: int, x: Tensor, outputs: list[Tensor]) -> None:
        hidden = step.shrink(index, x)
        for g, y in enumerate(outputs):
            step.expand(layer.first + g, hidden, y)

    return add


def error(backbone: Backbone, shift: int = 0) -> float:
    """Of the factored and the combined kernels on one group against the float32 reference."""
    from polyhead.adapters.triton_step import TritonCombined, TritonFactored

    tokens, layer = 3, backbone.layers[0]
    x = backbone.inputs[layer.base[0].shape[1]][:1].repeat(tokens, 1)
    rows = (torch.arange(tokens, device=backbone.device) + shift) % tokens
    size = len(layer.base)
    weights = backbone.weights[:tokens, layer.first : layer.first + size].float()
    width, rank, skills = x.shape[1] // HEADS, RANK, SKILLS
    a = layer.group.a.view(HEADS, width, size, skills, rank)[:, :, 0].transpose(1, 2)
    b = layer.group.b[0].view(HEADS, skills, rank, -1)
    expected = ops.reference(x, a, b, weights[:, 0], 1.0)
    step = TritonFactored(torch.arange(tokens, device=backbone.device), rows, backbone.weights)
    own = [ops.fold_factors(layer.group, weights[row]) for row in rows.tolist()]
    tables = [FactorTable.of([factors], [size]) for factors in own]
    grouped = TritonCombined(tables, [[token] for token in range(tokens)], backbone.device)
    y, z = (x.new_zeros(expected.shape) for _ in range(2))
    step.expand(layer.group, layer.first, 0, step.shrink(layer.group, layer.first, x), y)
    grouped.expand(0, grouped.shrink(0, x), z)
    return max(float((t.float() - expected).norm() / expected.norm()) for t in (y, z))


def timed(run: Callable[[], None], device: torch.device) -> list[float]:
    """Milliseconds of each round; on a GPU a replayed graph, so that no launch is waited for."""
    run()  # compiles
    if device.type != "cuda":
        return [_clocked(run) for _ in range(2)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(ROUNDS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 10)
    return times[1:]


def _clocked(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def measure(backbone: Backbone) -> list[Figure]:
    figures = []
    factors: list[list[ops.Factors]] = []
    base = sum(t.nbytes for layer in backbone.layers for t in layer.base)
    skills = sum(t.nbytes for la in backbone.layers for t in (la.group.a, *la.group.b))
    for batch in backbone.shape.batches:
        for tasks in (t for t in backbone.shape.tasks if t <= batch):
            most = backbone.shape.resident
            sides = [
                ("bare", most, 0, bare),
                ("factored", most, skills, factored(backbone, batch, tasks, most)),
                ("factored", tasks, skills, factored(backbone, batch, tasks, tasks)),
                ("combined", tasks, tasks * skills // SKILLS,
                 combined(backbone, batch, tasks, factors)),
            ]  # fmt: skip
            for form, resident, read, add in sides:
                ms = timed(lambda: backbone.run(batch, add), backbone.device)  # noqa: B023
                figure = Figure(
                    form, batch, tasks, resident,
                    statistics.median(ms), min(ms), max(ms), base + read,
                )  # fmt: skip
                figures.append(figure)
                print(row(figure), flush=True)
    return figures


def row(figure: Figure) -> str:
    span = f"{figure.median:.3f} ({figure.least:.3f}–{figure.most:.3f})"
    cells = (
        figure.form,
        figure.batch,
        figure.tasks,
        figure.resident,
        span,
        f"{figure.bandwidth:.0f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def section(figures: Sequence[Figure], found: float, wrong: float, device: str) -> str:
    """What belongs into RESULTS.md."""
    most = max(figure.resident for figure in figures)
    head = (
        f"## GPU\n\n`python -m benchmarks gpu`, {device}, torch {torch.__version__}. Kernels "
        f"against the float32 reference: {found:.1e}, another task's weights: {wrong:.1e}. Linear "
        f"layers of a decode step, in milliseconds; {most} tasks resident, or no others.\n\n"
    )
    lines = [
        "| form | batch | tasks | resident | ms | GB/s |",
        "|---|---|---|---|---|---|",
        *map(row, figures),
    ]
    return head + "\n".join(lines) + "\n"


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", choices=SHAPES, default="llama-3-8b", help="whose shape")
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and options.backbone != "tiny":
        print("no CUDA device: not measured")
        return 0
    if not cuda:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16
    backbone = Backbone(SHAPES[options.backbone], device, dtype)
    found, wrong = error(backbone), error(backbone, shift=1)
    if not found < LARGEST_ERROR[dtype] < wrong:
        print(f"kernels are wrong: {found:.1e} from the reference, {wrong:.1e} for another task")
        return 1
    figures = measure(backbone)
    name = torch.cuda.get_device_name() if cuda else "CPU, interpreted"
    text = section(figures, found, wrong, name)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        report = {"device": name, "error": found, "figures": [asdict(f) for f in figures]}
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1))
        (options.out / "gpu.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
