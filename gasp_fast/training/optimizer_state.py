"""AdamW's state of every trained parameter, whole and by the parameter's name, however training divides it.

    optimizer-N.safetensors    NAME.exp_avg and NAME.exp_avg_sq, shaped as the parameter; NAME.step, a scalar

Plain PyTorch and DDP hold the state by parameter. ZeRO flattens the parameters and gives every process a part of the
result. At saving the parts are put together, and at loading they are cut anew. Numbers are copied and never computed,
so a run continues with any number of processes and any ZeRO stage, and with the same ones bitwise.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .divided_files import FILE_BYTES, Dealt, read_into, shapes, write

FILES = "optimizer-"  # begins the names of the files
MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = tuple(f".{part}" for part in (*MOMENTS, "step"))


def gathered_state(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """(NAME.exp_avg, tensor) and so on. All processes must call, and take every tensor.

    `optimizer` is torch's AdamW, or ZeRO's around it. A parameter that no step has used has no state, except in ZeRO.
    """
    plain = isinstance(optimizer, torch.optim.Optimizer)
    if not plain:
        _link_parts(optimizer)
    for name, parameter in _trained(model).items():
        state = optimizer.state.get(parameter, {}) if plain else _gathered_from_zero(parameter, optimizer)
        for part in (*MOMENTS, "step"):
            if part in state:
                yield f"{name}.{part}", state[part].detach()


def write_state(folder: Path, dealt: Dealt, group: dist.ProcessGroup | None, first: bool) -> None:
    """Write the files; all processes must call. DCP gives them the names of a model's files, so they are renamed."""
    write(unnamed := folder / "optimizer", dealt, group)
    if first:
        for number, path in enumerate(sorted(unnamed.glob("*.safetensors")), 1):
            path.rename(folder / f"optimizer-{number}.safetensors")
        shutil.rmtree(unnamed)


def without_state(model: nn.Module, optimizer: Any) -> list[str]:
    """The trained parameters that no step has used, so that AdamW has no state of them. ZeRO has one of all."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return []
    return [name for name, parameter in _trained(model).items() if not optimizer.state.get(parameter)]


def read_state(folder: Path, model: nn.Module, optimizer: Any, without: Iterable[str] | None = ()) -> None:
    """Give the optimiser of a new run the state in `folder`. Every process reads it and keeps its part.

    Every trained parameter must have a state there, but for those `without`, which must have none. None: unknown, as
    for full training in checkpoints of earlier versions; then any parameter may have none.
    """
    trained = _trained(model)
    stored = {name: shape for name, shape in shapes(folder, FILES).items() if name.endswith(PARTS)}
    _check_names(stored.keys(), trained.keys(), without)
    _check_shapes(stored, trained)
    with_state = {name: parameter for name, parameter in trained.items() if f"{name}.step" in stored}
    taken = {f"{name}.step": torch.zeros(()) for name in with_state}
    read_into(taken, folder, FILES)
    if isinstance(optimizer, torch.optim.Optimizer):
        for name, parameter in with_state.items():
            step = taken[f"{name}.step"].to(parameter.device)
            optimizer.state[parameter] = {"step": step, **{part: torch.empty_like(parameter) for part in MOMENTS}}
        moments = {f"{name}.{part}": optimizer.state[trained[name]][part] for name in with_state for part in MOMENTS}
        read_into(moments, folder, FILES)
        return
    steps = {float(step) for step in taken.values()}
    if len(steps) > 1:
        raise ValueError(f"its parameters have taken {sorted(steps)} steps; ZeRO needs one number for all")
    _begin_zero(optimizer, steps.pop() if steps else 0.0)
    for names in _in_groups(with_state):
        moments = {f"{name}.{part}": torch.empty(_shape(trained[name])) for name in names for part in MOMENTS}
        read_into(moments, folder, FILES)
        for name in names:
            for part in MOMENTS:
                _divide_for_zero(trained[name], part, moments[f"{name}.{part}"])


def _in_groups(parameters: dict[str, nn.Parameter]) -> Iterator[list[str]]:
    """Names of parameters whose moments are in host memory at once: of `FILE_BYTES`, at most by one parameter more."""
    names, held = list[str](), 0
    for name, parameter in parameters.items():
        names.append(name)
        held += len(MOMENTS) * 4 * _shape(parameter).numel()
        if held >= FILE_BYTES:
            yield names
            names, held = [], 0
    if names:
        yield names


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _shape(parameter: nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor
    return shape


def _check_names(stored: Iterable[str], trained: Iterable[str], without: Iterable[str] | None) -> None:
    """A parameter has all of its tensors; one of `without`, or where these are unknown any, may have none."""
    stored, trained = set(stored), set(trained)
    owners = {name.rpartition(".")[0] for name in stored}
    allowed = trained - set(without or ())
    required = owners if without is None else owners | allowed
    expected = {f"{name}.{part}" for name in required for part in (*MOMENTS, "step")}
    if missing := expected - stored:
        raise ValueError(f"{min(missing)} is missing")
    if unknown := owners - allowed:
        raise ValueError(f"it holds a state of {min(unknown)}, which is not trained or had none when it was saved")


def _check_shapes(stored: dict[str, tuple[int, ...]], trained: dict[str, nn.Parameter]) -> None:
    for full_name, shape in stored.items():
        name, _, part = full_name.rpartition(".")
        expected = () if part == "step" else tuple(_shape(trained[name]))
        if shape != expected:
            raise ValueError(f"{full_name} has the shape {list(shape)} instead of {list(expected)}")


# ---- ZeRO -----------------------------------------------------------------------------------------------------------
# `zero` is DeepSpeed's optimiser of stage 1, 2 or 3, and `zero.optimizer` AdamW, whose parameters are flat fp32 tensors
# that hold this process's part of all of them.


def _flat_parts(zero: Any) -> list[Tensor]:
    stage_3: list[Tensor] | None = getattr(zero, "fp32_partitioned_groups_flat", None)
    return zero.single_partition_of_fp32_groups if stage_3 is None else stage_3


def _link_parts(zero: Any) -> None:
    """Let stages 1 and 2 find the moments of each parameter. DeepSpeed does so for the first group only."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if hasattr(zero, "bit16_groups"):
        for parameters, part in zip(zero.bit16_groups, _flat_parts(zero), strict=True):
            lazy_init_hp_params_optimizer_state(parameters, part, zero.optimizer.state)


def _gathered_from_zero(parameter: nn.Parameter, zero: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_optimizer_state

    states = zero.optimizer.state
    if not any(states.values()):  # no step has been taken: each so far had a gradient that was not finite
        zeros = torch.zeros(_shape(parameter))
        return {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": torch.zeros(())}
    steps = {float(state["step"]) for state in states.values()}
    gathered = {part: safe_get_full_optimizer_state(parameter, part) for part in MOMENTS}
    return {**gathered, "step": torch.tensor(steps.pop())}


def _begin_zero(zero: Any, step: float) -> None:
    """Create the state that AdamW would create in its first step, so that there is something to copy into."""
    adam = zero.optimizer
    tensors = isinstance(adam, torch.optim.AdamW)  # DeepSpeed's own Adam for CPUs counts its steps in Python
    for part in _flat_parts(zero):
        taken = torch.tensor(step, device=part.device) if tensors else int(step)
        adam.state[part] = {"step": taken, **{name: torch.zeros_like(part) for name in MOMENTS}}
    _link_parts(zero)


def _divide_for_zero(parameter: nn.Parameter, name: str, value: Tensor) -> None:
    """Copy this process's part of `value` into the state of a parameter."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not hasattr(parameter, "ds_id"):
        safe_set_full_optimizer_state(parameter, value, name)
        return
    # In stage 3 every process has equally many numbers of a parameter, the last ones being padding.
    own = vars(parameter)["ds_tensor"].numel()
    padded = F.pad(value.flatten(), (0, own * dist.get_world_size() - value.numel()))
    safe_set_local_optimizer_state(parameter, padded.narrow(0, own * dist.get_rank(), own), name)
