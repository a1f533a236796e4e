"""The Hugging Face `Trainer` on a tiny model and a rendered room, those of the examples."""

import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

import gasp_fast

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import toy


class Setting:
    """A tiny model, its processor, and a room."""

    without = ()  # numbers of batches without matches
    instead = ()  # what they have instead, as pairs

    def __init__(self, folder):
        self.folder = folder
        self.sample = toy.room(folder)
        torch.manual_seed(0)
        _, self.processor = toy.tiny_model(folder)

    def model(self, dtype=torch.float32):
        from transformers import AutoModelForImageTextToText

        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_pretrained(self.folder / "model", dtype=dtype)

    def inputs(self, gasp, number):
        """Batch `number`: other batches see other tracks."""
        [tracks] = self.sample.tracks
        chosen = slice(number, None, number + 2)
        batch = toy.model_inputs(self.processor, [self.sample])
        if number in self.without:
            return {**batch, **dict(self.instead)}
        matches = gasp.matches(self.sample.frames, tracks.uv[chosen], tracks.visible[chosen])
        return {**batch, "matches": matches}

    def arguments(self, **options):
        settings = {
            "output_dir": str(self.folder / "run"), "per_device_train_batch_size": 1, "learning_rate": 0.05,
            "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
            "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False, "report_to": "none",
            "max_grad_norm": 0.0,
        }  # fmt: skip
        return TrainingArguments(**{**settings, **options})

    def trainer(self, gasp, model, numbers, callbacks=(), resume_from=None, **options):
        return Trainer(
            model,
            self.arguments(**options),
            data_collator=lambda rows: self.inputs(gasp, rows[0]),
            train_dataset=numbers,
            eval_dataset=numbers[:1],
            callbacks=[gasp_fast.GaspCallback(gasp, resume_from), *callbacks],
        )
