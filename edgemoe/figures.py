"""What pictures have in common: whether they can be drawn at all, how they look, and files that appear whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgemoe.atomic_file import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["NO_MATPLOTLIB", "can_plot", "new_figure", "plain_frame", "save_figure"]

NO_MATPLOTLIB = "matplotlib is missing; install it with pip install 'edgemoe[plot]', or leave --plot out."
"""What to say where `can_plot` is false."""


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=130)


def plain_frame(axes: Axes, grid: Literal["both", "y"]) -> None:
    """Leave of the frame what has numbers, and draw a faint grid behind the data."""
    axes.grid(axis=grid, color="0.92")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file, whole or not at all.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    with atomic_file(path) as file:
        figure.savefig(file, format="png")
