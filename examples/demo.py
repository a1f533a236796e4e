"""The whole workflow on a tiny model, in minutes on a CPU: `make demo`, or `python examples/demo.py --out DIR`.

Renders synthetic scenes with exact geometry, checks them, evaluates point correspondence of a randomly initialised
Qwen2.5-VL, trains it twice with `gasp_fast.train` (with the geometric losses, and as a control without; same steps,
same samples), evaluates again on held-out scenes, exports, and writes one page with the results. Each step is a command
that works in the same way on a cluster; it is printed before it runs.

Fails (exit code 1) if training with geometry does not raise PCK@2 on held-out scenes by at least 0.25.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
RECIPE = HERE / "configs" / "tiny_cpu.yaml"
GAIN = 0.25  # required gain in PCK@2 on held-out scenes over the untrained model
HELD_OUT = 0.15  # share of scenes for evaluation only
RUNS = {  # name: changes to the full recipe
    "language only": ["loss.corr_weight=0", "loss.depth_weight=0"],
    "GASP": [],
}
INTRODUCTION = """
<p>A small, randomly initialised vision-language model was trained twice for {steps} steps on the same rendered
rooms. All models were evaluated on rooms that none was trained on: <em>where is this point of the first frame in a
later frame?</em> <b>before</b> is the untrained model. <b>language only</b> was trained on questions and answers,
without geometry; <b>GASP</b> also with the correspondence and depth losses.</p>
<p>Point at a first frame below to see where each model looks for that point in later frames. In the tables, compare
<em>PCK@2</em>, the share of points found within two patches, with <em>same</em>, the PCK@2 of predicting the same
position in every frame, and see <em>moved</em>, the PCK@2 of the points for which that prediction is always wrong.
PCK@2 rose from {before:.0%} to {after:.0%}.</p>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for all results; replaced (demo)")
    parser.add_argument("--scenes", type=int, default=80, help="rooms to render (80)")
    parser.add_argument("--steps", type=int, default=700, help="optimizer steps of each run (700)")
    parser.add_argument("--sequences", type=int, default=32, help="sequences of each evaluation (32)")
    arguments = parser.parse_args()
    silence_libraries()
    start = time.monotonic()
    out, steps, sequences = arguments.out, arguments.steps, arguments.sequences
    new_folder(out)

    heading("1/6  render scenes with exact depth and poses")
    command("gasp-fast", "render", "--out", out / "scenes", "--scenes", arguments.scenes, "--frames", 24)

    heading("2/6  check the geometry of some scenes; draw tracks")
    (out / "checked").mkdir()
    for folder in sorted((out / "scenes").glob("scene-*"))[:6]:
        (out / "checked" / folder.name).symlink_to(folder.resolve())
    command("gasp-fast", "scenes", out / "checked", "--picture", out / "tracks")

    heading("3/6  evaluate an untrained Qwen2.5-VL")
    from gasp_fast.backbones.tiny import build_tiny

    build_tiny(out / "model")
    reports = {"before": evaluate(out, "before", out / "model", sequences)}

    heading(f"4/6  train twice for {steps} steps")
    for name, changes in RUNS.items():
        train(out, name, changes, steps)

    heading("5/6  evaluate each run on held-out scenes; export")
    for name in RUNS:
        reports[name] = evaluate(out, name, run_folder(out, name), sequences)
    command("gasp-fast", "export", run_folder(out, "GASP"), "--out", out / "export")

    heading("6/6  results")
    conclude(out, reports, steps, time.monotonic() - start)


def new_folder(out: Path) -> None:
    """Creates an empty folder; only the output of an earlier demo is removed for it."""
    mark = out / ".gasp-demo"
    if out.exists() and not mark.exists() and any(out.iterdir()):
        raise SystemExit(f"demo: --out {out} contains files that are not from a demo; name another folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    mark.touch()


def run_folder(out: Path, name: str) -> Path:
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
        f"run.out={run_folder(out, name)}",
        "data.workers=1",  # video questions decode clips in it
        "run.save_every=100000",
        "run.min_free_gb=1",
        *changes,
    ]
    command("python -m gasp_fast.train", os.path.relpath(RECIPE), *settings)


def evaluate(out: Path, name: str, model: Path, sequences: int) -> Path:
    folder = out / "reports" / name.replace(" ", "-")
    size = ["--sequences", sequences, "--frames", 6, "--max-gap", 8, "--held-out", HELD_OUT]
    output = ["--features", "head,hidden"]
    command("gasp-fast", "evaluate", "--model", model, "--scenes", out / "scenes", "--out", folder, *size, *output)
    return folder


def conclude(out: Path, folders: dict[str, Path], steps: int, seconds: float) -> None:
    """Writes the page, prints the table, and stops with an error if training failed."""
    from rich.console import Console

    from gasp_fast.evaluation.report import read_report, write_comparison
    from gasp_fast.evaluation.tables import terminal_table
    from gasp_fast.training.curves import draw_curves, read_run

    reports = {name: read_report(folder) for name, folder in folders.items()}
    before, after = reports["before"]["pck"]["peak"], reports["GASP"]["pck"]["peak"]
    pictures = [("True tracks over frames, coloured by depth", sorted((out / "tracks").glob("*.png"))[0])]
    introduction = INTRODUCTION.format(steps=steps, before=before, after=after)
    curves = draw_curves({name: read_run(run_folder(out, name)) for name in RUNS})
    title = "GASP training of a small model"
    comparison = write_comparison(reports, out, pictures, title, introduction, sources=folders, curves=curves)
    Console().print(terminal_table(reports, ["head"]))
    print(f"\n{seconds / 60:.1f} minutes; results: {comparison.page}")
    print("next, on a GPU: gasp-fast doctor; python -m gasp_fast.train qwen2_5_vl_7b --dry-run")
    if after - before < GAIN:
        raise SystemExit(f"demo: PCK@2 went from {before:.3f} to {after:.3f}, a gain below {GAIN}: training failed")


def command(program: str, *words: object) -> None:
    """Prints a command and runs it in this process, which saves starting another."""
    from gasp_fast.cli import main as gasp_fast
    from gasp_fast.train import main as gasp_train

    arguments = [str(word) for word in words]
    print(f"\n$ {program} {' '.join(arguments)}", flush=True)
    code = (gasp_fast if program == "gasp-fast" else gasp_train)(arguments)
    if code:
        raise SystemExit(code)


def heading(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def silence_libraries() -> None:
    """Hides notices of the libraries, not our own messages."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it finds no GPU
    warnings.filterwarnings("ignore", category=FutureWarning)
    from gasp_fast.training.distributed import quiet_libraries

    quiet_libraries()


if __name__ == "__main__":
    main()
