"""A step of the training loop casts each adapter to bf16 once, whatever it accumulates and recomputes."""

import pytest
import torch
from support.casts import CastCounter

from gasp_fast.training.distributed import Processes
from gasp_fast.training.gasp import Gasp
from gasp_fast.training.loop import TrainingLoop
from gasp_fast.training.model import build_model
from gasp_fast.training.stream import SampleStream, Share

CPU = torch.device("cpu")


@pytest.mark.parametrize("checkpointing", ["off", "full", "reentrant"])
def test_a_step_casts_each_adapter_once(config, family, checkpointing):
    settings = config(family, model={"dtype": "bf16"}, train={"checkpointing": checkpointing, "batch_size": 2})
    model, stream, share = build_model(settings, CPU), SampleStream(settings.data), Share(0, 1, 2, 1)
    loop = TrainingLoop(Gasp(settings, stream, model=model), share, 3, Processes(0, 1, CPU))
    _, batches = loop.begin()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    for step in (1, 2):
        micro_batches = [next(batches) for _ in range(share.accumulation)]
        assert len(micro_batches) == 2
        with CastCounter(model) as counter:
            loop.train_step(step, micro_batches)
        assert counter.casts == dict.fromkeys(before, 1)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if "lora_B" in name)
