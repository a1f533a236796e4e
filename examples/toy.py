"""Model and data of the examples: a tiny Qwen2.5-VL with random weights, and a rendered room with exact geometry.

Both are created in seconds, without a download. In your own project, use a real model and real scenes instead.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import nn

from gasp_fast.backbones import Backbone, load_backbone
from gasp_fast.backbones.tiny import TinyConfig, build_tiny
from gasp_fast.collator import Collator, Sample
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes
from gasp_fast.data.tracks.build import build_tracks

SIZE = 160  # pixels along each side of a frame
FRAMES = [0, 4, 8]  # far enough apart that few points keep their position
MESSAGES = [
    {"role": "user", "content": "What is shown in the video?"},
    {"role": "assistant", "content": "A room with textured walls, a floor and boxes."},
]


def tiny_model(folder: Path) -> tuple[Backbone, nn.Module]:
    """A model with random weights, and its backbone. A frame has 10 x 10 tokens."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    backbone = load_backbone(build_tiny(folder / "model", TinyConfig(frame_size=SIZE)))
    return backbone, backbone.load_model(dtype=torch.float32)


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


def question_rows(folder: Path, backbone: Backbone) -> list[dict[str, Any]]:
    """The room as rows of a `datasets.Dataset`: images, messages, and the fields of `Matches` as lists."""
    sample = room(folder)
    matches = Collator(backbone)([sample])["matches"]
    names = [f.name for f in fields(matches) if f.init and getattr(matches, f.name) is not None]
    return [
        {
            "images": [Image.fromarray(frame) for frame in sample.frames],
            "messages": MESSAGES,
            "matches": {name: getattr(matches, name).tolist() for name in names},
        }
    ]


def show_log(history: list[dict[str, Any]]) -> None:
    """Print the log of a `Trainer` as a table."""
    print(f"{'step':>4}  {'loss':>6}  {'corr':>6}  {'PCK@2':>6}")
    for entry in history:
        if "loss" in entry:
            print(f"{entry['step']:4d}  {entry['loss']:6.3f}  {entry['corr']:6.3f}  {entry['pck']:6.3f}")
