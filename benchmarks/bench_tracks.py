"""Times tracks and patch depth: the C++ extension against the NumPy reference, and a sequence end to end.

    python benchmarks/bench_tracks.py [--rounds 7] [--out benchmarks/results]

1. Depth in memory, 24 frames of 960 x 540, one thread. Grid mode is 8 x 8 queries with the pooled depth of 34 x 19
   patches; in dense mode every pixel of the first frame is a query. Variants are interleaved and each ratio is the
   median over rounds, so that other load on the machine affects both alike. Ratios are reported only if both variants
   give the same bits.
2. Threads: the same dense job on 1, 2, ... threads, as ratios to one thread.
3. End to end from disk (photographs as JPEG, depth as 16-bit PNG), sequences of 16 frames on one core: frames decoded
   each time ("cold"), all frames in the cache ("cached"), and tracks and patch depth without photographs, on cached
   depth ("tracks_alone"). Then the cold sequence again, decoded ahead by two threads ("read_ahead").
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gasp_fast.benchmarking.report import device_and_date, machine
from gasp_fast.data.depth.pooling import pool_depth
from gasp_fast.data.scenes.frame_cache import DECODED, DEFAULT_BYTES
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene, rigid_inverse
from gasp_fast.data.tracks.build import Tracks, Views, build_tracks, grid_queries, track_points
from gasp_fast.processes import usable_cores

WIDTH, HEIGHT, FRAMES = 960, 540, 24
PATCHES = (34, 19)  # Qwen2.5-VL's tokens of a 960 x 540 frame
SCENE, SEQUENCE = 48, 16  # frames end to end


def slanted_wall(frames: int = FRAMES) -> Views:
    """Depth maps of a slanted wall with 1 % noise and 5 % holes, from a camera that moves and turns."""
    draw = np.random.default_rng(0)
    camera = np.array([[700.0, 0, WIDTH / 2], [0, 700.0, HEIGHT / 2], [0, 0, 1]])
    x = (np.arange(WIDTH) + 0.5 - camera[0, 2]) / camera[0, 0]
    y = (np.arange(HEIGHT) + 0.5 - camera[1, 2]) / camera[1, 1]
    depth, poses = [], []
    for f in range(frames):
        angle = 0.006 * f
        pose = np.eye(4)
        pose[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
        pose[:3, 3] = (0.02 * f, 0.004 * f, -0.01 * f)
        normal = pose[:3, :3] @ np.array([0.2, 0.1, 1.0])
        wall = (3.0 + normal @ pose[:3, 3]) / (normal[0] * x[None, :] + normal[1] * y[:, None] + normal[2])
        wall *= 1 + 0.01 * draw.standard_normal(wall.shape)
        wall[draw.random(wall.shape) < 0.05] = 0
        depth.append(wall.astype(np.float32))
        poses.append(pose)
    size = np.tile([[WIDTH, HEIGHT]], (frames, 1))
    return Views(depth, np.tile(camera, (frames, 1, 1)), np.array(poses), size, np.arange(frames))


def grid_mode(views: Views, backend: str) -> tuple[Tracks, np.ndarray]:
    tracks = track_points(grid_queries(views, 8), views, backend=backend)
    edges = (np.linspace(0, WIDTH, PATCHES[0] + 1), np.linspace(0, HEIGHT, PATCHES[1] + 1))
    return tracks, pool_depth(views.depth, views.size, *edges, backend=backend)


def dense_mode(views: Views, backend: str, threads: int = 1) -> Tracks:
    return track_points(grid_queries(views, "dense"), views, backend=backend, threads=threads)


def same_bits(one: Tracks, other: Tracks) -> bool:
    return all(
        getattr(one, name).tobytes() == getattr(other, name).tobytes() for name in ("query", "uv", "visible", "depth")
    )


def seconds(job: Callable[[], object]) -> float:
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


def compare(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Times of each variant, round by round, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for k in range(rounds + 1):
        for name, job in variants.items():
            time_taken = seconds(job)
            if k:
                times[name].append(time_taken)
    return times


def median_ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def bench_kernels(rounds: int) -> dict[str, float]:
    views = slanted_wall()
    reference, compiled = grid_mode(views, "numpy"), grid_mode(views, "cpp")
    assert same_bits(reference[0], compiled[0]) and reference[1].tobytes() == compiled[1].tobytes()
    assert same_bits(dense_mode(views, "numpy"), dense_mode(views, "cpp"))
    result: dict[str, float] = {}
    for name, mode, repeats in (("grid", grid_mode, 3 * rounds), ("dense", dense_mode, rounds)):
        times = compare({b: lambda b=b, mode=mode: mode(views, b) for b in ("numpy", "cpp")}, repeats)
        result[f"{name}_numpy_ms"] = 1e3 * statistics.median(times["numpy"])
        result[f"{name}_cpp_ms"] = 1e3 * statistics.median(times["cpp"])
        result[f"{name}_ratio"] = median_ratio(times["numpy"], times["cpp"])
    counts = sorted({1, 2, usable_cores()})
    times = compare({str(n): lambda n=n: dense_mode(views, "cpp", n) for n in counts}, rounds)
    for n in counts[1:]:
        result[f"dense_{n}_threads_ratio"] = median_ratio(times["1"], times[str(n)])
    return result


def write_scene(root: Path, frames: int) -> None:
    views = slanted_wall(frames)
    draw = np.random.default_rng(0)
    texture = np.asarray(
        Image.fromarray(draw.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)).resize((WIDTH, HEIGHT))
    )
    for folder in ("color", "depth", "pose"):
        (root / folder).mkdir()
    for f in range(frames):
        Image.fromarray(np.roll(texture, 9 * f, axis=1)).save(root / "color" / f"{f:04d}.jpg", quality=92)
        Image.fromarray(np.rint(views.depth[f] * 1000).astype(np.uint16)).save(root / "depth" / f"{f:04d}.png")
        np.savetxt(root / "pose" / f"{f:04d}.txt", rigid_inverse(views.pose[f]))
    np.savetxt(root / "intrinsics.txt", views.intrinsics[0])


def sequence(scene: Scene, seed: int, images: bool = True, threads: int = 1) -> None:
    """The work of a data loader for one sequence, up to the processor: tracks, patch depth, photographs."""
    frames = [int(f) for f in np.random.default_rng(seed).permutation(SCENE)[:SEQUENCE]]
    if threads > 1:
        scene.read_ahead(frames, images=images, threads=threads)
    assert len(build_tracks(scene, frames, grid=8))
    edges = (np.linspace(0, WIDTH, PATCHES[0] + 1), np.linspace(0, HEIGHT, PATCHES[1] + 1))
    pool_depth([scene.depth(f) for f in frames], [(WIDTH, HEIGHT)] * SEQUENCE, *edges)
    if images:
        for f in frames:
            scene.image(f)


def bench_sequences(rounds: int) -> dict[str, float]:
    """Sequences of 16 frames out of 48, on one core, and cold ones on two threads."""
    with tempfile.TemporaryDirectory() as folder:
        write_scene(Path(folder), SCENE)
        scene = open_scene(folder)

        def from_disk(threads: int) -> None:
            DECODED.resize(0)
            DECODED.resize(1 << 30)
            sequence(scene, seed=0, threads=threads)

        def from_cache(images: bool) -> None:
            sequence(scene, seed=0, images=images)

        times = compare({"cold": lambda: from_disk(1), "read_ahead": lambda: from_disk(2)}, rounds)
        # The frames of the last cold round are still in the cache.
        cached = {"cached": lambda: from_cache(images=True), "tracks_alone": lambda: from_cache(images=False)}
        times |= compare(cached, 3 * rounds)
    DECODED.resize(DEFAULT_BYTES)
    names = ("cold", "cached", "tracks_alone")
    result = {f"sequences_per_second_per_core_{name}": 1 / statistics.median(times[name]) for name in names}
    return {**result, "read_ahead_2_threads_ratio": median_ratio(times["cold"], times["read_ahead"])}


def save(result: dict[str, float], rounds: int, out: Path) -> Path:
    """Writes `MACHINE-DATE-tracks.json`, beside the results of `gasp-fast bench`."""
    name, today = machine(torch.device("cpu")), datetime.date.today().isoformat()
    about = {"date": today, "machine": name.split(",")[0], "cores": usable_cores(), "numpy": np.__version__}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{device_and_date(name)}-tracks.json"
    rounded = {name: round(value, 3) for name, value in result.items()}
    path.write_text(json.dumps({**about, "rounds": rounds, **rounded}, indent=1) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the JSON")
    arguments = parser.parse_args()
    result = {**bench_kernels(arguments.rounds), **bench_sequences(arguments.rounds)}
    for name, value in result.items():
        print(f"{name:55s} {value:10.2f}")
    if arguments.out:
        print(f"wrote {save(result, arguments.rounds, arguments.out)}")


if __name__ == "__main__":
    main()
