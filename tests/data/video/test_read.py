"""A video gives the right frames; anything else gives a one-line error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gasp_fast.data.video.read import VideoTimeoutError, read_video
from gasp_fast.data.video.write import write_clip

av = pytest.importorskip("av")


FRAMES, FPS = 40, 10
SIXTEEN = (0, 2, 6, 8, 10, 12, 16, 18, 20, 22, 26, 28, 30, 32, 36, 38)  # of the 40 frames


@pytest.fixture(scope="session", params=["mp4", "mov", "webm", "avi"])
def clip(request, tmp_path_factory) -> Path:
    """A clip in each container; the grey level of a frame encodes its number."""
    path = tmp_path_factory.mktemp("video") / f"clip.{request.param}"
    codec = {"mp4": "libx264", "mov": "mpeg4", "webm": "libvpx", "avi": "mjpeg"}[request.param]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for k in range(FRAMES):
            image = np.full((48, 64, 3), 20 + 5 * k, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers(frames: np.ndarray) -> np.ndarray:
    """The number of each frame of `clip`, from its grey value."""
    return (frames.mean(axis=(1, 2, 3)) - 20) / 5


def test_frames_are_spread_evenly_from_the_first_on(clip):
    for expected in ([0], [0, 32], [0, 8, 16, 24, 32], [0, 4, 12, 16, 20, 24, 32, 36], SIXTEEN):
        frames = read_video(clip, len(expected))
        assert frames.shape == (len(expected), 48, 64, 3) and frames.dtype == np.uint8
        np.testing.assert_allclose(numbers(frames), expected, atol=1.0)


def test_a_short_clip_gives_all_its_frames(clip):
    assert np.allclose(numbers(read_video(clip, 100)), np.arange(FRAMES), atol=1.0)


def test_frames_can_be_shrunk_while_decoding(clip):
    assert read_video(clip, 3, longest_side=32).shape == (3, 24, 32, 3)


def test_a_clip_that_takes_too_long_is_an_error(clip):
    with pytest.raises(VideoTimeoutError, match="not decoded after 0 s"):
        read_video(clip, 4, timeout=0.0)


def test_the_deadline_holds_while_frames_are_decoded(clip, monkeypatch):
    clock = iter(range(0, 1_000_000, 20))  # each reading of the clock is twenty seconds later
    monkeypatch.setattr("gasp_fast.data.video.read.time.monotonic", lambda: next(clock))
    with pytest.raises(VideoTimeoutError, match="not decoded after 30 s"):
        read_video(clip, 4, timeout=30.0)


def test_a_decoder_that_hangs_inside_one_frame_is_abandoned(clip):
    """Checks between frames do not help here. The caller continues and can read the next file."""
    released, entered = threading.Event(), threading.Event()

    class Hanging(int):
        """A `longest_side` whose comparison with the side of a frame does not return."""

        def __lt__(self, other):
            entered.set()
            released.wait(60)
            raise ValueError("released")

    began = time.monotonic()
    with pytest.raises(VideoTimeoutError, match=r"not decoded after 0\.5 s"):
        read_video(clip, 4, timeout=0.5, longest_side=Hanging(32))
    assert entered.is_set() and time.monotonic() - began < 10
    assert len(read_video(clip, 4)) == 4
    released.set()


HANGING = """
import sys, threading
from pathlib import Path
from gasp_fast.data.video.read import VideoTimeoutError, read_video
class Hanging(int):
    def __lt__(self, other):
        threading.Event().wait()
try:
    read_video(Path(sys.argv[1]), 4, timeout=0.1, longest_side=Hanging(32))
except VideoTimeoutError:
    print("late")
"""


def test_a_process_with_a_hanging_decoder_still_ends(tmp_path):
    write_clip(tmp_path / "a.mp4", [np.zeros((32, 32, 3), np.uint8)] * 4)
    command = [sys.executable, "-c", HANGING, str(tmp_path / "a.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout.strip()) == (0, "late")


def test_frames_too_large_to_decode_in_time_are_refused(clip, monkeypatch):
    monkeypatch.setattr("gasp_fast.data.images.MOST_PIXELS", 64 * 48 - 1)
    with pytest.raises(OSError, match="size 64 x 48: at most 3,071 pixels"):
        read_video(clip, 4)


def test_the_decoder_itself_refuses_frames_that_are_too_large(tmp_path, monkeypatch):
    """A header may state a smaller size than the frames have: here the second half of a stream is larger."""
    parts = []
    for side in (64, 256):
        write_clip(tmp_path / "part.mp4", [np.full((side, side, 3), 90, np.uint8)] * 4)
        raw = tmp_path / "part.h264"
        with av.open(str(tmp_path / "part.mp4")) as source, av.open(str(raw), "w", format="h264") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        parts.append(raw.read_bytes())
    path = tmp_path / "grows.h264"
    path.write_bytes(b"".join(parts))
    with pytest.raises(OSError, match="frames change their size"):
        read_video(path, 8)
    monkeypatch.setattr("gasp_fast.data.video.read.MOST_PIXELS", 100 * 100)
    with pytest.raises(OSError, match="Invalid data"):
        read_video(path, 8)


@pytest.mark.parametrize("content", [b"", b"\0" * 500, b"no video at all\n" * 50, b"RIFF\x10\0\0\0AVI LIST"])
def test_files_that_are_no_video_give_a_one_line_error(tmp_path, content):
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"bad\.mp4: cannot read video") as caught:
        read_video(path, 4)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.mp4: no such file"):
        read_video(tmp_path / "gone.mp4", 4)


def test_playlists_that_point_elsewhere_are_refused(clip, tmp_path):
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nfile://{clip}\n#EXT-X-ENDLIST\n")
    shutil.copy(clip, tmp_path / "beside")
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile beside\n")
    for name in ("list.mp4", "concat.mp4"):
        with pytest.raises(OSError, match="cannot read video"):
            read_video(tmp_path / name, 4)


FUZZ = """
import random, sys
from pathlib import Path
from gasp_fast.data.video.read import read_video
source, work = Path(sys.argv[1]), Path(sys.argv[2])
draw, original = random.Random(source.name), source.read_bytes()
for case in range(int(sys.argv[3])):
    data = bytearray(original)
    if case % 2:
        del data[draw.randrange(len(data)):]
    else:
        for _ in range(draw.randrange(1, 30)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    work.write_bytes(data)
    try:
        assert read_video(work, 4, timeout=5).ndim == 4
    except OSError as error:
        assert "\\n" not in str(error) and str(work) in str(error), error
"""


def test_damaged_clips_never_crash_or_hang(clip, tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(clip), str(tmp_path / f"x{clip.suffix}"), "40"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert time.monotonic() - began < 100


def test_a_strip_that_no_model_takes_is_refused(tmp_path: Path) -> None:
    write_clip(tmp_path / "strip.mp4", [np.zeros((4, 1000, 3), np.uint8)] * 2)
    with pytest.raises(OSError, match=r"strip\.mp4: .*size 1000 x 4: one side is over 200 times the other"):
        read_video(tmp_path / "strip.mp4", 2)
