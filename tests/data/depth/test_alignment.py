"""The alignment tolerates wrong points, and names a fit that cannot be used."""

from __future__ import annotations

import numpy as np
import pytest

from gasp_fast.data.depth.alignment import align


@pytest.mark.parametrize("space", ["depth", "inverse depth"])
@pytest.mark.parametrize("wrong", [0.0, 0.2, 0.4])
def test_alignment_tolerates_wrong_points(space, wrong):
    draw = np.random.default_rng(1)
    z = np.exp(draw.uniform(0, 3, 300))
    y = z if space == "depth" else 1 / z
    x = (y - 0.05) / 1.7
    seen = z.copy()
    bad = draw.random(300) < wrong
    seen[bad] *= np.exp(draw.normal(scale=2, size=bad.sum()))
    fit = align(x, seen, space)
    assert fit.scale == pytest.approx(1.7, rel=1e-3) and fit.shift == pytest.approx(0.05, abs=1e-3)
    assert fit.fault is None
    np.testing.assert_allclose(fit.apply(x[None]), z[None], rtol=2e-2)


def test_the_error_is_that_of_the_noise():
    draw = np.random.default_rng(1)
    z = draw.uniform(1, 5, 2000)
    fit = align(z, z * np.exp(draw.normal(scale=0.05, size=2000)), "depth")
    assert fit.error == pytest.approx(0.05 * 0.6745, rel=0.1)  # the median of |normal|


@pytest.mark.parametrize(
    ("x", "z", "words"),
    [
        (np.ones(10), np.ones(10), "sparse points; 30 are needed"),
        (np.linspace(1, 2, 100), np.linspace(5, 1, 100), "are negatively correlated"),
        (np.linspace(1, 9, 200), np.linspace(1, 9, 200) * np.exp(np.sin(np.arange(200) * 7.0)), "points within 10%"),
        (np.arange(200) % 7.0, 3 + 0.3 * np.sin(np.arange(200) * 7.0) + 0.001 * (np.arange(200) % 7), "hardly below"),
        (np.ones(100), np.linspace(1, 2, 100), "are negatively correlated"),
        (np.full(100, np.nan), np.linspace(1, 2, 100), "0 sparse points"),
    ],
)
def test_what_cannot_be_aligned_has_a_fault(x, z, words):
    assert words in align(x, z, "depth").fault


def test_depth_beyond_the_range_of_the_points_is_unknown():
    z = np.linspace(2, 6, 100)
    fit = align(1 / z, z, "inverse depth")
    assert fit.apply(np.array([[1 / 4.0, 0.0, -1.0, 1 / 500.0, 1 / 0.1]])).tolist() == [
        [pytest.approx(4.0), 0, 0, 0, 0]
    ]
