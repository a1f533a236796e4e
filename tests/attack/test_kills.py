"""Kills a run on two processes over and over, in several ways, and compares its end with that of a run left alone."""

import os
import random
import signal
import time
from dataclasses import replace
from itertools import islice

import psutil
import pytest
from support.runs import (
    assert_ended,
    children_of,
    family_of,
    launch,
    log_of,
    wait_for,
    weights_of,
    without_clock,
    write_config,
)
from support.tiny_training import *  # noqa: F403 (fixtures)

from gasp_fast.run_folder import LOG, checkpoint_folders

STEPS, KILLS = 60, 20
SAVED = "continue with the same command"
WAYS = {  # a signal, and who receives it: exit codes, and whether the step in hand is saved
    (signal.SIGTERM, "launcher"): ({75}, True),
    (signal.SIGUSR1, "a rank"): ({75}, True),
    (signal.SIGINT, "all"): ({75}, True),  # as from a terminal
    (signal.SIGHUP, "launcher"): ({75}, True),
    (signal.SIGKILL, "launcher"): ({-signal.SIGKILL}, False),
    (signal.SIGKILL, "a rank"): ({128 + signal.SIGKILL, 1}, False),
    (signal.SIGKILL, "a worker"): ({1}, False),
}


def in_turn(draw):
    """The ways to end a run, all of them in random order, and again."""
    while True:
        yield from draw.sample(sorted(WAYS), len(WAYS))


def receivers(target, family, draw):
    """Who of a launcher, its ranks, and their fork servers and loader workers."""
    ranks = children_of(family[0])
    if target == "launcher":
        return [family[0].pid]
    if target == "a rank":
        return [draw.choice(ranks)]
    if target == "all":
        return [member.pid for member in family]
    servers = [server for rank in ranks for server in psutil.Process(rank).children()]
    return [draw.choice([worker.pid for server in servers for worker in server.children()])]


def end(command, out, way, draw):
    """Continue a run and end it in one way. Returns what went wrong, or nothing."""
    number, target = way
    log, folders = out / LOG, checkpoint_folders(out)
    saved, before = int(folders[-1].name.partition("-")[2]) if folders else 0, log.stat().st_ino if log.exists() else 0
    process = launch(1, *command)
    while not log.exists() or log.stat().st_ino == before:  # it writes the log anew, without the steps it does again
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    wait_for(process, out, saved + 1, 200)
    time.sleep(0.05 * draw.random())
    family = family_of(process)
    for pid in receivers(target, family, draw):
        os.kill(pid, number)
    output, _ = process.communicate(timeout=60)
    assert_ended(family)
    codes, saves = WAYS[way]
    if process.returncode not in codes:
        yield f"exit code {process.returncode}: {output[-500:]}"
    if "Traceback" in output:
        yield output[-500:]
    if output.count(SAVED) != saves:
        yield f"{output.count(SAVED)} lines say how to continue: {output[-500:]}"
    if saves and list(out.glob(".*")):
        yield f"{list(out.glob('.*'))} left behind"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_of_two_processes_ends_as_if_it_had_never_been_killed(config, tmp_path, capsys):
    run = {"save_every": 5, "log_every": 1}
    base = config(mixed=True, train={"steps": STEPS}, run=run, lora={"dropout": 0.1})
    base = replace(base, data=replace(base.data, workers=1))
    commands = {}
    for name in ("whole", "broken"):
        settings = replace(base, run=replace(base.run, out=str(tmp_path / name), save_async=name == "broken"))
        start = ("-m", "gasp_fast.training.launch", "--standalone", "--nproc-per-node", 2, "-m", "gasp_fast.train")
        commands[name] = (*start, write_config(settings, tmp_path / f"{name}.yaml"))
    process = launch(1, *commands["whole"])
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-3000:]
    draw, kills, failures = random.Random(0), 0, []
    for way in islice(in_turn(draw), KILLS):
        # Loader workers import everything for seconds: after a turn, only runs have some in which one is killed.
        workers = "data.workers=0" if kills >= len(WAYS) and "a worker" not in way else "data.workers=1"
        failures += [(way, what) for what in end((*commands["broken"], workers), tmp_path / "broken", way, draw)]
        kills += 1
        if (done := log_of(tmp_path / "broken")[-1]["step"]) > STEPS - 6:  # the next one may come too late
            break
    with capsys.disabled():
        print(f" {kills} kills, {len(failures)} failures; {done} of {STEPS} steps done")
    assert kills > KILLS / 2
    assert not failures
    process = launch(1, *commands["broken"])
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-3000:]

    assert without_clock(log_of(tmp_path / "broken")) == without_clock(log_of(tmp_path / "whole"))
    ends = [tmp_path / name / f"checkpoint-{STEPS}" for name in ("broken", "whole")]
    assert weights_of(ends[0]) == weights_of(ends[1])
