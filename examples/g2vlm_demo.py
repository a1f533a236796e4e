"""A tiny G²VLM learns depth and camera poses in minutes on a CPU: `make g2vlm-demo`, or run this file.

Renders synthetic rooms with exact depth and poses, trains the tiny recipe of G²VLM from random weights, and evaluates
it on rooms that it has not seen, beside guesses that look at no image:

- best constant depth: for each sequence the one with the least AbsRel, chosen by the truth;
- constant depth: the same depth everywhere, at the scale that the model's depth gets too;
- mean depth: the mean depth map of rooms of the training;
- identity poses: cameras neither turn nor move. Zero translation has no direction, which counts as wrong;
- usual poses: the mean rotation and the most frequent axis of motion in rooms of the training.

All depth but the first is multiplied by the scale that fits the sequence best. A run that was stopped continues with
the same command. Writes `results.json`, `depth.png` and `cameras.png`.

Measured on 2 cores of an AMD EPYC that were shared with other work, OMP_NUM_THREADS=1, 5.9 to 7.4 minutes a run; 52
sequences of 26 rooms, seeds 0, 1, 2 (`benchmarks/results/g2vlm-demo-*.json`):

|                                | AbsRel            | AUC@30            |
| ------------------------------ | ----------------- | ----------------- |
| best constant depth            | 0.418             |                   |
| constant depth, identity poses | 0.573             | 0                 |
| mean depth, usual poses        | 0.293             | 0.062             |
| before training                | 0.573             | 0.004 0.043 0.022 |
| after training                 | 0.156 0.159 0.161 | 0.070 0.066 0.057 |

So depth is learned. Poses are better than identity, and no better than the usual ones of the training. With heads of an
earlier form, the pitch between two cameras followed the truth (correlation 0.74 on unseen rooms, seed 0) and the roll
(0.46), which one frame shows; the yaw did not (0.05, though 0.49 on rooms of the training), and the way to the side
depends on it. That takes matching of frames, which these few steps do not teach.

Fails (exit code 1) if AbsRel is not below 0.6 of that of the best constant depth, or AUC not above that of identity
poses.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from demo import command, heading, silence_libraries
from rich.console import Console
from rich.table import Table

from gasp_fast.backbones.tiny import TinyConfig, build_tiny
from gasp_fast.benchmarking.report import machine
from gasp_fast.config.loader import load_config
from gasp_fast.g2vlm.batch import GeometryBatch
from gasp_fast.g2vlm.collator import GeometryCollator
from gasp_fast.g2vlm.config import G2TrainConfig
from gasp_fast.g2vlm.held_out import Scores, mean_scores, predicted
from gasp_fast.g2vlm.losses import Geometry
from gasp_fast.g2vlm.metrics import depth_metrics, pose_metrics
from gasp_fast.g2vlm.pictures import draw_cameras, draw_depths
from gasp_fast.g2vlm.rotation import nearest_rotation
from gasp_fast.g2vlm.samples import UnseenSequences
from gasp_fast.g2vlm.tiny import build_tiny_encoder
from gasp_fast.g2vlm.trained import build, read_weights
from gasp_fast.run_folder import checkpoint_folders

HERE = Path(__file__).resolve().parents[1]
RECIPE = HERE / "configs" / "g2vlm" / "tiny_cpu.yaml"
HELD_OUT = 0.15  # share of the rooms that is not trained on
FRAMES, STRIDE = 4, 4  # of a sequence of the evaluation
BEST_CONSTANT, CONSTANT, TRAINED = "best constant depth", "constant depth, identity poses", "after training"
SIZE = 112  # pixels of a rendered frame
STEPS = 1500
MOST_ABS_REL = 0.6  # required, of that of the best constant depth


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("g2vlm-demo"), help="folder for all results (g2vlm-demo)")
    parser.add_argument("--scenes", type=int, default=160, help="rooms to render (160)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimiser steps ({STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of weights and of the order of sequences (0)")
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="changes to the recipe")
    arguments = parser.parse_intermixed_args()
    silence_libraries()
    start, out = time.monotonic(), arguments.out
    out.mkdir(parents=True, exist_ok=True)

    heading("1/3  render rooms with exact depth and poses")
    scenes = out / "scenes"
    command("gasp-fast", "render", "--out", scenes, "--scenes", arguments.scenes, "--size", SIZE, "--no-qa")

    heading(f"2/3  train for {arguments.steps} steps")
    settings = [*recipe_settings(out, arguments.seed, arguments.steps), *arguments.keys]
    build_models(out, arguments.seed)
    command("gasp-fast", "train", RECIPE, *settings)

    heading("3/3  evaluate on unseen rooms")
    results = evaluate(settings, out)
    minutes = (time.monotonic() - start) / 60
    facts = {"machine": machine(torch.device("cpu")), "date": str(datetime.date.today()), "torch": torch.__version__}
    asked = {"scenes": arguments.scenes, "steps": arguments.steps, "seed": arguments.seed, "keys": arguments.keys}
    report = {**facts, **asked, "minutes": round(minutes, 1), "scores": results}
    (out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    show(results)
    print(f"\n{minutes:.1f} minutes; results: {out / 'results.json'}, {out / 'depth.png'}, {out / 'cameras.png'}")
    check(results)


def recipe_settings(out: Path, seed: int, steps: int) -> list[str]:
    return [
        f"model.source={out / 'qwen'}",
        f"model.encoder={out / 'dino'}",
        f"data.roots=[{out / 'scenes'}]",
        f"data.held_out={HELD_OUT}",
        f"data.seed={seed}",
        "evaluate.scenes=[]",
        f"train.steps={steps}",
        f"train.seed={seed}",
        f"run.out={out / 'run'}",
        "run.min_free_gb=0.5",
    ]


def build_models(out: Path, seed: int) -> None:
    """The two models that the small G²VLM is made from, with random weights. A resumed run has them already."""
    done = out / "dino" / "config.json"
    if not done.exists():
        build_tiny(out / "qwen", TinyConfig(model_type="qwen2_vl", patch_size=14, layers=3, seed=seed))
        build_tiny_encoder(out / "dino", seed=seed)


# ---- evaluation -----------------------------------------------------------------------------------------------------


def evaluate(settings: Sequence[str], out: Path) -> dict[str, dict[str, float]]:
    """Mean scores over sequences of unseen rooms, by name. Draws the first sequence."""
    config = load_config(G2TrainConfig, RECIPE, list(settings))
    rooms = UnseenSequences(config.data.roots[0], FRAMES, STRIDE, 2, config.data.side, held_out=HELD_OUT)
    unseen = [GeometryCollator()([sample]) for sample in rooms]
    seen = list(sequences_of_training(config))
    model = build(config).model.eval()
    before = [predicted(model, pack, torch.device("cpu")) for pack in unseen]
    read_weights(model, checkpoint_folders(Path(config.run.out))[-1])
    after = [predicted(model, pack, torch.device("cpu")) for pack in unseen]
    draw(rooms[0].images, after[0], unseen[0], out)
    guesses = {CONSTANT: identity(unseen[0]), "mean depth, usual poses": usual(seen)}
    predictions = {name: [guess] * len(unseen) for name, guess in guesses.items()}
    predictions |= {"before training": before, TRAINED: after}
    best = {"abs_rel": statistics.fmean(best_constant(pack) for pack in unseen)}
    return {BEST_CONSTANT: best} | {
        name: mean_scores([scores(one, pack) for one, pack in zip(ours, unseen, strict=True)])
        for name, ours in predictions.items()
    }


def sequences_of_training(config: G2TrainConfig) -> Iterator[GeometryBatch]:
    """One of each room that is trained on, with the frames and the size of the evaluation."""
    root, side = config.data.roots[0], config.data.side
    unseen = {name for name, _ in UnseenSequences(root, FRAMES, STRIDE, 1, side, held_out=HELD_OUT).sequences}
    every = UnseenSequences(root, FRAMES, STRIDE, 1, side)
    for index, (name, _) in enumerate(every.sequences):
        if name not in unseen:
            yield GeometryCollator()([every[index]])


def best_constant(pack: GeometryBatch) -> float:
    """The least AbsRel of any constant: that of the median of depth with the weight 1 / depth."""
    depth = pack.true.local[0, ..., 2][pack.valid[0]].double().sort().values  # [n]
    weight = (1 / depth).cumsum(0)
    constant = depth[torch.searchsorted(weight, weight[-1] / 2)]
    return float(((constant - depth).abs() / depth).mean())


def identity(pack: GeometryBatch) -> Geometry:
    """Depth 1 everywhere, cameras that do not move."""
    points = torch.ones_like(pack.true.local)
    still = torch.eye(3).expand_as(pack.true.rotation), torch.zeros_like(pack.true.translation)
    return Geometry(points, points, *still)


def usual(seen: Sequence[GeometryBatch]) -> Geometry:
    """The mean depth of each pixel; the mean rotation of each frame; steady motion along the principal axis."""
    points = torch.stack([pack.true.local.mean(1, keepdim=True) for pack in seen]).mean(0)
    rotation = nearest_rotation(torch.stack([pack.true.rotation for pack in seen]).mean(0))
    steps = torch.cat([pack.true.translation[0].diff(dim=0) for pack in seen])  # [n, 3]
    axis = torch.linalg.eigh(steps.mT @ steps).eigenvectors[:, -1]
    translation = torch.arange(FRAMES)[None, :, None] * axis
    points = points.expand(-1, FRAMES, -1, -1, -1)
    return Geometry(points, points, rotation, translation)


def scores(ours: Geometry, pack: GeometryBatch) -> Scores:
    true = pack.true
    depth = depth_metrics(ours.local[0, ..., 2], true.local[0, ..., 2], pack.valid[0])
    return Scores(depth, pose_metrics(ours.rotation[0], ours.translation[0], true.rotation[0], true.translation[0]))


# ---- results --------------------------------------------------------------------------------------------------------


def draw(images: object, ours: Geometry, pack: GeometryBatch, out: Path) -> None:
    true, valid = pack.true, pack.valid[0]
    scale = depth_metrics(ours.local[0, ..., 2], true.local[0, ..., 2], valid).scale
    depth = scale * ours.local[0, ..., 2]
    draw_depths(images, depth, true.local[0, ..., 2], valid, "An unseen room").savefig(out / "depth.png")
    cameras = ours.rotation[0], scale * ours.translation[0], true.rotation[0], true.translation[0]
    draw_cameras(*cameras).savefig(out / "cameras.png")


def show(results: dict[str, dict[str, float]]) -> None:
    table = Table(title="Unseen rooms", box=None)
    columns = {"AbsRel": "abs_rel", "δ < 1.25": "delta", "RRA@30": "rra", "RTA@30": "rta", "AUC@30": "auc"}
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, values in results.items():
        table.add_row(name, *(f"{values[key]:.3f}" if key in values else "" for key in columns.values()))
    Console().print(table)


def check(results: dict[str, dict[str, float]]) -> None:
    """Stops with an error where training has failed."""
    best, ours = results[BEST_CONSTANT]["abs_rel"], results[TRAINED]
    if ours["abs_rel"] >= MOST_ABS_REL * best:
        raise SystemExit(
            f"g2vlm_demo: AbsRel is {ours['abs_rel']:.3f}, not below {MOST_ABS_REL} of the best constant depth's, "
            f"{best:.3f}: training failed"
        )
    if ours["auc"] <= results[CONSTANT]["auc"]:
        raise SystemExit(f"g2vlm_demo: AUC@30 is {ours['auc']:.3f}, no better than identity poses: training failed")


if __name__ == "__main__":
    main()
