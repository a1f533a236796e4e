"""LLaVA-NeXT-Video for lmms-eval, which has no class for it.

Its generic `huggingface` model does not serve: it loads the model without its language-model head, and passes the path
of a video to a processor that takes frames.

A video is a number of frames, evenly spaced from the first to the last, each 144 tokens in the 7B model. A single image
goes in as an image, in tiles. Several images go in as the frames of one video: as images, two of them have more tokens
than Vicuna's context of 4096. This is also how the model is trained here.
"""

from __future__ import annotations

from typing import Any

import decord
import numpy as np
import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm
from transformers import AutoProcessor, LlavaNextVideoForConditionalGeneration


class LlavaNextVideo(lmms):
    is_simple = False

    def __init__(self, pretrained: str, device: str = "cuda", max_num_frames: int = 32, batch_size: int = 1) -> None:
        super().__init__()
        if int(batch_size) != 1:
            raise ValueError(f"batch_size = {batch_size}: this model answers one question at a time; pass 1")
        self.frames = int(max_num_frames)
        self.processor = AutoProcessor.from_pretrained(pretrained)
        model: Any = LlavaNextVideoForConditionalGeneration.from_pretrained(pretrained, dtype=torch.bfloat16)
        self.model = model.to(device).eval()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        return [self._answer(request) for request in tqdm(requests, desc="Model Responding")]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("this model only generates answers")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("this model answers in one round")

    @torch.inference_mode()
    def _answer(self, request: Instance) -> GenerationResult:
        _, to_messages, settings, question, task, split = request.args
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][question]))
        text, visual = self._inputs(messages)
        inputs = self.processor(text=[text], return_tensors="pt", **visual).to(self.model.device, self.model.dtype)
        made = self.model.generate(**inputs, do_sample=False, max_new_tokens=settings.get("max_new_tokens", 128))
        tokens = made[0, inputs["input_ids"].shape[1] :]
        answer = self.processor.decode(tokens, skip_special_tokens=True).strip()
        self.cache_hook.add_partial("generate_until", (text, settings), answer)
        return GenerationResult(text=answer, token_counts=TokenCounts(output_tokens=len(tokens)))

    def _inputs(self, messages: ChatMessages) -> tuple[str, dict[str, Any]]:
        """The prompt, and the processor's arguments for what is to be seen."""
        images, videos, _ = messages.extract_media()
        turns = messages.to_hf_messages()
        frames: NDArray[np.uint8] | None = None
        if videos:
            if len(videos) > 1 or images or not isinstance(videos[0], str):
                raise ValueError("a question has one video file, or images; this one has something else")
            frames = read_frames(videos[0], self.frames)
        elif len(images) > 1:
            frames = as_frames(images)
            turns = [{**turn, "content": one_video(turn["content"])} for turn in turns]
        text = self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        if frames is not None:
            return text, {"videos": [frames], "do_sample_frames": False}
        return text, {"images": images} if images else {}


def read_frames(path: str, most: int) -> NDArray[np.uint8]:
    """At most `most` frames of a video, evenly spaced, with the first and the last: uint8 [F, H, W, 3]."""
    video = decord.VideoReader(path)
    chosen = np.linspace(0, len(video) - 1, min(most, len(video))).round().astype(int)
    frames: NDArray[np.uint8] = video.get_batch(chosen).asnumpy()
    return frames


def as_frames(images: list[Image.Image]) -> NDArray[np.uint8]:
    """Images as frames of the first one's size: uint8 [F, H, W, 3]."""
    size = images[0].size
    return np.stack([np.asarray(image.convert("RGB").resize(size)) for image in images])


def one_video(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The content of a turn with one video in place of its images."""
    texts = [part for part in content if part["type"] != "image"]
    return [{"type": "video"}, *texts] if len(texts) < len(content) else texts
