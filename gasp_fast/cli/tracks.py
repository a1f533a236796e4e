"""Compute the point tracks of training sequences once, and store them in shards.

Reads a folder of scenes with depth. Writes into --out the settings (plan.json) and checksummed shards. A stopped run
continues with the missing shards and gives the same bytes. One folder holds one grid: coarse and fine are two runs.
Exit code 1 if no sequence has tracks, or if --verify finds a shard damaged or missing.

examples:
  gasp-fast tracks scenes --out tracks --dry-run
  gasp-fast tracks scenes --out tracks/grid8 --grid 8 --held-out 0.05
  gasp-fast tracks scenes --out tracks/grid24 --grid 24 --held-out 0.05 --part 0/4
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gasp_fast.processes import usable_cores

if TYPE_CHECKING:
    from gasp_fast.data.annotations.read import AnnotationReader
    from gasp_fast.data.annotations.settings import AnnotationSettings

SAMPLE = 20_000  # sequences drawn for the statistics of a dry run
HELP = "compute the tracks of training sequences once and store them in shards; resumable, parallel"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scenes", type=Path, metavar="DIR", help="a scene, or a folder of scenes")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder that receives the shards")
    parser.add_argument("--per-scene", type=int, default=16, metavar="N", help="sequences of each scene in an epoch")
    parser.add_argument(
        "--epochs", type=int, default=1, metavar="N", help="number of epochs, each with other sequences"
    )
    parser.add_argument("--min-frames", type=int, default=8, metavar="N", help="fewest frames of a sequence")
    parser.add_argument("--max-frames", type=int, default=24, metavar="N", help="most frames of a sequence")
    parser.add_argument("--window", type=int, default=48, metavar="N", help="frames before and after the anchor")
    parser.add_argument("--grid", type=int, default=8, metavar="N", help="query points along each axis (8; fine: 24)")
    parser.add_argument("--keep", type=float, default=0.5, metavar="X", help="share of tracks to keep (0.5)")
    parser.add_argument("--held-out", type=float, default=0.0, metavar="X", help="share of scenes held out for testing")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampler")
    parser.add_argument("--shard-size", type=int, default=1024, metavar="N", help="sequences in a shard")
    parser.add_argument(
        "--workers", type=int, default=usable_cores(), metavar="N", help="processes (default: all cores)"
    )
    parser.add_argument(
        "--part", default="0/1", metavar="I/N", help="compute the I-th of N parts, one per machine (0/1)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only print what would be computed, and its size")
    parser.add_argument("--verify", action="store_true", help="only check that every shard exists and is intact")


def run(arguments: argparse.Namespace) -> int:
    from gasp_fast.data.annotations.parts import parse_part, shards_in_part
    from gasp_fast.data.annotations.read import AnnotationReader
    from gasp_fast.data.annotations.write import annotate

    if arguments.verify:
        return _verify(AnnotationReader(arguments.out))
    settings = _settings(arguments)
    print(f"{len(settings):,} sequences of {len(settings.scenes):,} scenes in {settings.shards:,} shards")
    expected = settings.expected_bytes
    print(f"at most about {decimal(expected)}, {expected / len(settings):,.0f} bytes a sequence")
    if arguments.dry_run:
        sampler = settings.sampler
        print(f"{'a sample of ' if len(sampler) > SAMPLE else ''}an epoch: {sampler.statistics(0, SAMPLE)}")
        return 0
    part = parse_part(arguments.part)
    with _progress("computing tracks") as progress:
        shards = annotate(arguments.scenes, arguments.out, settings, arguments.workers, part)
        for _ in progress.track(shards, total=len(shards_in_part(settings.shards, part))):
            pass
    return _report(arguments.out) if part == (0, 1) else 0


def _settings(arguments: argparse.Namespace) -> AnnotationSettings:
    from gasp_fast.data.annotations.settings import AnnotationSettings
    from gasp_fast.data.scenes.library import SceneEntry, find_scenes, folder_name, survey
    from gasp_fast.data.tracks.sequences import SequenceConfig, is_held_out

    names = find_scenes(arguments.scenes)
    names = [name for name in names if not is_held_out(folder_name(arguments.scenes, name), arguments.held_out)]
    if not names:
        raise ValueError(f"--held-out {arguments.held_out} leaves no scene of {arguments.scenes}; lower it")
    usable: list[SceneEntry] = []
    with _progress("reading scenes") as progress:
        for found in progress.track(survey(arguments.scenes, names), total=len(names)):
            if not isinstance(found, SceneEntry):
                progress.console.print(f"skipped {found[0]}: {found[1]}", highlight=False, markup=False)
            elif found.frames < arguments.min_frames:
                reason = f"{found.frames} frames, fewer than --min-frames"
                progress.console.print(f"skipped {found.name}: {reason}", highlight=False, markup=False)
            else:
                usable.append(found)
    if not usable:
        raise ValueError(f"{arguments.scenes}: none of {len(names)} scenes can be used")
    sequences = SequenceConfig(
        min_frames=arguments.min_frames,
        max_frames=arguments.max_frames,
        window=arguments.window,
        per_scene=arguments.per_scene,
        seed=arguments.seed,
    )
    return AnnotationSettings(
        scenes=tuple(usable),
        sequences=sequences,
        grid=arguments.grid,
        keep=arguments.keep,
        epochs=arguments.epochs,
        shard_size=arguments.shard_size,
    )


def _report(out: Path) -> int:
    from gasp_fast.data.annotations.read import AnnotationReader
    from gasp_fast.data.annotations.shard import shard_path

    cache = AnnotationReader(out)
    size = sum(shard_path(out, number).stat().st_size for number in range(cache.settings.shards))
    failed = cache.failed()
    print(f"{out}: {len(cache):,} sequences, {decimal(size)}, {size / len(cache):,.0f} bytes a sequence")
    for reason in sorted(set(failed.values())):
        print(f"failed: {reason}")
    if failed:
        print(f"{len(failed):,} of {len(cache):,} sequences have no tracks")
    return 1 if len(failed) == len(cache) else 0


def _verify(cache: AnnotationReader) -> int:
    with _progress("verifying") as progress:
        results = list(progress.track(cache.verify(), total=cache.settings.shards))
    bad = [number for number, good in results if not good]
    print(f"{len(results) - len(bad):,} of {len(results):,} shards are good")
    if bad:
        print(f"damaged or missing: {', '.join(map(str, bad))}; delete them and run gasp-fast tracks again")
    return 1 if bad else 0


def _progress(what: str) -> Progress:
    return Progress(TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
