"""Compute depth for scenes that have none.

Reads scenes with COLMAP's stereo maps, or with sparse points to which the depth of a monocular model is fitted. Writes
computed_depth/ into each scene. Scenes with depth of their own stay unchanged. Exit code 0 if every scene has at least
one usable frame, otherwise 1.

examples:
  gasp-fast depth scenes                                    # from COLMAP's stereo maps
  gasp-fast depth scenes --model DepthAnythingV2 --device cuda
  gasp-fast depth scenes/one --source mvs --force
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.text import Text

from gasp_fast.data.depth.compute import Predictor, depth_from_mvs, depth_from_predictor, has_mvs
from gasp_fast.data.inspection.consistency import check_scene
from gasp_fast.data.scenes.computed_depth import FOLDER, INDEX, DepthIndex, read_index
from gasp_fast.data.scenes.library import find_scenes
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene, without_depth

HELP = "compute depth for scenes that have none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=Path, metavar="DIR", help="a scene, or a folder of scenes")
    parser.add_argument(
        "--source",
        choices=("auto", "mvs", "model"),
        default="auto",
        help="mvs: COLMAP's *.geometric.bin; model: --model; auto: mvs if the scene has it, otherwise model",
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="local folder of a transformers depth model")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="device of the model: cpu, cuda, cuda:1 ...")
    parser.add_argument("--force", action="store_true", help="compute it again where it exists")


def run(arguments: argparse.Namespace) -> int:
    console = Console()
    roots = [arguments.dir / name for name in find_scenes(arguments.dir)]
    model: Predictor | None = None
    complete = True
    for root in roots:
        try:
            scene = open_scene(root)
            if scene.has_depth and not (arguments.force and (root / FOLDER / INDEX).is_file()):
                console.print(f"{root}: {_why_skipped(scene)}", soft_wrap=True, highlight=False, markup=False)
                continue
            scene = without_depth(scene)
            mvs = arguments.source == "mvs" or (arguments.source == "auto" and has_mvs(scene))
        except (OSError, ValueError) as error:
            _fail(console, root, error, alone=len(roots) == 1)
            complete = False
            continue
        if not mvs and model is None:
            model = _load_model(arguments, root)
        try:
            index = _compute(console, scene, None if mvs else model, arguments.model)
            complete &= _print(console, root, index)
        except (OSError, ValueError) as error:
            _fail(console, root, error, alone=len(roots) == 1)
            complete = False
    return 0 if complete else 1


def _fail(console: Console, root: Path, error: Exception, alone: bool) -> None:
    """Names a scene that has no depth now, unless it is the only one: then its error is the command's."""
    if alone:
        raise error
    reason = str(error) if str(root) in str(error) else f"{root}: {error}"
    console.print(Text(f"failed: {reason}", style="red"), soft_wrap=True)


def _load_model(arguments: argparse.Namespace, root: Path) -> Predictor:
    if arguments.model is None:
        raise ValueError(f"{root}: no COLMAP stereo maps; give --model DIR, a transformers depth model")
    from gasp_fast.backbones.torchvision_shim import install

    install()
    from gasp_fast.data.depth.monocular import DepthModel

    return DepthModel(arguments.model, arguments.device)


def _compute(console: Console, scene: Scene, model: Predictor | None, folder: Path | None) -> DepthIndex:
    """With `model`, loaded from `folder`, or from MVS maps if it is None."""

    def progress(frames: Iterable[int]) -> Iterable[int]:
        return track(list(frames), escape(scene.root.name), console=console, transient=True)

    if model is None:
        return depth_from_mvs(scene, progress)
    return depth_from_predictor(scene, model, str(folder), progress)


def _why_skipped(scene: Scene) -> str:
    path = scene.root / FOLDER / INDEX
    if not path.is_file():
        return f"comes with depth ({scene.format}); nothing to do"
    index = read_index(path)
    return f"has computed depth already ({index.source}, {len(index.usable)} usable frames); --force computes it again"


def _print(console: Console, root: Path, index: DepthIndex) -> bool:
    """Prints the result; returns whether any frame is usable."""
    errors = sorted(fit.error for fit in index.frames.values() if fit.file is not None and fit.error is not None)
    fit = f"median error {errors[len(errors) // 2]:.3f}, worst {errors[-1]:.3f}" if errors else "not compared"
    console.print(
        f"{root}: {len(index.usable)} of {len(index.frames)} frames usable, from {index.source}; "
        f"against sparse points: {fit}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    for name, frame in index.frames.items():
        if frame.file is None:
            console.print(Text(f"  unusable {name}: {frame.reason}", style="yellow"), soft_wrap=True)
    if not index.usable:
        return False
    report = check_scene(open_scene(root))
    shares = ", ".join(f"gap {gap.gap}: {gap.share:.3f}" for gap in report.gaps if gap.share is not None)
    console.print(f"  frames agree with each other: {shares or 'not compared'}", highlight=False)
    for finding in report.findings:
        console.print(Text(f"  {finding}", style="red"), soft_wrap=True)
    return True
