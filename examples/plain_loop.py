"""Add the geometric loss to your own PyTorch loop. The lines to add are between the marks.

A batch of `Collator` has two entries besides the model's inputs: `matches`, the pairs of visual tokens that show the
same point, and `visual_positions`, the positions of the visual tokens in the batch. `LayerCapture` keeps the hidden
states of all decoder layers of a forward pass; a head maps each to embeddings, and `gasp_loss` compares them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from toy import room, tiny_model

# --- gasp_fast: begin
from gasp_fast import CorrespondenceHead, gasp_loss
from gasp_fast.collator import Collator
from gasp_fast.supervision.layer_capture import LayerCapture

# --- gasp_fast: end

STEPS = 21


def train(folder: Path) -> None:
    backbone, model = tiny_model(folder)
    samples = [room(folder)]
    # --- gasp_fast: begin
    collate = Collator(backbone)
    capture = LayerCapture(backbone.decoder_layers(model), backbone.final_norm(model))
    model.gasp_heads = torch.nn.ModuleList(CorrespondenceHead(backbone.hidden_size) for _ in capture.layers)
    # --- gasp_fast: end
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    print(f"{'step':>4}  {'loss':>6}  {'text':>6}  {'corr':>6}  {'depth':>6}  {'PCK@2':>6}")
    for step in range(STEPS):
        batch = collate(samples)
        # --- gasp_fast: begin
        matches, positions = batch.pop("matches"), batch.pop("visual_positions")
        with capture:
            text_loss = model(**batch).loss
        embeddings = [head(capture.tokens(layer, positions)) for layer, head in enumerate(model.gasp_heads)]
        geometry = gasp_loss(embeddings, matches, return_metrics=True)
        loss = text_loss + geometry.loss
        # --- gasp_fast: end
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            values = (loss, text_loss, geometry.corr, geometry.depth, geometry.metrics.pck.mean())
            print(f"{step:4d}", *(f"{value.item():6.3f}" for value in values), sep="  ")

    del model.gasp_heads  # only for training: the saved model has transformers' own modules
    model.save_pretrained(folder / "trained")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder))
