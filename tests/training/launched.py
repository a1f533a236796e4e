"""What the tests of several processes start: one training run after the other, in one process group."""

import sys

import torch
from accelerate.state import AcceleratorState

from gasp_fast.config.loader import load_config
from gasp_fast.train import train
from gasp_fast.training.config import TrainConfig
from gasp_fast.training.processes import quiet_libraries, stop_processes

if __name__ == "__main__":
    torch.set_num_threads(1)
    quiet_libraries()
    for path in sys.argv[1:]:
        train(load_config(TrainConfig, path))
        AcceleratorState._reset_state()
    stop_processes()
