"""Make depth for scenes that came without.

Reads scenes with COLMAP's stereo maps, or with sparse points to which the depth of a monocular model is fitted. Writes
computed_depth/ into each scene; gasp-fast scenes tells how well it agrees with itself. Scenes that come with depth are
left alone. Exit code 0 if every scene ended with at least one usable frame, 1 if one did not.

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
from rich.progress import track
from rich.text import Text

from gasp_fast.data.depth.making import Predictor, depth_from_predictor, depth_from_stereo, has_stereo
from gasp_fast.data.inspection.check import check_scene
from gasp_fast.data.scenes.computed_depth import FOLDER, INDEX, DepthIndex, read_index
from gasp_fast.data.scenes.library import find_scenes
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene, without_depth

HELP = "make depth for scenes that came without"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=Path, metavar="DIR", help="a scene, or a folder of scenes")
    parser.add_argument(
        "--source",
        choices=("auto", "mvs", "model"),
        default="auto",
        help="mvs: COLMAP's *.geometric.bin; model: --model; auto: mvs where it is there, else model",
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="local folder of a transformers depth model")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="where the model runs: cpu, cuda, cuda:1 …")
    parser.add_argument("--force", action="store_true", help="make it again where it is already there")


def run(arguments: argparse.Namespace) -> int:
    console = Console()
    roots = [arguments.dir / name for name in find_scenes(arguments.dir)]
    loaded: Predictor | None = None
    complete = True
    for root in roots:
        scene = open_scene(root)
        if scene.has_depth and not (arguments.force and (root / FOLDER / INDEX).is_file()):
            console.print(f"{root}: {_already(scene)}", soft_wrap=True, highlight=False)
            continue
        scene = without_depth(scene)
        stereo = arguments.source == "mvs" or (arguments.source == "auto" and has_stereo(scene))
        if not stereo and loaded is None:
            loaded = _predictor(arguments, root)
        index = _make(console, scene, None if stereo else loaded, arguments.model)
        complete &= _print(console, root, index)
    return 0 if complete else 1


def _predictor(arguments: argparse.Namespace, root: Path) -> Predictor:
    if arguments.model is None:
        raise ValueError(f"{root}: no COLMAP stereo maps there; give --model DIR, a transformers depth model")
    from gasp_fast.backbones.torchvision_shim import install

    install()
    from gasp_fast.data.depth.monocular import DepthModel

    return DepthModel(arguments.model, arguments.device)


def _make(console: Console, scene: Scene, predictor: Predictor | None, model: Path | None) -> DepthIndex:
    """From `predictor`, or from stereo where there is none."""

    def progress(frames: Iterable[int]) -> Iterable[int]:
        return track(list(frames), scene.root.name, console=console, transient=True)

    if predictor is None:
        return depth_from_stereo(scene, progress)
    return depth_from_predictor(scene, predictor, str(model), progress)


def _already(scene: Scene) -> str:
    path = scene.root / FOLDER / INDEX
    if not path.is_file():
        return f"comes with depth ({scene.format}); nothing to do"
    index = read_index(path)
    return f"has computed depth already ({index.source}, {len(index.usable)} usable frames); --force makes it again"


def _print(console: Console, root: Path, index: DepthIndex) -> bool:
    """Say how it went; whether there is anything to use."""
    errors = sorted(fit.error for fit in index.frames.values() if fit.file is not None and fit.error is not None)
    fit = f"median error {errors[len(errors) // 2]:.3f}, worst {errors[-1]:.3f}" if errors else "not compared"
    console.print(
        f"{root}: {len(index.usable)} of {len(index.frames)} frames usable, from {index.source}; "
        f"against sparse points: {fit}",
        soft_wrap=True,
        highlight=False,
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
