"""The model of a run, its forward pass with the losses, and its trained weights in checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gasp_fast.run_folder import ABOUT, configuration_of
from gasp_fast.training.checkpoints import readable
from gasp_fast.training.distributed import Processes
from gasp_fast.training.divided_files import Dealt, deal, read_into, shapes
from gasp_fast.training.weights import gathered

from .batch import GeometryBatch
from .checkpoint import load_weights, new_model, official_names, row_blocks
from .config import FROZEN, G2LossConfig, G2TrainConfig
from .heads import GeometryHeads
from .losses import geometry_loss
from .model import G2VLM
from .supervision import build_gasp, gasp_capture, gasp_terms

FILES = "model-"  # begins the names of the files with trained weights
GEOMETRY_TERMS = ("local", "world", "normal", "rotation", "translation")
GASP_TERMS = ("corr", "depth", "pck")


class TrainedG2VLM(nn.Module):
    """A forward pass of training: the model and its losses."""

    def __init__(self, model: G2VLM, loss: G2LossConfig, gasp_weight: float = 0.0) -> None:
        super().__init__()
        self.model, self.loss, self.gasp_weight = model, loss, gasp_weight

    def forward(
        self,
        pack: GeometryBatch,
        counts: Tensor,  # [3], labelled tokens, sequences, and those with matches, of the pack
        shares: Tensor | None = None,  # float32 [3], of the pack in those of the step; None: the pack is the step
    ) -> dict[str, Any]:
        """The `loss` and, without gradient, its terms: `lm`, `local`, `world`, `normal`, `rotation`, `translation`.

        With GASP's supervision also `corr`, `depth` and `pck` of each supervised layer [L].
        """
        shares = torch.ones(3, device=pack.images.device) if shares is None else shares
        with gasp_capture(self.model.gasp, self.model) as capture:
            found = self.model(pack.images, pack.questions, with_geometry=self.loss.geometry_weight > 0)
        parts, terms = list[Tensor](), dict[str, Tensor]()
        if found.text_loss is not None:
            lm = found.text_loss * shares[0]
            parts.append(self.loss.text_weight * lm)
            terms["lm"] = lm.detach()
        if found.geometry is not None:
            losses = geometry_loss(found.geometry, pack.true, pack.valid, pack.with_normals, self.loss.backend)
            total = losses.total(self.loss.translation_weight, self.loss.zero_above).mean() * shares[1]
            parts.append(self.loss.geometry_weight * total)
            terms |= {name: getattr(losses, name).detach().mean() * shares[1] for name in GEOMETRY_TERMS}
        if self.model.gasp is not None:
            gasp = gasp_terms(self.model.gasp, capture, self.model, pack)
            parts.append(self.gasp_weight * shares[2] * gasp["loss"])
            if pack.matches is not None and len(pack.matches):
                terms |= {name: gasp[name].detach() * shares[2] for name in GASP_TERMS}
        return {**terms, "loss": torch.stack(parts).sum()}


def build(config: G2TrainConfig, device: torch.device | None = None) -> TrainedG2VLM:
    """The model of a run, on the CPU, the same on every process. `device` is that of the training; None: the CPU."""
    torch.manual_seed(config.train.seed)
    heads = GeometryHeads(config.heads)
    model = new_model(config.model.source, config.model.encoder, heads, config.experts)
    if config.model.start is not None:
        start_from(model, Path(config.model.start))
    model.freeze(FROZEN[config.train.mode])
    model.gasp = build_gasp(model, config.gasp, device or torch.device("cpu"))
    return TrainedG2VLM(model, config.loss, config.gasp.weight).train()


def start_from(model: G2VLM, folder: Path) -> None:
    """Load the weights of a saved model, or those that a checkpoint of an earlier stage has trained.

    A stage may train a part of them. The others are those that it began from.
    """
    if (folder / ABOUT).is_file():
        earlier = configuration_of(folder).get("model", {}).get("start")
        if isinstance(earlier, str):
            start_from(model, Path(earlier))
        with readable(folder):
            stored = shapes(folder, FILES)
            every = _named(model, [name for name, _ in model.named_parameters()])
            # GASP's heads begin anew, from the query projections that are read here.
            read_into({name: every[name] for name in stored if not name.startswith("gasp.")}, folder, FILES)
    else:
        load_weights(model, folder)


def read_weights(model: G2VLM, folder: Path) -> None:
    """Load the trained weights of a checkpoint of the same run."""
    with readable(folder):
        read_into(_named(model, trained_names(model)), folder, FILES)


def trained_names(model: G2VLM) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _named(model: G2VLM, names: list[str]) -> dict[str, Tensor]:
    """Views of parameters by the names that they, or their rows, have in files."""
    parameters = dict(model.named_parameters())
    return dict(part for name in names for part in _parts(model, name, parameters[name].detach()))


def _parts(model: G2VLM, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    names = official_names(name)
    yield from zip(names, value.split(row_blocks(model, name)) if len(names) > 1 else [value], strict=True)


@dataclass(frozen=True)
class G2Weights:
    """The trained weights, of which each process has a share."""

    whole: Dealt


def gather_weights(model: G2VLM, processes: Processes, in_place: bool) -> G2Weights:
    """All processes must call."""
    parameters = dict(model.named_parameters())
    parts = (part for name in trained_names(model) for part in _parts(model, name, gathered(parameters[name])))
    return G2Weights(deal(parts, processes.rank, processes.world_size, in_place))
