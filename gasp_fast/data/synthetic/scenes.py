"""Renders synthetic scenes with exact depth and poses: a textured room with boxes and a moving camera.

A scene is written as an `rgbd` folder. It is a pure function of its seed and configuration, to the last byte.

The scenes are neither trivial nor impossible to match. All surfaces are near-grey with the same mean brightness, and
every frame has its own exposure and white balance, so brightness does not reveal the position of a patch. The camera
moves around the boxes with yaw, pitch and roll, so the "same position" guess fails. Two boxes, one near and one far,
are identical down to the texture: only depth distinguishes them, which is what the depth loss is for.

World axes: z up, metres, the room's floor at z = 0. Camera axes: OpenCV.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gasp_fast.data.compiled import render_extension
from gasp_fast.data.images import check_size
from gasp_fast.data.scenes.scene import MOST_FRAMES
from gasp_fast.files import complete_folder, read_json

from .layout import COLOURS, Box, camera_path, is_clear, place_boxes
from .textures import PATTERNS, SIZE, Grey, make_texture, mip_levels

Float = NDArray[np.float64]

VERSION = 2  # raise it whenever the same seed gives other bytes, so that old folders are rendered again
MOST_SCENES = 1_000_000  # of one call
TEXTURE_METRES = 12.0  # period of a texture: longer than a wall, so that no two places of a room look the same


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Parameters of a scene; the same configuration and seed give the same bytes."""

    frames: int = 32
    width: int = 224
    height: int = 224
    field_of_view: float = 65.0  # horizontal, degrees
    min_boxes: int = 3  # two of them are identical
    max_boxes: int = 6
    samples: int = 2  # colour rays along each side of a pixel
    exposure_jitter: float = 0.12  # standard deviation of the logarithm of each frame's gain
    white_balance_jitter: float = 0.04
    sensor_noise: float = 0.012

    def __post_init__(self) -> None:
        if not 2 <= self.frames <= MOST_FRAMES:
            raise ValueError(f"frames = {self.frames}: a scene has 2 to {MOST_FRAMES:,} frames")
        if min(self.width, self.height) < 16:
            raise ValueError(f"size {self.width} x {self.height}: at least 16 x 16 pixels")
        check_size(self.width, self.height)
        if not 20 <= self.field_of_view <= 120:
            raise ValueError(f"field_of_view = {self.field_of_view}: give degrees between 20 and 120")
        if not 2 <= self.min_boxes <= self.max_boxes <= 8:
            raise ValueError(
                f"min_boxes = {self.min_boxes}, max_boxes = {self.max_boxes}: need 2 <= min_boxes <= max_boxes <= 8"
            )


class RenderedView(NamedTuple):
    """One rendered frame."""

    image: NDArray[np.uint8]  # [H, W, 3]
    depth: NDArray[np.float32]  # [H, W], metres along the optical axis
    surface: NDArray[np.int32]  # [H, W], 0..5: faces of the room, 6 + 6 b + face: box b


@dataclass(frozen=True)
class SyntheticScene:
    """The full description of a scene: images, depth and poses follow from it."""

    name: str
    seed: int
    config: SyntheticConfig
    room: Float  # [2, 3], low and high corner
    lamp: Float  # [3]
    boxes: tuple[Box, ...]
    patterns: tuple[str, ...]  # of the textures: walls, floor, ceiling, then those of the boxes
    camera_to_world: Float = field(repr=False)  # [F, 4, 4]

    def __len__(self) -> int:
        return len(self.camera_to_world)

    @cached_property
    def intrinsics(self) -> Float:
        """`[3, 3]` in pixels, pixel centres at integer + 0.5."""
        width, height = self.config.width, self.config.height
        focal = width / 2 / np.tan(np.radians(self.config.field_of_view) / 2)
        return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])

    @cached_property
    def _materials(self) -> tuple[NDArray[np.int32], Float]:
        """Texture `[6 + 6 B]` and colour `[6 + 6 B, 3]` of each surface."""
        texture = [0] * 4 + [1, 2] + [box.texture for box in self.boxes for _ in range(6)]
        room = [(1.0, 1.0, 1.0)] * 4 + [(1.03, 1.0, 0.95), (1.08, 1.08, 1.08)]
        return np.array(texture, np.int32), np.array(room + [COLOURS[b.colour] for b in self.boxes for _ in range(6)])

    @cached_property
    def textures(self) -> Grey:
        """`[n, S, S]`, made on first use."""
        rng = np.random.default_rng([self.seed, 2])
        return np.stack([make_texture(rng, pattern) for pattern in self.patterns])

    @cached_property
    def _mips(self) -> Grey:
        return mip_levels(self.textures)

    def render(self, index: int) -> RenderedView:
        """The view of frame `index`, with that frame's exposure, white balance and sensor noise."""
        config, k = self.config, self.intrinsics
        texture, tint = self._materials
        boxes = np.array([[*b.centre, *b.half, *b.rotation.ravel()] for b in self.boxes]).reshape(-1, 15)
        colour, depth, surface = render_extension().render(
            room=self.room,
            lamp=self.lamp,
            boxes=boxes,
            surface_texture=texture,
            surface_colour=tint,
            texels=self._mips,
            texture_count=len(self.textures),
            texture_size=SIZE,
            texture_metres=TEXTURE_METRES,
            camera_to_world=self.camera_to_world[index],
            intrinsics=np.array([k[0, 0], k[1, 1], k[0, 2], k[1, 2]]),
            width=config.width,
            height=config.height,
            samples=config.samples,
        )
        rng = np.random.default_rng([self.seed, 1, index])
        gain = np.exp(rng.normal(0, config.exposure_jitter) + rng.normal(0, config.white_balance_jitter, 3))
        colour *= gain.astype(np.float32)
        colour += config.sensor_noise * rng.standard_normal(colour.shape, dtype=np.float32)
        return RenderedView((np.clip(colour, 0, 1) * 255 + 0.5).astype(np.uint8), depth, surface)


def make_scene(seed: int, config: SyntheticConfig | None = None) -> SyntheticScene:
    """The scene of a seed: a room, boxes around its middle, and a camera path around them."""
    config = config or SyntheticConfig()
    rng = np.random.default_rng([seed, 0])
    width, depth, height = rng.uniform(7.0, 9.5), rng.uniform(7.0, 9.5), rng.uniform(2.7, 3.3)
    room = np.array([[0, 0, 0], [width, depth, height]])
    lamp = np.array([width * rng.uniform(0.35, 0.65), depth * rng.uniform(0.35, 0.65), height - 0.15])
    azimuth = rng.uniform(0, 2 * np.pi)
    while True:  # a path that runs into a box is drawn again, with other boxes
        boxes = place_boxes(rng, room, azimuth, int(rng.integers(config.min_boxes, config.max_boxes + 1)))
        poses = camera_path(rng, room, azimuth, config.frames)
        if boxes and is_clear(poses[:, :3, 3], room, boxes):
            break
    return SyntheticScene(
        name=f"scene-{seed:06d}",
        seed=seed,
        config=config,
        room=room,
        lamp=lamp,
        boxes=boxes,
        patterns=tuple(str(pattern) for pattern in rng.choice(list(PATTERNS), 2 + len(boxes))),
        camera_to_world=poses,
    )


def write_scene(scene: SyntheticScene, folder: Path) -> None:
    """Writes the `rgbd` folder under a temporary name and renames it: a killed run leaves no incomplete scene."""
    with complete_folder(folder) as partial:
        for part in ("color", "depth", "pose"):
            (partial / part).mkdir(parents=True)
        seen = np.zeros((len(scene), len(scene.boxes)), int)  # [F, B], pixels of each box
        for index in range(len(scene)):
            view, key = scene.render(index), f"{index:06d}"
            Image.fromarray(view.image).save(partial / "color" / f"{key}.jpg", quality=95)
            millimetres = np.clip(np.rint(view.depth * 1000), 0, 65535).astype(np.uint16)
            Image.fromarray(millimetres).save(partial / "depth" / f"{key}.png", compress_level=1)
            np.savetxt(partial / "pose" / f"{key}.txt", scene.camera_to_world[index], fmt="%.17g")
            seen[index] = np.bincount(view.surface.ravel() // 6, minlength=len(scene.boxes) + 1)[1:]
        np.savetxt(partial / "intrinsics.txt", scene.intrinsics, fmt="%.17g")
        (partial / "meta.json").write_text(json.dumps(_meta(scene, seen), indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)


def _meta(scene: SyntheticScene, seen: NDArray[np.int_]) -> dict[str, object]:
    return {
        "name": scene.name,
        "source": "gasp_fast.data.synthetic",
        "version": VERSION,
        "seed": scene.seed,
        "config": asdict(scene.config),
        "frames": len(scene),
        "color_wh": [scene.config.width, scene.config.height],
        "depth_wh": [scene.config.width, scene.config.height],
        "depth_unit": "mm (scale 1000)",
        "depth_invalid": [0],
        "pose": "camera-to-world 4x4 (OpenCV axes), metres",
        "room": scene.room.tolist(),
        "boxes": [
            {**asdict(box), "pixels_per_frame": seen[:, number].tolist()} for number, box in enumerate(scene.boxes)
        ],
    }


def render_scenes(
    out: Path, scenes: int, seed: int = 0, config: SyntheticConfig | None = None, workers: int = 2
) -> Iterator[Path]:
    """Writes `scenes` scenes as folders of `out` and yields them in order.

    A complete folder of the same version, seed and configuration is kept, so a killed run continues.
    """
    if not 1 <= scenes <= MOST_SCENES:
        raise ValueError(f"scenes = {scenes}: 1 to {MOST_SCENES:,}")
    config = config or SyntheticConfig()
    out.mkdir(parents=True, exist_ok=True)

    def one(scene_seed: int) -> Path:
        folder = out / f"scene-{scene_seed:06d}"
        if not _is_complete(folder, scene_seed, config):
            write_scene(make_scene(scene_seed, config), folder)
        return folder

    # Ray casting and image compression release the interpreter's lock, so threads suffice.
    with ThreadPoolExecutor(max(1, workers)) as pool:
        yield from pool.map(one, range(seed, seed + scenes))


def _is_complete(folder: Path, seed: int, config: SyntheticConfig) -> bool:
    try:
        meta = read_json(folder / "meta.json")
    except (OSError, ValueError):
        return False
    expected = {"version": VERSION, "seed": seed, "config": asdict(config)}
    return isinstance(meta, dict) and all(meta.get(key) == value for key, value in expected.items())
