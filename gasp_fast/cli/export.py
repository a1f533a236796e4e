"""Export a run or checkpoint as a plain Hugging Face model: adapters merged, correspondence heads dropped.

Reads RUN/checkpoint-N/ and, for adapters, their base model. Writes a new folder (default: RUN/export) that
transformers loads without gasp_fast. The logits of the result are compared with those of the trained model; if they
differ, nothing is exported.

With --adapters, writes the adapters and the heads alone, for others to attach to the same base model. With
--push-to-hub, uploads what was written to a private repository on the Hugging Face hub.

examples:
  gasp-fast export runs/full
  gasp-fast export runs/full/checkpoint-500 --out model --dtype fp32 --device cpu
  gasp-fast export runs/full --adapters --out adapters
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import get_args

from rich.console import Console

HELP = "export a trained model for plain Hugging Face transformers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from gasp_fast.export import TOLERANCE, Stored

    parser.add_argument("run", type=Path, metavar="RUN", help="a run (its newest checkpoint), or a checkpoint")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write; new or empty (default: RUN/export)")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="model it was trained from (default: as the run's config.yaml says, without a download)",
    )
    parser.add_argument(
        "--dtype", choices=get_args(Stored), default="auto", help="of the stored weights; auto: the base model's"
    )
    parser.add_argument(
        "--device", metavar="NAME", help="device for computing: cpu, cuda, cuda:1 … (default: cuda if there is one)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help="largest difference of a logit by merging, in fp32",
    )

    parser.add_argument("--adapters", action="store_true", help="write adapters and heads alone, unmerged")
    parser.add_argument(
        "--push-to-hub", metavar="OWNER/NAME", help="then upload it to this repository; a new one is private"
    )


def run(arguments: argparse.Namespace) -> int:
    from gasp_fast.export.hub import check_name, upload
    from gasp_fast.run_folder import ADAPTERS, EXPORT, result_folder

    if arguments.push_to_hub is not None:
        check_name(arguments.push_to_hub)
    out = arguments.out or result_folder(arguments.run, ADAPTERS if arguments.adapters else EXPORT)
    console = Console()
    if arguments.adapters:
        from gasp_fast.export import export_adapters

        console.print(f"{', '.join(export_adapters(arguments.run, out))}: {out}", highlight=False, soft_wrap=True)
    else:
        _export_model(arguments, out, console)
    if arguments.push_to_hub is not None:
        with console.status("uploading"):
            address = upload(out, arguments.push_to_hub)
        console.print(f"uploaded: {address}", highlight=False, soft_wrap=True)
    return 0


def _export_model(arguments: argparse.Namespace, out: Path, console: Console) -> None:
    from gasp_fast.export import export

    with console.status("reading the checkpoint") as status:
        report = export(
            arguments.run,
            out,
            base=arguments.base,
            dtype=arguments.dtype,
            device=arguments.device,
            tolerance=arguments.tolerance,
            progress=status.update,
        )
    console.print(f"{report.tensors} tensors of {report.checkpoint} in {report.dtype}: {out}", highlight=False)
    console.print(
        f"largest difference of a logit from the trained model: {report.merge_difference:.1e} after merging, "
        f"{report.file_difference:.1e} read back from {report.dtype} files (logits reach {report.largest_logit:.1f})",
        highlight=False,
    )
    if report.layout == "transformers":
        console.print(
            "the base model is not here or is stored in another form, so the files are as transformers "
            f"{version('transformers')} writes them; older versions may not read them",
            highlight=False,
        )
    if report.trained_difference == 0:
        console.print("[yellow]The adapters change no logit; check that the run trained anything.")
    elif report.trained_difference is not None:
        console.print(f"the adapters changed the base model's logits by up to {report.trained_difference:.1e}")
