"""Model and data of the examples: a tiny Qwen2.5-VL with random weights, and a rendered room with exact geometry.

Both are created in seconds, without a download. In your own project, use a real model and real scenes instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import nn

from gasp_fast.backbones.tiny import TinyConfig, build_tiny
from gasp_fast.collator import Sample
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes
from gasp_fast.data.tracks.build import build_tracks

SIZE = 160  # pixels along each side of a frame
FRAMES = [0, 4, 8]  # far enough apart that few points keep their position
MESSAGES = [
    {"role": "user", "content": "What is shown in the video?"},
    {"role": "assistant", "content": "A room with textured walls, a floor and boxes."},
]


def tiny_model(folder: Path) -> tuple[nn.Module, Any]:
    """A model with random weights, and its processor. A frame has 10 x 10 tokens."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    name = build_tiny(folder / "model", TinyConfig(frame_size=SIZE))
    model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32)
    return model, transformers.AutoProcessor.from_pretrained(name)


def room(folder: Path) -> Sample:
    """One sample: three frames of a room, a question with its answer, depth maps, and tracks through the frames."""
    [path] = render_scenes(folder / "scenes", 1, config=SyntheticConfig(frames=FRAMES[-1] + 1, width=SIZE, height=SIZE))
    scene = open_scene(path)
    return Sample(
        frames=[scene.image(frame) for frame in FRAMES],
        messages=MESSAGES,
        tracks=[build_tracks(scene, FRAMES, grid=10, keep=1.0)],
        depth=[scene.depth(frame) for frame in FRAMES],
    )


def model_inputs(processor: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Inputs of a transformers model, made with its processor; the text is the label, frames and padding are not."""
    texts = []
    for sample in samples:
        question, answer = sample.messages
        shown = [*({"type": "image"} for _ in sample.frames), {"type": "text", "text": question["content"]}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": shown}, answer]))
    frames = [frame for sample in samples for frame in sample.frames]
    inputs = processor(text=texts, images=frames, padding=True, return_tensors="pt")
    hidden = (inputs["input_ids"] == processor.image_token_id) | (inputs["attention_mask"] == 0)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(hidden, -100)}


def rows_for_trl(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The samples as rows of a `datasets.Dataset`: TRL's columns `images` and `messages`, and the tracks as lists."""
    return [
        {
            "images": [Image.fromarray(frame) for frame in sample.frames],
            "messages": sample.messages,
            "uv": sample.tracks[0].uv.tolist(),
            "visible": sample.tracks[0].visible.tolist(),
            "depth_maps": [depth.tolist() for depth in sample.depth],
        }
        for sample in samples
    ]


def show_log(history: list[dict[str, Any]]) -> None:
    """Print the log of a `Trainer` as a table."""
    print(f"{'step':>4}  {'text':>6}  {'corr':>6}  {'PCK@2':>6}")
    for entry in history:
        if "loss" in entry:
            print(f"{entry['step']:4d}  {entry['loss']:6.3f}  {entry['corr']:6.3f}  {entry['pck']:6.3f}")
