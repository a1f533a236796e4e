"""The result of `step.py`: a line for each case, comparison with the targets, JSON and a plot."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from step_profile import PARTS

from gasp_fast.benchmarking.report import device_and_date
from gasp_fast.files import write_atomically
from gasp_fast.processes import versions

PACKAGES = ("gasp-fast", "torch", "triton", "transformers", "peft", "accelerate", "liger-kernel", "flash-attn")
GEOMETRY_TIME, GEOMETRY_MEMORY = 0.10, 0.05  # shares of a step, at most
MFU, RATE = 0.45, 4.6  # at least; sequences a second
PLAN_ERROR = 0.15  # at most
Record = dict[str, Any]


def one_line(record: Record) -> str:
    """What a case measured, for the terminal."""
    if "failed" in record:
        return f"{record['name']}: {record['failed']}"
    parts = [
        f"{record['step_seconds']:.3f} s a step",
        f"{record['sequences_per_s']:.2f} sequences/s",
        f"{record['tokens_per_s']:,.0f} tokens/s",
        f"MFU {record['mfu']:.1%}",
    ]
    parts += [f"{record['seconds_in_a_row']:.3f} s in a row"] if "seconds_in_a_row" in record else []
    parts += [f"{record['pauses']['idle_seconds']:.3f} s without a kernel"] if "pauses" in record else []
    parts += [] if record["peak_memory"] is None else [f"{record['peak_memory'] / 1e9:.1f} GB"]
    parts += [f"plan {record['plan_error']:+.0%}"] if "plan_error" in record else []
    if "seconds_to_trainer" in record and not record["trainer"]:
        of_process = f" ({record['process_seconds_to_trainer']:.2f} x its process time)" * (
            record["peak_memory"] is None
        )
        parts.append(f"{record['seconds_to_trainer']:.2f} x the Trainer's{of_process}")
    line = f"{record['name']}: {', '.join(parts)}"
    if "seconds_by_part" not in record:
        return f"{line}; no profile: {record['profile_failed']}" if "profile_failed" in record else line
    total = sum(record["seconds_by_part"].values())
    shares = (f"{part} {value / total:.0%}" for part, value in record["seconds_by_part"].items())
    return f"{line}\n        {', '.join(shares)}\n        {kernels(record)}"


def kernels(record: Record) -> str:
    """What really ran: attention, replaced modules, recomputation."""
    replaced = ", ".join(f"{count} modules by {package}" for package, count in record["replaced"].items())
    return (
        f"attention by {', '.join(record['attention_operations']) or 'none'}; {replaced or 'no module replaced'}; "
        f"{record['recomputed']} of {record['layers']} layers recomputed; "
        f"vision tower {'with' if record['vision_graph'] else 'without'} a graph"
    )


# ---- targets --------------------------------------------------------------------------------------------------------


def verdicts(result: Record) -> list[Record]:
    """Each target with the measured value; `met` is null where its case was not measured."""
    measured = [record for record in result["cases"] if "failed" not in record]
    targets = []
    for family, frames in dict.fromkeys((r["family"], r["frames"]) for r in measured if r["essential"]):
        essential = [r for r in measured if r["family"] == family and r["essential"] and not r["trainer"]]
        with_geometry, plain = (next((r for r in essential if r["geometry"] is want), None) for want in (True, False))
        ratio = None if with_geometry is None else with_geometry.get("seconds_to_trainer")
        targets.append(_at_most(f"{family}, {frames} frames: our step with geometry / the Trainer's without", ratio, 1))
        time = memory = None
        if with_geometry and plain:
            time = 1 - plain["step_seconds"] / with_geometry["step_seconds"]
        if with_geometry and plain and plain["peak_memory"]:
            heads = with_geometry["head_bytes"]
            memory = 1 - (plain["peak_memory"] + heads) / with_geometry["peak_memory"]
        targets.append(_at_most(f"{family}, {frames} frames: geometry's share of time", time, GEOMETRY_TIME))
        what = "share of peak memory, besides its weights and their states"
        targets.append(_at_most(f"{family}, {frames} frames: geometry's {what}", memory, GEOMETRY_MEMORY))
        mfu = [r["mfu"] for r in measured if r["family"] == family and r["geometry"]]
        targets.append(_at_least(f"{family}: best MFU with geometry", mfu, MFU))
    llava = ("llava_next_video", 16, True)
    rates = [r["sequences_per_s"] for r in measured if (r["family"], r["frames"], r["geometry"]) == llava]
    targets.append(_at_least("LLaVA, 16 frames: sequences/s (of an H200)", rates, RATE))
    errors = [abs(r["plan_error"]) for r in measured if "plan_error" in r and r["essential"]]
    targets.append(_at_most("plan: worst error on the essential steps", max(errors, default=None), PLAN_ERROR))
    return targets


def _at_most(target: str, value: float | None, bound: float) -> Record:
    met = None if value is None else bool(value <= bound)
    return {"target": target, "bound": f"at most {bound:g}", "value": value, "met": met}


def _at_least(target: str, values: list[float], bound: float) -> Record:
    value = max(values, default=None)
    met = None if value is None else bool(value >= bound)
    return {"target": target, "bound": f"at least {bound:g}", "value": value, "met": met}


def print_targets(result: Record) -> None:
    """Each target with its verdict, and the cases for which there was no time."""
    for target in result.get("targets", ()):
        verdict = {True: "met", False: "MISSED", None: "not measured"}[target["met"]]
        value = "" if target["value"] is None else f"{target['value']:.3g}, "
        print(f"{verdict:>12}  {target['target']}: {value}target {target['bound']}")
    if result["out_of_time"]:
        print(f"out of time: {'; '.join(result['out_of_time'])}")


# ---- files ----------------------------------------------------------------------------------------------------------


def save(result: Record, out: Path) -> None:
    """Write `step-DEVICE-DATE.json`."""
    out.mkdir(parents=True, exist_ok=True)
    about = {"date": datetime.date.today().isoformat(), "versions": versions(*PACKAGES)}
    write_atomically(_path(result, out), (json.dumps({**about, **result}, indent=1) + "\n").encode())


def _path(result: Record, out: Path) -> Path:
    return out / f"step-{device_and_date(result['machine'])}.json"


def plot(result: Record, out: Path) -> None:
    """Seconds of a sequence in every case, and by part in those that were profiled, beside the JSON."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    measured = [record for record in result["cases"] if "failed" not in record]
    profiled = [record for record in measured if "seconds_by_part" in record]
    if not measured:
        return
    rows = (len(measured), max(1, len(profiled)))
    figure = Figure(figsize=(9, 2 + 0.32 * sum(rows)), layout="constrained")
    every, parts = figure.subplots(2, 1, height_ratios=[rows[0], rows[1] + 1])
    seconds = [1 / record["sequences_per_s"] for record in measured]
    every.barh(
        range(len(measured)),
        seconds,
        color=["#D55E00" if r["trainer"] else "#0072B2" if r["geometry"] else "#BBBBBB" for r in measured],
    )
    for place, (value, record) in enumerate(zip(seconds, measured, strict=True)):
        every.text(value, place, f" MFU {record['mfu']:.0%}", va="center", fontsize=7)
    every.set_yticks(range(len(measured)), [record["name"] for record in measured], fontsize=7)
    every.set_xlim(0, 1.15 * max(seconds))
    every.set_xlabel(
        "seconds of a sequence, its share of the optimiser included (grey: without geometry, red: the Trainer)",
        fontsize=8,
    )
    for place, record in enumerate(profiled):
        left = 0.0
        for part, colour in zip(PARTS, colormaps["tab10"].colors, strict=True):
            width = record["seconds_by_part"].get(part, 0.0)
            parts.barh(place, width, left=left, color=colour, label=part if place == 0 else None)
            left += width
    parts.set_yticks(range(len(profiled)), [record["name"] for record in profiled], fontsize=7)
    parts.set_xlabel("seconds of a micro-batch and of the optimiser, profiled", fontsize=8)
    parts.legend(fontsize=6, ncols=5)
    for panel in (every, parts):
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"gasp_fast training step on {result['machine']}", fontsize=10)
    figure.savefig(_path(result, out).with_suffix(".png"), dpi=150)
