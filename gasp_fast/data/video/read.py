"""Reads frames of a video file through PyAV, with a deadline.

Video collections contain files that are empty, truncated, mislabelled, or that a decoder never finishes. Each becomes a
one-line error that names the file. Only ordinary container formats are opened, and only local files: FFmpeg refuses a
playlist that points elsewhere.

The deadline is checked at three levels. FFmpeg checks it while it opens and reads the file, and `_read` checks it
between frames. Neither can interrupt the decoding of one frame, so decoding runs in a thread that is abandoned after
the deadline. A thread cannot be killed, but PyAV decodes without the interpreter's lock: a stuck thread costs a core
and blocks nothing, and `max_pixels` bounds the work for one frame.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from gasp_fast.data.errors import one_line
from gasp_fast.data.images import MOST_PIXELS, check_size
from gasp_fast.processes import in_time

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,gif,ogg,h264,hevc,ivf"
GRACE = 0.5  # seconds after the deadline in which decoding may still end


class VideoTimeoutError(OSError):
    """Decoding took longer than the timeout."""


def read_video(
    path: Path, frames: int, *, timeout: float = 30.0, longest_side: int | None = None
) -> np.ndarray:  # uint8 [F, H, W, 3]
    """At most `frames` frames, spread evenly over the file; all of them if it has fewer.

    Larger frames are scaled to `longest_side` pixels while decoding. A bad file is a one-line `OSError`; a file that
    is not decoded within `timeout` seconds is a `VideoTimeoutError`.
    """
    if frames < 1:
        raise ValueError(f"frames = {frames}; at least 1")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise OSError(f"{path}: cannot read video: the file is empty")
    import av

    try:
        return in_time(lambda: _open_and_read(path, frames, timeout, longest_side), timeout + GRACE)
    except (TimeoutError, av.error.ExitError):  # the latter is raised inside FFmpeg at the deadline
        raise VideoTimeoutError(f"{path}: not decoded after {timeout:g} s") from None
    except Exception as error:
        raise OSError(f"{path}: cannot read video: {one_line(error)}") from error


def _open_and_read(path: Path, frames: int, timeout: float, longest_side: int | None) -> np.ndarray:
    import av

    deadline = time.monotonic() + timeout
    options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
    with av.open(str(path.resolve()), options=options, timeout=timeout) as container:
        if not container.streams.video:
            raise ValueError("no video stream")
        return _read(container, frames, deadline, longest_side)


def _read(container: Any, frames: int, deadline: float, longest_side: int | None) -> np.ndarray:
    """Decodes once from the start: exact for every codec, while seeking lands on key frames and sometimes beside them.

    The number of frames is known only at the end. So frames are kept at a stride that doubles whenever twice as many as
    requested are held: memory is bounded, and the kept frames stay evenly spread.
    """
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    # The decoder checks this for every frame: sizes may change within a stream.
    stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
    if stream.codec_context.width and stream.codec_context.height:  # some streams know their size only when decoded
        check_size(stream.codec_context.width, stream.codec_context.height)
    kept: list[np.ndarray] = []
    stride = 1
    for number, frame in enumerate(container.decode(stream)):
        if time.monotonic() > deadline:
            raise TimeoutError
        if number % stride == 0:
            check_size(frame.width, frame.height)
            kept.append(_pixels(frame, longest_side))
            if len(kept) >= 2 * frames:
                kept, stride = kept[::2], stride * 2
    if not kept:
        raise ValueError("no frame could be decoded")
    chosen = [kept[k] for k in np.unique(np.linspace(0, len(kept) - 1, frames).round().astype(int))]
    if len({pixels.shape for pixels in chosen}) > 1:
        raise ValueError("frames change their size")
    return np.stack(chosen)


def _pixels(frame: Any, longest_side: int | None) -> np.ndarray:
    if longest_side and max(frame.width, frame.height) > longest_side:
        factor = longest_side / max(frame.width, frame.height)
        width, height = (max(2, round(n * factor)) for n in (frame.width, frame.height))
        return frame.to_ndarray(format="rgb24", width=width, height=height)
    return frame.to_ndarray(format="rgb24")
