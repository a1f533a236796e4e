"""A new scene format in one file: register it, open a scene, track points.

A recording app writes `recording.json` and, for each shot, a photograph and a depth map in metres. Its poses are
camera-to-world, with y up and z backwards. The code above the line reads this format; the code below the line writes a
scene in it, to try the reader. docs/extending.md explains this file.

    python examples/custom_scene_format.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from gasp_fast import build_tracks, open_scene
from gasp_fast.data.scenes import formats
from gasp_fast.data.scenes.depth_maps import DepthFile
from gasp_fast.data.scenes.scene import Frame, Scene, build_scene, pinhole, rigid_inverse
from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes

NAME = "recorder"
FILES = "recording.json"
OPENCV_FROM_RECORDER = np.diag([1.0, -1.0, -1.0, 1.0])  # y up and z backwards become y down and z forwards


def detect(root: Path) -> bool:
    return (root / "recording.json").is_file()


def read(root: Path) -> Scene:
    frames = []
    for shot in json.loads((root / "recording.json").read_text())["shots"]:
        focal, cx, cy = shot["focal"], *shot["centre"]
        camera_to_world = np.array(shot["pose"]) @ OPENCV_FROM_RECORDER
        frames.append(
            Frame(
                name=shot["name"],
                image=root / f"{shot['name']}.png",
                intrinsics=pinhole(focal, focal, cx, cy),
                pose=rigid_inverse(camera_to_world),  # world-to-camera, OpenCV axes: the only kind from here on
                depth=DepthFile(root / f"{shot['name']}.npy"),
            )
        )
    return build_scene(root, NAME, frames)  # refuses paths that leave the folder, skips and counts impossible cameras


formats.FORMATS = (sys.modules[__name__], *formats.FORMATS)  # tried first

# ----------------------------------------------------------------------------------------------------------------------


def write(scene: Scene, root: Path) -> None:
    """Write `scene` as the recording app would."""
    root.mkdir()
    shots = []
    for i, name in enumerate(scene.frame_names):
        (focal, _, cx), (_, _, cy), _ = scene.intrinsics(i).tolist()
        pose = rigid_inverse(scene.pose(i)) @ OPENCV_FROM_RECORDER
        shots.append({"name": name, "focal": focal, "centre": [cx, cy], "pose": pose.tolist()})
        Image.fromarray(scene.image(i)).save(root / f"{name}.png")
        np.save(root / f"{name}.npy", scene.depth(i))
    (root / "recording.json").write_text(json.dumps({"shots": shots}))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        [rendered] = render_scenes(
            Path(folder) / "rendered", 1, config=SyntheticConfig(frames=8, width=160, height=160)
        )
        write(open_scene(rendered), Path(folder) / "recorded")
        scene = open_scene(Path(folder) / "recorded")
        tracks = build_tracks(scene, frames=[0, 3, 7], grid=8)
        print(f"{scene.format}: {len(scene)} frames, {len(tracks)} tracks in frames 0, 3 and 7")
        visible = tracks.visible[:, 2]
        print(f"frame 7 sees {visible.sum()} of them, at {tracks.depth[visible, 2].mean():.2f} m on average")
