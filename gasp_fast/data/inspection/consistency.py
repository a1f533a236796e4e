"""Checks whether the geometry of a scene agrees with itself, and names the convention that is wrong if it does not.

The check needs no ground truth: unproject the pixels of one frame with its depth, project them into another frame, and
compare with the depth map there. Over a wide gap they agree only if poses, intrinsics and depth scale are all right.
Over a gap of one frame nearly any geometry agrees, because the camera has hardly moved. So three gaps are reported.

Wrong conventions are found by repeating the check with inverted poses, with Blender axes, with both, and with depth
scaled by factors from 1e-4 to 1e4. A wrong scale shows only where the camera moved sideways, so the wide gaps decide.
If another convention agrees much better than the one on disk, it is reported as a finding. If depth and poses agree
with each other, they are compared with the photographs, which show what depth maps cannot (`displacement.py`,
`registration.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from gasp_fast.data.scenes.formats.dl3dv import BLENDER_FROM_OPENCV
from gasp_fast.data.scenes.scene import Scene, camera_centre
from gasp_fast.data.tracks.build import AGREEMENT, BORDER

from .depth_values import marked_share, undeclared_value
from .displacement import Displacement, displacement
from .frame_order import order_warnings
from .registration import DepthOffset, depth_offset
from .views import frame_pairs

GAPS = (1, 5, 20)
PAIRS_PER_GAP = 8
PIXELS_PER_PAIR = 20_000
# With real depth cameras 0.95 of the pixels agree at gap 5; with a wrong convention less than 0.5.
SOUND = 0.7

# The search for a better convention has a narrower tolerance and fewer pixels, and needs a clear margin.
SEARCH_AGREEMENT = 0.02
SEARCH_PIXELS = 1_000
SEARCH_PAIRS = 4
SEARCH_FACTORS = np.exp(np.linspace(math.log(1e-4), math.log(1e4), 65))
MARGIN = 0.15
# The photographs of sound recorded scenes are off by up to 0.2 degrees at gap 1 and 0.4 at gap 5, and their depth by
# 0.9 % of the width. With poses turned by 1 degree each, it is 0.5 and more at gap 1.
MOST_DEGREES = {1: 0.4, 5: 0.7}  # by gap
LEAST_VIEW_PIXELS = 1.5
MOST_OFFSET = 0.01  # of the width of a photograph
LEAST_GAIN = 0.3
FEWEST_COMPARED = 0.02  # share of a gap's sampled pixels; with less overlap the gap counts as not agreeing

Convention = Callable[[np.ndarray], np.ndarray]  # from the pose on disk to the pose under the convention
CONVENTIONS: dict[str, Convention] = {
    "as it is": lambda pose: pose,
    "poses are inverted: world-to-camera and camera-to-world are mistaken for each other": np.linalg.inv,
    "camera axes are flipped: Blender axes (y up, z back) and OpenCV axes are mistaken": lambda pose: (
        BLENDER_FROM_OPENCV @ pose
    ),
    "poses are inverted and camera axes are flipped (world-to-camera, Blender axes)": lambda pose: (
        BLENDER_FROM_OPENCV @ np.linalg.inv(pose)
    ),
}
AS_IT_IS = next(iter(CONVENTIONS))


@dataclass(frozen=True)
class GapAgreement:
    """Agreement of frames `gap` apart, over the pixels of one that project onto known depth in the other."""

    gap: int
    baseline: float  # median distance of the two camera centres, in the scene's unit
    share: float | None  # of these pixels, within `AGREEMENT`; None: no pixel could be compared
    compared: int


@dataclass
class SceneReport:
    """The result of `check_scene`."""

    root: str
    format: str
    frames: int
    skipped: int
    first_skipped: str
    image_size: tuple[int, int]
    frames_with_depth: int
    marked_unknown: float = 0.0  # share of pixels with a value that stands for unknown, beside 0
    known_depth: float = 0.0  # share of pixels, over the compared frames that have depth
    median_depth: float = 0.0
    path_length: float = 0.0
    gaps: list[GapAgreement] = field(default_factory=list)
    displacements: list[Displacement] = field(default_factory=list)
    depth_offset: DepthOffset | None = None
    findings: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # what is doubtful but may be meant

    @property
    def sound(self) -> bool:
        return not self.findings


def check_scene(scene: Scene) -> SceneReport:
    """Checks the scene's geometry; `findings` is empty if nothing is wrong."""
    centres = np.array([camera_centre(scene.pose(i)) for i in range(len(scene))])
    report = SceneReport(
        root=str(scene.root),
        format=scene.format,
        frames=len(scene),
        skipped=len(scene.skipped),
        first_skipped=f"{scene.skipped[0].name}: {scene.skipped[0].reason}" if scene.skipped else "",
        image_size=scene.image_size(0),
        frames_with_depth=sum(frame.depth is not None for frame in scene.frames),
        path_length=float(np.linalg.norm(np.diff(centres, axis=0), axis=1).sum()),
    )
    if not scene.has_depth:
        extent = float(np.linalg.norm(centres - centres.mean(axis=0), axis=1).max())
        report.warnings += order_warnings(scene, extent or 1.0, [])
        return report
    pairs = {gap: frame_pairs(scene, gap, PAIRS_PER_GAP) for gap in GAPS if gap < len(scene)}
    compared_frames = sorted({i for gap in pairs.values() for pair in gap for i in pair} or {0})
    maps = [scene.depth(i) for i in compared_frames if scene.frames[i].depth is not None]
    known = np.concatenate([one[one > 0] for one in maps]) if maps else np.zeros(0)
    report.known_depth = known.size / max(sum(one.size for one in maps), 1)
    if not known.size:
        report.findings.append("none of the compared frames has a pixel of known depth")
        return report
    report.median_depth = float(np.median(known))
    report.marked_unknown = marked_share(scene, compared_frames)
    if undeclared := undeclared_value(maps):
        report.findings.append(undeclared)

    for gap, members in pairs.items():
        baseline = float(np.median([np.linalg.norm(centres[i] - centres[j]) for i, j in members]))
        agreed, compared, _ = _count(_samples(scene, members, PIXELS_PER_PAIR), CONVENTIONS[AS_IT_IS], 1.0, AGREEMENT)
        report.gaps.append(GapAgreement(gap, baseline, agreed / compared if compared else None, compared))
    if pairs:  # a single frame agrees with itself
        report.findings += _findings(scene, pairs, report)
        shares = [(gap.gap, gap.share) for gap in report.gaps if gap.share is not None]
        report.warnings += order_warnings(scene, report.median_depth, shares)
    if not report.findings:
        _compare_with_photographs(scene, compared_frames, report)
    return report


def _compare_with_photographs(scene: Scene, frames: list[int], report: SceneReport) -> None:
    report.depth_offset = offset = depth_offset(scene, frames)
    if offset is not None and offset.share > MOST_OFFSET and offset.gain > LEAST_GAIN:
        report.findings.append(
            f"depth lies beside the photographs: moved by {offset.right:+.0f} pixels to the right and "
            f"{offset.down:+.0f} down, its outlines meet theirs; register depth to colour"
        )
    for gap, most in MOST_DEGREES.items():
        moved = displacement(scene, gap) if gap < len(scene) else None
        if moved is None:
            continue
        report.displacements.append(moved)
        if moved.degrees > most and moved.view_pixels > LEAST_VIEW_PIXELS and not report.findings:
            report.findings.append(
                f"photographs show points {moved.pixels:.1f} pixels ({moved.degrees:.2f} degrees) from where depth and "
                f"poses project them {gap} frame{'s' * (gap > 1)} later: poses, time stamps or intrinsics are off"
            )


def _findings(scene: Scene, pairs: dict[int, list[tuple[int, int]]], report: SceneReport) -> list[str]:
    """Names a wrong convention, a wrong depth scale, or low agreement that neither explains."""
    wide = {gap: members for gap, members in pairs.items() if gap > 1} or pairs
    samples = {
        gap: _samples(scene, members[:: -(-len(members) // SEARCH_PAIRS)], SEARCH_PIXELS)
        for gap, members in wide.items()
    }
    as_it_is = _score(samples, CONVENTIONS[AS_IT_IS], 1.0)
    best, convention, factor = max(
        (_score(samples, to_pose, factor), name, factor)
        for name, to_pose in CONVENTIONS.items()
        for factor in SEARCH_FACTORS
    )
    factor, best = _refined(samples, CONVENTIONS[convention], float(factor), best)
    findings = []
    if best > as_it_is + MARGIN:
        if convention != AS_IT_IS:
            findings.append(f"{convention} (agreement {as_it_is:.2f} as it is, {best:.2f} otherwise)")
        # The scale is a finding only if the convention alone does not explain the gain.
        if best > _score(samples, CONVENTIONS[convention], 1.0) + MARGIN:
            findings.append(
                f"depth scale is wrong: multiplied by {_rounded(factor)}, depth agrees with the poses "
                f"(agreement {as_it_is:.2f} as it is, {best:.2f} then)"
            )
    shares = [gap.share for gap in report.gaps if gap.share is not None and gap.gap <= 5]
    if not findings and shares and shares[-1] < SOUND:
        findings.append(
            f"frames agree for only {shares[-1]:.2f} of their pixels, and no other convention of poses and scale does "
            "better: inaccurate poses, wrong intrinsics, or moving objects"
        )
    return findings


# ---- comparing two frames -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    """Pixels of one frame, as rays and depths, and the frame they are projected into."""

    rays: np.ndarray  # [3, n], z = 1
    depth: np.ndarray  # [n]
    pose: np.ndarray  # [4, 4] of their own frame
    other_pose: np.ndarray
    other_camera: np.ndarray  # [3, 3] in pixels of the other depth map
    other_depth: np.ndarray  # [h, w]
    pixels: int  # number of sampled pixels, of known depth or not


def _samples(scene: Scene, pairs: list[tuple[int, int]], pixels: int) -> list[_Sample]:
    """About `pixels` pixels of the first frame of each pair, on a regular grid."""
    samples = []
    for i, j in pairs:
        depth = scene.depth(i)
        step = max(1, int(math.sqrt(depth.size / pixels)))
        row, column = (
            axis.ravel() for axis in np.mgrid[step // 2 : depth.shape[0] : step, step // 2 : depth.shape[1] : step]
        )
        z = depth[row, column].astype(np.float64)
        camera = _depth_camera(scene, i)
        x = (column + 0.5 - camera[0, 2]) / camera[0, 0]
        y = (row + 0.5 - camera[1, 2]) / camera[1, 1]
        rays = np.stack([x, y, np.ones_like(x)])[:, z > 0]
        other = (scene.pose(j), _depth_camera(scene, j), scene.depth(j))
        samples.append(_Sample(rays, z[z > 0], scene.pose(i), *other, z.size))
    return samples


def _depth_camera(scene: Scene, i: int) -> np.ndarray:
    """Intrinsics in pixels of the depth map, which may be coarser than the image."""
    height, width = scene.depth(i).shape
    image_width, image_height = scene.image_size(i)
    return scene.intrinsics(i) * np.array([width / image_width, height / image_height, 1.0])[:, None]


@np.errstate(over="ignore", invalid="ignore")  # pixels of a wild depth or camera agree with nothing
def _count(samples: list[_Sample], to_pose: Convention, factor: float, tolerance: float) -> tuple[int, int, int]:
    """(agreeing, compared, sampled) pixels, with the poses under a convention and the depth multiplied by `factor`."""
    agreeing = compared = sampled = 0
    for sample in samples:
        motion = to_pose(sample.other_pose) @ np.linalg.inv(to_pose(sample.pose))
        moved = motion[:3, :3] @ (sample.rays * (sample.depth * factor)) + motion[:3, 3:]  # [3, n]
        moved = moved[:, moved[2] > 1e-9]
        u, v, _ = sample.other_camera @ (moved / moved[2])
        height, width = sample.other_depth.shape
        inside = (u >= BORDER) & (u < width - BORDER) & (v >= BORDER) & (v < height - BORDER)
        there = sample.other_depth[v[inside].astype(int), u[inside].astype(int)] * factor
        here = moved[2, inside][there > 0]
        there = there[there > 0]
        agreeing += int((np.abs(here - there) < tolerance * np.minimum(here, there)).sum())
        compared += here.size
        sampled += sample.pixels
    return agreeing, compared, sampled


def _score(samples: dict[int, list[_Sample]], to_pose: Convention, factor: float) -> float:
    """Mean agreement over the gaps; a gap with hardly any overlap counts as 0."""
    shares = []
    for members in samples.values():
        agreeing, compared, sampled = _count(members, to_pose, factor, SEARCH_AGREEMENT)
        shares.append(agreeing / compared if compared > FEWEST_COMPARED * sampled else 0.0)
    return float(np.mean(shares))


def _refined(
    samples: dict[int, list[_Sample]], to_pose: Convention, factor: float, score: float
) -> tuple[float, float]:
    """The best factor near `factor`, in ever finer steps, and its score."""
    width = float(np.log(SEARCH_FACTORS[1] / SEARCH_FACTORS[0]))
    for _ in range(3):
        candidates = factor * np.exp(np.linspace(-width, width, 9))
        score, factor = max([(score, factor), *((_score(samples, to_pose, float(f)), float(f)) for f in candidates)])
        width /= 4
    return factor, score


def _rounded(factor: float) -> str:
    """The factor, rounded to a power of ten or a simple multiple of one if it is within 3 % of it."""
    power = 10.0 ** math.floor(math.log10(factor))
    for digit in (1, 2, 2.5, 4, 5, 10):
        if abs(factor / (digit * power) - 1) < 0.03:
            return f"{digit * power:g}"
    return f"{factor:.3g}"
