"""Add the geometric loss to TRL's `SFTTrainer`. The lines to add are between the marks.

The data keep TRL's format: a `Dataset` with `images` and `messages`, and TRL's own collator. One more column,
`matches`, holds the fields of `gasp_fast.Matches`, which you can compute in any way. `LayerCapture` takes the hidden
states from the trainer's own forward pass, and the token id locates the visual tokens. The heads are attached after the
trainer is created, because it may add adapters, which freezes all existing parameters.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from datasets import Dataset
from torch.nn import ModuleList
from toy import question_rows, show_log, tiny_model
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

# --- gasp_fast: begin
from gasp_fast import CorrespondenceHead, Matches, gasp_loss
from gasp_fast.supervision.layer_capture import LayerCapture


class GeometryTrainer(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        matches, visual = inputs.pop("matches"), inputs["input_ids"] == self.model.config.image_token_id  # [B, S]
        with self.capture as capture:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        embeddings = [head(capture.hidden(layer)[visual]) for layer, head in enumerate(self.model.gasp_heads)]
        self.geometry = gasp_loss(embeddings, matches, return_metrics=True)
        added = self.geometry.loss / (self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1)
        return (loss[0] + added, loss[1]) if return_outputs else loss + added

    # --- gasp_fast: end

    def log(self, logs: dict, *args: object) -> None:  # optional: our terms in the trainer's own log
        terms = {"corr": self.geometry.corr.item(), "pck": self.geometry.metrics.pck.mean().item()}
        super().log({**logs, **terms}, *args)


def train(folder: Path) -> None:
    backbone, model = tiny_model(folder)
    settings = SFTConfig(
        output_dir=str(folder / "run"),
        max_steps=16,
        per_device_train_batch_size=1,
        learning_rate=2e-3,
        logging_steps=5,
        logging_first_step=True,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_length=None,  # a truncated row would lose visual tokens
        remove_unused_columns=False,
    )
    rows = Dataset.from_list(question_rows(folder, backbone))
    collate_text_and_images = DataCollatorForVisionLanguageModeling(backbone.processor)

    # --- gasp_fast: begin
    def collate(rows):
        return {**collate_text_and_images(rows), "matches": Matches.pack([Matches(**row["matches"]) for row in rows])}

    # --- gasp_fast: end

    trainer = GeometryTrainer(
        model,
        settings,
        data_collator=collate,
        train_dataset=rows.with_format("torch", columns=["matches"], output_all_columns=True),
        processing_class=backbone.processor,
    )
    # --- gasp_fast: begin
    trainer.capture = LayerCapture(backbone.decoder_layers(model), backbone.final_norm(model))
    trainer.model.gasp_heads = ModuleList(CorrespondenceHead(backbone.hidden_size) for _ in trainer.capture.layers)
    # --- gasp_fast: end
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    show_log(trainer.state.log_history)

    del model.gasp_heads  # only for training: the saved model has transformers' own modules
    trainer.save_model(folder / "trained")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder))
