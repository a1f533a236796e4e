"""Within a training step the host never waits for the device."""

import pytest
import torch
from support.pretend_device import DEVICE, PretendedDevice
from support.tiny_training import loop_on

# Places that read a number on a CPU only, and the reason.
ON_A_CPU = {
    "kernels/scaling.py:scale_in_place": "a CPU is spared a multiplication by one; a GPU's kernel reads the number",
    "loss/arguments.py:checked_temperature": "checked where reading costs nothing",
}


@pytest.mark.parametrize(
    ("mode", "checkpointing", "dtype", "packing", "frames_as"),
    [
        ("lora", "non_reentrant", "bf16", False, "images"),
        ("lora", "off", "fp32", False, "images"),
        ("full", "reentrant", "fp32", False, "images"),
        ("lora", "non_reentrant", "bf16", True, "images"),
        ("lora", "non_reentrant", "bf16", False, "video_pairs"),
        ("lora", "off", "fp32", True, "video_doubled"),
    ],
)
def test_a_step_does_not_wait(config, family, mode, checkpointing, dtype, packing, frames_as):
    """Micro-batches of scenes and questions of different lengths, so that there is padding, or several in a row."""
    if family != "qwen2_5_vl" and frames_as != "images":
        pytest.skip("a family with one form of frames")
    train = {"batch_size": 4, "micro_batch_size": 2, "mode": mode, "checkpointing": checkpointing, "packing": packing}
    heads = {"input": "output_normed" if packing else "output"}
    model = {"dtype": dtype, "frames_as": frames_as}
    settings = config(family, mixed=True, train=train, model=model, heads=heads)
    loop, steps = loop_on(DEVICE, settings)
    assert {batch["token_index"].row is not None for batches in steps for batch in batches} == {packing}
    device = PretendedDevice()
    device.place([*loop.objective.model.parameters(), *loop.objective.model.buffers(), loop.meter.packed])
    with device:
        launched = [loop.train_step(number, batches) for number, batches in enumerate(steps, 1)]
    innermost = [wait.partition(" < ")[0] for wait in device.waits]
    assert [wait for wait in innermost if not wait.endswith(tuple(ON_A_CPU))] == []
    assert all(step.sums is not None for step in launched)  # log lines were on their way, too


def test_the_pretended_device_sees_every_kind_of_wait():
    device = PretendedDevice()
    with device:
        x = torch.arange(4.0).to(DEVICE, non_blocking=True)
        assert x.device == DEVICE and (x + 1).device == DEVICE and torch.zeros(2).device.index is None
        y = x * 2 + torch.full((), 3.0, device=x.device)
        y.to("cpu", non_blocking=True), x.repeat_interleave(2), x[torch.arange(2, device=x.device)]
        assert device.waits == []
        waits = {
            "item": lambda: y.sum().item(),
            "a condition": lambda: bool(y[0] > 0),
            "tolist": lambda: y.tolist(),
            "cpu": lambda: y.cpu(),
            "a mask": lambda: y[y > 4],
            "nonzero": lambda: y.nonzero(),
            "repeat_interleave": lambda: x.repeat_interleave(x.long()),
            "a Python list": lambda: torch.tensor([1.0], device=x.device),
            "a blocking copy": lambda: torch.arange(3).to(x.device),
            "an index of the host": lambda: x[torch.tensor([0, 1])],
        }
        for name, wait in waits.items():
            before = len(device.waits)
            wait()
            assert len(device.waits) > before, name
