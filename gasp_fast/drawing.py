"""Colours, panels of pictures and depth maps, and how figures are written: as files, and as SVG inside a page."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours of Okabe and Ito, which colour-blind readers can distinguish, without the yellow: too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#6b6b6b"
DEPTH_COLOURS = "viridis"  # monotonic in brightness, and safe for colour-blind readers
NO_DEPTH = "0.85"
FORMATS = ("png", "svg", "pdf")
_NOT_NEEDED_IN_HTML = re.compile(r'<metadata>.*?</metadata>|\sxmlns(?::\w+)?="[^"]*"|(?<=<g)\sid="[^"]*"', re.DOTALL)


def panels(rows: int, columns: int, tall: float) -> tuple[Figure, Any, Any]:
    """A figure, its panels [rows, columns], `tall` times as high as wide, and an axis for a colour bar beside them.

    Placed in inches: exact, and twice as fast as a layout engine.
    """
    from matplotlib.figure import Figure

    panel, gap, head, margin, bar = 3.6, 0.12, 0.85, 0.12, 0.75
    width = 2 * margin + columns * panel + (columns - 1) * gap + bar
    height = head + rows * panel * tall + (rows - 1) * gap + margin
    figure = Figure(figsize=(width, height), dpi=110)
    sides = {"left": margin / width, "right": 1 - (margin + bar) / width}
    ends = {"top": 1 - head / height, "bottom": margin / height}
    spaces = {"wspace": gap / panel, "hspace": gap / (panel * tall)}
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={**sides, **ends, **spaces})
    bar_axis = figure.add_axes(
        (sides["right"] + gap / width, ends["bottom"], 0.14 / width, ends["top"] - ends["bottom"])
    )
    return figure, axes, bar_axis


def depth_norm(known: np.ndarray) -> Any:
    """Colours of these depths, on a logarithmic scale: differences between near depths show."""
    from matplotlib.colors import LogNorm

    low, high = np.percentile(known, [2, 98]) if known.size else (1.0, 2.0)
    return LogNorm(low, max(high, low * 1.01))


def draw_depth(axis: Any, depth: np.ndarray, norm: Any, size: tuple[float, float] | None = None) -> Any:
    """A depth map; grey where it is not positive. `size`: of the picture that it covers, if it has another one."""
    wide, tall = size or depth.shape[::-1]
    masked = np.ma.masked_less_equal(depth, 0)
    axis.set_facecolor(NO_DEPTH)
    return axis.imshow(masked, extent=(0, wide, tall, 0), cmap=DEPTH_COLOURS, norm=norm, interpolation="nearest")


def draw_depth_bar(figure: Figure, mesh: Any, axis: Any, label: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    bar = figure.colorbar(mesh, cax=axis)
    bar.set_label(label, fontsize=9)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes the file in the format that its ending names."""
    name = path.suffix.removeprefix(".").lower()
    if name not in FORMATS:
        raise ValueError(f"{path}: a picture's ending is one of {', '.join(f'.{one}' for one in FORMATS)}")
    with replacing(path) as partial:
        figure.savefig(partial, format=name)
    return path


def as_svg(figure: Figure) -> str:
    """An `<svg>` element with a transparent background, whose letters are text. The same figure gives the same text."""
    from matplotlib import rc_context

    file = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gasp-fast"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    return _NOT_NEEDED_IN_HTML.sub("", text[text.index("<svg") :]).strip()
