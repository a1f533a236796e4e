"""What the losses teach a tiny model: correspondence alone, with depth, and adapters on the result.

    python benchmarks/learning.py [--seeds 3] [--steps 600] [--lora-steps 300] [--out benchmarks/results]

`configs/tiny_cpu.yaml` from random weights, and `configs/tiny_cpu_lora.yaml` on what came out, its heads dropped by
the export, in rooms that another camera looks at: wider, noisier, its exposure less steady. A seed draws the weights
and the order of sequences; within a seed, runs differ in what their name says and in nothing else. "heads alone" is the
adapters' control: the same new heads on the same base, whose adapters do not move.

All are asked about rooms that none has seen, of the kind they trained on: PCK@2 of the last layer's head, of all points
and of those that moved by more than two patches; the share found by answering "the same place"; and the depth term, the
relative error of the soft-argmax depth.
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
from gasp_fast.export import export
from gasp_fast.loss.function import gasp_loss
from gasp_fast.loss.matches import Matches
from gasp_fast.run_folder import HEADS, finished
from gasp_fast.supervision.head_files import read_heads
from gasp_fast.supervision.heads import CorrespondenceHeads
from gasp_fast.supervision.layer_capture import LayerCapture
from gasp_fast.train import train
from gasp_fast.training.config import TrainConfig
from gasp_fast.training.model import build_model
from gasp_fast.training.processes import quiet_libraries
from gasp_fast.training.stream import SampleStream

RECIPES = Path(__file__).parents[1] / "configs"
CAMERA = SyntheticConfig()
OTHER_CAMERA = SyntheticConfig(field_of_view=80, exposure_jitter=0.2, white_balance_jitter=0.07, sensor_noise=0.02)
ROOMS = {  # first seed, how many, seen by which camera
    "seen": (0, 120, CAMERA),
    "unseen": (120, 48, CAMERA),
    "new": (1000, 40, OTHER_CAMERA),
    "new unseen": (2000, 24, OTHER_CAMERA),
}
LAYERS = 3
BASE = "other camera: base, new heads"
CORRESPONDENCE_ONLY = ["loss.depth_weight=0"]
FROZEN = ["train.learning_rate=1e-30", "train.head_lr_scale=1e27"]  # 1e-3 for the heads, nothing for the adapters


@dataclass(frozen=True)
class Knowledge:
    """What the last layer's head knows of rooms it has never seen."""

    pck: float
    moved: float  # PCK of the points that moved
    same_place: float  # PCK of the guess that nothing moves
    depth: float  # the depth term


def render_rooms(folder: Path) -> None:
    for name, (first, count, camera) in ROOMS.items():
        list(render_scenes(folder / name, count, seed=first, config=camera))


def recipe(name: str, folder: Path, rooms: Path, out: Path, seed: int, changes: list[str]) -> TrainConfig:
    """A tiny recipe on the model of `folder`, trained on whole `rooms`: who is asked later is rendered apart."""
    own = [
        f"model.source={folder}",
        f"data.scenes.root={rooms}",
        "data.scenes.held_out=0",
        f"train.seed={seed}",
        f"data.seed={seed}",
        f"run.out={out}",
        "run.min_free_gb=0.5",
        "run.progress=false",
    ]
    return load_config(TrainConfig, RECIPES / f"{name}.yaml", own + changes)


# ---- asking ---------------------------------------------------------------------------------------------------------


def ask_trained(config: TrainConfig, unseen: Path, sequences: int = 48, adapted: bool = True) -> Knowledge:
    """A finished run, through its newest checkpoint; its heads on the base alone, if not `adapted`."""
    last = finished(Path(config.run.out))[-1]
    supervised = build_model(config, torch.device("cpu"))
    network = supervised.model
    if config.train.mode == "lora":
        from peft import PeftModel

        network = PeftModel.from_pretrained(supervised.backbone.load_model(dtype=torch.float32), str(last))
        if not adapted:
            network.base_model.disable_adapter_layers()
    else:
        network = load_backbone(last).load_model(dtype=torch.float32)
    return ask(config, supervised.backbone, network, read_heads(last / HEADS), unseen, sequences)


def ask_untrained(config: TrainConfig, unseen: Path, sequences: int = 48) -> Knowledge:
    """The model as a run begins: heads made from its own query projections."""
    supervised = build_model(config, torch.device("cpu"))
    layers: Any = supervised.supervision.by_layer  # type: ignore[union-attr]
    heads = {int(name): layer.head for name, layer in layers.items()}
    return ask(config, supervised.backbone, supervised.model, CorrespondenceHeads(heads), unseen, sequences)


def ask(
    config: TrainConfig, backbone: Backbone, network: Any, heads: CorrespondenceHeads, unseen: Path, sequences: int
) -> Knowledge:
    """Questions as the recipe draws them, about the rooms in `unseen`."""
    network.eval()
    scenes = replace(config.data.scenes, root=str(unseen), held_out=0.0)
    stream = SampleStream(replace(config.data, scenes=scenes, workers=0, seed=0))
    collate, last = Collator(backbone), heads.layers[-1]
    sums = {"pck": 0.0, "moved": 0.0, "depth": 0.0}
    points = far_points = 0
    for position in range(sequences):
        batch = collate([stream[position]])
        matches, positions = batch.pop("matches"), batch.pop("visual_positions")
        batch.pop("labels")
        layers: Any = backbone.decoder_layers(network)
        capture = LayerCapture(layers, backbone.final_norm(network), [last])
        with capture, torch.no_grad():
            network(**batch, use_cache=False, logits_to_keep=1)
            embeddings = heads(last, capture.tokens(last, positions))
        far = moved(matches)
        (pck, depth), (far_pck, _) = found(embeddings, matches), found(embeddings, far)
        for key, value in (("pck", pck * len(matches)), ("depth", depth * len(matches)), ("moved", far_pck * len(far))):
            sums[key] += value
        points, far_points = points + len(matches), far_points + len(far)
    return Knowledge(
        pck=sums["pck"] / points,
        moved=sums["moved"] / far_points,
        same_place=1 - far_points / points,
        depth=sums["depth"] / points,
    )


def found(embeddings: torch.Tensor, matches: Matches) -> tuple[float, float]:
    """PCK@2 and the depth term."""
    with torch.no_grad():
        out = gasp_loss(embeddings, matches, return_metrics=True)
    assert out.metrics is not None and out.metrics.pck is not None
    return float(out.metrics.pck[0]), float(out.depth)


def moved(matches: Matches) -> Matches:
    """The matches whose target lies more than two patches from where the anchor was."""
    assert matches.token_xy is not None
    offset = (matches.token_xy[matches.anchor] - matches.token_xy[matches.target]).square().sum(1)
    far = offset > 4
    return Matches(
        frame_offsets=matches.frame_offsets,
        sequence_offsets=matches.sequence_offsets,
        anchor=matches.anchor[far],
        target=matches.target[far],
        token_xy=matches.token_xy,
    )


# ---- the experiment -------------------------------------------------------------------------------------------------


def experiment(folder: Path, seed: int, steps: int, lora_steps: int) -> dict[str, dict[str, float]]:
    """What each run of a seed knows afterwards, by name, with its seconds of training."""
    runs = folder / f"seed-{seed}"
    model = build_tiny(runs / "model", TinyConfig(layers=LAYERS, seed=seed))
    known: dict[str, dict[str, float]] = {}

    def teach(name: str, config: TrainConfig, unseen: Path) -> None:
        start = time.monotonic()
        train(config)
        known[name] = {"seconds": round(time.monotonic() - start, 1), **asdict(ask_trained(config, unseen))}
        print(f"seed {seed}, {name}: {_words(known[name])}", flush=True)

    for name, changes in (("correspondence alone", CORRESPONDENCE_ONLY), ("full", [])):
        out = runs / name.replace(" ", "-")
        config = recipe("tiny_cpu", model, folder / "seen", out, seed, [f"train.steps={steps}", *changes])
        if not known:
            known["untrained"] = asdict(ask_untrained(config, folder / "unseen"))
        teach(name, config, folder / "unseen")
    export(runs / "full", runs / "trained", device="cpu")
    for name, changes in (("heads alone", FROZEN), ("adapters", [])):
        out, name = runs / name.replace(" ", "-"), f"other camera: {name}"
        changes = [f"train.steps={lora_steps}", *changes]
        config = recipe("tiny_cpu_lora", runs / "trained", folder / "new", out, seed, changes)
        if BASE not in known:
            known[BASE] = asdict(ask_untrained(config, folder / "new unseen"))
        teach(name, config, folder / "new unseen")
    return known


def _words(known: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in known.items())


def _table(seeds: dict[int, dict[str, dict[str, float]]]) -> Table:
    table = Table(title="What the last head knows of unseen rooms: mean over seeds, and each seed's", box=None)
    for column in ("run", "PCK@2", "moved", "depth term", "seconds"):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    for name in next(iter(seeds.values())):
        known = [runs[name] for runs in seeds.values()]
        cells = []
        for key in ("pck", "moved", "depth"):
            values = [one[key] for one in known]
            cells.append(f"{statistics.fmean(values):.3f} ({' '.join(f'{value:.3f}' for value in values)})")
        seconds = [one["seconds"] for one in known if "seconds" in one]
        table.add_row(name, *cells, f"{statistics.fmean(seconds):.0f}" if seconds else "")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lora-steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    quiet_libraries()
    device = machine(torch.device("cpu"))
    date = datetime.date.today().isoformat()
    path = arguments.out / f"learning-{re.sub(r'[^A-Za-z0-9.]+', '-', device.split(',')[0])}-{date}.json"
    told: dict[str, Any] = {"date": date, "machine": device, "torch": torch.__version__, "steps": arguments.steps}
    told |= {"lora_steps": arguments.lora_steps, "seeds": {}}
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        render_rooms(Path(temporary))
        for seed in range(arguments.seeds):
            told["seeds"][seed] = experiment(Path(temporary), seed, arguments.steps, arguments.lora_steps)
            path.write_text(json.dumps(told, indent=1) + "\n")
    Console().print(_table(told["seeds"]))


if __name__ == "__main__":
    main()
