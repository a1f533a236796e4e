"""ZeRO-2 on one GPU, in a process of its own: two steps, and two more after a stop."""

import shutil
from pathlib import Path

import pytest
from support.gpu import ON_A_GPU, assert_finite
from support.runs import log_of, run_to_end, write_config

pytestmark = ON_A_GPU


@pytest.mark.parametrize("stage", ["zero2"])
def test_a_run_is_stopped_and_resumed(settings, tmp_path, stage):
    pytest.importorskip("deepspeed")
    steps = {"steps": 4, "checkpointing": "full"}
    recipe = settings(model={"dtype": "bf16"}, heads={"compute": "bf16"}, train=steps, run={"save_every": 2})
    path, out = write_config(recipe, tmp_path / "recipe.yaml"), Path(recipe.run.out)
    words = ["-m", "gasp_fast.train", path, f"deepspeed={stage}"]
    logs = []
    for _ in range(2):
        done = run_to_end(1, *words, fresh=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        logs.append(log_of(out))
        shutil.rmtree(out / "checkpoint-4")
    for whole, parts in zip(*logs, strict=True):
        assert_finite(parts)
        assert parts["loss"] == pytest.approx(whole["loss"], rel=2e-3)
