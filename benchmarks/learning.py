"""Learning benchmark: PCK@2 and depth error of a tiny model after training with different losses and adapters.

    python benchmarks/learning.py [--seeds 3] [--steps 600] [--lora-steps 300] [--full-only] [--out DIR] [KEY=VALUE ...]

First `configs/tiny_cpu.yaml` from random weights, with and without the depth loss. Then `configs/tiny_cpu_lora.yaml` on
the exported result (without heads) in rooms seen by another camera: wider, noisier, with varying exposure. The seed
determines the weights and the order of sequences; runs of a seed differ only in what their name says. "heads alone" is
the control for the adapters: the same new heads on the same base with frozen adapters.

All models are evaluated on rooms seen by the same camera as in their training, but not used for training: PCK@2 of the
last layer's head, for all points and for points that moved by more than two patches; PCK@2 of predicting the same
position; and the depth term, the relative error of the expected depth; beside them the mean loss of the last tenth of
the steps. `KEY=VALUE` changes the recipe of every run; `--full-only` leaves out all but the run with both losses. The
effect of the heads' precision: `--full-only` with heads.compute=bf16 heads.embeddings=bf16, and with fp32 for both.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gasp_fast.backbones import Backbone, load_backbone
from gasp_fast.backbones.tiny import TinyConfig, build_tiny
from gasp_fast.benchmarking.report import machine
from gasp_fast.collator import Collator
from gasp_fast.config.loader import load_config
from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes
from gasp_fast.evaluation.metrics import within
from gasp_fast.export import export
from gasp_fast.loss.function import gasp_loss
from gasp_fast.loss.matches import Matches
from gasp_fast.run_folder import HEADS, checkpoint_folders
from gasp_fast.supervision.head_files import read_heads
from gasp_fast.supervision.heads import CorrespondenceHeads
from gasp_fast.supervision.layer_capture import LayerCapture
from gasp_fast.train import train
from gasp_fast.training.config import TrainConfig
from gasp_fast.training.distributed import quiet_libraries
from gasp_fast.training.model import build_model
from gasp_fast.training.stream import SampleStream

RECIPES = Path(__file__).parents[1] / "configs"
CAMERA = SyntheticConfig()
OTHER_CAMERA = SyntheticConfig(field_of_view=80, exposure_jitter=0.2, white_balance_jitter=0.07, sensor_noise=0.02)
ROOMS = {  # first seed, number, camera
    "seen": (0, 120, CAMERA),
    "unseen": (120, 48, CAMERA),
    "new": (1000, 40, OTHER_CAMERA),
    "new unseen": (2000, 24, OTHER_CAMERA),
}
LAYERS = 3
BASE = "other camera: base, new heads"
CORRESPONDENCE_ONLY = ["loss.depth_weight=0"]
FROZEN = ["train.learning_rate=1e-30", "train.head_lr_scale=1e27"]  # 1e-3 for the heads, none for the adapters


@dataclass(frozen=True)
class Scores:
    """Metrics of the last layer's head on unseen rooms."""

    pck: float
    moved: float  # PCK of the points that moved
    same_place: float  # PCK of predicting the same position
    depth: float  # the depth term


def render_rooms(folder: Path) -> None:
    for name, (first, count, camera) in ROOMS.items():
        list(render_scenes(folder / name, count, seed=first, config=camera))


def recipe(name: str, folder: Path, rooms: Path, out: Path, seed: int, changes: list[str]) -> TrainConfig:
    """A tiny recipe for the model in `folder` that trains on all of `rooms`; evaluation has rooms of its own."""
    settings = [
        f"model.source={folder}",
        f"data.scenes.root={rooms}",
        "data.scenes.held_out=0",
        f"train.seed={seed}",
        f"data.seed={seed}",
        f"run.out={out}",
        "run.min_free_gb=0.5",
        "run.progress=false",
    ]
    return load_config(TrainConfig, RECIPES / f"{name}.yaml", settings + changes)


# ---- evaluation -----------------------------------------------------------------------------------------------------


def evaluate_trained(config: TrainConfig, unseen: Path, sequences: int = 48, adapted: bool = True) -> Scores:
    """Scores of a run's newest checkpoint; with `adapted=False` of its heads on the base model without adapters."""
    last = checkpoint_folders(Path(config.run.out))[-1]
    supervised = build_model(config, torch.device("cpu"))
    network: Any = supervised.model
    if config.train.mode == "lora":
        from peft import PeftModel

        network = PeftModel.from_pretrained(supervised.backbone.load_model(dtype=torch.float32), str(last))
        if not adapted:
            network.base_model.disable_adapter_layers()
    else:
        network = load_backbone(last).load_model(dtype=torch.float32)
    return evaluate(config, supervised.backbone, network, read_heads(last / HEADS), unseen, sequences)


def evaluate_untrained(config: TrainConfig, unseen: Path, sequences: int = 48) -> Scores:
    """Scores at the start of a run: heads initialised from the model's query projections."""
    supervised = build_model(config, torch.device("cpu"))
    layers: Any = supervised.supervision.by_layer  # type: ignore[union-attr]
    heads = {int(name): layer.head for name, layer in layers.items()}
    return evaluate(config, supervised.backbone, supervised.model, CorrespondenceHeads(heads), unseen, sequences)


def evaluate(
    config: TrainConfig, backbone: Backbone, network: Any, heads: CorrespondenceHeads, unseen: Path, sequences: int
) -> Scores:
    """Scores on sequences drawn as in the recipe, from the rooms in `unseen`."""
    network.eval()
    scenes = replace(config.data.scenes, root=str(unseen), held_out=0.0)
    stream = SampleStream(replace(config.data, scenes=scenes, workers=0, seed=0))
    collate, last = Collator(backbone), heads.layers[-1]
    sums = {"pck": 0.0, "moved": 0.0, "depth": 0.0}
    points = moved_points = 0
    for position in range(sequences):
        batch = collate([stream[position]])
        matches, positions = batch.pop("matches"), batch.pop("visual_positions")
        batch.pop("labels")
        layers: Any = backbone.decoder_layers(network)
        capture = LayerCapture(layers, backbone.final_norm(network), [last])
        with capture, torch.no_grad():
            network(**batch, use_cache=False, logits_to_keep=1)
            embeddings = heads(last, capture.tokens(last, positions))
        moved = moved_matches(matches)
        (pck, depth), (moved_pck, _) = pck_and_depth(embeddings, matches), pck_and_depth(embeddings, moved)
        sums["pck"] += pck * len(matches)
        sums["depth"] += depth * len(matches)
        sums["moved"] += moved_pck * len(moved)
        points, moved_points = points + len(matches), moved_points + len(moved)
    return Scores(
        pck=sums["pck"] / points,
        moved=sums["moved"] / moved_points,
        same_place=1 - moved_points / points,
        depth=sums["depth"] / points,
    )


def pck_and_depth(embeddings: torch.Tensor, matches: Matches) -> tuple[float, float]:
    """PCK@2 and the depth term."""
    with torch.no_grad():
        out = gasp_loss(embeddings, matches, return_metrics=True)
    assert out.metrics is not None and out.metrics.pck is not None
    return float(out.metrics.pck[0]), float(out.depth)


def moved_matches(matches: Matches) -> Matches:
    """The matches whose target is more than two patches from the anchor's position."""
    assert matches.token_xy is not None
    xy = matches.token_xy.numpy()
    moved = ~within(xy[matches.anchor.numpy()], xy[matches.target.numpy()], radius=2)
    return chosen_matches(matches, torch.from_numpy(moved))


def chosen_matches(matches: Matches, chosen: torch.Tensor) -> Matches:
    """The matches for which `chosen` [M] is true, without depth."""
    return Matches(
        frame_offsets=matches.frame_offsets,
        sequence_offsets=matches.sequence_offsets,
        anchor=matches.anchor[chosen],
        target=matches.target[chosen],
        token_xy=matches.token_xy,
    )


# ---- the experiment -------------------------------------------------------------------------------------------------


def experiment(
    folder: Path, seed: int, steps: int, lora_steps: int, overrides: list[str], full_only: bool = False
) -> dict[str, dict[str, float]]:
    """Trains and evaluates all runs of a seed; returns the scores and training seconds of each by name."""
    runs = folder / f"seed-{seed}"
    model = build_tiny(runs / "model", TinyConfig(layers=LAYERS, seed=seed))
    scores: dict[str, dict[str, float]] = {}

    def train_and_evaluate(name: str, config: TrainConfig, unseen: Path) -> None:
        start = time.monotonic()
        train(config)
        seconds, loss = round(time.monotonic() - start, 1), final_loss(Path(config.run.out))
        scores[name] = {"seconds": seconds, "loss": loss, **asdict(evaluate_trained(config, unseen))}
        print(f"seed {seed}, {name}: {_words(scores[name])}", flush=True)

    first = {"full": []} if full_only else {"correspondence alone": CORRESPONDENCE_ONLY, "full": []}
    for name, changes in first.items():
        out = runs / name.replace(" ", "-")
        config = recipe("tiny_cpu", model, folder / "seen", out, seed, [f"train.steps={steps}", *changes, *overrides])
        if not scores:
            scores["untrained"] = asdict(evaluate_untrained(config, folder / "unseen"))
        train_and_evaluate(name, config, folder / "unseen")
    if full_only:
        return scores
    export(runs / "full", runs / "trained", device="cpu")
    for name, changes in (("heads alone", FROZEN), ("adapters", [])):
        out, name = runs / name.replace(" ", "-"), f"other camera: {name}"
        changes = [f"train.steps={lora_steps}", *changes, *overrides]
        config = recipe("tiny_cpu_lora", runs / "trained", folder / "new", out, seed, changes)
        if BASE not in scores:
            scores[BASE] = asdict(evaluate_untrained(config, folder / "new unseen"))
        train_and_evaluate(name, config, folder / "new unseen")
    return scores


def final_loss(run: Path) -> float:
    """The mean loss of the last tenth of a run's log lines."""
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def _words(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items())


def _table(seeds: dict[int, dict[str, dict[str, float]]]) -> Table:
    table = Table(title="Last head on unseen rooms: mean over seeds (each seed)", box=None)
    for column in ("run", "PCK@2", "moved", "depth term", "seconds"):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    for name in next(iter(seeds.values())):
        scores = [runs[name] for runs in seeds.values()]
        cells = []
        for key in ("pck", "moved", "depth"):
            values = [one[key] for one in scores]
            cells.append(f"{statistics.fmean(values):.3f} ({' '.join(f'{value:.3f}' for value in values)})")
        seconds = [one["seconds"] for one in scores if "seconds" in one]
        table.add_row(name, *cells, f"{statistics.fmean(seconds):.0f}" if seconds else "")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lora-steps", type=int, default=300)
    parser.add_argument("--full-only", action="store_true", help="only the run with both losses, from random weights")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the recipe of every run")
    arguments = parser.parse_intermixed_args()
    quiet_libraries()
    device = machine(torch.device("cpu"))
    date = datetime.date.today().isoformat()
    name = "-".join(["learning", device.split(",")[0], date, *arguments.overrides])
    path = arguments.out / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.json"
    results: dict[str, Any] = {"date": date, "machine": device, "torch": torch.__version__, "steps": arguments.steps}
    results |= {"lora_steps": arguments.lora_steps, "overrides": arguments.overrides, "seeds": {}}
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        render_rooms(Path(temporary))
        for seed in range(arguments.seeds):
            results["seeds"][seed] = experiment(
                Path(temporary), seed, arguments.steps, arguments.lora_steps, arguments.overrides, arguments.full_only
            )
            path.write_text(json.dumps(results, indent=1) + "\n")
    Console().print(_table(results["seeds"]))


if __name__ == "__main__":
    main()
