"""The metrics of predicted geometry: known answers."""

import math

import pytest
import torch

from gasp_fast.g2vlm.metrics import (
    Similarity,
    depth_metrics,
    iterated_closest_points,
    least_deviation_scale,
    nearest,
    point_metrics,
    pose_metrics,
    umeyama,
)
from gasp_fast.g2vlm.rotation import nearest_rotation
from gasp_fast.g2vlm.scale import best_scale

GENERATOR = torch.Generator().manual_seed(0)


def cloud(count: int) -> torch.Tensor:
    return torch.rand(count, 3, generator=GENERATOR, dtype=torch.float64)


def turned(*axis_angle: float) -> torch.Tensor:
    x, y, z = axis_angle
    skew = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.linalg.matrix_exp(skew)


def test_depth_is_compared_after_its_scale():
    true, valid = torch.tensor([[[1.0, 2.0, 4.0, 8.0, 5.0]]]), torch.tensor([[[True, True, True, True, False]]])
    found = depth_metrics(true / 10, true, valid)
    assert (found.abs_rel, found.delta, found.scale) == pytest.approx((0, 1, 10), abs=1e-6)
    off = true.clone()
    off[0, 0, 0], off[0, 0, 4] = 1.5, 100  # one of four valid points is 50 % too far; the unknown one does not count
    found = depth_metrics(off, true, valid)
    assert (found.abs_rel, found.delta) == pytest.approx((0.5 / 4, 3 / 4), abs=5e-3)


def test_ten_rounds_come_close_to_the_exact_scale():
    predicted = 1 + torch.rand(500, generator=GENERATOR, dtype=torch.float64)
    true = 3 * predicted + 0.1 * torch.randn(500, generator=GENERATOR, dtype=torch.float64)
    true[:100] *= 4  # outliers
    exact = best_scale(predicted[None], true[None], torch.ones(1, 500))
    assert float(least_deviation_scale(predicted, true)) == pytest.approx(float(exact), rel=1e-2)


def test_umeyama_recovers_a_similarity_and_never_mirrors():
    source = cloud(50)
    motion = Similarity(torch.tensor(2.5).double(), turned(0.3, -1.0, 2.0), torch.tensor([1.0, -2, 3]).double())
    found = umeyama(source, motion(source))
    assert torch.allclose(found.rotation, motion.rotation) and torch.allclose(found.translation, motion.translation)
    assert float(found.scale) == pytest.approx(2.5)
    mirrored = umeyama(source, source * torch.tensor([1.0, 1.0, -1.0]).double())
    assert float(torch.linalg.det(mirrored.rotation)) == pytest.approx(1)


def test_points_are_compared_in_any_pose_and_unit():
    true = cloud(3000)
    predicted = 0.2 * true @ turned(1.0, 0.5, 0.2).T + 7
    found = point_metrics(predicted, true)
    assert max(found.accuracy, found.completeness) < 1e-9
    half = torch.cat([true[:1500], true[:1500]])  # the truth is twice as large as what was predicted
    found = point_metrics(half, torch.cat([true[:1500], true[:1500] + torch.tensor([0, 0, 1e-9])]))
    assert found.accuracy < 1e-6


def test_icp_finds_a_small_motion_without_knowing_pairs():
    target = cloud(400)
    motion = Similarity(torch.tensor(1.0).double(), turned(0.01, -0.02, 0.01), torch.tensor([0.01, 0, -0.01]).double())
    shuffled = motion(target)[torch.randperm(400, generator=GENERATOR)]
    found = iterated_closest_points(shuffled, target, reach=0.1)
    assert torch.allclose(found(motion(target)), target, atol=1e-9)
    assert torch.equal(iterated_closest_points(shuffled, target, reach=0.0)(shuffled), shuffled)  # nothing in reach


def test_the_nearest_point_is_that_of_a_search_over_all():
    source, target = cloud(30), cloud(40)
    distance, at = nearest(source, target)
    for point, d, i in zip(source, distance, at, strict=True):
        all_distances = (target - point).norm(dim=1)
        assert float(d) == pytest.approx(float(all_distances.min())) and int(i) == int(all_distances.argmin())


def poses(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    rotation = nearest_rotation(torch.randn(count, 3, 3, generator=GENERATOR, dtype=torch.float64))
    return rotation, torch.randn(count, 3, generator=GENERATOR, dtype=torch.float64)


def test_poses_are_compared_up_to_a_similarity_of_the_world():
    rotation, translation = poses(5)
    world = turned(0.4, 0.1, -2.0)
    found = pose_metrics(world @ rotation, 3 * translation @ world.T + 1, rotation, translation)
    assert (found.rra, found.rta, found.auc) == (1, 1, 1)


@pytest.mark.parametrize(("degrees", "auc"), [(0.5, 1.0), (10.5, 20 / 30), (29.5, 1 / 30), (31.0, 0.0)])
def test_the_auc_is_the_mean_share_over_thresholds(degrees, auc):
    """Two cameras, of which one is turned."""
    rotation, translation = poses(2)
    off = rotation.clone()
    off[1] = rotation[1] @ turned(math.radians(degrees), 0, 0)
    found = pose_metrics(off, translation, rotation, translation)
    assert found.auc == pytest.approx(auc) and found.rta == 1 and found.rra == float(degrees < 30)


def test_a_direction_and_its_opposite_count_as_the_same():
    rotation, translation = poses(3)
    found = pose_metrics(rotation, -translation, rotation, translation)
    assert (found.rra, found.rta) == (1, 1)


def test_a_translation_of_0_has_no_direction_and_counts_as_wrong():
    """So identity poses score 0, even where cameras do not turn."""
    rotation, translation = torch.eye(3).expand(6, 3, 3).double(), poses(6)[1]
    nowhere = torch.zeros(6, 3).double()
    for ours, truth in ((nowhere, translation), (translation, nowhere)):
        found = pose_metrics(rotation, ours, rotation, truth)
        assert (found.rra, found.rta, found.auc) == (1, 0, 0)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="valid marks no point"):
        depth_metrics(torch.ones(1, 2, 2), torch.ones(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="n >= 3"):
        point_metrics(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="1 poses"):
        pose_metrics(*poses(1), *poses(1))
