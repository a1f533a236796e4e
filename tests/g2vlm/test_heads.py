"""The geometry heads: what each output depends on, how they start, and gradients that are finite."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from support.authors_g2vlm import SlowHeads

from gasp_fast.g2vlm.checkpoint import official_names
from gasp_fast.g2vlm.head_blocks import Attention, CrossAttention, rotated, turns_of
from gasp_fast.g2vlm.heads import GeometryHeads, HeadsConfig, moved, pixels_of_patches
from gasp_fast.g2vlm.losses import Geometry, corner_normals, directions, geometry_loss
from gasp_fast.g2vlm.rotation import nearest_rotation

ROWS, COLUMNS, FRAMES, HIDDEN = 2, 3, 3, 24
TINY = HeadsConfig(hidden=HIDDEN, width=32, layers=2, heads=2, point_width=24, camera_width=16, patch=4)


def new_heads(seed: int = 0, config: HeadsConfig = TINY) -> GeometryHeads:
    torch.manual_seed(seed)
    return GeometryHeads(config)


def trained_heads(config: HeadsConfig = TINY) -> GeometryHeads:
    """With last layers as large as the others: outputs differ between hidden states."""
    heads = new_heads(config=config)
    with torch.no_grad():
        for last in (heads.point_head.proj, heads.global_point_head.proj, heads.camera_head.fc_rot):
            last.weight.normal_(std=0.3)
        heads.camera_head.fc_t.weight.normal_(std=0.3)
    return heads


def hidden_states(seed: int = 1, samples: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, FRAMES, ROWS * COLUMNS, HIDDEN, generator=generator)


def values(geometry: Geometry) -> list[torch.Tensor]:
    return [geometry.local, geometry.world, geometry.rotation, geometry.translation]


def a_scene(samples: int = 1) -> tuple[Geometry, torch.Tensor]:
    """A tilted wall and a step, from three places."""
    height, width = ROWS * TINY.patch, COLUMNS * TINY.patch
    y, x = torch.meshgrid(torch.linspace(-0.5, 0.5, height), torch.linspace(-0.7, 0.7, width), indexing="ij")
    depth = torch.stack([2 + 0.1 * x + 0.05 * y + 0.3 * frame * (x > 0) for frame in range(FRAMES)])
    local = torch.stack([x * depth, y * depth, depth], -1).expand(samples, -1, -1, -1, -1)
    matrix = torch.eye(3) + 0.2 * torch.randn(FRAMES, 3, 3, generator=torch.Generator().manual_seed(3))
    rotation, translation = nearest_rotation(matrix), torch.tensor([[0.0, 0, 0], [0.3, 0, 0.1], [0.5, 0.1, 0]])
    rotation[0] = torch.eye(3)
    rotation, translation = rotation.expand(samples, -1, -1, -1), translation.expand(samples, -1, -1)
    valid = torch.ones(local.shape[:-1], dtype=torch.bool)
    return Geometry(local, moved(local, rotation, translation), rotation, translation), valid


def test_the_values_of_a_patch_are_ordered_by_coordinate_row_and_column():
    patch = 2
    given = torch.arange(FRAMES * ROWS * COLUMNS * 3 * patch**2).view(1, FRAMES, ROWS * COLUMNS, 3 * patch**2)
    found = pixels_of_patches(given, ROWS, COLUMNS, patch)
    assert found.shape == (1, FRAMES, ROWS * patch, COLUMNS * patch, 3)
    for f, row, column, y, x, k in product(*map(range, (FRAMES, ROWS, COLUMNS, patch, patch, 3))):
        expected = given[0, f, row * COLUMNS + column, k * patch**2 + y * patch + x]
        assert found[0, f, row * patch + y, column * patch + x, k] == expected


def test_half_of_the_dimensions_rotates_by_the_row_and_half_by_the_column():
    d, base, row, column = 12, 100.0, 5, 2
    vector = torch.randn(d)
    found = rotated(vector[None], turns_of(torch.tensor([row]), torch.tensor([column]), d, base))[0]
    for half, place in enumerate((row, column)):
        for i in range(d // 4):
            at, other = half * d // 2 + i, half * d // 2 + i + d // 4
            turn = complex(math.cos(angle := place * base ** (-2 * i / (d / 2))), math.sin(angle))
            expected = complex(vector[at], vector[other]) * turn
            assert abs(complex(found[at], found[other]) - expected) < 1e-5


@pytest.mark.parametrize("kind", [Attention, CrossAttention])
def test_attention_depends_on_differences_of_rows_and_columns(kind):
    torch.manual_seed(0)
    attention = kind(32, 2, "fp32")
    place = torch.arange(ROWS * COLUMNS)
    rows, columns = place // COLUMNS, place % COLUMNS
    x, context = 3 * torch.randn(4, len(place), 32), 3 * torch.randn(2, len(place), 32)
    inputs = (x,) if kind is Attention else (x, context)
    found, shifted, stretched, level = (
        attention(*inputs, turns_of(*at, 16, 100.0))
        for at in ((rows, columns), (rows + 7, columns + 4), (rows, 2 * columns), (0 * rows, columns))
    )
    torch.testing.assert_close(shifted, found, rtol=0, atol=1e-5)
    assert (stretched - found).abs().max() > 0.01 and (level - found).abs().max() > 0.01


def test_patches_lie_row_by_row():
    heads, given = trained_heads(), []
    for decoder in (heads.point_decoder, heads.camera_decoder, heads.global_points_decoder):
        decoder.register_forward_pre_hook(lambda _, inputs: given.append(inputs[1]))
    heads(hidden_states(), ROWS, COLUMNS)
    expected = turns_of(torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2]), 16, 100.0)
    for turns, part in product(given, (0, 1)):
        torch.testing.assert_close(turns[part], expected[part])


def test_points_depend_on_their_frame_alone_and_world_points_also_on_frame_0():
    heads, hidden = trained_heads(), hidden_states()
    before = heads(hidden, ROWS, COLUMNS)
    for changed in range(FRAMES):
        other = hidden.clone()
        other[:, changed] += 1
        after = heads(other, ROWS, COLUMNS)
        for frame in range(FRAMES):
            sees = frame == changed
            assert torch.equal(before.local[:, frame], after.local[:, frame]) != sees
            assert torch.equal(before.world[:, frame], after.world[:, frame]) != (sees or changed == 0)
            pose = torch.equal(before.translation[:, frame], after.translation[:, frame])
            assert pose != (frame != 0 and (sees or changed == 0))
    last = hidden.clone()
    last[-1] += 1
    assert all(torch.equal(a[0], b[0]) for a, b in zip(values(before), values(heads(last, ROWS, COLUMNS)), strict=True))


def test_all_is_computed_from_the_authors_names_as_they_compute_it():
    """Without a map before the blocks; all weights drawn, so that none is without effect."""
    heads = new_heads(config=replace(TINY, hidden=TINY.width)).train()
    torch.manual_seed(4)
    with torch.no_grad():
        for weight in heads.parameters():
            weight += 0.2 * torch.randn_like(weight)
    hidden = torch.randn(1, FRAMES, ROWS * COLUMNS, TINY.width)
    found = heads(hidden, ROWS, COLUMNS)
    slow = SlowHeads({official_names(f"heads.{name}")[0]: w.detach() for name, w in heads.state_dict().items()}, 2, 4)
    first, origin = slow.pose(hidden[0, 0], COLUMNS)
    for frame, states in enumerate(hidden[0]):
        rotation, translation = slow.pose(states, COLUMNS)
        expected = (
            slow.points(states, ROWS, COLUMNS), slow.global_points(states, hidden[0, 0], ROWS, COLUMNS),
            first.T @ rotation, first.T @ (translation - origin),
        )  # fmt: skip
        for ours, theirs in zip(values(found), expected, strict=True):
            torch.testing.assert_close(ours[0, frame].double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_poses_are_rotations_and_the_first_is_the_identity(size):
    found = trained_heads()(size * hidden_states(), ROWS, COLUMNS)
    identity = torch.eye(3).expand_as(found.rotation)
    torch.testing.assert_close(found.rotation @ found.rotation.mT, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(found.rotation), identity[..., 0, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.rotation[:, 0], identity[:, 0], rtol=0, atol=1e-6)
    assert not found.translation[:, 0].any()
    assert (found.local[..., 2] > 0).all() and all(value.isfinite().all() for value in values(found))


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_new_heads_show_squares_that_face_the_camera_and_poses_near_the_identity(size):
    found = new_heads()(size * hidden_states(), ROWS, COLUMNS)
    side = (torch.arange(TINY.patch) - (TINY.patch - 1) / 2) / (16 * TINY.patch)
    for points in (found.local, found.world):
        torch.testing.assert_close(points[..., 0], side.repeat(COLUMNS).expand(points.shape[:-1]))
        torch.testing.assert_close(points[..., 1], side.repeat(ROWS)[:, None].expand(points.shape[:-1]))
        assert (points[..., 2] == 1).all()
    torch.testing.assert_close(found.rotation, torch.eye(3).expand_as(found.rotation), rtol=0, atol=0.1)
    torch.testing.assert_close(found.translation, torch.zeros_like(found.translation), rtol=0, atol=0.1)


def test_in_evaluation_world_points_are_the_local_ones_moved_by_their_pose():
    heads = trained_heads().eval()
    found = heads(hidden_states(), ROWS, COLUMNS)
    by_hand = torch.einsum("bfij,bfhwj->bfhwi", found.rotation, found.local) + found.translation[:, :, None, None]
    torch.testing.assert_close(found.world, by_hand)
    torch.testing.assert_close(found.world[:, 0], found.local[:, 0])
    without = new_heads(config=replace(TINY, with_world=False))
    without.load_state_dict({name: heads.state_dict()[name] for name in without.state_dict()})
    for ours, theirs in zip(values(found), values(without(hidden_states(), ROWS, COLUMNS)), strict=True):
        assert torch.equal(ours, theirs)  # also in training mode


def gradients(heads: GeometryHeads, hidden: torch.Tensor, scene: tuple[Geometry, torch.Tensor]) -> list[torch.Tensor]:
    """Of hidden states and weights."""
    hidden = hidden.clone().requires_grad_()
    loss = geometry_loss(heads(hidden, ROWS, COLUMNS), *scene, backend="torch").total().sum()
    return list(torch.autograd.grad(loss, [hidden, *heads.parameters()]))


@pytest.mark.parametrize("same", ["zero", "equal frames", "equal patches"])
def test_gradients_are_finite_and_moderate_for_zero_hidden_states_and_identical_poses(same):
    hidden = hidden_states()
    hidden = {
        "zero": torch.zeros_like(hidden),
        "equal frames": hidden[:, :1].expand_as(hidden),
        "equal patches": hidden[:, :, :1].expand_as(hidden),
    }[same]
    true, valid = a_scene(2)
    still = replace(true, rotation=torch.eye(3).expand_as(true.rotation), translation=0 * true.translation)
    for heads, scene in product(
        (new(config=replace(TINY, layers=5)) for new in (new_heads, trained_heads)), (true, still)
    ):
        of_hidden, *of_weights = gradients(heads, hidden, (scene, valid))
        size = torch.linalg.vector_norm(torch.stack([one.norm() for one in of_weights]))
        assert 0 < size < 300 and of_hidden.norm() < 30
        assert of_hidden.norm() > 0 or scene is still


def test_hidden_states_of_zero_have_finite_gradients_also_without_a_map():
    """There LayerNorm multiplies gradients by 1,000, once: biases follow it."""
    heads = trained_heads(replace(TINY, layers=5, hidden=TINY.width))
    for hidden in (
        torch.zeros(2, FRAMES, ROWS * COLUMNS, TINY.width),
        torch.ones(2, FRAMES, ROWS * COLUMNS, TINY.width),
    ):
        of_hidden, *of_weights = gradients(heads, hidden, a_scene(2))
        assert 0 < of_hidden.norm() < 1000 and all(0 <= one.norm() < 300 for one in of_weights)


def test_the_gradient_is_that_of_finite_differences():
    """Along the gradient of the hidden states and of each weight, away from the kinks of ReLU."""
    heads, hidden = trained_heads(), hidden_states().requires_grad_()
    camera = heads.camera_head
    with torch.no_grad():
        for layer in camera.modules():
            if isinstance(layer, torch.nn.Linear) and layer not in (camera.fc_t, camera.fc_rot):
                layer.bias.copy_(torch.tensor([1.0, -1.0]).repeat(TINY.camera_width // 2))
    weights = [torch.randn_like(value) for value in values(heads(hidden, ROWS, COLUMNS))]

    def score() -> torch.Tensor:
        found = values(heads(hidden, ROWS, COLUMNS))
        return sum((weight * value).double().sum() for weight, value in zip(weights, found, strict=True))

    score().backward()
    step = 1e-2
    for value in (hidden, *heads.parameters()):
        direction = value.grad / value.grad.norm().clamp(min=1e-3)  # a shift of all translations changes nothing
        with torch.no_grad():
            value += step * direction
            above = score()
            value -= 2 * step * direction
            slope = (above - score()) / (2 * step)
            value += step * direction
        assert float(slope) == pytest.approx(float((direction * value.grad).sum()), rel=0.02, abs=1e-3)


def test_checkpointing_changes_neither_outputs_nor_gradients():
    scene = a_scene(2)
    plain, again = trained_heads(), trained_heads(replace(TINY, checkpointing=True))
    for one, other in zip(
        gradients(plain, hidden_states(), scene), gradients(again, hidden_states(), scene), strict=True
    ):
        assert torch.equal(one, other)


def normal_error(points: torch.Tensor, true: torch.Tensor) -> float:
    """Mean over corners, in degrees."""
    ours, truth = (directions(corner_normals(one.double()))[0] for one in (points, true))
    sine, cosine = torch.linalg.vector_norm(torch.linalg.cross(ours, truth), dim=-1), (ours * truth).sum(-1)
    return torch.rad2deg(torch.atan2(sine, cosine)).mean().item()


def test_under_autocast_a_plane_keeps_its_normals_which_bf16_distorts():
    """The last product makes the plane; rounded to bf16 afterwards, it has normals that are off by tens of degrees."""
    config = replace(TINY, patch=14)
    heads = new_heads(config=config).eval()
    hidden = hidden_states(samples=1)
    y, x = torch.meshgrid(torch.arange(14) / 518 + 0.1, torch.arange(14) / 518 + 0.2, indexing="ij")
    depth = 1 / (0.3 * x - 0.2 * y + 0.5)  # of a plane
    wanted = torch.stack([x, y, depth.log()]).flatten()  # [3 * 14²]
    last, inputs = heads.point_head.proj, []
    last.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0, 0, 0]))
    with torch.no_grad():
        heads(hidden, ROWS, COLUMNS)
        last.bias.zero_()
        last.weight.copy_(wanted[:, None] * inputs[0] / inputs[0].square().sum())
    true = torch.stack([x * depth, y * depth, depth], -1)
    with torch.autocast("cpu", torch.bfloat16):
        found = heads(hidden, ROWS, COLUMNS)
    points = found.local[0, 0, :14, :14]
    assert normal_error(points, true) < 0.2
    assert normal_error(points.bfloat16(), true) > 10
    for ours, plain in zip(values(found), values(heads(hidden, ROWS, COLUMNS)), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, plain)


def test_narrower_decoders_still_end_in_float32():
    heads = trained_heads(replace(TINY, compute="bf16"))
    found, exact = (one(hidden_states(), ROWS, COLUMNS) for one in (heads, trained_heads()))
    for ours, theirs in zip(values(found), values(exact), strict=True):
        assert ours.dtype == torch.float32 and not torch.equal(ours.bfloat16().float(), ours)
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1)


def test_a_few_steps_fit_a_fixed_scene():
    """Without the normal loss; with it the local points take more than a thousand."""
    heads, hidden, scene = new_heads(), hidden_states(samples=1), a_scene()
    optimiser = torch.optim.AdamW(heads.parameters(), lr=3e-3, weight_decay=0)
    totals = []
    for _ in range(60):
        loss = geometry_loss(heads(hidden, ROWS, COLUMNS), *scene, torch.tensor([False]), backend="torch")
        totals.append(torch.stack([loss.local, loss.world, loss.rotation, loss.translation]).detach())
        loss.total().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert (totals[-1] < 0.2 * totals[0]).all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda heads: heads(hidden_states(), ROWS, COLUMNS + 1), ValueError, r"hidden has the shape \(2, 3, 6, 24\)"),
        (lambda heads: heads.bfloat16()(hidden_states(), ROWS, COLUMNS), TypeError, "keep them in float32"),
        (lambda _: HeadsConfig(width=100, heads=16), ValueError, r"heads.width = 100 must be a multiple of 4 \* heads"),
        (lambda _: HeadsConfig(heads=0), ValueError, "heads.heads = 0 must be at least 1"),
        (lambda _: HeadsConfig(rope_base=0.0), ValueError, "heads.rope_base = 0.0 must be positive"),
    ],
)
def test_an_error_says_what_is_wrong(change, error, words):
    with pytest.raises(error, match=words):
        change(new_heads())
