"""Runs of training as tests start, stop and compare them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
from safetensors.torch import load_file

from gasp_fast.config.loader import to_yaml

from .forked import forked_popen

REPOSITORY = Path(__file__).parents[2]
CLOCK = ("tokens_per_s", "mfu", "peak_memory", "data_wait", "device_wait")  # differ from run to run


def log_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def without_clock(records):
    return [{key: value for key, value in record.items() if key not in CLOCK} for record in records]


def launch(processes, *arguments, fresh=False, **options):
    """Start a Python program; for several processes by torchrun. Its output is in one stream.

    It is a fork of a process that has imported everything, unless `fresh`.
    """
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = command if processes > 1 else [sys.executable]
    options = {"cwd": REPOSITORY, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    start = subprocess.Popen if fresh else forked_popen
    return start([*command, *map(str, arguments)], env=environment, text=True, **options)


def run_to_end(processes, *arguments, timeout=500, **options):
    """`launch` a program and wait for it, as `subprocess.run` does."""
    process = launch(processes, *arguments, stderr=subprocess.PIPE, **options)
    output, errors = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def write_config(config, path):
    path.write_text(to_yaml(config))
    return path


def children_of(process):
    return [int(n) for n in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True).stdout.split()]


def lives(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(process, out, step, deadline):
    """Wait until `step` is logged."""
    log = Path(out) / "log.jsonl"
    end = time.monotonic() + deadline
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < end, "too slow"
        time.sleep(0.02)


def kill_at(process, out, step, deadline):
    """kill -9 of the process that was started, as soon as `step` is logged. Its children must end by themselves."""
    wait_for(process, out, step, deadline)
    children = children_of(process)
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while any(map(lives, children)):
        assert time.monotonic() < end, "processes outlive their launcher"
        time.sleep(0.1)


def family_of(process):
    """The process and all that it started: ranks, and the fork servers and workers of their loaders."""
    first = psutil.Process(process.pid)
    return [first, *first.children(recursive=True)]


def assert_ended(family):
    end = time.monotonic() + 10
    while alive := [member for member in family if lives(member.pid)]:
        assert time.monotonic() < end, f"{alive} outlive the process that started them"
        time.sleep(0.1)


def tensors_of(folder, pattern="*.safetensors"):
    """All tensors in files of a checkpoint, by name: how many files hold them depends on the number of processes."""
    tensors = {}
    for path in Path(folder).glob(pattern):
        tensors |= load_file(path)
    return tensors


def weights_of(folder):
    """Type and bytes of all tensors in a checkpoint."""
    return {name: (value.dtype, value.numpy().tobytes()) for name, value in tensors_of(folder).items()}
