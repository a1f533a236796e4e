"""`GaspCallback`: the supervision of `attach` in the Hugging Face `Trainer` and in the trainers of TRL.

    gasp = gasp_fast.attach(model, processor)
    trainer = Trainer(model, args, train_dataset=..., data_collator=..., callbacks=[gasp_fast.GaspCallback(gasp)])

The batches of the data collator have one more entry, `matches`; with `remove_unused_columns=False` the trainer passes
it on. A first step without it is an error, because the heads would learn nothing. The loss in the trainer's log remains
its own; the log gets `gasp_loss`, `corr`, `depth` and `pck`, means since the last line, besides. Checkpoints get
`heads.safetensors`, from which a resumed run continues.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.trainer_callback import (
    ExportableState,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.training_args import TrainingArguments

from gasp_fast.run_folder import HEADS

from .attach import Gasp

TERMS = ("gasp_loss", "corr", "depth", "pck")
CURE = (
    'return them from the data collator, batch["matches"] = gasp_fast.Matches.pack([gasp.matches(...), ...]), with '
    "remove_unused_columns=False; a batch without tracks has matches=None"
)


class GaspCallback(TrainerCallback, ExportableState):
    """Adds the loss, logs it, saves and resumes the heads.

    `resume_from` is the checkpoint from which the heads continue, if the trainer resumes from one outside its
    `output_dir`.
    """

    def __init__(self, gasp: Gasp, resume_from: str | Path | None = None) -> None:
        self.gasp = gasp
        self.resume_from = resume_from
        self._sums = {"": _Means(), "eval_": _Means()}  # of training, and of an evaluation
        self._first_step = True  # it has not ended yet
        self._warned = False

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None
        _refuse_what_does_not_work(args)
        self.gasp.join(model)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **also: Any) -> None:
        batches = also["train_dataloader"]
        self.gasp.share = 1 / _passes_of_step(state.global_step, args.gradient_accumulation_steps, batches)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Refuse a first step in which no process had `matches`; warn of a pass without later."""
        if self._first_step:
            self._first_step = False
            if not _sum_over_processes(torch.tensor([float(self.gasp.passes_with_matches)])).item():
                raise ValueError(f"GaspCallback: no batch of the first step has matches; {CURE}")
        if self.gasp.passes_without_matches and not self._warned:
            self._warned = True
            warnings.warn(
                f"GaspCallback: a batch has no matches, so only the trainer's own loss; {CURE}",
                stacklevel=2,
            )

    def on_substep_end(self, *_: Any, **__: Any) -> None:  # a forward pass of an accumulated step
        self._sums[""].add(self.gasp.metrics)

    def on_step_end(self, *_: Any, **__: Any) -> None:  # the last or only one of a step
        self._sums[""].add(self.gasp.metrics)

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        self._sums["eval_"].add(self.gasp.metrics)

    # ---- the log -----------------------------------------------------------------------------------------------------

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Add the terms to the line: to the history, and to `logs` for the callbacks that come after this one."""
        if not logs or "train_runtime" in logs:  # the last line, of the whole run
            return
        prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
        terms = {f"{prefix}{name}": value for name, value in self._sums[prefix].taken().items()}
        logs.update(terms)
        state.log_history[-1].update(terms)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the trainer writes into `trainer_state.json` just before `on_save`: which heads the checkpoint has."""
        return {"args": {}, "attributes": {"heads": _digest(self.gasp)}}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.gasp.save(_checkpoint(args, state))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._first_step, self._warned = True, False
        self.gasp.passes_with_matches = self.gasp.passes_without_matches = 0
        if state.global_step == 0:
            return
        folder = Path(self.resume_from or _checkpoint(args, state))
        cure = "pass the checkpoint from which the trainer resumes: GaspCallback(gasp, resume_from=...)"
        if not (folder / HEADS).is_file():
            raise OSError(
                f"{folder / HEADS} does not exist, so the heads cannot continue at {state.global_step}; {cure}"
            )
        self.gasp.load(folder)
        saved: Any = state.stateful_callbacks  # read from trainer_state.json: what `state` returned
        expected = saved[type(self).__name__]["attributes"]["heads"]
        if expected != _digest(self.gasp):
            raise ValueError(f"{folder / HEADS} has other heads than those that the checkpoint was saved with; {cure}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if without := self.gasp.passes_without_matches:
            passes = without + self.gasp.passes_with_matches
            warnings.warn(f"GaspCallback: {without} of {passes} batches had no matches", stacklevel=2)
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self.gasp.load(state.best_model_checkpoint)


class _Means:
    """Means of the terms over the forward passes that had them: matches, and for some terms depth or a grid."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # float64 [2, terms]: sums, and numbers of passes

    def add(self, metrics: dict[str, Tensor]) -> None:
        if not metrics:
            return
        terms = torch.stack([metrics["loss"], *(metrics[name].mean() for name in TERMS[1:])]).double()
        had = ~terms.isnan()  # depth and pck are NaN in a pass without them
        had[:2] = True
        row = torch.stack([terms.where(had, 0.0), had.double()])
        self.sums = row if self.sums is None else self.sums + row

    def taken(self) -> dict[str, float]:
        """The means over all processes since the last call; none without passes."""
        sums, self.sums = self.sums, None
        sums = _sum_over_processes(torch.zeros(2, len(TERMS), dtype=torch.float64) if sums is None else sums)
        return {name: total / count for name, total, count in zip(TERMS, *sums.tolist(), strict=True) if count}


def _sum_over_processes(values: Tensor) -> Tensor:
    if dist.is_initialized():
        values = values.to("cpu" if dist.get_backend() == "gloo" else torch.cuda.current_device())
        dist.all_reduce(values)
    return values


def _passes_of_step(step: int, accumulated: int, dataloader: Any) -> int:
    """Forward passes of an optimiser step. The last step of an epoch may have fewer than the others."""
    try:
        batches = len(dataloader)
    except TypeError:  # a stream without an end
        return accumulated
    steps = math.ceil(batches / accumulated)
    return batches - (steps - 1) * accumulated if step % steps == steps - 1 else accumulated


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _digest(gasp: Gasp) -> str:
    digest = hashlib.sha256()
    for parameter in gasp.parameters():
        digest.update(parameter.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:20]


def _refuse_what_does_not_work(args: TrainingArguments) -> None:
    reasons = {
        "fp16 = True scales the trainer's loss, but not that of the heads; use bf16": args.fp16,
        "fsdp divides the heads' weights; use DDP, ZeRO-1 or ZeRO-2, or gasp_fast.train": bool(args.fsdp),
        "ZeRO-3 divides the heads' weights; use ZeRO-1 or ZeRO-2, or gasp_fast.train": _zero_stage(args) == 3,
        "several GPUs in one process copy the model in each step; start it with torchrun": args.n_gpu > 1,
        "remove_unused_columns = True would drop the matches; set it to False": args.remove_unused_columns,
        "restore_callback_states_from_checkpoint = True would build a callback without its heads; leave it out, heads "
        "are restored without it": args.restore_callback_states_from_checkpoint,
    }
    for reason, true in reasons.items():
        if true:
            raise ValueError(f"GaspCallback: {reason}")


def _zero_stage(args: TrainingArguments) -> int:
    plugin = getattr(args, "deepspeed_plugin", None)
    return 0 if plugin is None else int(plugin.zero_stage)
