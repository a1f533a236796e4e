"""Every model family on a GPU, forward and backward with geometry: losses and gradients are those of a CPU."""

import copy

import pytest
import torch
from support.families import SHIPPED, families, noise_fixture, talk_fixture  # noqa: F401 (fixtures)
from support.gpu import CPU, DEVICE, ON_A_GPU, assert_agree, step_on
from support.tracked import batch_of, tracks_fixture  # noqa: F401 (fixture)

import gasp_fast

pytestmark = ON_A_GPU


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", SHIPPED)
def test_a_cpu_agrees(families, family, dtype, talk, tracks):  # noqa: F811
    family = families[family]
    batch, positions, matches = batch_of(family, talk, tracks)
    model = copy.deepcopy(family.model)
    gasp = gasp_fast.attach(model, family.backbone.processor)

    def step(device):
        gasp.to(device)
        text = model(**{name: value.to(device) for name, value in batch.items()}).loss
        geometry = gasp.loss(positions, matches)
        return {"loss": text + geometry, "text": text, "corr": gasp.metrics["corr"], "depth": gasp.metrics["depth"]}

    expected = step_on(CPU, model, step)
    model.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    found = step_on(DEVICE, model, step)
    if dtype == "bf16":  # an expert may be chosen otherwise, and a gradient be another one
        assert found.pop("gradient").isfinite().all() and expected.pop("gradient").any()
    assert_agree(found, expected, dtype)
