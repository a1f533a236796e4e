"""Started by tests: trains each configuration on two processes, with checkpoints as earlier versions wrote them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.earlier_checkpoints import save_as_earlier
from train_on_two_processes import run_on_two_processes

from gasp_fast.training.loop import TrainingLoop

if __name__ == "__main__":
    TrainingLoop.save = save_as_earlier
    for path in sys.argv[1:]:
        run_on_two_processes(path)
