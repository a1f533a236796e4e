"""`attach` on a GPU, in a loop of one's own and in the Hugging Face `Trainer`: the losses are those of a CPU."""

import pytest
import torch
from support.gpu import CPU, DEVICE, ON_A_GPU, TERMS
from support.trainer import Setting

import gasp_fast

pytestmark = ON_A_GPU
STEPS, RATE = [0, 1], 0.05


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(tmp_path_factory.mktemp("trainer"))


def losses_of_a_loop(setting, device, numbers=STEPS, dtype=torch.float32):
    """The language loss and the mean corr of steps of SGD."""
    model = setting.model(dtype)
    gasp = gasp_fast.attach(model, setting.processor)
    model.to(device), gasp.to(device)
    optimizer = torch.optim.SGD([*model.parameters(), *gasp.parameters()], lr=RATE)
    losses = []
    for number in numbers:
        batch = setting.inputs(gasp, number)
        matches = batch.pop("matches")
        text = model(**{name: value.to(device) for name, value in batch.items()}).loss
        geometry = gasp.loss(gasp.visual_positions(batch["input_ids"]), matches)
        optimizer.zero_grad()
        (text + geometry).backward()
        optimizer.step()
        losses.append((text.item(), float(gasp.metrics["corr"].mean())))
    return losses


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_plain_loop(setting, dtype):
    found = losses_of_a_loop(setting, DEVICE, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    for ours, theirs in zip(found, losses_of_a_loop(setting, CPU), strict=True):
        assert ours == pytest.approx(theirs, rel=TERMS[dtype])


def test_a_trainer(setting):
    model, order = setting.model(), []
    gasp = gasp_fast.attach(model, setting.processor)
    trainer = setting.trainer(gasp, model, STEPS, max_steps=2, use_cpu=DEVICE == CPU)
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: (order.extend(rows), collate(rows))[1]
    trainer.train()
    assert sorted(order) == STEPS and next(model.parameters()).device.type == DEVICE.type
    logged = [(line["loss"], line["corr"]) for line in trainer.state.log_history if "corr" in line]
    for ours, theirs in zip(logged, losses_of_a_loop(setting, CPU, order), strict=True):
        assert ours == pytest.approx(theirs, rel=TERMS["fp32"])
