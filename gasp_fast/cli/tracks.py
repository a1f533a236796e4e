"""Compute the point tracks of training sequences once, and store them in shards.

Reads a folder of scenes with depth. Writes into --out the settings (plan.json), the scenes that were left out
(skipped.json), and checksummed shards. A stopped run continues with the missing shards and gives the same bytes. With
--shard the work is divided over the jobs of an array; together they write the same shards as one job. One folder holds
one grid: coarse and fine are two runs. Exit code 1 if no sequence has tracks, or if --verify finds a shard damaged or
missing.

examples:
  gasp-fast tracks scenes --out tracks --dry-run
  gasp-fast tracks scenes --out tracks/grid8 --grid 8 --held-out 0.05
  gasp-fast tracks scenes --out tracks/grid24 --grid 24 --held-out 0.05 --shard 0/4
  gasp-fast tracks scenes --out tracks/grid8 --verify
"""

from __future__ import annotations

import argparse
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.filesize import decimal

from gasp_fast.processes import check_workers, usable_cores
from gasp_fast.progress import duration, progress

if TYPE_CHECKING:
    from gasp_fast.data.annotations.inventory import Inventory
    from gasp_fast.data.annotations.read import AnnotationReader
    from gasp_fast.data.annotations.settings import AnnotationSettings

SAMPLE = 20_000  # sequences drawn for the statistics of a dry run
SHOWN_SKIPPED = 10  # scenes that are left out and named; skipped.json has all
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
        "--shard",
        "--part",
        default="0/1",
        metavar="I/N",
        help="the work of job I of N, counted from 0; $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT in an array (0/1)",
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="also compute shards again that have sequences without tracks"
    )
    parser.add_argument("--dry-run", action="store_true", help="only print what would be computed, its time and size")
    parser.add_argument(
        "--plan-only", action="store_true", help="only write the settings, so that no job of an array reads all scenes"
    )
    parser.add_argument("--verify", action="store_true", help="only check that every shard exists and is intact")


def run(arguments: argparse.Namespace) -> int:
    from gasp_fast.data.annotations.parts import WHOLE, parse_part, shards_in_part
    from gasp_fast.data.annotations.read import AnnotationReader
    from gasp_fast.data.annotations.settings import store_settings
    from gasp_fast.data.annotations.write import prepare, write_shards

    part = parse_part(arguments.shard)
    check_workers(arguments.workers, "--workers")
    if not 0 <= arguments.held_out <= 1:
        raise ValueError(f"--held-out {arguments.held_out}: give the share of the scenes to hold out, from 0 to 1")
    if arguments.verify:
        return _verify(AnnotationReader(arguments.out))
    settings, skipped = _settings(arguments, alone=part == WHOLE)
    print(f"{len(settings):,} sequences of {len(settings.scenes):,} scenes in {settings.shards:,} shards")
    expected = settings.expected_bytes
    print(f"at most about {decimal(expected)} (from the options), {expected / len(settings):,.0f} bytes a sequence")
    numbers = shards_in_part(settings.shards, part)
    if arguments.dry_run:
        sampler = settings.sampler
        print(f"{'a sample of ' if len(sampler) > SAMPLE else ''}an epoch: {sampler.statistics(0, SAMPLE)}")
        _print_estimate(arguments, settings, numbers)
        return 0
    if arguments.plan_only:
        store_settings(arguments.out, settings, skipped)
        return 0
    missing = prepare(arguments.out, settings, part, skipped, arguments.retry_failed)
    if len(numbers) > len(missing):
        print(f"{len(numbers) - len(missing):,} of {len(numbers):,} shards are there already")
    _print_estimate(arguments, settings, missing)
    shards = write_shards(arguments.scenes, arguments.out, settings, missing, arguments.workers)
    for _ in progress(shards, len(missing), "computing tracks"):
        pass
    return _report(arguments.out, part)


def _settings(arguments: argparse.Namespace, alone: bool) -> tuple[AnnotationSettings, dict[str, str]]:
    """The settings, and the scenes that are left out with the reasons.

    A job of an array takes the scenes from the stored settings, if there are any, and opens those only that they do not
    name. It compares a scene with its entry when it computes its tracks.
    """
    from gasp_fast.data.annotations.settings import SETTINGS_FILE, AnnotationSettings, read_settings
    from gasp_fast.data.scenes.library import SceneEntry, find_scenes, folder_name, survey
    from gasp_fast.data.tracks.sequences import SequenceConfig, is_held_out

    settings = AnnotationSettings(
        scenes=(),
        sequences=SequenceConfig(
            min_frames=arguments.min_frames,
            max_frames=arguments.max_frames,
            window=arguments.window,
            per_scene=arguments.per_scene,
            seed=arguments.seed,
        ),
        grid=arguments.grid,
        keep=arguments.keep,
        epochs=arguments.epochs,
        shard_size=arguments.shard_size,
    )
    settings.check_shard_size()  # before minutes of reading scenes
    names = find_scenes(arguments.scenes)
    names = [name for name in names if not is_held_out(folder_name(arguments.scenes, name), arguments.held_out)]
    if not names:
        raise ValueError(f"--held-out {arguments.held_out} leaves no scene of {arguments.scenes}; lower it")
    known: dict[str, SceneEntry] = {}
    if not alone and (arguments.out / SETTINGS_FILE).exists():
        known = {entry.name: entry for entry in read_settings(arguments.out).scenes}
    unread = [name for name in names if name not in known]
    usable = [known[name] for name in names if name in known]
    skipped: dict[str, str] = {}
    found = survey(arguments.scenes, unread, arguments.workers)
    for entry in progress(found, len(unread), "reading scenes"):
        if not isinstance(entry, SceneEntry):
            skipped[entry[0]] = entry[1].replace(f"{arguments.scenes}/", "")
        elif entry.frames < arguments.min_frames:
            skipped[entry.name] = f"{entry.frames} frames, fewer than --min-frames"
        else:
            usable.append(entry)
    _print_skipped(skipped, len(names))
    if not usable:
        name, reason = next(iter(skipped.items()))
        raise ValueError(f"{arguments.scenes}: none of {len(names)} scenes can be used; the first, {name}: {reason}")
    return replace(settings, scenes=tuple(sorted(usable, key=lambda entry: entry.name))), skipped


def _print_skipped(skipped: Mapping[str, str], scenes: int) -> None:
    if not skipped:
        return
    for name, reason in list(skipped.items())[:SHOWN_SKIPPED]:
        print(f"skipped {name}: {reason}")
    kinds = Counter("without depth" if reason.startswith("no depth") else "unusable" for reason in skipped.values())
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    print(f"skipped {len(skipped):,} of {scenes:,} scenes: {counts}")


def _print_estimate(arguments: argparse.Namespace, settings: AnnotationSettings, numbers: Iterable[int]) -> None:
    """Time and bytes of the shards that this job computes, from its first sequences."""
    from gasp_fast.data.annotations.estimate import measure

    numbers = list(numbers)
    sequences = sum(len(settings.sequences_in_shard(number)) for number in numbers)
    if sequences <= settings.sequences.per_scene:
        return
    measured = measure(arguments.scenes, settings, numbers)
    if measured is None:
        print("no estimate of the time: the first sequences have no tracks")
        return
    workers = min(arguments.workers, usable_cores(), len(numbers))
    taken = duration(measured.seconds_for(sequences, workers))
    size = measured.bytes_for(sequences)
    what = "this job" if arguments.shard != "0/1" else "all of it"
    print(
        f"{what}, {sequences:,} sequences: about {taken} on {workers} core{'s' * (workers > 1)}, {decimal(int(size))} "
        f"(measured on the first {measured.sequences})"
    )
    if arguments.out.exists() and (free := shutil.disk_usage(arguments.out).free) < size:
        print(f"only {decimal(free)} are free in {arguments.out}")


def _report(out: Path, part: tuple[int, int]) -> int:
    """What the folder holds now. Other jobs may be at work: what they have not finished is no error."""
    from gasp_fast.data.annotations.inventory import take_inventory
    from gasp_fast.data.annotations.read import AnnotationReader

    cache = AnnotationReader(out)
    found = take_inventory(out, cache.settings)
    if found.fault:
        _print_unfinished(out, found, part)
        return 0
    each = found.bytes / len(cache)
    print(f"{out}: complete, {len(cache):,} sequences, {decimal(found.bytes)}, {each:,.0f} bytes a sequence")
    for reason in sorted(set(found.failed.values())):
        print(f"failed: {reason}")
    if found.failed:
        print(f"{len(found.failed):,} of {len(cache):,} sequences have no tracks")
    return 1 if len(found.failed) == len(cache) else 0


def _print_unfinished(out: Path, found: Inventory, part: tuple[int, int]) -> None:
    from gasp_fast.data.annotations.parts import ranges

    jobs = found.unfinished_parts(part[1])
    print(
        f"{out}: {found.total - len(found.bad):,} of {found.total:,} shards so far; not finished, or still at work: "
        f"{len(jobs):,} of {part[1]:,} jobs ({ranges(jobs)})"
    )


def _verify(cache: AnnotationReader) -> int:
    from gasp_fast.data.annotations.parts import ranges

    results = list(progress(cache.verify(), cache.settings.shards, "verifying"))
    bad = [number for number, good in results if not good]
    print(f"{len(results) - len(bad):,} of {len(results):,} shards are good")
    if bad:
        print(f"damaged or missing: {ranges(bad)}; delete them and run gasp-fast tracks again")
    return 1 if bad else 0
