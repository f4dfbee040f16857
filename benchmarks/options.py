"""What most measurements are told: the backbone and the inventory, the demo's unless told."""

from pathlib import Path
from typing import Annotated

import typer

Backbone = Annotated[Path, typer.Option(help="Folder of the backbone")]
Inventory = Annotated[Path, typer.Option(help="Folder of the inventory")]
BACKBONE = Path("data/SmolLM2-135M-Instruct")
INVENTORY = Path("data/inventory")
