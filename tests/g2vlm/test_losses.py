"""The losses of the geometric expert: known answers, invariances, and gradients that are finite."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from gasp_fast.g2vlm.losses import (
    HUBER_ANGLE,
    SMALLEST_ANGLE,
    Geometry,
    GeometryLoss,
    corner_normals,
    counted_corners,
    depth_edges,
    depth_weight,
    geometry_loss,
    normal_loss,
)
from gasp_fast.g2vlm.rotation import nearest_rotation

FRAMES, HEIGHT, WIDTH = 3, 6, 7


def scene(seed: int = 0, samples: int = 2) -> tuple[Geometry, torch.Tensor]:
    """Smooth depth seen by cameras in different places, and which of its points are known."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(samples, FRAMES, *shape, generator=generator)

    y, x = torch.meshgrid(torch.linspace(-0.5, 0.5, HEIGHT), torch.linspace(-0.6, 0.6, WIDTH), indexing="ij")
    slope = 0.02 * draw(2, 1, 1)
    depth = 2 + slope[:, :, 0] * x + slope[:, :, 1] * y + 0.1 * draw(1, 1).abs()
    local = torch.stack([x * depth, y * depth, depth], -1)
    rotation, translation = nearest_rotation(torch.eye(3) + 0.1 * draw(3, 3)), 0.3 * draw(3)
    rotation[:, 0], translation[:, 0] = torch.eye(3), 0
    world = (rotation[:, :, None, None] @ local[..., None]).squeeze(-1) + translation[:, :, None, None]
    valid = torch.rand(local.shape[:-1], generator=generator) < 0.8
    return Geometry(local, world, rotation, translation), valid


def leaves(geometry: Geometry) -> list[torch.Tensor]:
    return [geometry.local, geometry.world, geometry.rotation, geometry.translation]


def copied(geometry: Geometry, scale: float = 1.0, noise: float = 0.0) -> Geometry:
    """A prediction: another unit, and noise."""
    generator = torch.Generator().manual_seed(9)
    scales = scale, scale, 1.0, scale
    changed = [
        (value + noise * torch.randn(value.shape, generator=generator)) * by
        for value, by in zip(leaves(geometry), scales, strict=True)
    ]
    changed[2] = nearest_rotation(changed[2])
    return Geometry(*(value.detach().requires_grad_() for value in changed))


def terms(loss: GeometryLoss) -> torch.Tensor:
    return torch.stack([loss.local, loss.world, loss.normal, loss.rotation, loss.translation])  # [5, B]


def naive(predicted: Geometry, true: Geometry, valid: torch.Tensor) -> list[list[float]]:
    """Point and camera terms of each sample by loops in float64; the scale by trying all breakpoints."""
    results = []
    for sample in range(len(valid)):
        p, t = (Geometry(*(value[sample].detach().double() for value in leaves(g))) for g in (predicted, true))
        mask = valid[sample]
        unit = torch.stack([point.norm() for point in t.world[mask]]).mean()
        ours = torch.stack([point.norm() for point in p.local[mask]]).mean()
        weight = torch.zeros(mask.shape, dtype=torch.float64)
        for frame in range(FRAMES):
            depths = t.local[frame][mask[frame]][:, 2] / unit
            weight[frame][mask[frame]] = torch.stack([1 / max(z, 0.1 * depths.mean()) for z in depths])
        a, b = p.local[mask] / ours, t.local[mask] / unit  # [n, 3]
        costs = {float(s): float((weight[mask][:, None] * (s * a - b).abs()).sum()) for s in (b / a).flatten()}
        scale = min(costs, key=lambda s: costs[s])
        world = (weight[mask][:, None] * (scale * p.world[mask] / ours - t.world[mask] / unit).abs()).mean()
        angles, errors = [], []
        for i, j in itertools.permutations(range(FRAMES), 2):
            turn, turned = (g.rotation[i].T @ g.rotation[j] for g in (t, p))
            chord = float((turn - turned).norm())  # as acos of the trace, but exact at small angles
            angles.append(2 * math.asin(chord / math.sqrt(8)))
            shift = t.rotation[i].T @ (t.translation[j] - t.translation[i]) / unit
            shifted = scale * (p.rotation[i].T @ (p.translation[j] - p.translation[i])) / ours
            for error in (shifted - shift).abs().tolist():
                errors.append(error**2 / 2 if error <= 0.1 else 0.1 * (error - 0.05))
        results.append([
            costs[scale] / (3 * int(mask.sum())), float(world), sum(angles) / len(angles), sum(errors) / len(errors)
        ])  # fmt: skip
    return results


@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_points_and_cameras_equal_loops_in_float64(noise):
    true, valid = scene()
    predicted = copied(true, 3.0, noise)
    found = terms(geometry_loss(predicted, true, valid))[[0, 1, 3, 4]].T
    assert found.flatten().tolist() == pytest.approx([*itertools.chain(*naive(predicted, true, valid))], rel=2e-5)


@pytest.mark.parametrize("scale", [1.0, 17.0, 0.01])
def test_a_perfect_prediction_in_any_unit_has_only_the_floor_of_normals(scale):
    true, valid = scene()
    found = terms(geometry_loss(copied(true, scale), true, valid))
    floor = SMALLEST_ANGLE**2 / (2 * HUBER_ANGLE)
    assert found[:2].max() < 1e-6 and found[3].max() < 1e-3 and found[4].max() < 1e-10
    assert found[2].tolist() == pytest.approx([floor] * 2, rel=1e-4)


def test_gradients_are_finite_at_the_truth_and_with_nothing_known():
    true, valid = scene()
    valid[1] = False
    predicted = copied(true)
    loss = geometry_loss(predicted, true, valid)
    loss.total().sum().backward()
    assert terms(loss)[:3, 1].tolist() == [0, 0, 0]
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves(predicted))


def test_gradients_are_finite_for_a_head_that_predicts_one_point():
    """Two layers whose last one is zero at first: all points are equal, and no block has a normal."""
    true, valid = scene()
    predicted = copied(Geometry(*(torch.zeros_like(value) for value in leaves(true))))
    with torch.no_grad():
        predicted.local[..., 2] = 1  # z = exp(0)
        predicted.rotation.copy_(torch.eye(3))
    geometry_loss(predicted, true, valid).total().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves(predicted))


def test_what_is_unknown_changes_nothing():
    true, valid = scene()
    predicted = copied(true, 1.0, 0.1)
    expected = terms(geometry_loss(predicted, true, valid))
    unknown = replace(true, local=true.local.clone(), world=true.world.clone())
    unknown.local[~valid] = unknown.world[~valid] = float("nan")
    loss = geometry_loss(predicted, unknown, valid)
    assert torch.equal(terms(loss), expected)
    loss.total().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves(predicted))
    assert (predicted.world.grad[~valid] == 0).all()  # type: ignore[index]


def plane(degrees: float) -> torch.Tensor:
    """A plane before the camera, turned about the vertical: [1, 1, H, W, 3]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 9), indexing="ij")
    z = 50 + math.tan(math.radians(degrees)) * x
    return torch.stack([x, y, z], -1)[None, None]


@pytest.mark.parametrize(("degrees", "counted"), [(0, 1), (2, 2), (10, 10), (60, 60)])
def test_the_normal_term_is_the_huber_loss_of_the_angle(degrees, counted):
    angle = math.radians(counted)
    expected = angle**2 / (2 * HUBER_ANGLE) if angle < HUBER_ANGLE else angle - HUBER_ANGLE / 2
    valid = torch.ones(1, 1, 8, 9, dtype=torch.bool)
    assert normal_loss(plane(degrees), plane(0), counted_corners(plane(0), valid)).item() == pytest.approx(
        expected, rel=1e-4
    )


def test_normals_at_all_corners_of_a_plane_point_the_same_way():
    normals = torch.nn.functional.normalize(corner_normals(plane(0)), dim=-1)
    assert torch.allclose(normals, normals[:1, :, :, :1, :1].expand_as(normals), atol=1e-6)
    assert normals[0, 0, 0, 0, 0].abs().tolist() == pytest.approx([0, 0, 1], abs=1e-6)


def test_normals_do_not_cross_an_edge_of_depth_or_an_unknown_point():
    true, valid = plane(0), torch.ones(1, 1, 8, 9, dtype=torch.bool)
    true[..., 4:, 2] += 5  # a step of 10 %
    edges = depth_edges(true[..., 2], valid)[0, 0]
    assert edges[:, 3:5].all() and not edges[:, :3].any() and not edges[:, 5:].any()
    predicted = plane(0)  # without the step: wrong at the edge only
    floor = SMALLEST_ANGLE**2 / (2 * HUBER_ANGLE)
    assert normal_loss(predicted, true, counted_corners(true, valid)).item() == pytest.approx(floor, rel=1e-4)
    predicted, valid[..., 2, 2] = plane(0), False
    predicted[..., 2, 2, 2] = 1.0
    assert normal_loss(predicted, plane(0), counted_corners(plane(0), valid)).item() == pytest.approx(floor, rel=1e-4)


def test_near_points_weigh_at_most_ten_times_the_mean():
    depth, valid = torch.tensor([[[[0.01, 1.0, 2.0, 2.99]]]]), torch.ones(1, 1, 1, 4, dtype=torch.bool)
    valid[..., 1] = False
    mean = (0.01 + 2 + 2.99) / 3
    assert depth_weight(depth, valid).flatten().tolist() == pytest.approx([1 / (0.1 * mean), 0, 0.5, 1 / 2.99])


def test_samples_without_smooth_depth_have_no_normal_term_and_one_frame_has_no_camera_term():
    true, valid = scene()
    predicted = copied(true, 1.0, 0.1)
    found = geometry_loss(predicted, true, valid, with_normals=torch.tensor([True, False]))
    assert found.normal[0] > 0 and found.normal[1] == 0
    first = (Geometry(*(value[:, :1] for value in leaves(g))) for g in (predicted, true))
    alone = geometry_loss(*first, valid[:, :1])
    assert alone.rotation.tolist() == alone.translation.tolist() == [0, 0]


def test_the_total_weighs_cameras_and_drops_outliers():
    one, two = torch.ones(1), torch.full((1,), 2.0)
    loss = GeometryLoss(dense=3 * one, local=one, world=one, normal=one, rotation=two, translation=one)
    assert loss.total().item() == pytest.approx(3 + 0.2 * (200 + 2))
    assert loss.total(translation_weight=1).item() == pytest.approx(3.6)
    assert loss.total(zero_above=10).item() == 0


def test_shapes_that_do_not_match_are_named():
    true, valid = scene()
    with pytest.raises(ValueError, match=r"predicted\.world has the shape \(2, 3, 6, 7, 2\)"):
        geometry_loss(replace(true, world=true.world[..., :2]), true, valid)
    with pytest.raises(ValueError, match=r"valid is torch\.float32"):
        geometry_loss(true, true, valid.float())
