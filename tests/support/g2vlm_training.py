"""Configurations of small training runs of a tiny G²VLM."""

import pytest

from gasp_fast.backbones.tiny import TinyConfig, build_tiny
from gasp_fast.g2vlm.config import (
    G2EvaluateConfig,
    G2LossConfig,
    G2ModelConfig,
    G2OptimisationConfig,
    G2TrainConfig,
)
from gasp_fast.g2vlm.data_config import G2DataConfig
from gasp_fast.g2vlm.experts import ExpertsConfig
from gasp_fast.g2vlm.heads import HeadsConfig
from gasp_fast.g2vlm.supervision import G2GaspConfig
from gasp_fast.g2vlm.tiny import build_tiny_encoder
from gasp_fast.training.config import RunConfig

WIDTH = 64


@pytest.fixture(scope="session")
def g2_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("g2vlm")
    sizes = {"hidden_size": WIDTH, "layers": 2, "patch_size": 14, "frame_size": 56}
    build_tiny(folder / "qwen", TinyConfig(model_type="qwen2_vl", **sizes))
    build_tiny_encoder(folder / "dino", width=32, layers=1, heads=2)
    return folder


@pytest.fixture
def recipe(g2_models, assets, tmp_path):
    """A configuration of a few steps; keywords change keys of groups."""

    def make(questions=None, deepspeed=None, **groups):
        def of(name, **defaults):
            return {**defaults, **groups.get(name, {})}

        return G2TrainConfig(
            model=G2ModelConfig(**of("model", source=str(g2_models / "qwen"), encoder=str(g2_models / "dino"))),
            experts=ExpertsConfig(**of("experts", layer_scale=0.1, checkpointing="off")),
            heads=HeadsConfig(hidden=WIDTH, width=32, layers=1, heads=2, point_width=32, camera_width=16),
            loss=G2LossConfig(**of("loss")),
            gasp=G2GaspConfig(**of("gasp")),
            train=G2OptimisationConfig(**of("train", steps=4, batch_size=4, learning_rate=1e-3, tokens_at_once=64)),
            data=G2DataConfig(
                **of("data", roots=(str(assets.scenes),), side=56, max_frames=3, workers=0, questions=questions or "")
            ),
            evaluate=G2EvaluateConfig(**of("evaluate")),
            run=RunConfig(**of("run", out=str(tmp_path / "run"), progress=False, min_free_gb=0.0)),
            deepspeed=deepspeed,
        )

    return make
