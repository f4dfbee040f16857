"""Figures that are drawn without a screen."""

from pathlib import Path
from typing import Any

from polyhead.adapters.errors import AdapterError

DOTS_PER_INCH = 130


def figure(panels: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure of `panels` axes below each other, each `width` by `height` inches.

    Raises `AdapterError` when matplotlib is not installed: nothing but pictures needs it.
    """
    return grid(panels, 1, width, height)


def grid(panels: int, across: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure of `panels` axes, `across` of them in a row. Otherwise as `figure`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise AdapterError("pictures need matplotlib: pip install 'polyhead[train]'") from exc
    rows = -(-panels // across)
    made = Figure(figsize=(width * across, height * rows), layout="constrained")
    FigureCanvasAgg(made)
    return made, list(made.subplots(rows, across, squeeze=False).flat)[:panels]


def save(made: Any, path: Path) -> None:
    """Write the figure as PNG, its folder made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
