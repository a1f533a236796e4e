"""Every depth format is read as float32, finite, 0 where unknown."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from support.scene_formats import write_depth

from gasp_fast.data.scenes.depth_maps import read_depth


@pytest.mark.parametrize("suffix", [".npy", ".png", ".exr", ".geometric.bin"])
def test_depth_files_round_trip(tmp_path, suffix):
    depth = np.round(np.random.default_rng(0).uniform(0.5, 60, (23, 31)), 3).astype(np.float32)
    depth[3:5] = 0
    scale = 1e-3 if suffix == ".png" else 1.0
    write_depth(tmp_path / f"d{suffix}", depth, scale)
    np.testing.assert_allclose(read_depth(tmp_path / f"d{suffix}", scale), depth, rtol=1e-6)


@pytest.mark.parametrize("suffix", [".npy", ".exr", ".geometric.bin"])
def test_values_that_are_not_a_depth_become_unknown(tmp_path, suffix):
    depth = np.array([[1.0, np.nan, np.inf], [-2.0, 0.0, -np.inf]], np.float32)
    write_depth(tmp_path / f"d{suffix}", depth)
    assert read_depth(tmp_path / f"d{suffix}").tolist() == [[1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("suffix", "kind", "largest"), [(".png", np.uint16, 65535), (".npy", np.uint16, 65535), (".npy", np.int16, 32767)]
)
def test_the_largest_value_of_sixteen_bits_is_unknown(tmp_path, suffix, kind, largest):
    stored = np.array([[1, largest - 1], [largest, 0]], kind)
    path = tmp_path / f"d{suffix}"
    np.save(path, stored) if suffix == ".npy" else Image.fromarray(stored).save(path)
    assert read_depth(path).tolist() == [[1, largest - 1], [0, 0]]


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.int32, np.uint16])
def test_further_values_can_be_named_as_unknown(tmp_path, kind):
    np.save(tmp_path / "d.npy", np.array([[1000, 4, 5, 70000 if kind == np.int32 else 6]], kind))
    assert read_depth(tmp_path / "d.npy", 0.5, (1000.0, 70000.0))[0, :3].tolist() == [0, 2, 2.5]
    assert read_depth(tmp_path / "d.npy")[0, 0] == 1000


def test_geometric_maps_are_read_as_colmap_reads_them(tmp_path):
    pycolmap = pytest.importorskip("pycolmap")
    depth = np.random.default_rng(0).uniform(1, 5, (7, 11)).astype(np.float32)
    pycolmap.DepthMap.from_array(depth, 0.5, 9.0).write(str(tmp_path / "theirs.bin"))
    write_depth(tmp_path / "ours.bin", depth)
    assert np.array_equal(read_depth(tmp_path / "theirs.bin"), depth)
    theirs = pycolmap.DepthMap()
    theirs.read(str(tmp_path / "ours.bin"))
    assert np.array_equal(theirs.to_array(), depth)


def test_an_eight_bit_picture_is_no_depth_map(tmp_path):
    Image.fromarray(np.full((4, 4), 200, np.uint8)).save(tmp_path / "d.png")
    with pytest.raises(OSError, match="one channel of 16 bits, this one is L"):
        read_depth(tmp_path / "d.png")


def test_a_depth_file_is_read_with_its_scale(tmp_path):
    np.save(tmp_path / "d.npy", np.ones((2, 2), np.float16))
    assert read_depth(tmp_path / "d.npy", scale=2.0).tolist() == [[2, 2], [2, 2]]
