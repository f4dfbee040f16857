"""MHR, Poly and one shared LoRA of equal size over seeds, and what fitting makes of held-out tasks.

    python -m benchmarks comparison --seconds 290 --bfloat16
    python -m benchmarks comparison --steps 150 --together 1 --bfloat16

Every run is a process. Unless `--steps` says how many, all begin together with a few steps, from
which the number is chosen that the time allows; it is the same for all.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

METHODS = ("mhr", "poly", "lora")
POLL_SECONDS = 0.5
FEWEST_STEPS = 20


def main() -> int:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = [(method, seed) for seed in range(options.seeds) for method in options.methods]
    failed = in_turn(runs, options) if options.steps else side_by_side(runs, options)
    for command in failed:
        print(f"failed: {command}", file=sys.stderr)
    told = [json.loads(path.read_text()) for path in sorted(options.out.glob("run-*.json"))]
    (options.out / "comparison.json").write_text(json.dumps(told))
    print(report(told))
    return len(failed)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", type=Path, default=Path("data/SmolLM2-135M-Instruct"))
    parser.add_argument("--suite", type=Path, default=Path("data/suite"))
    parser.add_argument("--train", type=Path, default=Path("data/suite-train.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, default=3, help="from 0 on")
    parser.add_argument("--steps", type=int, help="of each run, instead of what --seconds allow")
    parser.add_argument("--together", type=int, default=9, help="runs at a time, with --steps")
    parser.add_argument("--bfloat16", action="store_true", help="autocast in training")
    parser.add_argument("--seconds", type=float, default=3600, help="of training, all together")
    parser.add_argument("--fit-seconds", type=float, default=3600, help="fits begin within these")
    parser.add_argument("--examples", type=int, default=256, help="of a step, over all tasks")
    parser.add_argument("--rank", type=int, default=3, help="of a skill; LoRA has all in one")
    parser.add_argument("--test", type=int, help="most test examples of a task")
    return parser.parse_args()


def in_turn(runs: Sequence[tuple[str, int]], options: argparse.Namespace) -> list[Any]:
    """Runs of `--steps`, so many at a time as `--together` says. The commands that failed."""
    (options.out / "steps").write_text(str(options.steps))
    with ThreadPoolExecutor(options.together) as pool:
        ended = pool.map(lambda run: finished(start(*run, options)), runs)
        return [command for command in ended if command is not None]


def side_by_side(runs: Sequence[tuple[str, int]], options: argparse.Namespace) -> list[Any]:
    """All at once, as many steps as `--seconds` allow. The commands that failed."""
    workers = [start(*run, options) for run in runs]
    steps = affordable(options, len(workers))
    (options.out / "steps").write_text(str(steps))
    print(f"{len(workers)} runs of {steps} steps", flush=True)
    return [command for command in map(finished, workers) if command is not None]


def finished(worker: "subprocess.Popen[bytes]") -> Any:
    """The command of a run that failed, once it has ended."""
    return worker.args if worker.wait() else None


def start(method: str, seed: int, options: argparse.Namespace) -> "subprocess.Popen[bytes]":
    """One run, its output in a file."""
    command = [sys.executable, "-m", "benchmarks.comparison_run", method, str(seed)]
    command.append(json.dumps(vars(options), default=str))
    threads = {"OMP_NUM_THREADS": "1"} if options.seeds * len(options.methods) > 1 else {}
    with (options.out / f"{method}-{seed}.log").open("wb") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **threads}
        )


def affordable(options: argparse.Namespace, runs: int) -> int:
    """How many steps fit into `--seconds`, once every run has told how long one takes."""
    told: list[float] = []
    while len(told) < runs:
        time.sleep(POLL_SECONDS)
        told = [float(path.read_text()) for path in options.out.glob("*.seconds")]
    return max(FEWEST_STEPS, int(options.seconds / max(told)))


def report(runs: Sequence[dict[str, Any]]) -> str:
    """Averages over tasks: the median over seeds, with the least and the most."""
    lines = ["| tasks | trained by | answered by | exact match | seeds |", "|---|---|---|---|---|"]
    kinds = dict.fromkeys((kind, run["method"], way) for run in runs
                          for kind, ways in run["scores"].items() for way in ways)  # fmt: skip
    for kind, method, way in kinds:
        found = [
            100 * statistics.mean(run["scores"][kind][way].values())
            for run in runs
            if run["method"] == method and run["scores"].get(kind, {}).get(way)
        ]
        if found:
            span = f"{statistics.median(found):.1f} ({min(found):.1f}–{max(found):.1f})"
            lines.append(f"| {kind} | {method} | {way} | {span} | {len(found)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
