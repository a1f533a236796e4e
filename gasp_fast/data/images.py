"""Opens image files: only named formats, only up to a stated size.

By itself, Pillow lets the content of a file choose among dozens of decoders; one of them runs Ghostscript. And a header
may claim any size.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MOST_PIXELS = 1 << 25  # of a photograph, a depth map or a video frame; 7680 x 4320 is just below
LARGEST_RATIO = 200  # of the longer side to the shorter; the processors of the models refuse more

# Between its own two limits, both higher than ours, Pillow warns.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@contextmanager
def open_image(path: Path, formats: Sequence[str] = FORMATS) -> Iterator[Image.Image]:
    """Opens an image of one of the `formats` and checks its size. Decodes nothing."""
    try:
        image = Image.open(path, formats=list(formats))
    except Image.DecompressionBombError as error:
        raise ValueError(f"at most {MOST_PIXELS:,} pixels are read; shrink it ({error})") from error
    with image:
        check_size(*image.size)
        yield image


def check_size(width: int, height: int) -> None:
    """Raises a `ValueError` for a size in pixels that is not read."""
    if min(width, height) < 1:
        raise ValueError(f"implausible size {width} x {height}")
    if width * height > MOST_PIXELS:
        raise ValueError(f"size {width} x {height}: at most {MOST_PIXELS:,} pixels are read; shrink it")
    if max(width, height) > LARGEST_RATIO * min(width, height):
        raise ValueError(f"size {width} x {height}: one side is over {LARGEST_RATIO} times the other; crop it")
