"""Starts training on the GPUs of a node, as torchrun does, and ends with one line and the exit code of the ranks.

Takes torchrun's arguments. A signal is passed on to the ranks, which save and end with code 75. torchrun itself would
end with tracebacks and code 1, and kill the ranks after 30 seconds.

example:
  python -m gasp_fast.training.launch --nproc-per-node 8 -m gasp_fast.train configs/qwen2_5_vl_7b.yaml
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .signals import INTERRUPTED, SIGNALS


def main(arguments: Sequence[str] | None = None) -> int:
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        logging.disable(logging.ERROR)  # the ranks end as they should; torchrun would report it as failures
        for rank in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    try:
        run.main([*_left_to_us(), *(sys.argv[1:] if arguments is None else arguments)])
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        # A rank that was still importing, and one that the launcher stopped after another had ended, die of the signal.
        if INTERRUPTED in codes or (received and codes <= {-number for number in received}):
            return INTERRUPTED
        rank, first = error.get_first_failure()
        print(f"gasp_fast.training.launch: rank {rank} ended with code {first.exitcode}", file=sys.stderr, flush=True)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


def _left_to_us() -> list[str]:
    """Arguments with which torchrun leaves the signals to this module. A torch without this option handles them."""
    option = "--signals-to-handle"
    return [option, "SIGQUIT"] if option in run.get_args_parser().format_help() else []


if __name__ == "__main__":
    sys.exit(main())
