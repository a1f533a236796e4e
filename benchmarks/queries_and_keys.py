"""Do queries and keys follow? What different supervision teaches heads, hidden states, and queries and keys.

    python benchmarks/queries_and_keys.py [--seeds 3] [--base-steps 400] [--steps 200] [--photographs SCENES]
        [--variants NAME ...] [--out DIR]

The paper supervises heads on the outputs of layers, and reports that queries and keys of the trained model match. A
tiny model first learns from random weights (`configs/tiny_cpu.yaml`, with questions) and is exported without heads.
Then adapters of this base are trained in rooms of another camera, with questions, in each way of `VARIANTS`; runs of a
seed differ in nothing else. `--photographs` names a folder of two or more recorded RGB-D scenes: adapters of the same
base are trained on all of them but the last, and measured on the last.

Measured on scenes that were not trained on, for each layer: the PCK@2 of hidden states, of heads, and of the queries
and keys of attention before the rotary embedding (`heads.attention_heads=mean`); queries of earlier frames with keys of
later ones, as the paper reports, and queries of later frames with keys of earlier ones, which is what a causal mask
lets attention compare. Beside them the language loss on questions about rooms that were not trained on.

Prints a table, and writes JSON and a picture. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from learning import CAMERA, FROZEN, LAYERS, OTHER_CAMERA, chosen_matches, recipe
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gasp_fast.backbones import Backbone, load_backbone
from gasp_fast.backbones.tiny import TinyConfig, build_tiny
from gasp_fast.benchmarking.report import machine
from gasp_fast.collator import Collator
from gasp_fast.data.synthetic.questions import write_qa
from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes
from gasp_fast.export import export
from gasp_fast.files import replacing, write_atomically
from gasp_fast.loss.function import gasp_loss
from gasp_fast.loss.matches import Matches
from gasp_fast.run_folder import HEADS, checkpoint_folders
from gasp_fast.supervision.head_files import read_heads
from gasp_fast.supervision.heads import CorrespondenceHeads
from gasp_fast.supervision.layer_capture import LayerCapture
from gasp_fast.supervision.live_projections import LiveProjections
from gasp_fast.train import train
from gasp_fast.training.config import TrainConfig
from gasp_fast.training.distributed import quiet_libraries
from gasp_fast.training.model import language_loss
from gasp_fast.training.stream import SampleStream

ROOMS = {  # first seed, number, camera
    "base": (0, 80, CAMERA),
    "rooms": (1000, 40, OTHER_CAMERA),
    "unseen": (2000, 24, OTHER_CAMERA),
}
VARIANTS = {
    "heads only": FROZEN,  # the adapters do not learn
    "language only": ["loss.corr_weight=0", "loss.depth_weight=0"],
    "paper": [],
    "paper, layer input": ["heads.input=layer_input_normed"],
    "tied heads": ["heads.kind=tied"],
    "queries and keys": ["heads.kind=qk"],
    "heads, queries and keys": ["heads.kind=correspondence_and_qk"],
}
BASE = "base"
FEATURES = ("hidden", "head", "q to later k", "q to earlier k")
QA = ["data.qa.weight=0.5", "data.qa.frames=4", "data.scenes.weight=1"]
COLOURS = {"hidden": "#999999", "head": "#0072B2", "q to later k": "#E69F00", "q to earlier k": "#D55E00"}


def make_rooms(folder: Path) -> None:
    """The rooms of the study, and questions about them. Finished ones are kept."""
    for name, (first, count, camera) in ROOMS.items():
        root = folder / name
        scenes: SyntheticConfig = camera
        if not (root / "done").exists():
            list(render_scenes(root / "scenes", count, seed=first, config=scenes))
            list(write_qa(sorted(path for path in (root / "scenes").iterdir() if path.is_dir()), root / "questions"))
            (root / "done").touch()


# ---- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A model to measure."""

    backbone: Backbone
    network: Any
    heads: CorrespondenceHeads | None  # tied heads are found in the model
    tied: bool = False


def subject_of(config: TrainConfig, trained: bool) -> Subject:
    """The newest checkpoint of a run with adapters; or the base that it began from."""
    backbone = load_backbone(config.model.source)
    network: Any = backbone.load_model(dtype=torch.float32)
    heads = None
    if trained:
        last = checkpoint_folders(Path(config.run.out))[-1]
        network = PeftModel.from_pretrained(network, str(last))
        heads = read_heads(last / HEADS) if (last / HEADS).exists() else None
    return Subject(backbone, network.eval(), heads, trained and config.heads.kind == "tied")


def features_of(
    subject: Subject, capture: LayerCapture, positions: Tensor
) -> Iterator[tuple[int, str, Tensor, Tensor]]:
    """Layer, name, and what anchors and candidates show, [N, D] each."""
    for layer in range(subject.backbone.layer_count):
        outputs = capture.tokens(layer, positions, "output")
        yield layer, "hidden", outputs, outputs
        inputs = capture.tokens(layer, positions, "layer_input_normed")
        if subject.heads is not None:
            read = outputs if subject.heads.reads == "output" else inputs
            embeddings = subject.heads(layer, read)
            yield layer, "head", embeddings, embeddings
        attention, size = subject.backbone.attention(subject.network, layer), subject.backbone.attention_shape.head_dim
        if subject.tied:
            queries = LiveProjections(layer, attention, size, "tied")(inputs).embeddings
            yield layer, "head", queries[0], queries[0]
        compared = LiveProjections(layer, attention, size, "qk")(inputs)
        assert compared.keys is not None
        yield layer, "q", compared.embeddings[0], compared.keys[0]


def measure(config: TrainConfig, subject: Subject, scenes: Path, questions: Path, sequences: int) -> dict[str, Any]:
    """PCK@2 by kind of features and layer, and the mean language loss of labelled tokens."""
    samples = replace(config.data.scenes, root=str(scenes), held_out=0.0, only_counted=False)
    no_questions = replace(config.data.qa, root="")
    stream = SampleStream(replace(config.data, scenes=samples, qa=no_questions, workers=0, seed=0))
    collate, found = Collator(subject.backbone), PckSums()
    decoder_layers: Any = subject.backbone.decoder_layers(subject.network)
    norm, count = subject.backbone.final_norm(subject.network), subject.backbone.layer_count
    for position in range(sequences):
        batch = collate([stream[position]])
        matches, positions = batch.pop("matches"), batch.pop("visual_positions")
        batch.pop("labels")
        with torch.no_grad(), LayerCapture(decoder_layers, norm, inputs=range(count)) as capture:
            subject.network(**batch, use_cache=False, logits_to_keep=1)
            to_later = in_direction(matches, later=True)
            to_earlier = in_direction(matches, later=False)
            for layer, name, anchors, candidates in features_of(subject, capture, positions):
                if name == "q":
                    found.add("q to later k", layer, anchors, candidates, to_later)
                    found.add("q to earlier k", layer, anchors, candidates, to_earlier)
                else:
                    found.add(name, layer, anchors, candidates, matches)
    return {"pck": found.means(count), "language": language(config, subject, questions)}


class PckSums:
    """Sums of hits and matches by kind of features and layer."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, int], list[float]] = {}

    def add(self, name: str, layer: int, anchors: Tensor, candidates: Tensor, matches: Matches) -> None:
        if len(matches):
            out = gasp_loss(anchors[None], matches, keys=candidates[None], return_metrics=True)
            assert out.metrics is not None and out.metrics.pck is not None
            hits, count = self.sums.setdefault((name, layer), [0.0, 0.0])
            share = float(out.metrics.pck[0])
            self.sums[name, layer] = [hits + share * len(matches), count + len(matches)]

    def means(self, layers: int) -> dict[str, list[float]]:
        names = [name for name in FEATURES if (name, 0) in self.sums]
        return {name: [self.sums[name, n][0] / self.sums[name, n][1] for n in range(layers)] for name in names}


def in_direction(matches: Matches, later: bool) -> Matches:
    """The matches whose target's frame comes after the anchor's, or before it."""
    frame_of = torch.bucketize(torch.stack([matches.anchor, matches.target]), matches.frame_offsets, right=True)
    return chosen_matches(matches, frame_of[1] > frame_of[0] if later else frame_of[1] < frame_of[0])


def language(config: TrainConfig, subject: Subject, questions: Path, count: int = 48) -> float:
    """The mean loss of the labelled tokens of questions."""
    no_scenes = replace(config.data.scenes, root="")
    qa = replace(config.data.qa, root=str(questions), weight=1.0)
    stream = SampleStream(replace(config.data, scenes=no_scenes, qa=qa, workers=0, seed=0))
    collate, total, tokens = Collator(subject.backbone), 0.0, 0
    for position in range(count):
        batch = collate([stream[position]])
        labels = batch.pop("labels")
        index = subject.backbone.index_tokens({**batch, "labels": labels})
        inputs = {name: value for name, value in batch.items() if name not in ("matches", "visual_positions")}
        with torch.no_grad():
            states = subject.backbone.last_states(subject.network, inputs, index)
            total += float(language_loss(subject.network, states, index)) * len(index.answers)
        tokens += len(index.answers)
    return total / tokens


# ---- the study ------------------------------------------------------------------------------------------------------


def trained_base(work: Path, seed: int, steps: int) -> Path:
    """A tiny model that has seen rooms and questions, without heads."""
    folder = work / f"seed-{seed}"
    if not (folder / "trained").exists():
        model = folder / "model"
        if not model.exists():
            build_tiny(model, TinyConfig(layers=LAYERS, seed=seed))
        qa = f"data.qa.root={work / 'base' / 'questions'}"
        settings = [f"train.steps={steps}", qa, *QA]
        train(recipe("tiny_cpu", model, work / "base" / "scenes", folder / "base", seed, settings))
        export(folder / "base", folder / "trained", device="cpu")
    return folder / "trained"


def study(work: Path, results: dict[str, Any], path: Path, options: argparse.Namespace) -> None:
    """Train and measure what `results` lacks, and write it after each run."""
    make_rooms(work)
    parts: dict[str, tuple[Path, Path, int]] = {"rooms": (work / "rooms" / "scenes", work / "unseen" / "scenes", 48)}
    if options.photographs is not None:
        parts["photographs"] = (*photographs(options.photographs, work), 24)
    for seed in range(options.seeds):
        base = trained_base(work, seed, options.base_steps)
        for part, (seen, unseen, sequences) in parts.items():
            of_seed = results["parts"].setdefault(part, {}).setdefault(str(seed), {})
            for name in [BASE, *options.variants]:
                if name in of_seed:
                    continue
                out = work / f"seed-{seed}" / f"{part}-{name.replace(' ', '-').replace(',', '')}"
                settings = [f"train.steps={options.steps}", f"data.qa.root={work / 'rooms' / 'questions'}", *QA]
                settings += VARIANTS.get(name, [])
                config = recipe("tiny_cpu_lora", base, seen, out, seed, settings)
                if name != BASE:
                    train(config)
                questions = work / "unseen" / "questions"
                of_seed[name] = measure(config, subject_of(config, name != BASE), unseen, questions, sequences)
                print(f"seed {seed}, {part}, {name}: {in_words(of_seed[name])}", flush=True)
                write_atomically(path, (json.dumps(results, indent=1) + "\n").encode())


def photographs(scenes: Path, work: Path) -> tuple[Path, Path]:
    """Folders with links: to all scenes but the last, and to the last one."""
    folders = sorted(path for path in scenes.iterdir() if path.is_dir())
    if len(folders) < 2:
        raise SystemExit(f"--photographs {scenes}: {len(folders)} scenes; one to learn and one to measure are needed")
    seen, unseen = work / "photographs-seen", work / "photographs-unseen"
    for folder, chosen in ((seen, folders[:-1]), (unseen, folders[-1:])):
        folder.mkdir(parents=True, exist_ok=True)
        for scene in chosen:
            if not (folder / scene.name).exists():
                (folder / scene.name).symlink_to(scene.resolve())
    return seen, unseen


def in_words(found: dict[str, Any]) -> str:
    parts = [f"{name} {max(layers):.3f}" for name, layers in found["pck"].items()]
    return ", ".join([*parts, f"language {found['language']:.3f}"])


# ---- what a person reads --------------------------------------------------------------------------------------------


def over_seeds(seeds: dict[str, Any], name: str, features: str) -> list[float]:
    """The PCK of the best layer in each seed; empty without such features."""
    return [max(runs[name]["pck"][features]) for runs in seeds.values() if features in runs[name]["pck"]]


def table_of(part: str, seeds: dict[str, Any]) -> Table:
    table = Table(title=f"{part}: PCK@2 of the best layer, mean over seeds (each seed)", box=None)
    for column in ("", *FEATURES, "language loss"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name in next(iter(seeds.values())):
        cells = [with_seeds(over_seeds(seeds, name, features)) for features in FEATURES]
        table.add_row(name, *cells, with_seeds([runs[name]["language"] for runs in seeds.values()]))
    return table


def with_seeds(values: Sequence[float]) -> str:
    if not values:
        return "–"
    each = " ".join(f"{value:.3f}".lstrip("0") for value in values)
    return f"{statistics.fmean(values):.3f} ({each})"


def draw(results: dict[str, Any], path: Path) -> None:
    """A group of bars for each variant: the mean over seeds, and each seed as a point."""
    from matplotlib.figure import Figure

    parts = results["parts"]
    figure = Figure(figsize=(10, 3.6 * len(parts)), layout="constrained")
    axes = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
    for axis, (part, seeds) in zip(axes, parts.items(), strict=True):
        names = list(next(iter(seeds.values())))
        for number, features in enumerate(FEATURES):
            for place, name in enumerate(names):
                if values := over_seeds(seeds, name, features):
                    x = place + (number - 1.5) * 0.2
                    label = features if place == len(names) - 1 else None
                    axis.bar(x, statistics.fmean(values), 0.18, color=COLOURS[features], label=label)
                    axis.plot([x] * len(values), values, ".", color="black", markersize=3)
        axis.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
        axis.set_ylabel("PCK@2 of the best layer")
        axis.set_title(part)
    axes[0].legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.1), frameon=False)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=200, help="of the adapters")
    parser.add_argument("--photographs", type=Path, metavar="SCENES", help="folder of recorded RGB-D scenes")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--work", type=Path, default=Path("runs/queries-and-keys"), help="folder for rooms and runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    quiet_libraries()
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "queries-and-keys.json"
    facts = {"machine": machine(torch.device("cpu")), "torch": torch.__version__}
    facts |= {"base_steps": options.base_steps, "steps": options.steps}
    results: dict[str, Any] = {"date": datetime.date.today().isoformat(), **facts, "parts": {}}
    if path.exists():
        earlier = json.loads(path.read_text())
        if {key: earlier.get(key) for key in facts} != facts:
            raise SystemExit(f"{path} is of another machine or another number of steps; move it, or name another --out")
        results = earlier
    study(options.work, results, path, options)
    draw(results, path.with_suffix(".png"))
    for part, seeds in results["parts"].items():
        Console(width=200).print(table_of(part, seeds))


if __name__ == "__main__":
    main()
