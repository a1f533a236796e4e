"""Started by tests: each configuration resumes on two processes, takes no step, and saves as checkpoint-99."""

import sys

from train_on_two_processes import run_on_two_processes

from gasp_fast.training.loop import TrainingLoop


def load_and_save(self, resume=None, start_up=None):
    self.begin(resume)
    self.save(99)


if __name__ == "__main__":
    TrainingLoop.run = load_and_save
    for path in sys.argv[1:]:
        run_on_two_processes(path)
