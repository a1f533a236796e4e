"""Frames of a video file, through PyAV, with a deadline.

Video collections contain files that are empty, cut off, mislabelled, or that keep a decoder busy for ever. Each ends
here as one line that names the file. Only ordinary container formats are opened, and only as local files: a playlist
that points elsewhere is refused by FFmpeg itself. Knows files and arrays.

The deadline is kept three times. FFmpeg looks at its own while it opens and reads, we look between frames, and neither
is asked inside one frame, where a decoder works without a break. So the decoding is done by a thread that is left to
itself when it is late: threads cannot be killed, but PyAV decodes outside the interpreter's lock, so a stuck one costs
a core and stops nobody, and `max_pixels` bounds what one frame can cost in the first place.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gasp_fast.data.scenes.depth_maps import one_line

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,gif,ogg,h264,hevc,ivf"
LARGEST_FRAME = 1 << 25  # pixels
GRACE = 0.5  # seconds after the deadline in which decoding may still end by itself
Result = TypeVar("Result")


class VideoTimeoutError(OSError):
    """Decoding took longer than it was given."""


@dataclass(frozen=True)
class Video:
    """Evenly spread frames of a clip, and where in it they lie."""

    frames: np.ndarray  # uint8 [F, H, W, 3]
    times: np.ndarray  # float64 [F], seconds from the start
    fps: float  # of the file
    duration: float  # seconds


def read_video(path: Path, frames: int, *, timeout: float = 30.0, longest_side: int | None = None) -> Video:
    """At most `frames` frames spread evenly over the file; all of them if it has fewer.

    `longest_side` shrinks frames while decoding. A bad file is a one-line `OSError`; one that is not done after
    `timeout` seconds is a `VideoTimeoutError`.
    """
    if frames < 1:
        raise ValueError(f"frames = {frames}; at least 1")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise OSError(f"{path}: cannot read video: the file is empty")
    import av

    try:
        return _in_time(lambda: _open_and_read(path, frames, timeout, longest_side), timeout + GRACE)
    except (TimeoutError, av.error.ExitError):  # ExitError: the deadline passed inside FFmpeg's own reading
        raise VideoTimeoutError(f"{path}: not decoded after {timeout:g} s") from None
    except Exception as error:
        raise OSError(f"{path}: cannot read video: {one_line(error)}") from error


def _in_time(work: Callable[[], Result], seconds: float) -> Result:
    """What `work` returns or raises; a `TimeoutError` if it does neither in time."""
    results: list[Result] = []
    errors: list[Exception] = []

    def keep() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=keep, name="video", daemon=True)  # daemon: a stuck one must not hold up the exit
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]


def _open_and_read(path: Path, frames: int, timeout: float, longest_side: int | None) -> Video:
    import av

    deadline = time.monotonic() + timeout
    options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
    with av.open(str(path.resolve()), options=options, timeout=timeout) as container:
        if not container.streams.video:
            raise ValueError("no video stream")
        return _read(container, frames, deadline, longest_side)


def _read(container: Any, frames: int, deadline: float, longest_side: int | None) -> Video:
    """One pass from the start: exact for every codec, where seeking lands on key frames and sometimes beside them.

    Times are only known once decoded, so frames are kept at a stride that doubles whenever twice as many as wanted
    have come together; memory stays bounded, and the kept ones stay evenly spread.
    """
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    stream.codec_context.options = {"max_pixels": str(LARGEST_FRAME)}  # also for frames that grow in mid-stream
    if stream.codec_context.width * stream.codec_context.height > LARGEST_FRAME:
        raise ValueError(f"implausible size {stream.codec_context.width} x {stream.codec_context.height}")
    kept: list[tuple[float, np.ndarray]] = []
    stride, count, last_time = 1, 0, 0.0
    for frame in container.decode(stream):
        if time.monotonic() > deadline:
            raise TimeoutError
        last_time = float(frame.time) if frame.time is not None else last_time
        if count % stride == 0:
            kept.append((last_time, _pixels(frame, longest_side)))
            if len(kept) >= 2 * frames:
                kept, stride = kept[::2], stride * 2
        count += 1
    if not kept:
        raise ValueError("no frame could be decoded")
    chosen = [kept[k] for k in np.unique(np.linspace(0, len(kept) - 1, frames).round().astype(int))]
    fps = float(stream.average_rate or 0) or (count / last_time if last_time > 0 else 1.0)
    if len({pixels.shape for _, pixels in chosen}) > 1:
        raise ValueError("frames change their size")
    pixels = np.stack([pixels for _, pixels in chosen])
    return Video(pixels, np.array([t for t, _ in chosen]), fps, last_time + 1.0 / fps)


def _pixels(frame: Any, longest_side: int | None) -> np.ndarray:
    if longest_side and max(frame.width, frame.height) > longest_side:
        factor = longest_side / max(frame.width, frame.height)
        width, height = (max(2, round(n * factor)) for n in (frame.width, frame.height))
        return frame.to_ndarray(format="rgb24", width=width, height=height)
    return frame.to_ndarray(format="rgb24")
