"""Two textured planes, a moving camera, one `CorrespondenceHead`: the loss learns to match in half a minute.

    python examples/two_planes.py --out DIR

No vision-language model takes part. The features of a patch are the pixels around it, frozen; each photograph has its
own exposure and white balance, so that raw pixels match badly. A head is trained on them with `gasp_loss`, from
matches that exact geometry gives, and is then asked about views it has never seen. Writes `two_planes.png`, prints a
table, and exits with 1 if the head did not learn.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from gasp_fast import CorrespondenceHead, Matches, frame_match, gasp_loss
from gasp_fast.data.tracks import Views, track_points

SIDE, PATCH, WINDOW = 192, 12, 36  # pixels of an image, of a patch, and of what a patch's features see
GRID = SIDE // PATCH
FOCAL = 200.0
NEAR, FAR = 2.0, 3.5  # metres
RADIUS = 2  # patches: how close a match must come to count (PCK@2)
STEPS, FRAMES, TRAINING_VIEWS, TESTS = 300, 4, 120, 5
LEAST_GAIN = 0.25  # of PCK


@dataclass(frozen=True)
class View:
    image: NDArray[np.float32]  # [SIDE, SIDE, 3], 0 to 1
    depth: NDArray[np.float32]  # [SIDE, SIDE]
    pose: NDArray[np.float64]  # [4, 4], world-to-camera


# ---- the world ------------------------------------------------------------------------------------------------------


def texture(draw: np.random.Generator, size: int = 512) -> NDArray[np.float32]:
    """Pale blotches of three sizes, `[size, size, 3]`, without a seam where it repeats."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size))) * size
    picture = np.zeros((size, size, 3))
    for blobs in (8, 20, 48):  # across the texture
        speckle = draw.standard_normal((size, size, 1)) + 1.5 * draw.standard_normal((size, size, 3))
        spectrum = np.fft.fft2(speckle, axes=(0, 1))
        noise = np.fft.ifft2(spectrum * np.exp(-((frequency / blobs) ** 2))[..., None], axes=(0, 1)).real
        picture += noise / noise.std()
    return np.clip(0.5 + 0.09 * picture, 0, 1).astype(np.float32)


def render(textures: list[NDArray[np.float32]], draw: np.random.Generator) -> View:
    """A photograph from a random place: a near plane of 1.4 x 1.4 m before a far one without end."""
    pitch, yaw, roll = (
        np.radians(draw.uniform(-8, 8)),
        np.radians(draw.uniform(-8, 8)),
        np.radians(draw.uniform(-20, 20)),
    )
    centre = draw.uniform([-0.5, -0.5, -0.3], [0.5, 0.5, 0.3])
    rotation = _turn(0, pitch) @ _turn(1, yaw - 0.3 * centre[0]) @ _turn(2, roll)  # world to camera, facing the middle
    pixel = (np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), -1) + 0.5 - SIDE / 2) / FOCAL
    ray = np.concatenate([pixel, np.ones((SIDE, SIDE, 1))], -1) @ rotation  # [SIDE, SIDE, 3], in the world
    image, depth = np.zeros((SIDE, SIDE, 3), np.float32), np.zeros((SIDE, SIDE), np.float32)
    for plane, distance in ((1, FAR), (0, NEAR)):
        length = (distance - centre[2]) / ray[..., 2]  # along the ray, whose camera depth is 1: this is the depth
        hit = (centre + length[..., None] * ray)[..., :2]
        shown = (np.abs(hit) < 0.7).all(-1) if plane == 0 else np.ones((SIDE, SIDE), bool)
        image[shown], depth[shown] = _sample(textures[plane], hit[shown] * 96), length[shown]
    gain, haze = np.exp(draw.normal(0, 0.2, 3)), draw.uniform(0, 0.2, 3)
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, -rotation @ centre
    return View(np.clip(image * gain + haze, 0, 1).astype(np.float32), depth, pose)


def _turn(axis: int, angle: float) -> NDArray[np.float64]:
    i, j = [k for k in range(3) if k != axis]
    rotation = np.eye(3)
    rotation[i, i] = rotation[j, j] = np.cos(angle)
    rotation[i, j], rotation[j, i] = -np.sin(angle), np.sin(angle)
    return rotation


def _sample(picture: NDArray[np.float32], at: NDArray[np.float64]) -> NDArray[np.float32]:
    """Bilinear, repeating; `at [..., 2]` in texels."""
    low = np.floor(at).astype(int)
    x, y = np.moveaxis(at - low, -1, 0)[..., None]
    (left, top), (right, bottom) = np.moveaxis(low % len(picture), -1, 0), np.moveaxis((low + 1) % len(picture), -1, 0)
    upper = (1 - x) * picture[top, left] + x * picture[top, right]
    return ((1 - y) * upper + y * ((1 - x) * picture[bottom, left] + x * picture[bottom, right])).astype(np.float32)


# ---- from views to what the loss takes ------------------------------------------------------------------------------


def features(views: list[View]) -> Tensor:
    """The pixels around each patch, thinned to 9 x 9: `[N, 243]`, frame by frame, row by row."""
    images = torch.from_numpy(np.stack([view.image for view in views])).movedim(-1, 1)  # [F, 3, SIDE, SIDE]
    margin = (WINDOW - PATCH) // 2
    padded = torch.nn.functional.pad(images, [margin] * 4, mode="replicate")
    small = torch.nn.functional.avg_pool2d(padded, 4)
    step = PATCH // 4
    windows = small.unfold(2, WINDOW // 4, step).unfold(3, WINDOW // 4, step)  # [F, 3, GRID, GRID, 9, 9]
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(len(views) * GRID * GRID, -1)


def ground_truth(views: list[View]) -> Matches:
    """Where every patch centre of the first view is seen again in the others."""
    camera = np.array([[FOCAL, 0, SIDE / 2], [0, FOCAL, SIDE / 2], [0, 0, 1]])
    count, tokens = len(views), GRID * GRID
    places = np.stack(np.divmod(np.arange(tokens), GRID)[::-1], -1)  # [tokens, 2], column and row
    tracks = track_points(
        (places + 0.5) * PATCH,
        Views(
            depth=[view.depth for view in views],
            intrinsics=np.stack([camera] * count),
            pose=np.stack([view.pose for view in views]),
            size=np.full((count, 2), SIDE),
        ),
        keep=1.0,
    )
    token = (tracks.uv // PATCH).astype(int) @ [1, GRID] + tokens * np.arange(count)  # [T, F]
    point, frame = np.nonzero(tracks.visible[:, 1:])
    patches = np.stack([view.depth for view in views]).reshape(count, GRID, PATCH, GRID, PATCH)
    return Matches(
        frame_offsets=torch.arange(count + 1) * tokens,
        anchor=torch.from_numpy(token[point, 0]),
        target=torch.from_numpy(token[point, frame + 1]),
        target_depth=torch.from_numpy(tracks.depth[point, frame + 1]).float(),
        patch_depth=torch.from_numpy(patches.mean((2, 4)).ravel()).float(),
        token_xy=torch.from_numpy(np.tile(places, (count, 1))),
    )


def nearest(embeddings: Tensor, matches: Matches) -> Tensor:
    """The token that each anchor finds in the frame of its target, `[M]`."""
    found = frame_match(embeddings, matches.anchor, matches.frame_offsets, sequence_offsets=matches.sequence_offsets)
    frame = matches.target // (GRID * GRID) % FRAMES  # within its sequence
    return found.best[0, torch.arange(len(matches)), frame]


def distance(matches: Matches, first: Tensor, second: Tensor) -> Tensor:
    """Between tokens, in patches, whatever their frames: `[M]`."""
    assert matches.token_xy is not None
    return (matches.token_xy[first] - matches.token_xy[second]).float().norm(dim=-1)


# ---- training and its report ----------------------------------------------------------------------------------------


def train(head: CorrespondenceHead, views: list[View], draw: np.random.Generator, console: Console) -> None:
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    for _ in track(range(STEPS), "training a correspondence head", console=console):
        chosen = [views[index] for index in draw.choice(len(views), FRAMES, replace=False)]
        loss = gasp_loss(head(features(chosen)), ground_truth(chosen)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def scores(errors: Tensor, moved: Tensor) -> tuple[float, float]:
    """PCK of all matches, and of those whose point left its place by more than the radius."""
    hit = (errors <= RADIUS).float()
    return float(hit.mean()), float(hit[moved].mean())


def draw_matches(
    path: Path, views: list[View], matches: Matches, found: dict[str, tuple[Tensor, float | None]]
) -> None:
    """The first view, then the second once for each answer, with an arrow from a point's old place to its new one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    assert matches.token_xy is not None
    here = matches.target // (GRID * GRID) == 1
    start = ((matches.token_xy[matches.anchor[here]] + 0.5) * PATCH).numpy()
    true_length = distance(matches, matches.anchor, matches.target)[here]
    figure = Figure(figsize=(15.2, 4.05), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + len(found))
    colours = {"cmap": "viridis", "norm": Normalize(float(true_length.min()), float(true_length.max()))}
    axes[0].imshow(pale(views[0].image), extent=(0, SIDE, SIDE, 0))
    axes[0].scatter(*start.T, c=true_length, s=30, edgecolors="black", linewidths=0.6, **colours)
    axes[0].set_title("first view: the points to find", fontsize=12)
    for axis, (name, (tokens, pck)) in zip(axes[1:], found.items(), strict=True):
        end = ((matches.token_xy[tokens[here]] + 0.5) * PATCH).numpy()
        length = distance(matches, matches.anchor, tokens)[here]
        axis.imshow(pale(views[1].image), extent=(0, SIDE, SIDE, 0))
        arrows = axis.quiver(
            *start.T,
            *(end - start).T,
            length,
            angles="xy",
            scale_units="xy",
            scale=1,
            width=0.008,
            edgecolors="black",
            linewidths=0.4,
            **colours,
        )
        axis.set_title(name if pck is None else f"{name}: {pck:.0%} right", fontsize=12)
    for axis in axes:
        axis.set(xlim=(0, SIDE), ylim=(SIDE, 0), xticks=[], yticks=[])
    figure.colorbar(arrows, ax=axes, label="displacement in patches", extend="both", pad=0.01, fraction=0.02)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def pale(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Stretched to its own range and faded, so that what is drawn on it stands out."""
    low, high = np.percentile(image, [1, 99], axis=(0, 1))
    return np.asarray(0.6 + 0.4 * np.clip((image - low) / (high - low), 0, 1), np.float32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for two_planes.png")
    out = parser.parse_args().out
    console, draw, draw_tests = Console(), np.random.default_rng(0), np.random.default_rng(1)
    torch.manual_seed(0)

    textures = [texture(draw), texture(draw)]
    training = [render(textures, draw) for _ in track(range(TRAINING_VIEWS), "taking photographs", console=console)]
    unseen = [[render(textures, draw_tests) for _ in range(FRAMES)] for _ in range(TESTS)]
    inputs = torch.cat([features(views) for views in unseen])  # [N, 243]
    matches = Matches.pack([ground_truth(views) for views in unseen])
    head = CorrespondenceHead(inputs.shape[1], mid_size=256, out_size=64)

    with torch.no_grad():
        before = nearest(head(inputs), matches)
        raw = nearest(inputs, matches)
    train(head, training, draw, console)
    with torch.no_grad():
        after = nearest(head(inputs), matches)

    moved = distance(matches, matches.anchor, matches.target) > RADIUS
    answers = {
        "same position (the identity)": distance(matches, matches.anchor, matches.target),
        "raw patch features": distance(matches, raw, matches.target),
        "head before training": distance(matches, before, matches.target),
        "head after training": distance(matches, after, matches.target),
    }
    results = {name: scores(errors, moved) for name, errors in answers.items()}
    first, last = results["head before training"][0], results["head after training"][0]
    picture = out / "two_planes.png"
    draw_matches(
        picture,
        unseen[0],
        matches,
        {"before": (before, first), "after": (after, last), "truth": (matches.target, None)},
    )

    table = Table(title=f"PCK@{RADIUS} on {TESTS} unseen walks of {FRAMES} views, {len(matches)} matches")
    table.add_column("who answers")
    table.add_column("all points", justify="right")
    table.add_column(f"moved points ({moved.float().mean():.0%})", justify="right")
    for name, (everywhere, of_moved) in results.items():
        table.add_row(name, f"{everywhere:.3f}", f"{of_moved:.3f}")
    console.print(table)
    console.print(f"picture: {picture}", soft_wrap=True)
    if last - first < LEAST_GAIN:
        console.print(f"PCK rose by {last - first:.3f}, less than {LEAST_GAIN}: the head did not learn")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
