"""Photographs to geometry, and answers about them.

    model = load_model("G2VLM", GeometryHeads())
    photographs = [Image.open(path) for path in ("kitchen1.jpg", "kitchen2.jpg")]
    seen = recon(model, photographs)
    seen.local[1, 200, 300]  # x, y, z of a pixel of the second photograph, in its camera

    backbone = load_backbone("Qwen/Qwen2-VL-2B-Instruct")
    seen, text = chat_with_recon(model, backbone, photographs, "Is the fridge left of the oven?")

    chat = ReconChat(model, backbone, photographs)  # several questions; geometry is computed once
    chat.ask("Is the fridge left of the oven?")
    chat.ask("How many chairs are there?", temperature=0.7, top_p=0.9, seed=1)

The text follows from the geometry: keys and values of the geometric tokens of every layer are what ViT tokens, question
and answer attend to, as in training. DINOv2 sees crops of one size, the vision tower of Qwen2-VL the photographs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from gasp_fast.backbones import Backbone, Conversation
from gasp_fast.backbones.chat import Message
from gasp_fast.backbones.frames import RGBImage

from .batch import PATCH, Questions
from .cache import Cache
from .collator import check_backbone, encoded_questions, normalised
from .crop import Crop, Float
from .data_config import MOST_SIDE, frame_size
from .generation import Sampler, generate
from .model import G2VLM

SIDE = 518  # of the last stage of pretraining
Photograph = Image.Image | RGBImage


@dataclass(frozen=True)
class Reconstruction:
    """The geometry of F photographs, of crops of H x W pixels. Lengths have no unit; axes are x right, y down, z ahead.

    A pixel (u, v) of the photograph is in its crop at ((u - left) / step, (v - top) / step), see `crops`; pixel centres
    are at integer + 0.5.
    """

    local: NDArray[np.float32]  # [F, H, W, 3], points in the camera of their photograph
    world: NDArray[np.float32]  # [F, H, W, 3], the same points in the camera of the first photograph
    rotation: NDArray[np.float32]  # [F, 3, 3], from each camera to the first one
    translation: NDArray[np.float32]  # [F, 3]
    images: NDArray[np.uint8]  # [F, H, W, 3], the crops
    crops: tuple[Crop, ...]

    @property
    def depth(self) -> NDArray[np.float32]:
        """[F, H, W]"""
        return self.local[..., 2]

    def photograph_pixels(self, frame: int, uv: Float) -> Float:
        """Where pixels [..., 2] of a crop are in its photograph."""
        crop = self.crops[frame]
        return uv * crop.step + [crop.left, crop.top]


def recon(model: G2VLM, images: Sequence[Photograph], side: int = SIDE) -> Reconstruction:
    """The geometry of photographs of one scene: PIL images, or arrays uint8 [h, w, 3], of any sizes.

    Of each, the largest part with the photographs' mean aspect ratio becomes about `side` squared pixels.
    """
    return _read(model, _photographs(images), side, None)


def chat_with_recon(
    model: G2VLM,
    backbone: Backbone,
    images: Sequence[Photograph],
    prompt: str | Sequence[Message],
    *,
    side: int = SIDE,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> tuple[Reconstruction, str]:
    """The geometry of photographs, and the answer to a question about them. See `ReconChat`."""
    sampler, messages = Sampler(temperature, top_p, seed), _messages(prompt)  # errors come before the work
    chat = ReconChat(model, backbone, images, side)
    return chat.reconstruction, chat.answer(messages, sampler, max_new_tokens)


class ReconChat:
    """Questions about photographs, whose geometry is computed once. `reconstruction` is that geometry."""

    def __init__(self, model: G2VLM, backbone: Backbone, images: Sequence[Photograph], side: int = SIDE) -> None:
        """`backbone` is that of the Qwen2-VL from which the model began: `load_backbone(FOLDER OR HUB NAME)`."""
        check_backbone(backbone)
        self.model, self.backbone = model, backbone
        self.photographs = _photographs(images)
        self.cache = Cache(len(model.experts.layers))
        self.reconstruction = _read(model, self.photographs, side, self.cache)
        self._start = self.cache.length, self.cache.position

    def ask(
        self,
        prompt: str | Sequence[Message],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """The answer to a question, or to messages [{"role": "user" | "assistant" | "system", "content": TEXT}, ...].

        With `temperature` 0 each token is the most likely one. Otherwise tokens are drawn, from the likeliest ones that
        have a share of `top_p` together. Nothing is remembered: for a second turn, give the first one in the messages.
        """
        return self.answer(_messages(prompt), Sampler(temperature, top_p, seed), max_new_tokens)

    def answer(self, messages: Sequence[Message], sampler: Sampler, max_new_tokens: int) -> str:
        questions = self.questions(messages)
        self.cache.rewind(*self._start)
        tokenizer = self.backbone.processor.tokenizer
        with _evaluating(self.model):
            tokens = generate(self.model, questions, self.cache, max_new_tokens, self._ends(tokenizer), sampler)
        text: str = tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    def questions(self, messages: Sequence[Message]) -> Questions:
        """What the model reads after the geometry: the photographs' ViT tokens and the messages."""
        talk = Conversation(self.photographs, messages)
        return encoded_questions(self.backbone, [talk], add_generation_prompt=True).to(self.model.marks.device)

    def _ends(self, tokenizer: Any) -> set[int]:
        """Tokens that end an answer. Qwen2-VL has two: of a turn, and of a text, with which it also pads."""
        of_config = self.model.qwen_config.text_config.eos_token_id
        of_config = of_config if isinstance(of_config, list) else [of_config]
        tokens = (*of_config, tokenizer.eos_token_id, tokenizer.pad_token_id)
        return {token for token in tokens if token is not None}


def _read(model: G2VLM, photographs: Sequence[RGBImage], side: int, cache: Cache | None) -> Reconstruction:
    """The geometry of photographs, whose keys and values are added to the cache."""
    if not PATCH <= side <= MOST_SIDE:
        raise ValueError(f"side = {side} pixels; give {PATCH} to {MOST_SIDE}")
    aspects = [math.log(photograph.shape[1] / photograph.shape[0]) for photograph in photographs]
    height, width = frame_size(side, math.exp(sum(aspects) / len(aspects)))
    crops = tuple(Crop.largest((one.shape[1], one.shape[0]), height, width) for one in photographs)
    images = np.stack([crop.image(photograph) for crop, photograph in zip(crops, photographs, strict=True)])
    pixels = normalised(torch.from_numpy(images).movedim(-1, 1)[None]).to(model.marks.device)  # [1, F, 3, H, W]
    with _evaluating(model):
        states, arrangement = model.states(pixels, cache=cache)
        geometry = model.heads(states.patches.float(), arrangement.rows, arrangement.columns)
    names = ("local", "world", "rotation", "translation")
    arrays = {name: getattr(geometry, name)[0].cpu().numpy() for name in names}
    return Reconstruction(**arrays, images=images, crops=crops)


@contextmanager
def _evaluating(model: G2VLM) -> Iterator[None]:
    """Evaluation mode, without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _photographs(images: Sequence[Photograph]) -> list[RGBImage]:
    if not len(images):
        raise ValueError("images is empty; give at least one photograph")
    return [_photograph(number, image) for number, image in enumerate(images)]


def _photograph(number: int, image: Photograph) -> RGBImage:
    pixels = np.array(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        found = f"{pixels.dtype} {list(pixels.shape)}"
        raise ValueError(f"images[{number}] is {found}; give a PIL image, or an array uint8 [h, w, 3]")
    height, width = pixels.shape[:2]
    if min(height, width) < PATCH:
        raise ValueError(f"images[{number}] is {width} x {height} pixels; give at least {PATCH} along each side")
    return pixels


def _messages(prompt: str | Sequence[Message]) -> list[Message]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ValueError("prompt is empty; give a question, or messages of which the last one is the user's")
    return messages
