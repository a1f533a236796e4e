"""Matrices in text files, and poses of one file a frame: `pose/KEY.txt`, 4x4 camera-to-world.

They take as many calls to the file system as there are frames. `poses.txt` holds all of them, one line a frame: KEY and
the 16 numbers, row by row. Where it exists, the files in `pose/` are not read. `pack_poses` writes it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gasp_fast.data.errors import one_line, shown
from gasp_fast.data.scenes.folder import SceneFolder
from gasp_fast.data.scenes.natural_order import natural_key
from gasp_fast.data.scenes.scene import check_frame_count
from gasp_fast.files import write_atomically

POSES = "poses.txt"
FOLDER = "pose"


class PoseFiles:
    """The camera-to-world poses of a scene by the keys of its frames."""

    def __init__(self, files: SceneFolder) -> None:
        self.files = files
        self._packed: dict[str, np.ndarray] | None = None
        path = files.root / POSES
        if files.is_file(files.inside(path)):
            self._packed = _packed_poses(path)

    def find(self, key: str) -> np.ndarray | str:
        """The pose, or why there is none."""
        if self._packed is not None:
            return self._packed.get(key, f"{self.files.root / POSES} has no pose of it")
        path = self.files.root / FOLDER / f"{key}.txt"
        return read_pose(self.files.inside(path)) if self.files.is_file(path) else f"{path} is missing"


def pack_poses(root: Path) -> None:
    """Writes `poses.txt` from the files in `pose/`, with their numbers as they are. Without such files it stays."""
    files = SceneFolder(root)
    lines = []
    for path in with_suffix(files, root / FOLDER, (".txt",)):
        read_pose(files.inside(path))  # raises unless it is a pose
        lines.append(" ".join([path.stem, *path.read_text().split()]))
    if lines:
        write_atomically(root / POSES, ("\n".join(lines) + "\n").encode(errors="surrogateescape"))


def with_suffix(files: SceneFolder, folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files with one of the suffixes, in the order of their names."""
    paths = (folder / name for name in files.names(folder))
    chosen = [path for path in paths if path.suffix.lower() in suffixes]
    return sorted(chosen, key=lambda path: natural_key(path.stem))


def read_pose(path: Path) -> np.ndarray:  # float64 [4, 4]
    pose = read_matrix(path)
    if pose.shape != (4, 4):
        raise ValueError(f"{path}: a pose is a 4x4 matrix, this file holds {pose.shape}")
    return pose


def read_matrix(path: Path) -> np.ndarray:
    try:
        matrix = np.array([line.split() for line in path.read_text().splitlines() if line.strip()], dtype=np.float64)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a matrix of numbers: {one_line(error)}") from error
    if matrix.ndim != 2 or min(matrix.shape) < 3:
        raise ValueError(f"{path}: not a 3x3 or 4x4 matrix, its shape is {matrix.shape}")
    return matrix


def _packed_poses(path: Path) -> dict[str, np.ndarray]:
    """The poses in `poses.txt`, by key."""
    poses: dict[str, np.ndarray] = {}
    for number, line in enumerate(path.read_bytes().decode(errors="surrogateescape").split("\n"), 1):
        if not line.strip():
            continue
        key, *numbers = line.rsplit(maxsplit=16)
        try:
            pose = np.array(numbers, np.float64).reshape(4, 4)
        except ValueError:
            raise ValueError(f"{path}: line {number} is not a key and 16 numbers") from None
        if key in poses:
            raise ValueError(f"{path}: line {number} is the second pose of {shown(key)}")
        poses[key] = pose
    check_frame_count(path, len(poses))
    return poses
