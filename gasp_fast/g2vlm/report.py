"""The report of an evaluation of geometry: `report.json`, tables, pictures, point clouds and one page."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from gasp_fast.drawing import as_svg, save_figure
from gasp_fast.evaluation.page import cloud_part, folded, links, picture, plot, write_page
from gasp_fast.evaluation.tables import html_rows, terminal_rows
from gasp_fast.files import write_atomically

from .cloud import cloud_of, preview_data, write_ply
from .collator import GeometryCollator
from .evaluate import GeometryEvaluation, GeometrySequences, prediction, summary
from .pictures import draw_cameras, draw_depths
from .saved import SavedGeometryModel

Report = Mapping[str, Any]  # content of report.json
BASELINE = "constant depth, identity poses"
METRICS = {  # name in report.json -> heading and meaning
    "abs_rel": ("AbsRel ↓", "depth: mean of |predicted − true| / true, after one scale a sequence"),
    "delta": ("δ 1.25 ↑", "depth: share of pixels with predicted / true within a factor of 1.25, after the same scale"),
    "accuracy": ("Acc ↓", "points: mean distance from a predicted point to the nearest true one, in the scenes' unit"),
    "accuracy_median": ("Acc med ↓", "points: the median of these distances"),
    "completeness": ("Comp ↓", "points: mean distance from a true point to the nearest predicted one"),
    "completeness_median": ("Comp med ↓", "points: the median of these distances"),
    "rra": ("RRA@30 ↑", "poses: share of pairs of frames whose relative rotation is off by less than 30°"),
    "rta": ("RTA@30 ↑", "poses: the same for the direction of the relative translation; opposite directions are equal"),
    "auc": ("AUC@30 ↑", "poses: mean share of pairs with both below a threshold, over 1°, 2°, … 30°"),
}
MOST_NAMED = 20  # of scenes and sequences that are left out


@dataclass(frozen=True)
class Pictured:
    """A sequence in the page."""

    number: int
    parts: list[str]  # HTML
    preview: dict[str, Any]


def report_content(
    saved: SavedGeometryModel, sequences: GeometrySequences, evaluation: GeometryEvaluation
) -> dict[str, Any]:
    outcomes = evaluation.outcomes
    height, width = sequences.found.size
    return {
        "model": saved.name,
        "settings": asdict(sequences.config),
        "frame_pixels": {"height": height, "width": width},
        "sequences": len(outcomes),
        "scenes": sorted({sequences.place(number)["scene"] for number in outcomes}),
        "metrics": {
            "model": summary([one.model for one in outcomes.values()]),
            "baseline": summary([one.baseline for one in outcomes.values()]),
        },
        "by_sequence": [
            {"sequence": number, **sequences.place(number), **asdict(one)} for number, one in outcomes.items()
        ],
        "left_out": {
            "scenes": [{"scene": one.record, "reason": one.reason} for one in sequences.found.left_out],
            "sequences": [
                {"sequence": number, **sequences.place(number), "reason": reason}
                for number, reason in evaluation.left_out.items()
            ],
        },
    }


def draw_sequences(
    saved: SavedGeometryModel, sequences: GeometrySequences, evaluation: GeometryEvaluation, count: int, out: Path
) -> list[Pictured]:
    """Pictures and point clouds of `count` of the evaluated sequences, spread evenly; those of an earlier report go."""
    for earlier in out.glob(f"sequence-{5 * '[0-9]'}[.-]*"):
        earlier.unlink()
    numbers = list(evaluation.outcomes)
    chosen = dict.fromkeys(numbers[int(at)] for at in np.linspace(0, len(numbers) - 1, min(count, len(numbers))))
    out.mkdir(parents=True, exist_ok=True)
    return [_drawn(saved, sequences, evaluation, number, out) for number in chosen]


def _drawn(
    saved: SavedGeometryModel, sequences: GeometrySequences, evaluation: GeometryEvaluation, number: int, out: Path
) -> Pictured:
    sample, numbers = sequences.sample(number), evaluation.outcomes[number].model
    pack = GeometryCollator()([sample])
    found, true, scale = prediction(saved, pack), pack.true, numbers["scale"]
    frames = f"frame{'s' * (len(sample.frames) > 1)} {', '.join(map(str, sample.frames))}"
    place = f"{sequences.place(number)['scene']}, {frames}"
    stem, valid = out / f"sequence-{number:05d}", pack.valid[0].numpy()
    local, world, translation = (
        scale * part[0].numpy() for part in (found.local, found.world, found.translation)
    )  # in the unit of the truth
    depths = draw_depths(sample.images, local[..., 2], true.local[0, ..., 2].numpy(), valid, place)
    depth_file = save_figure(depths, stem.with_name(f"{stem.name}-depth.png"))
    caption = f"{place}. AbsRel {numbers['abs_rel']:.3f}, δ 1.25 {numbers['delta']:.3f}"
    parts = [picture(caption, depth_file)]
    if len(sample.frames) > 1:
        cameras = draw_cameras(
            found.rotation[0].numpy(), translation, true.rotation[0].numpy(), true.translation[0].numpy()
        )
        save_figure(cameras, stem.with_name(f"{stem.name}-cameras.png"))
        parts.append(plot(f"{place}. AUC@30 {numbers['auc']:.3f}", as_svg(cameras), narrow=True))
    cloud = cloud_of(world, sample.images, np.ones_like(valid))
    predicted_file = write_ply(stem.with_name(f"{stem.name}.ply"), cloud)
    true_file = write_ply(
        stem.with_name(f"{stem.name}-true.ply"), cloud_of(true.world[0].numpy(), sample.images, valid)
    )
    parts.append(links([("predicted points (PLY)", predicted_file), ("true points (PLY)", true_file)], out))
    return Pictured(number, parts, preview_data(cloud, found.rotation[0].numpy(), translation))


def write_report(report: Report, pictured: Sequence[Pictured], out: Path) -> Path:
    """Writes `report.json` and `index.html`; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "report.json", (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    parts = [
        links([("the numbers: report.json", out / "report.json")], out),
        f"<p>{html.escape(what_was_evaluated(report))}</p>",
        *(f'<p class="warn">{html.escape(warning)}</p>' for warning in warnings_of(report)),
        html_rows(_rows(report, with_meaning=True)),
        f'<p class="note">{html.escape(_note(report))}</p>',
        *_pictures(report, pictured),
        folded("All sequences", html_rows(_sequence_rows(report))),
    ]
    return write_page(out / "index.html", f"Geometry: {report['model']}", parts)


def _pictures(report: Report, pictured: Sequence[Pictured]) -> Iterator[str]:
    for at, one in enumerate(pictured):
        if at == 0:
            place = next(each for each in report["by_sequence"] if each["sequence"] == one.number)
            yield "<h2>Predicted points and cameras</h2>"
            yield cloud_part(f"Sequence {one.number}, of {place['scene']}, as the model predicts it.", one.preview)
        yield f"<h2>Sequence {one.number}</h2>"
        yield from one.parts


def terminal_table(report: Report) -> Table:
    meanings = dict(METRICS[name] for name in report["metrics"]["model"] if name in METRICS)
    return terminal_rows(_rows(report, with_meaning=False), meanings, ["metric"])


def what_was_evaluated(report: Report) -> str:
    settings, size = report["settings"], report["frame_pixels"]
    of_frames = (
        f"of {settings['frames']} frames, {settings['stride']} apart," if settings["frames"] > 1 else "of a frame"
    )
    return (
        f"{report['sequences']} sequences {of_frames} from {len(report['scenes'])} scenes; frames of "
        f"{size['width']} × {size['height']} pixels."
    )


def warnings_of(report: Report) -> list[str]:
    """What the evaluation left out, in words."""
    scenes, sequences = (report["left_out"][kind] for kind in ("scenes", "sequences"))
    warnings = [f"scene {one['scene']} is left out: {one['reason']}" for one in scenes]
    warnings += [f"sequence {one['sequence']}, of {one['scene']}, is left out: {one['reason']}" for one in sequences]
    if len(warnings) > MOST_NAMED:
        warnings[MOST_NAMED:] = [f"{len(warnings) - MOST_NAMED} more are named in report.json"]
    if warnings:
        warnings.insert(0, f"left out: scenes {len(scenes)}, sequences {len(sequences)}")
    return warnings


def _note(report: Report) -> str:
    settings = report["settings"]
    return (
        f"Numbers are means and medians over sequences. The baseline, {BASELINE}, has seen no image: each sequence "
        "gets the constant depth with the least AbsRel on it, in the unit of the truth, and cameras that do not move. "
        f"Points are compared in the camera of frame 0, at most {settings['points']:,} of a sequence, after the best "
        f"similarity transform (Umeyama) and ICP, which pairs points at most {settings['reach']:g} apart. Points that "
        "shrink to a spot have a small Acc and a large Comp: read both."
    )


def _rows(report: Report, with_meaning: bool) -> list[list[str]]:
    """One row for each metric, below the headings."""
    model, baseline = report["metrics"]["model"], report["metrics"]["baseline"]
    rows = [["metric", *(["meaning"] if with_meaning else []), "model", "baseline", "model median", "baseline median"]]
    for name, (heading, meaning) in METRICS.items():
        if name in model:
            cells = [each[name][kind] for kind in ("mean", "median") for each in (model, baseline)]
            heading = heading.replace(" ", "\N{NO-BREAK SPACE}")
            rows.append([heading, *([meaning] if with_meaning else []), *(f"{cell:.3f}" for cell in cells)])
    return rows


def _sequence_rows(report: Report) -> list[list[str]]:
    names = [name for name in METRICS if name in report["metrics"]["model"]]
    rows = [["sequence", "scene", *(METRICS[name][0] for name in names)]]
    for one in report["by_sequence"]:
        rows.append([str(one["sequence"]), one["scene"], *(f"{one['model'][name]:.3f}" for name in names)])
    return rows
