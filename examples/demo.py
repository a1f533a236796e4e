"""What GASP does to a model, in minutes on a CPU: `make demo`, or `python examples/demo.py --out DIR`.

Renders synthetic scenes with exact geometry, checks them, asks a random Qwen2.5-VL where points go, trains it three
times through `gasp_fast.train` (language alone, correspondence, correspondence and depth; the same steps over the same
stream of samples, only the weights of the losses differ), asks again about scenes it has never seen, exports, and shows
all of it on one page. Every step is a command that works the same on a cluster, and is printed before it runs.

Fails (exit code 1) if training does not raise PCK on unseen scenes by at least 0.25.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
RECIPE = HERE / "configs" / "tiny_cpu.yaml"
GAIN = 0.25  # of PCK on unseen scenes, over the untrained model
HELD_OUT = 0.15  # share of the scenes that training never sees
RUNS = {  # name -> what differs from the full recipe
    "language only": ["loss.corr_weight=0", "loss.depth_weight=0"],
    "correspondence only": ["loss.depth_weight=0"],
    "full": [],
}
INTRODUCTION = """
<p>One small vision-language model, random at first, trained three times for the same {steps} steps on the same
rendered rooms. It was then asked, about rooms it had never seen: <em>this point of the first frame, where is it in
that later frame?</em> <b>before</b> is the untrained model; <b>language only</b> learned from questions and answers,
without geometry; <b>correspondence only</b> was also told which points are the same; <b>full</b> their depth as
well.</p>
<p>In the picture, dots are points found again, crosses are points lost. In the table, compare <em>PCK@2</em> (share of
points found) with <em>same</em>, the share one would find by pointing at the same place again without looking; and
read <em>moved</em>: the points for which that guess is always wrong. The share found rose from {before:.0%} to
{after:.0%}. What depth adds to PCK on a model this small is within the noise of one run.</p>
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for all of it; made anew (demo)")
    parser.add_argument("--scenes", type=int, default=80, help="rooms to render (80)")
    parser.add_argument("--steps", type=int, default=320, help="optimiser steps of each run (320)")
    parser.add_argument("--sequences", type=int, default=32, help="questions are about so many sequences (32)")
    told = parser.parse_args()
    quiet()
    start = time.monotonic()
    out = told.out
    make_room(out)

    heading("1/6  scenes: rendered rooms with exact depth and poses")
    command("gasp-fast", "render", "--out", out / "scenes", "--scenes", told.scenes, "--frames", 24)
    sample = sorted((out / "scenes").glob("scene-*"))[:6]
    for folder in sample:
        (out / "checked").mkdir(exist_ok=True)
        (out / "checked" / folder.name).symlink_to(folder.resolve())
    heading("2/6  is the geometry sound? tracks over frames")
    command("gasp-fast", "scenes", out / "checked", "--picture", out / "tracks")

    heading("3/6  what an untrained Qwen2.5-VL knows of correspondence")
    from gasp_fast.backbones.tiny import build_tiny

    build_tiny(out / "model")
    reports = {"before": evaluate(out, "before", out / "model", told.sequences)}

    heading(f"4/6  training, three times {told.steps} steps: gasp_fast.train")
    for name, changes in RUNS.items():
        train(out, name, changes, told.steps)

    heading("5/6  the same questions again, on unseen scenes")
    for name in RUNS:
        reports[name] = evaluate(out, name, folder_of(out, name), told.sequences)
    command("gasp-fast", "export", folder_of(out, "full"), "--out", out / "export")

    heading("6/6  what changed")
    return conclude(out, reports, told.steps, time.monotonic() - start)


def make_room(out: Path) -> None:
    """An empty folder; what is removed for it is the demo before, and nothing else."""
    mark = out / ".gasp-demo"
    if out.exists() and not mark.exists() and any(out.iterdir()):
        raise SystemExit(f"demo: --out {out} holds something else than a demo; name another folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    mark.touch()


def folder_of(out: Path, name: str) -> Path:
    return out / "runs" / name.replace(" ", "-")


def train(out: Path, name: str, changes: list[str], steps: int) -> None:
    settings = [
        f"model.source={out / 'model'}",
        f"data.scenes.root={out / 'scenes'}",
        f"data.scenes.held_out={HELD_OUT}",
        "data.scenes.weight=3",
        f"data.qa.root={out / 'scenes' / 'qa'}",
        "data.qa.frames=4",
        f"train.steps={steps}",
        f"run.out={folder_of(out, name)}",
        "data.workers=1",  # questions decode clips, too
        "run.save_every=100000",
        "run.min_free_gb=1",
        *changes,
    ]
    command("python -m gasp_fast.train", os.path.relpath(RECIPE), *settings)


def evaluate(out: Path, name: str, model: Path, sequences: int) -> Path:
    folder = out / "reports" / name.replace(" ", "-")
    asked = ["--sequences", sequences, "--frames", 6, "--max-gap", 8, "--held-out", HELD_OUT]
    kinds = ["--features", "head,hidden", "--pictures", 1]
    command("gasp-fast", "evaluate", "--model", model, "--scenes", out / "scenes", "--out", folder, *asked, *kinds)
    return folder


def conclude(out: Path, folders: dict[str, Path], steps: int, seconds: float) -> int:
    from rich.console import Console

    from gasp_fast.backbones import load_backbone
    from gasp_fast.cli.evaluate import as_table
    from gasp_fast.evaluation.report import read_report, table_rows, write_comparison
    from gasp_fast.evaluation.showing import draw_comparison

    reports = {name: read_report(folder) for name, folder in folders.items()}
    before, after = reports["before"]["pck"]["peak"], reports["full"]["pck"]["peak"]
    pictures = draw_comparison(
        {name: folders[name] for name in ("before", "language only", "full")},
        out / "scenes", load_backbone(out / "model"), out / "pictures", 2,
    )  # fmt: skip
    pictures += [("Ground truth: tracks over frames, coloured by depth", sorted((out / "tracks").glob("*.png"))[0])]
    introduction = INTRODUCTION.format(steps=steps, before=before, after=after)
    page, _ = write_comparison(reports, out, pictures, "What GASP did to a small model", introduction)
    Console().print(as_table(table_rows(reports, ["head"])))
    print("PCK@2: points found within two patches; same: found by not looking; moved: those that guess always misses")
    print(f"\n{seconds / 60:.1f} minutes; the page: {page}")
    print("next, on a GPU: gasp-fast doctor; python -m gasp_fast.train configs/qwen2_5_vl_7b.yaml --dry-run")
    if after - before < GAIN:
        print(f"demo: PCK went from {before:.3f} to {after:.3f}, less than {GAIN} up: training failed", file=sys.stderr)
        return 1
    return 0


def command(program: str, *words: object) -> None:
    """Print a command as one would type it, and run it in this process, which spares its start."""
    from gasp_fast.cli import main as gasp_fast
    from gasp_fast.train import main as gasp_train

    typed = [str(word) for word in words]
    print(f"\n$ {program} {' '.join(typed)}", flush=True)
    code = (gasp_fast if program == "gasp-fast" else gasp_train)(typed)
    if code:
        raise SystemExit(code)


def heading(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def quiet() -> None:
    """Libraries keep their notices to themselves; ours come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed says at length that it finds no GPU
    warnings.filterwarnings("ignore", category=FutureWarning)
    from gasp_fast.training.processes import quiet_libraries

    quiet_libraries()


if __name__ == "__main__":
    sys.exit(main())
