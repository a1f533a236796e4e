"""Reads a report of `gasp-fast evaluate`: prints its main metrics and plots PCK by temporal gap.

    python examples/read_report.py                    # first makes a small report: a tiny model on rendered rooms
    python examples/read_report.py REPORT --out DIR   # reads REPORT/report.json

Prints the best layer and its gain over predicting the same position, and writes the plot to `pck_by_gap.png`.
docs/evaluating.md lists the keys of report.json. Undefined values are null there and None here.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from gasp_fast.evaluation.report import read_report
from gasp_fast.evaluation.tables import pck_name


def describe(report: dict[str, Any]) -> list[str]:
    pck, name = report["pck"], pck_name({"": report})
    moved = report["pck_moved"]["per_layer"][report["layers"].index(pck["peak_layer"])]
    on_moved = "no point moved" if moved is None else f"{moved:.3f} on moved points"
    return [
        f"{report['model']}: {report['sequences']} sequences, features: {report['features']}",
        f"best layer {pck['peak_layer']} of {max(report['layers'])}: {name} {pck['peak']:.3f}, {on_moved}",
        f'gain over the "same position" guess ({report["identity"]:.3f}): {pck["peak"] - report["identity"]:+.3f}',
    ]


def plot(report: dict[str, Any], path: Path) -> Path:
    """Plots PCK of the best layer by temporal gap; the curve is interrupted at gaps without correspondences."""
    from matplotlib.figure import Figure

    temporal = report["temporal"]
    pck, identity = (np.array(temporal[name], dtype=float) for name in ("pck", "identity"))  # None becomes NaN
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(temporal["gaps"], pck, marker="o", label=f"layer {temporal['layer']}")
    axis.plot(temporal["gaps"], identity, "--", color="0.4", label="same position (identity)")
    axis.set(xlabel="gap (frames)", ylabel=pck_name({"": report}), ylim=(0, 1))
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    return path


def small_report(folder: Path) -> Path:
    """Makes a report on a tiny model and two rendered scenes with the command line, in seconds."""
    from toy import SIZE, tiny_model

    from gasp_fast.cli import main as gasp_fast
    from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes

    tiny_model(folder)
    list(render_scenes(folder / "scenes", 2, config=SyntheticConfig(frames=12, width=SIZE, height=SIZE)))
    options = ["--sequences", "6", "--frames", "4", "--max-gap", "8", "--features", "hidden", "--pictures", "0"]
    options += ["--model", str(folder / "model"), "--scenes", str(folder / "scenes"), "--out", str(folder / "report")]
    if code := gasp_fast(["evaluate", *options]):
        raise SystemExit(code)
    return folder / "report"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("report", type=Path, nargs="?", help="folder of a report (default: makes one)")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="folder for the plot")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = read_report(arguments.report or small_report(Path(folder)))
    print(*describe(report), sep="\n")
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(f"plot: {plot(report, arguments.out / 'pck_by_gap.png')}")


if __name__ == "__main__":
    main()
