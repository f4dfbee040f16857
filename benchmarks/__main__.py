"""`python -m benchmarks` lists the measurements; with a name it runs that one, with `all` each."""

import ast
import subprocess
import sys
from pathlib import Path

COMMANDS = (
    "throughput",
    "seq2seq",
    "vllm",
    "quantize",
    "roofline",
    "long_prompt",
    "registration",
    "memory",
    "liveness",
    "fit_lane",
    "fitting",
    "warm_start",
    "generator",
    "merging",
    "registry",
    "private",
    "simulate",
    "load",
    "vllm_load",
    "overload",
    "prefix",
    "soak",
    "replicas",
    "overhead",
    "dashboard_pictures",
    "lm_eval",
    "guidellm",
    "gpu",
    "comparison",
)


def main() -> int:
    name, *options = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name in COMMANDS:
        return run(name, options)
    if name == "all" and not options:
        return max(run(command, []) for command in COMMANDS)
    wrong = f"all takes no options: {' '.join(options)}" if name == "all" else f"no {name!r}"
    print(f"{wrong}\n\n{usage()}", file=sys.stderr)
    return 2


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {title(name)}" for name in COMMANDS]
    head = "usage: python -m benchmarks NAME [OPTION]... (NAME --help tells the options)\n"
    return "\n".join([head, *lines, f"  {'all':<{width}}  Each of them, one after another."])


def title(name: str) -> str:
    """The first line of the module's text, read without importing what it measures."""
    module = ast.parse(Path(__file__).with_name(f"{name}.py").read_text())
    return (ast.get_docstring(module) or name).splitlines()[0]


def run(name: str, options: list[str]) -> int:
    """In a process of its own, so that no measurement inherits another's memory and threads."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    return subprocess.run(command, cwd=Path(__file__).parents[1], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
