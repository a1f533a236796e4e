"""Compute depth for scenes that have none.

Reads scenes with COLMAP's stereo maps, or with sparse points to which the depth of a monocular model is fitted. Writes
computed_depth/ into each scene, or with --out into another folder. Scenes with depth of their own stay unchanged, and
so do those whose depth was computed for the frames and poses that they have now: a stopped run continues with the scene
in hand. A scene that fails is named, and the others go on. With --shard the scenes are divided over the jobs of an
array. Exit code 0 if every scene has at least one usable frame, otherwise 1.

examples:
  gasp-fast depth scenes                                    # from COLMAP's stereo maps
  gasp-fast depth scenes --model DepthAnythingV2 --device cuda
  gasp-fast depth scenes --model DepthAnythingV2 --device cuda --shard 0/8
  gasp-fast depth scenes --check                            # whether every scene has whole maps, of one model
  gasp-fast depth scenes/one --source mvs --force
  gasp-fast depth /read/only/scenes --out depth             # then: gasp-fast scenes depth/library.json
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

from gasp_fast.data.annotations.parts import in_part, parse_part
from gasp_fast.data.depth.check import MapCheck, check_maps
from gasp_fast.data.depth.compute import Predictor, depth_from_mvs, depth_from_predictor, has_mvs
from gasp_fast.data.depth.survey import DepthState, depth_state
from gasp_fast.data.inspection.consistency import check_scene
from gasp_fast.data.scenes.computed_depth import DepthIndex
from gasp_fast.data.scenes.library import FEWEST_FOR_PROCESSES, find_scenes
from gasp_fast.data.scenes.library_file import NAME, Place, place_of, write_library_file
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import without_depth
from gasp_fast.processes import in_processes, usable_cores
from gasp_fast.progress import Steps, duration, progress

HELP = "compute depth for scenes that have none; resumable, in array jobs"
SHOWN_MISSING = 10  # scenes without depth that --check names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=Path, metavar="DIR", help="a scene, or a folder of scenes")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="OUT",
        help="folder for the depth of scenes that are read-only; the file OUT/library.json then stands for the scenes",
    )
    parser.add_argument(
        "--source",
        choices=("auto", "mvs", "model"),
        default="auto",
        help="mvs: COLMAP's *.geometric.bin; model: --model; auto: mvs if the scene has it, otherwise model",
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="local folder of a transformers depth model")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="device of the model: cpu, cuda, cuda:1 ...")
    parser.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="the scenes of job I of N, counted from 0; $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT in an array (0/1)",
    )
    parser.add_argument("--force", action="store_true", help="compute it again where it exists")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compute nothing; read all maps, name the damaged ones and the scenes without depth",
    )


def run(arguments: argparse.Namespace) -> int:
    part = parse_part(arguments.shard)
    if arguments.out is not None:
        arguments.dir = _library_of(arguments.dir, arguments.out)
    names = in_part(find_scenes(arguments.dir), part)
    if not names:
        print(f"{arguments.dir}: fewer scenes than jobs, none for --shard {arguments.shard}")
        return 0
    work = DepthRun(arguments, names)
    return work.check() if arguments.check else work.compute()


def _library_of(scenes: Path, out: Path) -> Path:
    """The library file in `out`, which is read in place of `scenes` from now on."""
    library = out / NAME
    place = place_of(scenes)
    if place != Place(scenes):
        raise ValueError(f"--out {out}: {scenes} is a library already; name its computed_depth there")
    if not library.exists():
        find_scenes(scenes)  # raises where there are none
        out.mkdir(parents=True, exist_ok=True)
        write_library_file(library, scenes, Path("."))
    elif place_of(library).root.resolve() != scenes.resolve():
        raise ValueError(f"--out {out}: holds depth of {place_of(library).root}; give another folder")
    print(f"depth goes into {out}; give {library} in place of {scenes} to all commands")
    return library


class DepthRun:
    """The scenes that this command works on, what is known of each, and what failed."""

    def __init__(self, arguments: argparse.Namespace, names: list[str]) -> None:
        self.arguments = arguments
        self.console = Console()
        self.roots = [arguments.dir / name for name in names]
        self.failed: set[Path] = set()
        self.model: Predictor | None = None
        self.todo: list[Path] = []
        self.estimated = False  # what the scenes to compute will take
        workers = usable_cores() if len(self.roots) >= FEWEST_FOR_PROCESSES else 1
        found = dict(progress(in_processes(_look, self.roots, workers), len(self.roots), "reading scenes"))
        self.states: dict[Path, DepthState] = {}
        for root in self.roots:
            state = found[root]
            if isinstance(state, DepthState):
                self.states[root] = state
            else:
                self._fail(root, state)

    def check(self) -> int:
        """Prints which scenes have depth and which of their maps are damaged, and returns the exit code."""
        missing = [root for root, state in self.states.items() if not state.done]
        for root in missing[:SHOWN_MISSING]:
            self._line(f"{root}: {self.states[root]}")
        empty = [root for root, state in self.states.items() if state.done and not _has_depth(state)]
        for root in empty[:SHOWN_MISSING]:
            self._line(f"{root}: no usable frame")
        maps = self._check_maps([root for root, state in self.states.items() if state.done and _has_depth(state)])
        self._summary()
        return 1 if missing or empty or maps.damaged or self.failed or len(self._models()) > 1 else 0

    def _check_maps(self, roots: list[Path]) -> MapCheck:
        frames = sum(self.states[root].frames for root in roots)
        workers = usable_cores() if frames >= FEWEST_FOR_PROCESSES else 1
        total = MapCheck()
        for _, checked in progress(in_processes(check_maps, roots, workers), len(roots), "reading maps"):
            for damage in checked.damaged:
                self.console.print(Text(f"damaged: {damage}", style="red"), soft_wrap=True)
            total += checked
        if total.damaged:
            self._line("delete damaged maps in computed_depth/ and run gasp-fast depth again; copy others again")
        self._line(str(total))
        return total

    def compute(self) -> int:
        """Computes what is missing, and returns the exit code."""
        self.todo = todo = [root for root, state in self.states.items() if self._is_todo(state)]
        for root, state in self.states.items():
            if state.why or not self._is_todo(state):
                self._line(f"{root}: {state}")
        frames = sum(self.states[root].frames for root in todo)
        with Steps("computing depth", frames, self.console) as steps:
            done, measured = 0, False
            for number, root in enumerate(todo, 1):
                began = time.monotonic()
                self._compute(root, steps)
                done += self.states[root].frames
                steps.to(done)  # a scene that failed has not counted its frames
                if not measured and root not in self.failed and number < len(todo):
                    seconds = (time.monotonic() - began) / self.states[root].frames * (frames - done)
                    self._line(f"about {duration(seconds)} for the other {len(todo) - number:,} scenes (measured)")
                    measured = True
        if len(self.roots) > 1:
            self._summary()
        return 0 if not self.failed and all(map(_has_depth, self.states.values())) else 1

    def _is_todo(self, state: DepthState) -> bool:
        if state.source == "own":
            return False
        other = not state.usable and state.source not in ("", self._wanted(state))  # nothing to lose: try the other way
        return not state.done or self.arguments.force or other

    def _wanted(self, state: DepthState) -> str:
        """What would make the depth now; under `auto`, what has made it."""
        if self.arguments.source == "mvs" or (self.arguments.source == "auto" and state.source == "mvs"):
            return "mvs"
        return f"model {self.arguments.model}" if self.arguments.model else state.source

    def _compute(self, root: Path, steps: Steps) -> None:
        def frames_of(frames: Iterable[int]) -> Iterator[int]:
            for frame in frames:
                began = time.monotonic()
                yield frame
                steps.advance()
                if not self.estimated and len(self.todo) > 1:
                    self._print_estimate(time.monotonic() - began)

        try:
            scene = without_depth(open_scene(root))
            mvs = self.arguments.source == "mvs" or (self.arguments.source == "auto" and has_mvs(scene))
        except (OSError, ValueError) as error:
            self._fail(root, error)
            return
        if not mvs and self.arguments.model is None:
            cure = "give --model DIR, a transformers depth model"
            self._fail(root, ValueError(f"{root}: no COLMAP stereo maps; {cure}"))
            return
        if not mvs and self.model is None:
            self.model = _load_model(self.arguments)
        try:
            if mvs:
                index = depth_from_mvs(scene, frames_of)
            else:
                assert self.model is not None
                index = depth_from_predictor(scene, self.model, str(self.arguments.model), frames_of)
            before = self.states[root]
            self.states[root] = DepthState(before.frames, before.bytes, index.made_by, len(index.usable))
            self._print(root, index)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: of the model, such as too little memory
            self._fail(root, error)

    def _fail(self, root: Path, error: Exception) -> None:
        """Names a scene that has no depth now, unless it is the only one: then its error is the command's."""
        if len(self.roots) == 1:
            raise error
        self.failed.add(root)
        reason = str(error) if str(root) in str(error) else f"{root}: {error}"
        self.console.print(Text(f"failed: {reason}", style="red"), soft_wrap=True)

    def _print_estimate(self, seconds: float) -> None:
        """Of the scenes to compute; the first frame took `seconds`.

        Bytes are from the sizes of the photographs: what is unknown of a map takes as many as what is known.
        """
        self.estimated = True
        frames = sum(self.states[root].frames for root in self.todo)
        size = sum(self.states[root].bytes for root in self.todo)
        self._line(
            f"{len(self.todo):,} of {len(self.roots):,} scenes to compute, {frames:,} frames, "
            f"at most about {decimal(size)} (from the sizes of their photographs), "
            f"about {duration(seconds * frames)} (from one frame)"
        )
        free = shutil.disk_usage(self.arguments.dir).free
        if free < size:
            self._line(f"only {decimal(free)} are free in {self.arguments.dir}")

    def _print(self, root: Path, index: DepthIndex) -> None:
        errors = sorted(fit.error for fit in index.frames.values() if fit.file is not None and fit.error is not None)
        fit = f"median error {errors[len(errors) // 2]:.3f}, worst {errors[-1]:.3f}" if errors else "not compared"
        self._line(
            f"{root}: {len(index.usable)} of {len(index.frames)} frames usable, from {index.source}; "
            f"against sparse points: {fit}"
        )
        for name, frame in index.frames.items():
            if frame.file is None:
                self.console.print(Text(f"  unusable {name}: {frame.reason}", style="yellow"), soft_wrap=True)
        if not index.usable:
            return
        report = check_scene(open_scene(root))
        shares = ", ".join(f"gap {gap.gap}: {gap.share:.3f}" for gap in report.gaps if gap.share is not None)
        self._line(f"  frames agree with each other: {shares or 'not compared'}")
        for finding in report.findings:
            self.console.print(Text(f"  {finding}", style="red"), soft_wrap=True)

    def _summary(self) -> None:
        """One line: how many scenes have depth, and whose."""
        sources = Counter(state.source for state in self.states.values() if state.done and _has_depth(state))
        names = {"own": "their own"}
        whose = ", ".join(f"{count:,} {names.get(source, source)}" for source, count in sorted(sources.items()))
        missing = len(self.roots) - sum(sources.values())
        job = "" if self.arguments.shard == "0/1" else f"job {self.arguments.shard}: "
        line = (
            f"{job}{sum(sources.values()):,} of {len(self.roots):,} scenes have depth{f' ({whose})' if whose else ''}"
        )
        self._line(f"{line}; {missing:,} have none" if missing else line)
        if len(self._models()) > 1:
            self._line("their depth is of different models; --force computes it again")

    def _models(self) -> set[str]:
        return {state.source for state in self.states.values() if state.source.startswith("model")}

    def _line(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)


def _has_depth(state: DepthState) -> bool:
    return state.source == "own" or state.usable > 0


def _look(root: Path) -> DepthState | Exception:
    try:
        return depth_state(root)
    except (OSError, ValueError) as error:
        return error


def _load_model(arguments: argparse.Namespace) -> Predictor:
    from gasp_fast.backbones.torchvision_shim import install

    install()
    from gasp_fast.data.depth.monocular import DepthModel

    return DepthModel(arguments.model, arguments.device)
