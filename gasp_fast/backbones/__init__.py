"""Model families: how a vision-language model is loaded, how its inputs are made, and where its modules are.

base.py              `Backbone`: what a model family defines; the registry; `load_backbone`
qwen2_vl.py, qwen2_5_vl.py, qwen3_vl.py, qwen3_vl_moe.py  Qwen2-VL, Qwen2.5-VL, Qwen3-VL without and with experts
qwen_vl.py           what these share
llava_next_video.py  LLaVA-NeXT-Video
llava_onevision.py   LLaVA-OneVision
internvl.py          InternVL
frames.py            frames, and the forms in which a model can get them
token_grid.py        the pixel -> token map: which visual token covers which pixels of a frame
token_index.py       where the visual and the labelled tokens of a batch are, computed in the data worker
packing.py           the sequences of a batch in one row, without padding
chat.py              conversations to prompt text and labels
saved_model.py       loading of saved models: complete, with one-line errors, never with code
base_model.py        the base model of a run: attention, fused layers, gradient checkpointing
attention_kernel.py  the name of the attention kernel that runs
liger.py             Liger's fused layers for the decoder
adapters.py          LoRA, cast to bf16 once a step
frozen.py            frozen parts run once a step, without a graph
unmasked_attention.py  attention without a mask for right-padded batches and packed rows
window_attention.py  faster window attention for Qwen's vision tower
vision_layers.py     its norms, rotary embedding and MLP without slow kernels
tiny.py              small random models for tests, the demo and the examples, of tiny_families.py and tiny_parts.py
torchvision_shim.py  makes torchvision importable beside a CPU build of torch
"""

from . import torchvision_shim

torchvision_shim.install()  # before transformers' processors import torchvision

from .base import (  # noqa: E402
    AttentionShape,
    Backbone,
    Conversation,
    Encoded,
    load_backbone,
    register,
    supported_models,
    unwrap,
)
from .chat import messages_from_record  # noqa: E402
from .token_grid import TokenGrid  # noqa: E402
from .token_index import TokenIndex  # noqa: E402

__all__ = [
    "AttentionShape",
    "Backbone",
    "Conversation",
    "Encoded",
    "TokenGrid",
    "TokenIndex",
    "load_backbone",
    "messages_from_record",
    "register",
    "supported_models",
    "unwrap",
]
