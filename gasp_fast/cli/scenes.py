"""List the scenes of a folder with their formats, and check whether their geometry agrees with itself.

Reads a scene, or a folder of scenes, in any of the formats dl3dv (and nerfstudio), colmap, vggt, rgbd, scannet,
scannetpp, replica, tum. Writes only the files given by --picture and --json, and with --pack-poses a file poses.txt
into each rgbd or scannet scene. Depth, poses and photographs are compared with each other; a scene without depth cannot
be checked. Exit code 1 if a scene is wrong or unreadable, else 0; what is doubtful is named.

examples:
  gasp-fast scenes scenes
  gasp-fast scenes scenes/scene-000003 --picture tracks.png
  gasp-fast scenes /data/DL3DV/1K --jobs 8 --json findings.json
  gasp-fast scenes /data/ScanNet --pack-poses
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from gasp_fast.data.inspection.consistency import GAPS, SceneReport, check_scene
from gasp_fast.data.scenes.formats import find_format, rgbd, scannet
from gasp_fast.data.scenes.formats.pose_files import pack_poses
from gasp_fast.data.scenes.library import find_scenes
from gasp_fast.data.scenes.library_file import place_of
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene
from gasp_fast.data.tracks.build import LARGEST_GRID
from gasp_fast.processes import check_workers, in_processes, usable_cores

HELP = "list scenes, check their geometry, draw their tracks"
LEGEND = (
    "depth: share of pixels with known depth.  step: camera motion per frame, in median depths.\n"
    "gap n: share of pixels whose depth agrees within 5 % with the depth of the frame n frames later."
)


@dataclass(frozen=True)
class Checked:
    """The report on one scene, or the reason why there is none."""

    report: SceneReport | None = None
    picture: Path | None = None
    failure: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=Path, metavar="DIR", help="a scene, or a folder of scenes")
    parser.add_argument(
        "--picture",
        nargs="?",
        const="",
        metavar="PATH",
        help="draw tracks over frames: PATH.png for one scene, a folder for several (default: the current folder)",
    )
    parser.add_argument("--first", type=int, default=0, metavar="N", help="query frame of the picture's tracks")
    parser.add_argument("--grid", type=int, default=12, metavar="G", help="query points along each axis of the picture")
    parser.add_argument(
        "--jobs",
        type=int,
        default=usable_cores(),
        metavar="N",
        help="scenes checked in parallel (default: all cores)",
    )
    parser.add_argument(
        "--pack-poses",
        action="store_true",
        help="write the poses of rgbd and scannet scenes into one poses.txt each, which is read in place of pose/*.txt",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    check_workers(arguments.jobs, "--jobs")
    if arguments.first < 0:
        raise ValueError(f"--first {arguments.first}: frames are counted from 0")
    if not 1 <= arguments.grid <= LARGEST_GRID:
        raise ValueError(f"--grid {arguments.grid}: 1 to {LARGEST_GRID} query points along an axis")
    console = Console()
    roots = [arguments.dir / name for name in find_scenes(arguments.dir)]
    results = _check_all(console, roots, arguments)
    if len(roots) == 1 and results[0].failure:
        raise ValueError(results[0].failure)
    reports = [result.report for result in results if result.report]
    failures = {str(root): result.failure for root, result in zip(roots, results, strict=True) if result.failure}
    _print(console, place_of(arguments.dir).root, reports, failures)
    for result in results:
        if result.picture:
            console.print(f"picture: {result.picture}", highlight=False, soft_wrap=True, markup=False)
    if arguments.json:
        found = {"scenes": [asdict(report) for report in reports], "unreadable": failures}
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0 if not failures and all(report.sound for report in reports) else 1


def _check_all(console: Console, roots: list[Path], arguments: argparse.Namespace) -> list[Checked]:
    """The results in the order of `roots`."""
    check = partial(_check, arguments=arguments, many=len(roots) > 1)
    done = in_processes(check, roots, arguments.jobs)
    shown = track(done, "checking", total=len(roots), console=console, transient=True, disable=len(roots) == 1)
    results = dict(shown)
    return [results[root] for root in roots]


def _check(root: Path, arguments: argparse.Namespace, many: bool) -> Checked:
    """A scene that cannot be read is a failure of that scene; a wrong option stops the command."""
    try:
        folder = place_of(root).root
        if arguments.pack_poses and find_format(folder) in (rgbd, scannet):
            pack_poses(folder)
        scene = open_scene(root)
        report = check_scene(scene)
        if arguments.picture is None or not scene.has_depth:
            return Checked(report)
        if 0 <= arguments.first < len(scene):
            return Checked(report, _draw(scene, arguments, many))
    except (ValueError, OSError) as error:
        return Checked(failure=str(error))
    raise ValueError(f"--first {arguments.first}: {root} has frames 0 to {len(scene) - 1}")


def _draw(scene: Scene, arguments: argparse.Namespace, many: bool) -> Path:
    from gasp_fast.data.inspection.picture import draw_tracks

    name = f"{scene.root.resolve().name}-tracks.png"
    path = Path(arguments.picture or ".")
    if many or path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        path = path / name
    elif path.suffix.lower() != ".png":
        raise ValueError(f"--picture {path}: give a .png file or an existing folder")
    return draw_tracks(scene, path, arguments.first, arguments.grid)


def _print(console: Console, folder: Path, reports: list[SceneReport], failures: dict[str, str]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("scene", overflow="fold")
    for heading in ("format", "frames", "image", "depth", "step", *(f"gap {gap}" for gap in GAPS), ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for report in reports:
        shares = {gap.gap: gap.share for gap in report.gaps}
        table.add_row(
            Text(_short(report.root, folder)),
            report.format,
            str(report.frames),
            "x".join(map(str, report.image_size)),
            f"{report.known_depth:.0%}" if report.frames_with_depth else "-",
            f"{report.gaps[0].baseline / report.median_depth:.3f}" if report.gaps and report.median_depth else "-",
            *("-" if shares.get(gap) is None else f"{shares[gap]:.3f}" for gap in GAPS),
            _verdict(report),
        )
    if reports:
        console.print(table)
        console.print(Text(LEGEND, style="dim"))
    for report in reports:
        name = _short(report.root, folder)
        lines = [(finding, "red") for finding in report.findings]
        lines += [(warning, "yellow") for warning in report.warnings]
        if report.marked_unknown:
            lines.append((f"{report.marked_unknown:.0%} of the depth values stand for unknown (beside 0)", "yellow"))
        if report.skipped:
            lines.append((f"{report.skipped} frames skipped; the first, {report.first_skipped}", "yellow"))
        if not report.frames_with_depth:
            lines.append((f"no depth; make it with: gasp-fast depth {report.root}", "yellow"))
        for line, style in lines:
            console.print(Text(f"{name}: {line}", style=style), soft_wrap=True)
    for root, why in failures.items():
        console.print(Text(f"unreadable: {why if root in why else f'{root}: {why}'}", style="red"), soft_wrap=True)


def _verdict(report: SceneReport) -> str:
    if not report.sound:
        return "[bold red]WRONG"
    if report.warnings:
        return "[yellow]doubtful"
    return "[green]sound" if report.gaps else "[yellow]no depth"


def _short(root: str, folder: Path) -> str:
    path = Path(root)
    return str(path.relative_to(folder)) if path != folder else path.resolve().name
