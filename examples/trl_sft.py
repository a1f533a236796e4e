"""Add the geometric loss to TRL's `SFTTrainer`. The lines to add are between the marks.

The data keep TRL's format, `images` and `messages`, and have two more columns: point tracks through the images. The
collator turns them into matches. `GaspCallback` adds the loss, logs it, and saves and resumes the heads.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from datasets import Dataset
from toy import room, rows_for_trl, show_log, tiny_model
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

# --- gasp_fast: begin
import gasp_fast

# --- gasp_fast: end


def train(folder: Path) -> SFTTrainer:
    model, processor = tiny_model(folder)
    settings = SFTConfig(
        output_dir=str(folder / "run"),
        max_steps=16,
        per_device_train_batch_size=1,
        learning_rate=2e-3,
        logging_steps=5,
        logging_first_step=True,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_length=None,  # a truncated row would lose visual tokens
        remove_unused_columns=False,
    )
    rows = Dataset.from_list(rows_for_trl([room(folder)]))  # also uv [T, F, 2], visible [T, F] and depth_maps
    texts_and_images = DataCollatorForVisionLanguageModeling(processor)
    # --- gasp_fast: begin
    gasp = gasp_fast.attach(model, processor)

    def collate(rows):
        named = [(row["images"], row["uv"], row["visible"], row["depth_maps"]) for row in rows]
        matches = [gasp.matches(images, uv, visible, depth_maps=maps) for images, uv, visible, maps in named]
        return {**texts_and_images(rows), "matches": gasp_fast.Matches.pack(matches)}

    callbacks = [gasp_fast.GaspCallback(gasp)]
    # --- gasp_fast: end
    trainer = SFTTrainer(model, settings, collate, rows, processing_class=processor, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(folder / "trained")  # a plain model: the heads are in the checkpoints, as heads.safetensors
    return trainer


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        show_log(train(Path(folder)).state.log_history)
