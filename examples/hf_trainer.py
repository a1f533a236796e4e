"""Add the geometric loss to the Hugging Face `Trainer`. The lines to add are between the marks.

`attach` puts a correspondence head on every decoder layer. The data collator adds `matches` to each batch, and
`GaspCallback` adds the loss, logs it, and saves and resumes the heads. Adapters can be added before or after.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from toy import model_inputs, room, show_log, tiny_model
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

# --- gasp_fast: begin
import gasp_fast

# --- gasp_fast: end


def train(folder: Path, steps: int = 21, resume: bool = False) -> Trainer:
    model, processor = tiny_model(folder)
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=2e-3,
        logging_steps=5,
        logging_first_step=True,
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )

    # --- gasp_fast: begin
    gasp = gasp_fast.attach(model, processor)

    def matches_of(sample):
        [tracks] = sample.tracks  # uv [T, F, 2] and visible [T, F], from anywhere
        return gasp.matches(sample.frames, tracks.uv, tracks.visible, depth_maps=sample.depth)

    # --- gasp_fast: end

    def collate(samples):
        batch = model_inputs(processor, samples)
        # --- gasp_fast: begin
        batch["matches"] = gasp_fast.Matches.pack([matches_of(sample) for sample in samples])
        # --- gasp_fast: end
        return batch

    # --- gasp_fast: begin
    callbacks = [gasp_fast.GaspCallback(gasp)]
    # --- gasp_fast: end
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=[room(folder)], callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(folder / "trained")  # a plain model: the heads are in the checkpoints, as heads.safetensors
    return trainer


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        show_log(train(Path(folder)).state.log_history)
