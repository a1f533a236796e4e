"""LoRA adapters on the language model.

Adapters are stored in fp32 and multiplied in bf16. Under autocast alone every use casts the weight, recomputation under
checkpointing once more, and peft casts the input to fp32 in between. Here one copy a step serves every use:

    with cast_once(model, torch.bfloat16):  # the forward and backward passes of a step
        ...

The weights are rounded as by autocast, and gradients are rounded to bf16 and added up in fp32. The product with B adds
to the output of the frozen layer (`adapted_linear`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gasp_fast.config.limits import check_whole
from gasp_fast.files import one_line

from .base import Backbone

ADAPTERS = "adapter_model.safetensors"
LARGEST_RANK = 16_384  # no projection of a supported model is wider


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Adapters on q, k, v and o of the language model. Used where `train.mode` is lora."""

    rank: int = 128  # 512 for LLaVA-NeXT-Video
    alpha: int | None = None  # null: twice the rank
    dropout: float = 0.0  # of the adapters' inputs

    def __post_init__(self) -> None:
        check_whole(self, ("rank",), "lora.", most=LARGEST_RANK)
        check_whole(self, ("alpha",), "lora.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout = {self.dropout} must lie in 0 <= dropout < 1")


def add_adapters(backbone: Backbone, model: nn.Module, config: AdapterConfig) -> nn.Module:
    """Wrap `model` in peft's LoRA and freeze everything else. peft creates the adapters in fp32."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank if config.alpha is None else config.alpha,
        lora_dropout=config.dropout,
        target_modules=backbone.lora_targets,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, lora)
    _use_adapter_matrices(adapted)
    return adapted


def load_adapters(model: nn.Module, folder: Path) -> Any:
    """Wrap the base model `model` in the adapters of `folder`, each of which must be there."""
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(model, str(folder), local_files_only=True)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: its adapters do not fit the base model ({one_line(error)})") from error
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{folder}: its adapters cannot be loaded ({one_line(error)})") from error
    _check_adapter_names(adapted, load_file(folder / ADAPTERS), folder)
    return adapted


def read_adapters(model: nn.Module, folder: Path) -> None:
    """Load the adapters of `folder` into those of `model`, each of which must be there."""
    from peft import set_peft_model_state_dict

    try:
        stored = load_file(folder / ADAPTERS)
        _check_adapter_names(model, stored, folder)
        set_peft_model_state_dict(model, stored)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: its adapters do not fit this run ({one_line(error)})") from error


def _check_adapter_names(model: nn.Module, stored: Mapping[str, Tensor], folder: Path) -> None:
    """peft leaves adapters without stored tensors as they are, and ignores tensors without a place in the model."""
    from peft import get_peft_model_state_dict

    expected = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    unknown = stored.keys() - expected - model.state_dict().keys()  # embeddings may be stored with the adapters
    for problem, names in (("lacks", expected - stored.keys()), ("has unknown", unknown)):
        if names:
            raise ValueError(f"{folder / ADAPTERS} {problem} {len(names)} tensors of adapters, such as {min(names)}")


class AdapterMatrix(nn.Linear):
    """A or B of an adapter: a linear layer without bias, with the parameter that peft made.

    It casts its input itself, and only without autocast. peft would cast it to the weight's fp32 before autocast makes
    it bf16 again.
    """

    def __init__(self, linear: Any) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.cast_weight: Tensor | None = None  # set by `cast_once`

    def forward(self, input: Tensor, total: Tensor | None = None, factor: float = 1.0) -> Tensor:
        """The product; with `total` [N, outputs], `total += factor * product` for [N, inputs] of the same type."""
        weight: Tensor = self.weight
        if self.cast_weight is not None:
            weight = _CastWeight.apply(self.weight, self.cast_weight)
        if total is not None:
            return total.addmm_(input, weight.to(total.dtype).mT, alpha=factor)
        if self.cast_weight is None and not torch.is_autocast_enabled(input.device.type):
            input = input.to(weight.dtype)
        return F.linear(input, weight)


class _CastWeight(torch.autograd.Function):
    """The copy of a weight, as if it were cast here: its gradient is cast back and goes to the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


@contextmanager
def cast_once(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Cast the adapters now, for all forward and backward passes inside. Their weights must not change meanwhile.

    ZeRO-3 gathers weights only while they are used, so under ZeRO-3 every use casts them, as autocast does.
    """
    matrices = [module for module in model.modules() if isinstance(module, AdapterMatrix)]
    try:
        for matrix in matrices:
            if matrix.weight.dtype != dtype and not hasattr(matrix.weight, "ds_id"):
                matrix.cast_weight = matrix.weight.detach().to(dtype)
        yield
    finally:
        for matrix in matrices:
            matrix.cast_weight = None


def _use_adapter_matrices(model: nn.Module) -> None:
    """Replace the linear layers of every LoRA module by `AdapterMatrix`, and let its product add to the frozen one."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Linear

    from .adapted_linear import AdaptedLinear

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
            for matrices in (module.lora_A, module.lora_B):
                for name, linear in matrices.items():
                    matrices[name] = AdapterMatrix(linear)
            if type(module) is Linear:
                module.__class__ = AdaptedLinear
