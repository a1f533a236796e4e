"""The rooms that know a model's layout, one file a model. Start with `base.py`."""

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

__all__ = [
    "AttentionShape",
    "Backbone",
    "Conversation",
    "Encoded",
    "TokenGrid",
    "load_backbone",
    "messages_from_record",
    "register",
    "supported_models",
    "unwrap",
]
