"""Run by `test_callback.py`, alone or under torchrun: a Trainer takes one step of two samples."""

import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import torch
import toy
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import gasp_fast
from gasp_fast.training.distributed import start_processes

ZERO_2 = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
}


def main(folder: Path, out: Path, accumulated: int, deepspeed: bool) -> None:
    if deepspeed:
        start_processes(deepspeed=True)  # DeepSpeed alone would compile its collectives for CPUs, for a minute
    processor = AutoProcessor.from_pretrained(folder / "model")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    sample = pickle.loads((folder / "sample.pickle").read_bytes())
    gasp = gasp_fast.attach(model, processor)

    def collate(rows):
        [tracks], every = sample.tracks, slice(rows[0], None, 2)  # each sample has other tracks
        matches = gasp.matches(sample.frames, tracks.uv[every], tracks.visible[every], depth_maps=sample.depth)
        return {**toy.model_inputs(processor, [sample]), "matches": matches}

    arguments = TrainingArguments(
        output_dir=str(folder / "run"), max_steps=1, per_device_train_batch_size=1, optim="sgd", learning_rate=0.05,
        gradient_accumulation_steps=accumulated, use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
        report_to="none", save_strategy="no", logging_steps=1, max_grad_norm=0.0, lr_scheduler_type="constant",
        deepspeed=ZERO_2 if deepspeed else None,
    )  # fmt: skip
    callbacks = [gasp_fast.GaspCallback(gasp)]
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=[0, 1], callbacks=callbacks)
    trainer.train()
    if trainer.is_world_process_zero():
        weights = {name: value.detach() for name, value in model.named_parameters()}
        torch.save({"weights": weights, "corr": trainer.state.log_history[0]["corr"]}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] == ["ds"])
