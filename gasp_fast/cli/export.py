"""Make a plain Hugging Face model of a run or checkpoint: adapters merged, heads dropped.

Reads RUN/checkpoint-N/ and, for adapters, the model they were trained on. Writes a new folder that transformers loads
without gasp_fast (RUN/export, unless --out names another), and only if the merged model gives the logits of the
trained one.

examples:
  gasp-fast export runs/full
  gasp-fast export runs/full/checkpoint-500 --out model --dtype fp32 --device cpu
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

HELP = "merge adapters, drop heads, and write a plain Hugging Face model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run (its newest checkpoint is taken), or a checkpoint")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder to make; new or empty (RUN/export)")
    parser.add_argument("--base", metavar="MODEL", help="the model it was trained from (default: the run's own word)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of the stored weights; auto: the base model's",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="where to compute: cpu, cuda, cuda:1 … (default: cuda if there is one)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="largest difference of a logit that merging may make, in fp32",
    )


def run(arguments: argparse.Namespace) -> int:
    from gasp_fast.export import export
    from gasp_fast.run_folder import EXPORT, place_for

    out = arguments.out or place_for(arguments.run, EXPORT)
    console = Console()
    with console.status("looking at the checkpoint") as status:
        report = export(
            arguments.run,
            out,
            base=arguments.base,
            dtype=arguments.dtype,
            device=arguments.device,
            tolerance=arguments.tolerance,
            told=status.update,
        )
    console.print(f"{report.tensors} tensors of {report.checkpoint} in {report.dtype}: {out}", highlight=False)
    console.print(
        f"largest difference of a logit against the trained model: {report.merge_difference:.1e} after merging, "
        f"{report.file_difference:.1e} read back from {report.dtype} files (logits reach {report.largest_logit:.1f})",
        highlight=False,
    )
    if report.trained_difference == 0:
        console.print("[yellow]the adapters change no logit at all: was anything trained?")
    elif report.trained_difference is not None:
        console.print(f"the adapters changed the base model's logits by up to {report.trained_difference:.1e}")
    return 0
