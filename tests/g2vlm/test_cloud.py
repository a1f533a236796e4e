"""Point clouds as files and as data of a page."""

import base64
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest

from gasp_fast.evaluation.page import cloud_part, write_page
from gasp_fast.g2vlm.cloud import MOST_IN_PAGE, Cloud, cloud_of, preview_data, write_ply


def random_cloud(count: int) -> Cloud:
    draw = np.random.default_rng(0)
    return Cloud(draw.normal(size=(count, 3)).astype(np.float32), draw.integers(0, 256, (count, 3), dtype=np.uint8))


def read_ply(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A reader of its own, from the definition of the format."""
    header, body = path.read_bytes().split(b"end_header\n")
    lines = header.decode().splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    count = int(re.fullmatch(r"element vertex (\d+)", lines[2])[1])
    assert lines[3:] == [f"property float {axis}" for axis in "xyz"] + [
        f"property uchar {name}" for name in ("red", "green", "blue")
    ]
    assert len(body) == 15 * count
    rows = np.frombuffer(body, np.uint8).reshape(count, 15)
    return rows[:, :12].copy().view("<f4"), rows[:, 12:]


def test_a_ply_file_has_the_valid_finite_points_with_their_colours(tmp_path):
    draw = np.random.default_rng(1)
    points = draw.normal(size=(2, 3, 4, 3)).astype(np.float32)
    images = draw.integers(0, 256, points.shape, dtype=np.uint8)
    valid = draw.random(points.shape[:-1]) < 0.7
    valid[1, 0] = True
    points[1, 0, 0, 2], points[1, 0, 1, 0] = np.nan, np.inf
    positions, colours = read_ply(write_ply(tmp_path / "cloud.ply", cloud_of(points, images, valid)))
    valid[1, 0, :2] = False
    assert (positions == points[valid]).all() and (colours == images[valid]).all()


def test_a_thinned_cloud_has_the_stated_number_of_points_from_all_parts():
    points = np.arange(2 * 10 * 10 * 3, dtype=np.float32).reshape(2, 10, 10, 3)
    images = np.zeros(points.shape, np.uint8)
    thin = cloud_of(points, images, np.ones(points.shape[:-1]), most=40)
    assert len(thin) == 40 and (np.diff(thin.points[:, 0]) == 15).all()
    assert len(cloud_of(points, images, np.ones(points.shape[:-1]))) == 200


def test_positions_in_a_page_are_rounded_to_16_bits_and_outliers_are_left_out():
    cloud = random_cloud(1000)
    cloud.points[:, 1] /= 8  # proportions are kept
    cloud.points[7] = 1e6, 0, 0
    data = preview_data(cloud, np.eye(3)[None], np.zeros((1, 3)))
    steps = np.frombuffer(base64.b64decode(data["points"]), "<u2").reshape(-1, 3)
    colours = np.frombuffer(base64.b64decode(data["colours"]), np.uint8).reshape(-1, 3)
    shown = np.array([np.flatnonzero((cloud.colours == colour).all(1))[0] for colour in colours])
    assert 850 < len(shown) < 1000 and 7 not in shown
    positions = steps / 32767.5 - 1
    design = np.concatenate([positions, np.ones((len(shown), 1))], 1)
    fit, *_ = np.linalg.lstsq(design, cloud.points[shown].astype(float), rcond=None)
    scale = fit[0, 0]
    np.testing.assert_allclose(fit[:3], scale * np.eye(3), atol=1e-4)
    assert np.abs(design @ fit - cloud.points[shown]).max() < scale / 32767.5
    tip, corner = np.array(data["lines"])[0]
    np.testing.assert_allclose(tip, (0 - fit[3]) / scale, atol=1e-3)
    assert len(data["lines"]) == 8 and corner[2] > tip[2]  # it looks along z


def test_a_page_of_the_most_points_has_less_than_2_mb_and_loads_nothing(tmp_path):
    data = preview_data(random_cloud(2 * MOST_IN_PAGE))
    page = write_page(tmp_path / "page.html", "Points", [cloud_part("A <cloud>.", data)])
    text = page.read_text()
    assert 1_400_000 < page.stat().st_size < 2_000_000
    stored = json.loads(re.search(r'id="cloud-data">(.*?)</script>', text)[1])
    assert stored == data and len(base64.b64decode(data["points"])) == 6 * MOST_IN_PAGE
    assert html.escape("A <cloud>.") in text and not re.search(r"(src|href)=", text)


def test_an_error_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"images float64 \(1, 2, 2, 3\); both must be"):
        cloud_of(np.zeros((1, 2, 2, 3)), np.zeros((1, 2, 2, 3)), np.ones((1, 2, 2)))
    with pytest.raises(ValueError, match="no points"):
        preview_data(random_cloud(0))
