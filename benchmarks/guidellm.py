"""guidellm, unmodified, against `/v1`: first token, gaps between tokens and tokens a second.

    python -m benchmarks guidellm --streams 1,4,16 --requests 32

Streams chats and completions of synthetic prompts to one of the demo's tasks, some at a time.
Nothing is fetched but guidellm itself, once; it counts tokens with the backbone's own tokenizer.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.serving import Served
from benchmarks.tool_environment import (
    add_server_options,
    environment,
    run_offline,
    server_of,
)

REQUIREMENTS = ("guidellm==0.8.1", "torch>=2.11,<2.14")
FORMATS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
FIGURES = {
    "first token ms": "time_to_first_token_ms",
    "gap ms": "inter_token_latency_ms",
    "tokens/s": "output_tokens_per_second",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_server_options(parser)
    parser.add_argument("--streams", default="1,4,16", help="Requests at a time, of each run")
    parser.add_argument("--requests", type=int, default=32, help="Requests of each run")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    options = parser.parse_args()
    programs = environment("guidellm", *REQUIREMENTS)
    with server_of(options) as served:
        for name in FORMATS:
            with tempfile.TemporaryDirectory() as folder:
                for line in measured(programs, Path(folder), served, name, options):
                    print(f"{name}: {line}")


def measured(
    programs: Path, folder: Path, served: Served, name: str, options: argparse.Namespace
) -> list[str]:
    """One run of guidellm; a line for each number of streams."""
    tokens = {"prompt_tokens": options.prompt_tokens, "output_tokens": options.output_tokens}
    settings: dict[str, dict[str, Any]] = {
        "backend": {
            "kind": "openai_http",
            "target": f"http://127.0.0.1:{served.port}",
            "model": options.task,
            "request_format": FORMATS[name],
            "api_routes": {"/health": "health/ready"},
            "http2": False,
        },
        "tokenizer": {"kind": "huggingface_auto", "model": str(options.backbone.resolve())},
        "data": {"kind": "synthetic_text", **tokens},
        "profile": {"kind": "concurrent", "streams": json.loads(f"[{options.streams}]")},
        "constraint": {"kind": "max_requests", "count": options.requests},
        "output": {"kind": "json", "path": str(folder / "report.json")},
    }
    command = [str(programs / "guidellm"), "run", "--disable-console"]
    for option, value in settings.items():
        command += [f"--{option}", json.dumps(value)]
    run_offline(command, folder)
    report = json.loads((folder / "report.json").read_text())
    return [summary(benchmark) for benchmark in report["benchmarks"]]


def summary(benchmark: dict[str, Any]) -> str:
    """Streams, requests by how they ended, and medians."""
    metrics = benchmark["metrics"]
    totals = metrics["request_totals"]
    medians = [
        f"{label} {metrics[figure]['successful']['median']:.1f}"
        for label, figure in FIGURES.items()
    ]
    streams = benchmark["config"]["strategy"]["streams"]
    if totals["errored"]:
        raise SystemExit(f"{totals['errored']} requests failed")
    return f"{streams} streams, {totals['successful']} requests, median " + ", ".join(medians)


if __name__ == "__main__":
    main()
