"""`python -m benchmarks.tasks`: build the suite, verify it, list it, export it for training."""

import argparse
import gc
import sys
from pathlib import Path

from benchmarks.tasks.sources import SOURCES, SourceError, require


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except SourceError as exc:
        print(exc, file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="make the suite and compare it with its hashes")
    build.add_argument("out", type=Path, help="folder to write; what it held of a suite goes")
    build.add_argument("--accept", action="store_true", help="make these the committed hashes")
    build.set_defaults(run=run_build)
    verify = commands.add_parser("verify", help="check a built suite and name what is wrong")
    verify.add_argument("out", type=Path)
    verify.set_defaults(run=run_verify)
    listing = commands.add_parser("list", help="print the tasks as a table")
    listing.set_defaults(run=run_list)
    export = commands.add_parser("export", help="write one split of several tasks as JSONL")
    export.add_argument("out", type=Path, help="folder of a built suite")
    export.add_argument("file", type=Path)
    export.add_argument("--split", default="train", help="train, fewshot or test")
    export.add_argument(
        "--tasks", default="pretrain", help="pretrain, held-out, all, or names with commas"
    )
    export.set_defaults(run=run_export)
    return top


def run_build(options: argparse.Namespace) -> int:
    require(SOURCES)
    from benchmarks.tasks.catalogue import TASKS
    from benchmarks.tasks.records import accept, differences, render, write
    from benchmarks.tasks.split import split_suite

    # A quarter of the time would go to looking for garbage among tables that all stay in use.
    gc.disable()
    files = render(TASKS, split_suite(TASKS))
    write(options.out, files)
    if options.accept:
        accept(files)
    return report(differences(files), f"{len(TASKS)} tasks built in {options.out}")


def run_verify(options: argparse.Namespace) -> int:
    from benchmarks.tasks.checks import verify

    return report(verify(options.out), f"{options.out} is as committed, and nothing overlaps")


def report(wrong: list[str], fine: str) -> int:
    print("\n".join(wrong) or fine, file=sys.stderr if wrong else sys.stdout)
    return 1 if wrong else 0


def run_list(_options: argparse.Namespace) -> int:
    require(SOURCES)
    from benchmarks.tasks.table import source_table, table

    print(f"{table()}\n\n{source_table()}")
    return 0


def run_export(options: argparse.Namespace) -> int:
    from benchmarks.tasks.built import SuiteError, export

    try:
        content = export(options.out, options.tasks, options.split)
    except SuiteError as exc:
        print(exc, file=sys.stderr)
        return 2
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_bytes(content)
    lines = content.count(b"\n")
    print(f"{lines:,} examples in {options.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
