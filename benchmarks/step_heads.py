"""Compares the loss that the tiny run reaches with each precision of the heads' products (`heads.compute`).

    python benchmarks/step_heads.py [--steps 100] [--seeds 2] [--out benchmarks/results]

Runs of one seed have the same scenes, initial weights and order of sequences, and differ in the precision only; seeds
differ in the order. The figures are means over the last fifth of all steps. On a CPU tf32 is fp32 and is left out.
`step.py` measures the time of each precision on the real shapes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from gasp_fast.backbones.tiny import build_tiny
from gasp_fast.benchmarking.report import machine
from gasp_fast.config.loader import load_config
from gasp_fast.data.synthetic.scenes import render_scenes
from gasp_fast.train import train
from gasp_fast.training.config import TrainConfig
from gasp_fast.training.distributed import quiet_libraries

RECIPE = Path(__file__).parents[1] / "configs" / "tiny_cpu.yaml"


def final_losses(folder: Path, name: str, compute: str, seed: int, steps: int) -> dict[str, float]:
    """Losses and PCK at the end of one run."""
    config = load_config(
        TrainConfig,
        RECIPE,
        [
            f"model.source={folder}/model",
            f"data.scenes.root={folder}/scenes",
            f"run.out={folder}/{name}",
            f"heads.compute={compute}",
            f"data.seed={seed}",
            f"train.steps={steps}",
            "run.log_every=1",
            "run.min_free_gb=0",
            "run.progress=false",
        ],
    )
    train(config)
    log = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
    late = [record for record in log if record["step"] > steps - max(1, steps // 5)]
    means = {key: statistics.fmean(r[key] for r in late if r[key] is not None) for key in ("loss", "corr", "depth")}
    pck = [value for r in late for value in r["pck_per_layer"] if value is not None]
    return means | {"pck": statistics.fmean(pck)}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    quiet_libraries()
    gpu = torch.cuda.is_available()
    device = machine(torch.device("cuda" if gpu else "cpu"))
    result: dict[str, Any] = {"machine": device, "torch": torch.__version__, "steps": arguments.steps, "runs": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_tiny(folder / "model")
        list(render_scenes(folder / "scenes", arguments.scenes))
        for seed in range(arguments.seeds):
            for compute in ("fp32", "tf32", "bf16") if gpu else ("fp32", "bf16"):
                means = final_losses(folder, f"{compute}-{seed}", compute, seed, arguments.steps)
                result["runs"].append({"compute": compute, "seed": seed, **means})
                print(f"seed {seed}, {compute}: " + ", ".join(f"{k} {v:.4f}" for k, v in means.items()), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    name = re.sub(r"[^A-Za-z0-9.]+", "-", device.split(",")[0])
    path = arguments.out / f"heads-precision-{name}-{date}.json"
    path.write_text(json.dumps({"date": date, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
