"""`Backbone`, the interface of a model family, and the registry of supported families.

A `Backbone` describes the parts of a model that differ between families: where its modules are, which tokens are
visual and where they lie on a frame, how its processor is called. It holds the model's configuration and processor, no
weights, so that data loaders can use it in worker processes; methods that need the model take it as an argument.

A new family is one new file in this folder: a subclass of `Backbone`, decorated with `@register`, that defines

    model_type          the `model_type` in the model's config.json
    visual_token_id     which id in `input_ids` marks a visual token
    frame_grid          where the visual tokens of a frame lie on the frame (the pixel -> token map)
    visual_content      the chat-template entries for a number of frames
    visual_arguments    the processor's keyword arguments for frames

and overrides what differs from most transformers models. `load_backbone` imports every module of this folder before it
looks a family up; a class that is registered outside the package works as well. docs/extending.md shows an example.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .chat import IGNORE, ChatFormat, Message
from .frames import FramesAs, RGBImage, check_frames
from .packing import attention_arguments
from .saved_model import load_complete, loading
from .token_grid import TokenGrid
from .token_index import TokenIndex

HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")  # OWNER/NAME


@dataclass(frozen=True)
class Conversation:
    """One training sequence before it is encoded: its frames (possibly none) and its messages."""

    frames: Sequence[RGBImage]
    messages: Sequence[Message]


@dataclass(frozen=True)
class Encoded:
    """A batch of model inputs, and the positions of its visual tokens."""

    inputs: dict[str, Tensor]  # keyword arguments of the model's forward, labels included
    grids: list[list[TokenGrid]]  # per sequence, one per frame, or per `frames_per_grid` frames
    positions: list[Tensor]  # per sequence int64 [tokens of all its grids], flat indices into B * S, grid by grid


@dataclass(frozen=True)
class AttentionShape:
    """Head counts of the language model's attention."""

    query_heads: int
    key_heads: int
    head_dim: int


class Backbone(ABC):
    """One model family: where its modules are, its visual tokens, and how its inputs are made."""

    model_type: ClassVar[str]
    # Regular expression for q, k, v and o of the language model. It must include the module path, because a vision
    # tower can have layers of the same names.
    lora_targets: ClassVar[str] = r".*language_model.*\.(q|k|v|o)_proj"
    llama_layers: bool = False  # whether norms, rotary embedding and MLPs of the decoder are as in Llama
    host_inputs: tuple[str, ...] = ()  # arguments of the vision tower whose numbers the host reads
    frames_as: FramesAs = "images"  # the form in which the model gets frames
    frames_per_grid: int = 1  # frames f and g have one token grid if f // frames_per_grid == g // frames_per_grid

    def __init__(self, source: str, config: Any, processor: Any) -> None:
        self.source = source
        self.config = config
        self.processor = processor

    @cached_property
    def chat(self) -> ChatFormat:
        return ChatFormat(self.processor, self._reserved_tokens())

    # ---- the model's modules -----------------------------------------------------------------------------------------

    @property
    def layer_count(self) -> int:
        """L, the number of decoder layers."""
        return self.config.get_text_config().num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return self.config.get_text_config().hidden_size

    @property
    def attention_shape(self) -> AttentionShape:
        text = self.config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return AttentionShape(text.num_attention_heads, key_heads, head_dim)

    def language_model(self, model: nn.Module) -> Any:
        """The decoder stack: a module with `layers` and a final `norm`."""
        return unwrap(model).model.language_model

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        return self.language_model(model).layers

    def final_norm(self, model: nn.Module) -> nn.Module:
        return self.language_model(model).norm

    def attention(self, model: nn.Module, layer: int) -> Any:
        """The self-attention module of a decoder layer, whose `q_proj` and `k_proj` are linear layers."""
        layers: Any = self.decoder_layers(model)
        return layers[layer].self_attn

    def query_projection(self, model: nn.Module, layer: int) -> tuple[Tensor, Tensor | None]:
        """W_Q of a decoder layer, without adapters: weight `[outputs, hidden]` and bias `[outputs]` or None."""
        projection = self.attention(model, layer).q_proj  # peft's wrapper returns the original weight
        return projection.weight, projection.bias

    def load_model(self, dtype: torch.dtype = torch.bfloat16, attention: str = "sdpa") -> nn.Module:
        """Load the transformers model: every weight, safetensors only, no code from its repository."""
        from transformers import AutoModelForImageTextToText

        return load_complete(AutoModelForImageTextToText, self.source, dtype=dtype, attn_implementation=attention)

    def replace_slow_modules(self, model: nn.Module) -> None:  # noqa: B027 (optional)
        """Replace submodules by faster ones that compute the same function with the same, equally named parameters.

        The choice may depend on the model's attention implementation, which must not change afterwards.
        """

    # ---- visual tokens -----------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def visual_token_id(self) -> int:
        """The id that marks a visual token in `input_ids`."""

    @property
    def inserted_token_ids(self) -> list[int]:
        """The ids that the processor puts in the place of frames."""
        return [self.visual_token_id]

    def frame_tokens(self, input_ids: Tensor) -> Tensor:
        """Which tokens of `input_ids` [B, S] are those of frames, bool [B, S]."""
        return input_ids == self.visual_token_id

    @abstractmethod
    def frame_grid(self, width: int, height: int) -> TokenGrid:
        """The pixel -> token map of a frame of `width x height` pixels, after the processor's resize and crop."""

    def limit_frame_pixels(self, frame_pixels: int) -> None:
        """Limit the pixels of a frame after resizing, and so its number of tokens."""
        raise ValueError(
            f"frame_pixels = {frame_pixels} does not apply to {self.model_type}, whose frames have one fixed size; "
            "leave it out"
        )

    def pass_frames_as(self, frames_as: FramesAs) -> None:
        """Choose in what form the model gets frames, before their pixels are limited. "images": the only one."""
        if frames_as != "images":
            raise ValueError(
                f"frames_as = {frames_as!r} does not apply to {self.model_type}, whose frames always have a token grid "
                "each; leave it out, or give images"
            )

    # ---- model inputs ------------------------------------------------------------------------------------------------

    @abstractmethod
    def visual_content(self, frames: int) -> list[dict[str, str]]:
        """The chat-template entries for `frames` frames at the start of a user turn."""

    @abstractmethod
    def visual_arguments(self, batch: Sequence[Sequence[RGBImage]]) -> dict[str, Any]:
        """The processor's keyword arguments for the frames of several sequences, each with at least one frame."""

    def check_inputs(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:  # noqa: B027 (optional)
        """Raise `ValueError` if the model would misread these inputs without an error. Called once at start-up."""

    def encode(self, batch: Sequence[Conversation], add_generation_prompt: bool = False) -> Encoded:
        """Run the model's processor on a batch, label the answers and locate the visual tokens.

        With `add_generation_prompt` each prompt ends where the assistant's next answer begins.
        """
        if not batch:
            raise ValueError("batch is empty; encode needs at least one conversation")
        rendered = []
        for index, conversation in enumerate(batch):
            check_frames(conversation.frames, index)
            visual = self.visual_content(len(conversation.frames)) if conversation.frames else []
            rendered.append(self.chat.render(conversation.messages, visual, add_generation_prompt))
        frames = [conversation.frames for conversation in batch if conversation.frames]
        visual_arguments = self.visual_arguments(frames) if frames else {}
        inputs = self.run_processor([prompt.text for prompt in rendered], visual_arguments)
        self._check_length(inputs["input_ids"])
        grids = [
            [self.frame_grid(frame.shape[1], frame.shape[0]) for frame in conversation.frames[:: self.frames_per_grid]]
            for conversation in batch
        ]
        positions = self._positions(inputs["input_ids"], grids)
        inputs["labels"] = self.chat.labels(
            rendered, inputs["input_ids"], inputs["attention_mask"], self.inserted_token_ids
        )
        return Encoded(inputs, grids, positions)

    def run_processor(self, texts: list[str], visual: dict[str, Any]) -> dict[str, Tensor]:
        """The processor's tensors for several sequences, padded on the right. `visual` are the arguments of frames."""
        return dict(self.processor(text=texts, padding=True, padding_side="right", return_tensors="pt", **visual))

    # ---- a training step ---------------------------------------------------------------------------------------------

    def index_tokens(self, inputs: dict[str, Tensor]) -> TokenIndex:
        """The `TokenIndex` of model inputs (labels included). To be called on the CPU."""
        visual, following = inputs["input_ids"] == self.visual_token_id, torch.full_like(inputs["labels"], IGNORE)
        following[:, :-1] = inputs["labels"][:, 1:]  # [B, S]
        predicting = (following != IGNORE).flatten().nonzero()[:, 0]
        return TokenIndex(
            visual=visual.flatten().nonzero()[:, 0],
            predicting=predicting,
            answers=following.flatten()[predicting],
            rotary=self.rotary_positions(inputs),
            on_host={name: inputs[name] for name in self.host_inputs if name in inputs},
        )

    def rotary_positions(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """Position ids of the decoder's rotary embedding, for a model that would read `inputs` to compute them."""
        return None

    def last_states(self, model: nn.Module, inputs: dict[str, Tensor], index: TokenIndex) -> Tensor:
        """The states after the decoder's final norm, `[B, S, D]`, of sequences that are padded on the right or packed.

        Puts the visual features at the positions of their tokens and runs the decoder without a mask of the padding:
        then nothing makes the host wait for a GPU. Override this for a decoder that is not causal, or that takes more
        than this. With `index.row`, the sequences of the row must not see each other (`packing.py`).
        """
        features = self.visual_features(model, {**inputs, **index.on_host}) if len(index.visual) else None
        return unwrap(model).base_model(**self.decoder_arguments(model, inputs, index, features))[0]

    def decoder_arguments(
        self, model: nn.Module, inputs: dict[str, Tensor], index: TokenIndex, features: Tensor | None
    ) -> dict[str, Any]:
        """The decoder's arguments, with `features [V, D]` put at the visual tokens; None: there are none."""
        inner = unwrap(model)
        embeddings = inner.get_input_embeddings()(inputs["input_ids"])  # [B, S, D]
        if features is not None:
            features = features.to(embeddings.dtype)
            embeddings = embeddings.flatten(0, 1).index_copy(0, index.visual, features).view_as(embeddings)
        apart = {}
        if index.row is not None:
            attention = inner.config.get_text_config()._attn_implementation  # where transformers keeps the choice
            apart = attention_arguments(index.row, attention, embeddings)
        return {"inputs_embeds": embeddings, "position_ids": index.rotary, "use_cache": False, **apart}

    def visual_features(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """The features of the visual tokens of all frames, `[V, D]`, in the order of the tokens."""
        inner = unwrap(model).base_model
        if "pixel_values_videos" in inputs:
            compute, pixels = inner.get_video_features, inputs["pixel_values_videos"]
        else:
            compute, pixels = inner.get_image_features, inputs["pixel_values"]
        # The name of the first argument differs between versions of transformers.
        parts = compute(pixels, **{name: inputs[name] for name in self.host_inputs}, return_dict=True).pooler_output
        return torch.cat([part.flatten(0, -2) for part in parts])

    def _positions(self, input_ids: Tensor, grids: list[list[TokenGrid]]) -> list[Tensor]:
        """Flat positions of each sequence's visual tokens. Sequences, frames and rows appear in that order."""
        length, of_frames, positions = input_ids.shape[1], self.frame_tokens(input_ids), []
        for row, frames in enumerate(grids):
            visual = of_frames[row].nonzero()[:, 0] + row * length
            expected = sum(grid.tokens for grid in frames)
            if len(visual) != expected:
                raise ValueError(
                    f"sequence {row}: {type(self.processor).__name__} made {len(visual)} visual tokens of "
                    f"{len(frames)} grids, but {type(self).__name__}.frame_grid gives {expected}; its pixel -> token "
                    "map does not hold for this processor's settings"
                )
            positions.append(visual)
        return positions

    def _check_length(self, input_ids: Tensor) -> None:
        longest = getattr(self.config.text_config, "max_position_embeddings", None)
        if longest is not None and input_ids.shape[1] > longest:
            raise ValueError(
                f"the batch has {input_ids.shape[1]} tokens, {self.source} takes {longest}; "
                "use fewer frames per sequence, or fewer pixels per frame"
            )

    def _reserved_tokens(self) -> list[str]:
        return [getattr(self.processor, name, "") for name in ("image_token", "video_token")]


BACKBONES: dict[str, type[Backbone]] = {}
Family = TypeVar("Family", bound=type[Backbone])


def register(family: Family) -> Family:
    """Class decorator that adds a backbone to the registry under its `model_type`."""
    if family.model_type in BACKBONES and BACKBONES[family.model_type].__qualname__ != family.__qualname__:
        taken = BACKBONES[family.model_type].__name__
        raise ValueError(f"model_type = {family.model_type!r} of {family.__name__} is already taken by {taken}")
    BACKBONES[family.model_type] = family
    return family


def supported_models() -> list[str]:
    """The `model_type` of every registered backbone, after importing all modules of this folder."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return sorted(BACKBONES)


def load_backbone(
    source: str | os.PathLike[str], frame_pixels: int | None = None, frames_as: FramesAs = "images"
) -> Backbone:
    """The backbone of a model folder or hub name: its configuration and processor, in the class of its `model_type`.

    `frame_pixels` limits the pixels of a frame after resizing. Models with one fixed input size refuse it.
    `frames_as` chooses the form in which the model gets frames. Models with one form refuse another.
    """
    from transformers import AutoConfig, AutoProcessor, PretrainedConfig

    source = os.fspath(source)
    supported, local = supported_models(), Path(source).is_dir()
    with loading(source):
        if not local and not HUB_NAME.fullmatch(source):
            raise OSError("there is no such folder, and a hub name has the form OWNER/NAME")
        if local and not (Path(source) / "config.json").is_file():
            raise OSError("it has no config.json; pass a folder with a saved model, or a hub name")
        try:
            model_type = PretrainedConfig.get_config_dict(source, local_files_only=local)[0].get("model_type")
        except OSError as error:
            found = "a config.json that cannot be read" if local else "no such folder, and no such model on the hub"
            raise OSError(f"there is {found}; pass a folder with a saved model, or a hub name") from error
    if model_type not in supported:
        raise ValueError(
            f"model = {source!r} is of type {repr(model_type)[:100]}; supported types are {', '.join(supported)} "
            "(a new type is one file in gasp_fast/backbones)"
        )
    with loading(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=local)
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False, local_files_only=local)
        backbone = BACKBONES[model_type](source, config, processor)
    backbone.pass_frames_as(frames_as)
    if frame_pixels is not None:
        backbone.limit_frame_pixels(frame_pixels)
    return backbone


def unwrap(model: Any) -> Any:
    """The transformers model inside DDP, DeepSpeed, torch.compile and peft wrappers."""
    while True:
        if hasattr(model, "get_base_model"):  # peft
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):  # DDP, DeepSpeed
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod
        else:
            return model
