"""Started by a test as one process: takes the first step of each run on processes of its own, and writes its gradient.

Arguments are pairs: a number of processes and the configuration of a run. Writes `gradient.pt` and `loss.json` into the
run's folder. The gradient is what the weights have lost: AdamW's first update is `rate * g / (|g| + eps)`, and with an
`eps` as large as the one here that is the gradient times `SCALE`.
"""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import gasp_fast.backbones  # noqa: F401 (makes torchvision importable where only its library is missing)
from gasp_fast.config.loader import load_config
from gasp_fast.training import gasp
from gasp_fast.training.config import TrainConfig
from gasp_fast.training.distributed import quiet_libraries, read_deepspeed, start_processes, stop_processes
from gasp_fast.training.loop import TrainingLoop
from gasp_fast.training.model import build_model
from gasp_fast.training.stream import SampleStream, Share
from gasp_fast.training.weights import gathered

EPS, SCALE = 1e6, 1e3


def proportional(groups, config):
    parameters = [{"params": group.parameters} for group in groups]
    return torch.optim.AdamW(parameters, lr=SCALE * EPS, eps=EPS, weight_decay=0.0, fused=True)


def take_step(path: str) -> None:
    torch.set_num_threads(1)
    quiet_libraries()
    config = load_config(TrainConfig, path)
    deepspeed = read_deepspeed(config.deepspeed)
    processes = start_processes(deepspeed is not None)
    out = Path(config.run.out)
    share = Share.of(config.train, processes.rank, processes.world_size)
    model = build_model(config, processes.device)
    gasp.make_optimizer = proportional
    loop = TrainingLoop(
        gasp.Gasp(config, SampleStream(config.data), model=model), share, config.train.steps, processes, deepspeed
    )
    out.mkdir(exist_ok=True)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: gathered(parameter).clone() for name, parameter in trained.items()}
    record = loop.try_step()
    gradients = {name: (before[name] - gathered(parameter)) / SCALE for name, parameter in trained.items()}
    if processes.first:
        torch.save(gradients, out / "gradient.pt")
        (out / "loss.json").write_text(json.dumps(record))
    processes.barrier()
    stop_processes()


if __name__ == "__main__":
    for number, (count, path) in enumerate(zip(sys.argv[1::2], sys.argv[2::2], strict=True)):
        launcher = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=int(count), run_id=f"test-{number}", rdzv_endpoint="localhost:0",
            rdzv_backend="c10d", start_method="fork",
        )  # fmt: skip
        elastic_launch(launcher, take_step)(path)
