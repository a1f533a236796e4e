"""Colours, and how figures are written: as files, and as SVG inside a page."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from .files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours of Okabe and Ito, which colour-blind readers can distinguish, without the yellow: too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#6b6b6b"
FORMATS = ("png", "svg", "pdf")
_NOT_NEEDED_IN_HTML = re.compile(r'<metadata>.*?</metadata>|\sxmlns(?::\w+)?="[^"]*"|(?<=<g)\sid="[^"]*"', re.DOTALL)


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
