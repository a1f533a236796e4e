"""What `step.py` leaves behind: a line for each case, verdicts on the targets, JSON and a plot."""

from __future__ import annotations

import datetime
import json
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from step_profile import PARTS

PACKAGES = ("gasp-fast", "torch", "triton", "transformers", "peft", "accelerate", "liger-kernel", "flash-attn")
GEOMETRY_TIME, GEOMETRY_MEMORY, MFU, RATE = 0.10, 0.05, 0.45, 4.6
Record = dict[str, Any]


def one_line(record: Record) -> str:
    if "failed" in record:
        return f"{record['name']}: {record['failed']}"
    memory = record["peak_memory"]
    told = [
        f"{record['step_seconds']:.3f} s a step",
        f"{record['sequences_per_s']:.2f} sequences/s",
        f"{record['tokens_per_s']:,.0f} tokens/s",
        f"MFU {record['mfu']:.1%}",
    ]
    told += [] if memory is None else [f"{memory / 1e9:.1f} GB"]
    told += [f"plan {record['plan_error']:+.0%}"] if "plan_error" in record else []
    lines = [f"{record['name']}: {', '.join(told)}"]
    if "seconds_by_part" in record:
        whole = sum(record["seconds_by_part"].values())
        shares = (f"{part} {value / whole:.0%}" for part, value in record["seconds_by_part"].items())
        lines.append(f"        {', '.join(shares)}; attention by {', '.join(record['attention_operations']) or 'none'}")
    return "\n".join(lines)


# ---- targets --------------------------------------------------------------------------------------------------------


def judged(result: Record) -> list[Record]:
    """Each target with what was found; `met` is null where the case that would tell was not measured."""
    done = [record for record in result["cases"] if "failed" not in record]
    verdicts = []
    for family in dict.fromkeys(record["family"] for record in done):
        most = max(record["frames"] for record in done if record["family"] == family)
        with_geometry = _default(done, family, most, geometry=True)
        plain = _default(done, family, most, geometry=False)
        for what, key, wanted in (
            ("time", "step_seconds", GEOMETRY_TIME),
            ("peak memory", "peak_memory", GEOMETRY_MEMORY),
        ):
            found = None
            if with_geometry and plain and plain[key]:
                found = 1 - plain[key] / with_geometry[key]
            verdicts.append(
                _verdict(f"{family}, {most} frames: geometry's share of {what}", found, wanted, at_most=True)
            )
        best = max((r["mfu"] for r in done if r["family"] == family and r["geometry"]), default=None)
        verdicts.append(_verdict(f"{family}: best MFU with geometry", best, MFU, at_most=False))
    rates = [
        r["sequences_per_s"] for r in done if (r["family"], r["frames"]) == ("llava_next_video", 16) and r["geometry"]
    ]
    verdicts.append(
        _verdict("LLaVA, 16 frames: sequences/s (wanted of an H200)", max(rates, default=None), RATE, at_most=False)
    )
    worst = max((abs(r["plan_error"]) for r in done if "plan_error" in r and _is_default(r)), default=None)
    verdicts.append(_verdict("plan: worst error on the recipes' steps", worst, 0.15, at_most=True))
    return verdicts


def _default(done: list[Record], family: str, frames: int, geometry: bool) -> Record | None:
    fitting = (r for r in done if r["family"] == family and r["frames"] == frames and r["geometry"] == geometry)
    return next((r for r in fitting if _is_default(r)), None)


def _is_default(record: Record) -> bool:
    return (record["checkpointing"], record["attention"], record["heads"], record["liger"], record["at_once"]) == (
        "non_reentrant", "sdpa", "tf32", False, 1,
    )  # fmt: skip


def _verdict(target: str, found: float | None, wanted: float, at_most: bool) -> Record:
    met = None if found is None else bool(found <= wanted if at_most else found >= wanted)
    return {
        "target": target,
        "wanted": f"{'at most' if at_most else 'at least'} {wanted:g}",
        "found": found,
        "met": met,
    }


def print_targets(result: Record) -> None:
    for verdict in result.get("targets", ()):
        word = {True: "met", False: "MISSED", None: "not measured"}[verdict["met"]]
        found = "" if verdict["found"] is None else f"{verdict['found']:.3g}, "
        print(f"{word:>12}  {verdict['target']}: {found}wanted {verdict['wanted']}")
    if result["out_of_time"]:
        print(f"out of time: {'; '.join(result['out_of_time'])}")


# ---- files ----------------------------------------------------------------------------------------------------------


def save(result: Record, out: Path) -> Path:
    """`step-DEVICE-DATE.json`, and its plot where anything was measured."""
    out.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    device = re.sub(r"[^A-Za-z0-9.]+", "-", result["machine"].split(",")[0])
    path = out / f"step-{device}-{date}.json"
    versions = {name: _version(name) for name in PACKAGES}
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps({"date": date, "versions": versions, **result}, indent=1) + "\n")
    os.replace(partial, path)
    plot(result, path.with_suffix(".png"))
    return path


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def plot(result: Record, path: Path) -> None:
    """Seconds of a sequence in every case; and, for those that were profiled, by part."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [record for record in result["cases"] if "failed" not in record]
    split = [record for record in done if "seconds_by_part" in record]
    if not done:
        return
    rows = (max(1, len(done)), max(1, len(split)))
    figure, (every, parts) = pyplot.subplots(
        2, 1, figsize=(9, 2 + 0.32 * sum(rows)), height_ratios=[rows[0], rows[1] + 1], layout="constrained"
    )
    seconds = [1 / record["sequences_per_s"] for record in done]
    every.barh(range(len(done)), seconds, color=["#0072B2" if r["geometry"] else "#BBBBBB" for r in done])
    for place, (value, record) in enumerate(zip(seconds, done, strict=True)):
        every.text(value, place, f" MFU {record['mfu']:.0%}", va="center", fontsize=7)
    every.set_yticks(range(len(done)), [record["name"] for record in done], fontsize=7)
    every.set_xlim(0, 1.15 * max(seconds))
    every.set_xlabel(
        "seconds of a sequence, its share of the optimiser among them (grey: without geometry)", fontsize=8
    )
    colours = pyplot.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for place, record in enumerate(split):
        left = 0.0
        for part, colour in zip(PARTS, colours, strict=True):
            width = record["seconds_by_part"].get(part, 0.0)
            parts.barh(place, width, left=left, color=colour, label=part if place == 0 else None)
            left += width
    parts.set_yticks(range(len(split)), [record["name"] for record in split], fontsize=7)
    parts.set_xlabel("seconds of a micro-batch, and of the optimiser, under the profiler", fontsize=8)
    parts.legend(fontsize=6, ncols=5)
    for panel in (every, parts):
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"gasp_fast training step on {result['machine']}", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
