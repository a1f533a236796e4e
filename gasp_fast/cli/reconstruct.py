"""Reconstruct points, depth and cameras from photographs of one scene with a G²VLM.

Reads a model (as gasp-fast geometry does) and one or more photographs: JPEG, PNG, WebP, BMP or TIFF. Writes into --out:
cloud.ply, points with colours in the camera of the first photograph; cameras.json, the pose of each camera; pictures of
depth; and index.html, a page with a preview that turns. Lengths have no unit. Each photograph is cropped to the mean
aspect ratio of all.

examples:
  gasp-fast reconstruct --model runs/g2vlm/tiny kitchen1.jpg kitchen2.jpg kitchen3.jpg --out kitchen
  gasp-fast reconstruct --model G2VLM photographs/*.jpg --out points --side 392
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from .geometry import add_model_arguments, add_side_argument

HELP = "points, depth and cameras from photographs, with a G²VLM"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="photographs of one scene")
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; new or empty")
    add_side_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    from gasp_fast.config.limits import check_whole
    from gasp_fast.g2vlm.batch import PATCH
    from gasp_fast.g2vlm.data_config import MOST_SIDE
    from gasp_fast.g2vlm.inference import SIDE, recon
    from gasp_fast.g2vlm.reconstruct import check_new, read_photographs, write_reconstruction
    from gasp_fast.g2vlm.saved import finite_predictions, load_geometry_model
    from gasp_fast.training.distributed import quiet_libraries

    check_whole(arguments, ("side",), least=PATCH, most=MOST_SIDE)
    check_new(arguments.out)
    photographs = read_photographs(arguments.images)
    quiet_libraries()
    console = Console()
    with console.status("loading the model") as status:
        saved = load_geometry_model(
            arguments.model, device=arguments.device, base=arguments.base, encoder=arguments.encoder
        )
        status.update("reconstructing")
        side = arguments.side or saved.side or SIDE
        with finite_predictions(saved.name):
            found = recon(saved.model, photographs, side)
        page = write_reconstruction(found, arguments.images, saved.name, arguments.out)
    console.print(
        f"{len(photographs)} photographs, {found.depth.size:,} points: {page}", highlight=False, soft_wrap=True
    )
    return 0
