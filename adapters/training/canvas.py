"""Figures that are drawn without a screen."""

from pathlib import Path
from typing import Any

from polyhead.adapters.errors import AdapterError

DOTS_PER_INCH = 130


def figure(panels: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure of `panels` axes below each other, each `width` by `height` inches.

    Raises `AdapterError` when matplotlib is not installed: nothing but pictures needs it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise AdapterError("pictures need matplotlib: pip install 'polyhead[train]'") from exc
    made = Figure(figsize=(width, height * panels), layout="constrained")
    FigureCanvasAgg(made)
    return made, list(made.subplots(panels, 1, squeeze=False)[:, 0])


def save(made: Any, path: Path) -> None:
    """Write the figure as PNG, its folder made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
