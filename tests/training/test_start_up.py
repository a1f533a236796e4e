"""A run says how long it took until its first step was done, and what that time went into."""

import re
import subprocess
import sys
import time

import pytest

from gasp_fast.processes import process_age
from gasp_fast.train import train
from gasp_fast.training.start_up import StartUp


def test_the_age_of_a_process_includes_what_ran_before_the_import():
    code = "import time; time.sleep(1); from gasp_fast.processes import process_age; print(process_age())"
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 1.0 <= age < 60 and process_age() > age / 60


def test_the_parts_are_the_whole_and_what_heads_take_is_theirs():
    start_up, before = StartUp(since_process=True), process_age()
    start_up.add("imports and model")
    start_up.add("data")
    first = start_up.seconds["imports and model"]
    time.sleep(0.2)
    start_up.add("imports and model", heads=0.15)
    assert list(start_up.seconds) == ["imports and model", "data", "heads"]
    assert start_up.seconds["heads"] == 0.15 and start_up.seconds["imports and model"] >= first + 0.04
    assert before <= sum(start_up.seconds.values()) <= process_age()


def test_a_run_within_an_older_process_counts_from_its_own_beginning():
    start_up = StartUp()
    start_up.add("imports and model")
    assert sum(start_up.seconds.values()) < process_age() / 2


@pytest.mark.parametrize("progress", [True, False])
def test_a_run_prints_its_start_up_once(config, capsys, progress):
    train(config(train={"steps": 2}, run={"progress": progress}))
    lines = [line for line in capsys.readouterr().err.splitlines() if "first step done after" in line]
    assert len(lines) == progress
    for line in lines:
        whole, *parts = re.findall(r"([a-z ]*) (\d+\.\d)", line)
        assert {name.strip() for name, _ in parts} == {"imports and model", "data", "heads", "first step"}
        assert sum(float(seconds) for _, seconds in parts) == pytest.approx(float(whole[1]), abs=0.3)
