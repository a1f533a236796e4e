"""Add the geometric loss to the Hugging Face `Trainer`. The lines to add are between the marks.

`Collator` makes batches of frames with their matches; `LayerCapture` takes the hidden states from the trainer's own
forward pass. The heads become a submodule of the trainer's model, so that its optimizer, checkpoints, DDP and DeepSpeed
include them. If you also use adapters, add these first: adding adapters freezes all existing parameters.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch.nn import ModuleList
from toy import room, show_log, tiny_model
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

# --- gasp_fast: begin
from gasp_fast import CorrespondenceHead, gasp_loss
from gasp_fast.collator import Collator
from gasp_fast.supervision.layer_capture import LayerCapture


class GeometryTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        matches, positions = inputs.pop("matches"), inputs.pop("visual_positions")
        with self.capture as capture:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        embeddings = [head(capture.tokens(layer, positions)) for layer, head in enumerate(self.model.gasp_heads)]
        self.geometry = gasp_loss(embeddings, matches, return_metrics=True)
        added = self.geometry.loss / (self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1)
        return (loss + added, outputs) if return_outputs else loss + added

    # --- gasp_fast: end

    def log(self, logs: dict, *args: object) -> None:  # optional: our terms in the trainer's own log
        terms = {"corr": self.geometry.corr.item(), "pck": self.geometry.metrics.pck.mean().item()}
        super().log({**logs, **terms}, *args)


def train(folder: Path) -> None:
    backbone, model = tiny_model(folder)
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=21,
        per_device_train_batch_size=1,
        learning_rate=2e-3,
        logging_steps=5,
        logging_first_step=True,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    samples = [room(folder)]
    # --- gasp_fast: begin
    trainer = GeometryTrainer(model, arguments, data_collator=Collator(backbone), train_dataset=samples)
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
