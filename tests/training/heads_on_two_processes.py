"""Started by a test as one process: builds the model of a configuration on two processes of its own.

Prints what each of them did, as JSON: how often it decomposed a matrix, its heads (a digest), and the next number of
its random generator.
"""

import hashlib
import json
import sys

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gasp_fast.config.loader import load_config
from gasp_fast.training.config import TrainConfig
from gasp_fast.training.distributed import quiet_libraries, start_processes, stop_processes
from gasp_fast.training.model import build_model


def build(path: str) -> tuple[int, str, float]:
    torch.set_num_threads(1)
    quiet_libraries()
    processes = start_processes()
    decompositions, eigh = [], torch.linalg.eigh
    torch.linalg.eigh = lambda matrix: decompositions.append(matrix.shape) or eigh(matrix)
    model = build_model(load_config(TrainConfig, path), processes.device)
    weights = [p.detach().numpy().tobytes() for p in model.supervision.parameters()]
    stop_processes()
    return len(decompositions), hashlib.sha256(b"".join(weights)).hexdigest(), torch.rand(()).item()


if __name__ == "__main__":
    launcher = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="test", rdzv_endpoint="localhost:0", rdzv_backend="c10d",
        start_method="fork",
    )  # fmt: skip
    results = elastic_launch(launcher, build)(sys.argv[1])
    print(json.dumps([results[rank] for rank in sorted(results)]))
