"""The first signal waits for the end of a step; the second one ends the process at once, whatever it does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gasp_fast.training.signals import INTERRUPTED

REPOSITORY = Path(__file__).parents[2]
SCRIPT = """
import ctypes, time
from gasp_fast.training.signals import StopSignals
with StopSignals(launched={launched}) as signals:
    signals.step_in_hand = {in_step}
    print("ready", flush=True)
    {work}
print("received", signals.received, flush=True)
"""
UNTIL_NOTED = "while not signals.received: time.sleep(0.01)"
FOR_EVER = "time.sleep(600)"
# The second lock never returns and runs no Python, like a collective whose other ranks are gone.
IN_A_LIBRARY = "m = ctypes.create_string_buffer(64); [ctypes.CDLL(None).pthread_mutex_lock(m) for _ in range(2)]"


def start(work, launched=False, in_step=True):
    script = SCRIPT.format(work=work, launched=launched, in_step=in_step)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)  # until it works
    return process


def send(process, *numbers):
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.2)
    output, errors = process.communicate(timeout=30)
    return process.returncode, output, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_the_first_signal_is_noted(number):
    assert send(start(UNTIL_NOTED), number) == (0, f"received {number.value}\n", "")


def test_a_signal_before_the_first_step_ends_the_process_with_a_line():
    code, output, errors = send(start(FOR_EVER, in_step=False), signal.SIGTERM)
    assert (code, output) == (INTERRUPTED, "")
    assert errors == "gasp_fast.train: SIGTERM before the first step; nothing to save; start the command again\n"


@pytest.mark.parametrize("work", [FOR_EVER, IN_A_LIBRARY])
def test_the_second_signal_ends_the_process_at_once_and_without_a_word(work):
    assert send(start(work), signal.SIGTERM, signal.SIGINT) == (128 + signal.SIGINT, "", "")


def test_copies_of_a_signal_from_a_launcher_are_no_second_signal():
    process = start(f"{UNTIL_NOTED}\n    time.sleep(1)", launched=True)
    assert send(process, signal.SIGTERM, signal.SIGTERM) == (0, "received 15\n", "")


LOADER = """
import torch
from gasp_fast.training.signals import end_with_trainer
from torch.utils.data import DataLoader, Dataset

class Tensors(Dataset):
    def __len__(self): return 10**9
    def __getitem__(self, index): return [torch.full((100,), index) for _ in range(4)]

if __name__ == "__main__":
    how = dict(num_workers=1, multiprocessing_context="forkserver", worker_init_fn=end_with_trainer)
    for number, _ in enumerate(DataLoader(Tensors(), **how)):
        if number == 5: print("ready", flush=True)
"""


@pytest.mark.slow
def test_a_loader_worker_ends_without_a_word_when_its_trainer_is_killed(tmp_path):
    """Without `end_with_trainer`'s hook, six of ten kills leave a traceback of the thread that hands tensors over."""
    script = tmp_path / "loader.py"
    script.write_text(LOADER)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for number in range(5):
        process = subprocess.Popen(
            [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.01 * number)
        process.kill()
        assert "Traceback" not in process.communicate(timeout=60)[0]
