"""Creates small versions of what the documents name: models, scenes, annotations, a run, a report."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import numpy as np
import torch
from support.scene_formats import write_colmap, write_dl3dv

from gasp_fast import train as training
from gasp_fast.backbones.tiny import TinyConfig, build_tiny
from gasp_fast.cli import main as run_command
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import rigid_inverse, without_depth
from gasp_fast.data.synthetic.questions import write_qa
from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
LOOK = SyntheticConfig(frames=10, width=96, height=80, samples=1)
# Options appended to a command of the documents, so that it takes seconds; of two values of an option the last counts.
SHORT_TRAINING = shlex.split(
    "model.dtype=fp32 train.steps=2 train.batch_size=2 lora.rank=4 heads.layers=all heads.compute=fp32 data.workers=0 "
    "data.scenes.held_out=0 data.qa.limit=null data.qa.frames=2 run.progress=false run.min_free_gb=0 "
    "deepspeed=null"
)
MAKE_VQA = "make-vqa data/dl3dv --tracks data/tracks/grid8"
SHORT = {
    "render": "--scenes 2 --frames 10 --size 96",
    "tracks": "--per-scene 2 --min-frames 3 --max-frames 4 --window 4 --workers 1 --held-out 0",
    "make-vqa": "--workers 1",
    "scenes": "--jobs 1",
    "evaluate": "--sequences 2 --frames 3 --max-gap 4 --pictures 0 --held-out 0",
    "bench": "--workload tiny --rounds 1",
}


def prepare(root: Path) -> None:
    """Creates MODEL, RUN, SCENES, REPORT and data/... of the documents, and folders with the hub names of the models.

    Most names in capitals are links: a command whose `--out` is such a link replaces it.
    """
    models = {"Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl", "llava-hf/LLaVA-NeXT-Video-7B-hf": "llava_next_video"}
    for name, kind in models.items():
        shape = TinyConfig(model_type=kind, hidden_size=64, frame_size=112, vision_hidden_size=32, query_heads=2)
        build_tiny(root / name, shape)
    (root / "MODEL").symlink_to("Qwen/Qwen2.5-VL-7B-Instruct")
    folders = list(render_scenes(root / "SCENES", 2, config=LOOK, workers=1))
    list(write_qa(folders, root / "data" / "llava-video-178k" / "0_30_s_academic_v0_1", workers=1))
    for folder in folders:
        as_downloaded(folder, root / "data" / "dl3dv" / "1K" / folder.name)
    shutil.copytree(root / "data" / "dl3dv", root / "raw")
    for words in (
        "depth data/dl3dv",
        f"tracks data/dl3dv --grid 8 --out data/tracks/grid8 {SHORT['tracks']}",
        f"tracks data/dl3dv --grid 24 --out data/tracks/grid24 {SHORT['tracks']}",
        f"{MAKE_VQA} --model Qwen/Qwen2.5-VL-7B-Instruct --out data/dl3dv-vqa {SHORT['make-vqa']}",
        f"{MAKE_VQA} --model llava-hf/LLaVA-NeXT-Video-7B-hf --out data/dl3dv-vqa-llava {SHORT['make-vqa']}",
        f"evaluate --model MODEL --scenes SCENES --out .report {SHORT['evaluate']}",
    ):
        assert run_command(words.split()) == 0, words
    for name in ("REPORT", "BEFORE", "CORRESPONDENCE", "FULL"):
        (root / name).symlink_to(".report")
    recipe = str(ROOT / "configs" / "qwen2_5_vl_7b.yaml")
    assert training.main([recipe, "run.out=.run", *SHORT_TRAINING]) == 0
    (root / "RUN").symlink_to(".run")
    for name in ("configs", "examples", "benchmarks"):
        (root / name).symlink_to(ROOT / name)


def as_downloaded(rendered: Path, root: Path) -> None:
    """Writes a rendered scene in DL3DV's layout, without depth, with the output of COLMAP's stereo in `dense/`."""
    scene = open_scene(rendered)
    root.mkdir(parents=True)
    write_dl3dv(without_depth(scene), root)
    draw = np.random.default_rng(0)
    points = {}
    for i, name in enumerate(scene.frame_names):
        pixel = draw.uniform(0, scene.image_size(i), (100, 2))
        depth = scene.depth(i)[tuple(pixel.astype(int).T[::-1])]
        ray = np.column_stack([pixel, np.ones(100)]) @ np.linalg.inv(scene.intrinsics(i)).T
        to_world = rigid_inverse(scene.pose(i))
        points[name] = (ray * depth[:, None]) @ to_world[:3, :3].T + to_world[:3, 3]
    write_colmap(scene, root / "dense", points)
