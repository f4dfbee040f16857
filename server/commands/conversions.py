"""`polyhead convert` and `polyhead inventory`: inventories and LoRAs of what others trained."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polyhead.server.commands.common import fail, one_line_errors

if TYPE_CHECKING:
    from polyhead.adapters.inventory import Inventory
    from polyhead.adapters.private import PrivateAdapter

convert_app = typer.Typer(
    help="Turn a foreign checkpoint into an inventory, or into a LoRA.", no_args_is_help=True
)
inventory_app = typer.Typer(
    help="Make an inventory, or one LoRA, out of LoRAs.", no_args_is_help=True
)

Out = Annotated[Path, typer.Argument(help="Folder of the inventory to write")]
Backbone = Annotated[str, typer.Option(help="Folder of the backbone, or its name on the hub")]
Loras = Annotated[
    list[str],
    typer.Argument(help="PEFT LoRA folders, each as FOLDER or NAME=FOLDER", metavar="LORA..."),
]
Names = Annotated[
    Path | None, typer.Option(help="Task names, one a line, in the order of training")
]


@convert_app.command("peft")
def convert_peft_command(
    source: Annotated[Path, typer.Argument(help="Folder of a PEFT POLY adapter")],
    out: Out,
    backbone: Backbone,
    names: Names = None,
) -> None:
    """Turn a PEFT POLY adapter into an inventory and the routings of its tasks."""
    from polyhead.adapters.convert.peft import convert_peft

    _convert(convert_peft, source, out, backbone, names)


@convert_app.command("mttl")
def convert_mttl_command(
    source: Annotated[Path, typer.Argument(help="Folder of the checkpoint, or its .ckpt file")],
    out: Out,
    backbone: Backbone,
    names: Names = None,
) -> None:
    """Turn a Poly or MHR checkpoint of mttl, camera-ready or main, into an inventory."""
    from polyhead.adapters.convert.mttl import convert_mttl

    _convert(convert_mttl, source, out, backbone, names)


@convert_app.command("polytropon")
def convert_polytropon_command(
    source: Annotated[Path, typer.Argument(help="The state dict's file")],
    out: Out,
    backbone: Backbone,
    names: Names = None,
) -> None:
    """Turn a state dict of McGill's Polytropon into an inventory."""
    from polyhead.adapters.convert.polytropon import convert_polytropon

    _convert(convert_polytropon, source, out, backbone, names)


@convert_app.command("adamix")
def convert_adamix_command(
    source: Annotated[Path, typer.Argument(help="The .pt file of a run with LoRA modules")],
    out: Annotated[Path, typer.Argument(help="Folder of the LoRA to write, new or empty")],
    backbone: Backbone,
    alpha: Annotated[float, typer.Option(help="The run's --lora_alpha, which the file lacks")],
) -> None:
    """Average the modules of an AdaMix checkpoint to one LoRA, which a task can own."""
    from polyhead.adapters.convert.adamix import convert_adamix

    with one_line_errors():
        _refuse_full(out, "OUT")
        _save_lora(convert_adamix(source, _backbone(backbone), alpha), out, backbone)
    typer.echo(f"{out}: the average of {source}")


@inventory_app.command("from-loras")
def from_loras_command(
    loras: Loras,
    backbone: Backbone,
    out: Annotated[Path, typer.Option(help="Folder of the inventory to write")],
    missing: Annotated[
        Literal["zeros", "refuse"],
        typer.Option(help="What a module gets that only other LoRAs adapt"),
    ] = "zeros",
) -> None:
    """Make LoRAs of one rank the skills of an inventory, and each of them a task.

    Other tasks can then be fitted as mixtures of them, or be given weights.
    """
    from polyhead.adapters.convert.loras import inventory_from_loras

    with one_line_errors():
        folders = _named_folders(loras)
        model = _backbone(backbone)
        _save(inventory_from_loras(folders, model, Path(backbone).name, missing), out)


@inventory_app.command("merge")
def merge_command(
    loras: Loras,
    backbone: Backbone,
    method: Annotated[
        Literal["ot", "mean", "ties", "dare"],
        typer.Option(help="ot aligns by optimal transport first; mean is AdaMix's"),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the LoRA to write, new or empty")],
    density: Annotated[float, typer.Option(help="Share of entries that ties and dare keep")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of what dare drops")] = 0,
) -> None:
    """Merge LoRAs of one rank into one, a PEFT folder that a task can own.

    ot, ties and dare need the extra `merge`.
    """
    from polyhead.adapters.convert.merging import merge_loras

    with one_line_errors():
        _refuse_full(out, "--out")
        folders = _named_folders(loras)
        _save_lora(merge_loras(folders, _backbone(backbone), method, density, seed), out, backbone)
    typer.echo(f"{out}: {len(folders)} LoRAs merged by {method} into one")


def _refuse_full(out: Path, name: str) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        fail(f"{name} {out}: expected a new or an empty folder", 2)


def _save_lora(adapter: "PrivateAdapter", out: Path, backbone: str) -> None:
    from polyhead.adapters.materialise import peft_folder

    out.mkdir(parents=True, exist_ok=True)
    for name, data in peft_folder(adapter, Path(backbone).name).items():
        (out / name).write_bytes(data)


def _named_folders(given: list[str]) -> dict[str, Path]:
    """By task name, which is the folder's own where none is given."""
    folders: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        path = Path(folder if equals else text)
        name = name if equals else path.resolve().name
        if name in folders:
            fail(f"LORA: {name!r} is given twice; write NAME=FOLDER to name them apart", 2)
        folders[name] = path
    return folders


def _convert(
    convert: "Callable[[Path, Any, str, Sequence[str] | None], Inventory]",
    source: Path,
    out: Path,
    backbone: str,
    names: Path | None,
) -> None:
    with one_line_errors():
        task_names = names.read_text().split() if names else None
        _save(convert(source, _backbone(backbone), Path(backbone).name, task_names), out)


def _backbone(name: str) -> Any:
    from polyhead.server.engine.backbone import (
        find_backbone,
        load_backbone,
        pick_device,
        pick_dtype,
    )

    cpu = pick_device("cpu")
    return load_backbone(find_backbone(name), pick_dtype("float32", cpu), cpu, any_kind=True)


def _save(inventory: "Inventory", out: Path) -> None:
    inventory.save(out)
    typer.echo(f"{out}: {len(inventory.tasks)} tasks, fingerprint {inventory.fingerprint}")
