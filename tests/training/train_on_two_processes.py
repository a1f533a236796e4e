"""Started by tests as one process: trains each configuration in turn on two processes of its own.

The processes are forked from this one, which has already imported everything: importing again takes seconds.
"""

import sys

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gasp_fast.config.loader import load_config
from gasp_fast.train import train
from gasp_fast.training.config import TrainConfig
from gasp_fast.training.distributed import quiet_libraries, stop_processes


def train_one(path: str) -> None:
    torch.set_num_threads(1)
    quiet_libraries()
    train(load_config(TrainConfig, path))
    stop_processes()


def run_on_two_processes(path: str) -> None:
    launcher = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id=f"test-{abs(hash(path))}", rdzv_endpoint="localhost:0",
        rdzv_backend="c10d", start_method="fork", max_restarts=0,
    )  # fmt: skip
    elastic_launch(launcher, train_one)(path)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        run_on_two_processes(path)
