"""The suite as a Markdown table, from what is committed: the catalogue and the hashes."""

from benchmarks.tasks.catalogue import TASKS
from benchmarks.tasks.records import expected
from benchmarks.tasks.sources import SOURCES, Source
from benchmarks.tasks.spec import TaskSpec
from benchmarks.tasks.split import SPLITS


def table() -> str:
    """One row a task, the training tasks first."""
    ordered = sorted(TASKS, key=lambda spec: spec.held_out)
    head = "| task | kind | train / few-shot / test | choices | made from | held out |"
    return "\n".join([head, "|---|---|---|---|---|---|", *map(row, ordered)])


def row(spec: TaskSpec) -> str:
    known = expected()
    counts = [f"{known[f'{spec.name}/{split}.jsonl']['lines']:,}" for split in SPLITS]
    choices = str(len(spec.choices)) if spec.choices else "–"
    made_from = ", ".join(source.package for source in spec.sources) or "a range of numbers"
    held_out = "yes" if spec.held_out else ""
    return (
        f"| {spec.name} | {spec.kind} | {' / '.join(counts)} | {choices} | {made_from} "
        f"| {held_out} |"
    )


def source_table() -> str:
    head = "| package | version | licence of the data | examples may be passed on | note |"
    return "\n".join([head, "|---|---|---|---|---|", *map(source_row, SOURCES)])


def source_row(source: Source) -> str:
    passed_on = "yes" if source.redistributable else "no"
    return (
        f"| {source.package} | {source.version} | {source.licence} | {passed_on} | {source.note} |"
    )
