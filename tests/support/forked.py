"""Starts Python programs as forks of a process that has imported what training imports, which takes seconds each time.

    process = forked_popen([sys.executable, "-m", "gasp_fast.train", …], stdout=PIPE, …)    like `subprocess.Popen`

The first call starts `python forked.py`, which forks whenever it is asked to. The fork has the environment, folder and
output that were given, runs the program as `__main__`, and is a child of the process that asked. torchrun in it forks
its ranks instead of starting them. At its end a run draws no figure. All else is as in a program that was started.
"""

import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TORCHRUN_STARTS = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"  # its ranks
IMPORTED = (
    "gasp_fast.train", "gasp_fast.training.launch", "gasp_fast.backbones", "peft", "accelerate", "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer", "torch.distributed.checkpoint", "matplotlib.backends.backend_agg",
    "gasp_fast.backbones.discovered", "av", TORCHRUN_STARTS,
)  # fmt: skip
SHUTDOWN = 3  # seconds
LARGEST = 1 << 20  # bytes of a request
PR_SET_CHILD_SUBREAPER = 36


def save_no_figure(figure, path):
    """In place of `save_figure` at the end of a run: matplotlib takes longer than all else in a small one."""
    path.touch()
    return path


class _Popen(subprocess.Popen):
    """A `Popen` whose process `start` makes."""

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
        start_new_session, *more,
    ):  # fmt: skip
        outputs = [1 if c2pwrite == -1 else c2pwrite, 2 if errwrite == -1 else errwrite]
        environment = dict(os.environ if env is None else env)
        words = [str(word) for word in args[1:] if word != "-u"]
        self.pid = self.start((words, environment, os.fspath(cwd or os.getcwd()), start_new_session), outputs)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


class forked_popen(_Popen):
    """A child of this process that the prepared one has forked."""

    def start(self, program, outputs):
        control = prepared_process()
        adopt_orphans(True)  # the fork becomes a child of this process, as the process between them ends at once
        try:
            socket.send_fds(control, [json.dumps(program).encode()], outputs)
            return int(control.recv(32))
        finally:
            adopt_orphans(False)  # other orphans are not: nobody here waits for them


class _Rank(_Popen):
    """A fork of this process, which has imported everything."""

    def start(self, program, outputs):
        if pid := os.fork():
            return pid
        code = 1
        try:
            code = exit_code_of(program, outputs)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def exit_code_of(program, outputs):
    try:
        run(program, outputs)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def run(program, outputs):
    """In a fork: run a program, as Python would."""
    words, environment, folder, new_session = program
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if new_session:
        os.setsid()
    for output, target in zip(outputs, (1, 2), strict=True):
        os.dup2(output, target)
    # Files of another kind than those that this process began with.
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.orig_argv = [sys.executable, *words]
    if words[0] == "-m":
        sys.path[0], sys.argv = folder, words[1:]
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = os.path.dirname(words[0]), words
        runpy.run_path(words[0], run_name="__main__")


def adopt_orphans(yes):
    """Whether a process whose parent ends becomes a child of this one, if it descends from it."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(yes))


@cache
def prepared_process():
    """A socket to the process that forks."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
    subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())], env=environment, cwd=REPOSITORY, pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    theirs.close()
    return ours


# ---- in the prepared process ----------------------------------------------------------------------------------------


def import_everything():
    for name in IMPORTED:
        import_module(name)
    for name in ("Qwen2_5_VLForConditionalGeneration", "Qwen2VLImageProcessor", "Qwen2Tokenizer", "AutoProcessor"):
        getattr(sys.modules["transformers"], name)  # imports it
    sys.modules[TORCHRUN_STARTS].Popen = _Rank
    sys.modules["gasp_fast.training.summary"].save_figure = save_no_figure
    # torchrun gives a frozen rank 30 seconds, whatever --shutdown-timeout says.
    sys.modules["torch.distributed.elastic.multiprocessing.api"].PContext.close.__defaults__ = (None, SHUTDOWN)
    gc.freeze()  # forks need not look through all of this when they collect garbage


def serve(control):
    """Fork for each request. Returns in a fork, with what it is to run; None: in this process, when all is over."""
    while message := socket.recv_fds(control, LARGEST, 2):
        content, outputs, *_ = message
        if not content:
            return None
        reading, writing = os.pipe()
        if between := os.fork():
            os.close(writing)
            os.waitpid(between, 0)
            control.send(os.read(reading, 32))
            for descriptor in (reading, *outputs):
                os.close(descriptor)
        elif pid := os.fork():
            os.write(writing, str(pid).encode())
            os._exit(0)
        else:
            os.close(reading)
            os.close(writing)
            control.close()
            return json.loads(content), outputs
    return None


if __name__ == "__main__":
    import_everything()
    if (asked := serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        run(*asked)
