"""Loads a G²VLM from a run or checkpoint of training, or from a folder of a whole model: `checkpoint` says which files.

A checkpoint holds the weights that its run trained. The others come from the models that its `config.yaml` names, as at
the start of the run: `model.source`, `model.encoder` and `model.start`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gasp_fast.backbones.base_model import usable_device
from gasp_fast.backbones.saved_model import local_folder
from gasp_fast.config.loader import load_config, objective_of
from gasp_fast.run_folder import ABOUT, CONFIG, check_intact, checkpoint_folders, model_name, weights_fingerprint

from .checkpoint import TEXT, load_model
from .config import G2TrainConfig
from .model import G2VLM
from .trained import build, read_weights


@dataclass(frozen=True)
class SavedGeometryModel:
    """A model in evaluation mode, without gradients, and where it comes from."""

    model: G2VLM
    name: str  # for reports
    folder: Path  # of its weights
    fingerprint: str  # changes with the files of its weights
    source: str | None  # the Qwen2-VL that it was made from, whose processor encodes questions; None: not known
    side: int | None  # data.side of its training; None: not known


def load_geometry_model(
    path: str | os.PathLike[str],
    *,
    device: str | None = None,
    base: str | None = None,
    encoder: str | None = None,
) -> SavedGeometryModel:
    """The model of a run (its newest checkpoint), a checkpoint, or a folder of a whole model.

    `base` and `encoder` replace `model.source` and `model.encoder` of a run. A model that only the run names is not
    downloaded.
    """
    device, folder = usable_device(device), Path(path)
    if (folder / TEXT).is_file():
        if base is not None or encoder is not None:
            raise ValueError(f"{folder} is a whole model; base and encoder are for runs and checkpoints")
        model, source, side = load_model(folder), None, None
    else:
        folder = _checkpoint(folder)
        config = _configuration(folder)
        source, side = base or local_folder(config.model.source), config.data.side
        frames = encoder or local_folder(config.model.encoder, "--encoder")
        trained = build(replace(config, model=replace(config.model, source=source, encoder=frames)))
        read_weights(trained.model, folder)
        model = trained.model
    model = model.eval().requires_grad_(False).to(device)
    return SavedGeometryModel(model, model_name(str(path)), folder, weights_fingerprint(folder), source, side)


@contextmanager
def finite_predictions(name: str) -> Iterator[None]:
    """Turns the error of a rotation of NaN into one line."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"{name} predicts NaN or infinite geometry: its weights are damaged, or diverged") from error


def _checkpoint(folder: Path) -> Path:
    """`folder` if it is a checkpoint, else the newest one in it."""
    if not folder.is_dir():
        raise OSError(f"model = {str(folder)!r} is no folder; give a run, a checkpoint or a saved G²VLM model")
    folder = folder.resolve()  # RUN/best is a link
    if not (folder / ABOUT).is_file():
        newest = next(reversed(checkpoint_folders(folder)), None)
        if newest is None:
            raise OSError(
                f"model = {str(folder)!r} holds no checkpoint and no {TEXT}; give a run, a checkpoint "
                "or a saved G²VLM model"
            )
        folder = newest
    check_intact(folder)
    return folder


def _configuration(checkpoint: Path) -> G2TrainConfig:
    path = next((one / CONFIG for one in (checkpoint, checkpoint.parent) if (one / CONFIG).is_file()), None)
    if path is None:
        raise OSError(f"{checkpoint}: {CONFIG} is missing; get the whole checkpoint again, or use another")
    if objective_of(path) != "g2vlm":
        raise ValueError(f"{path} is not of a G²VLM run (objective: g2vlm); gasp-fast evaluate is for others")
    return load_config(G2TrainConfig, path)
