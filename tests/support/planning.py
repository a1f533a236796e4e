"""The Qwen recipe, its setup and its plan, with overrides."""

from pathlib import Path
from typing import Any

from gasp_fast.config.loader import load_config
from gasp_fast.planning.gpus import GPUS
from gasp_fast.planning.plan import Plan
from gasp_fast.planning.shapes import QWEN2_5_VL_7B, ModelShape
from gasp_fast.planning.training_setup import TrainingSetup
from gasp_fast.training.config import TrainConfig
from gasp_fast.training.workload import plan_run, training_setup

ROOT = Path(__file__).parents[2]
QWEN = ROOT / "configs" / "qwen2_5_vl_7b.yaml"


def zero(preset: str) -> str:
    """The override that chooses a DeepSpeed preset."""
    return f"deepspeed={ROOT}/configs/deepspeed/{preset}.json"


def recipe(*overrides: str) -> TrainConfig:
    return load_config(TrainConfig, QWEN, [zero("zero1"), *overrides])


def setup_of(*overrides: str, shape: ModelShape = QWEN2_5_VL_7B) -> TrainingSetup:
    return training_setup(recipe(*overrides), shape)


def plan_of(*overrides: str, gpus: int = 32, gpu: str = "h200", **more: Any) -> Plan:
    return plan_run(recipe(*overrides), QWEN2_5_VL_7B, gpus, GPUS[gpu], **more)
