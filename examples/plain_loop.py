"""Add the geometric loss to your own PyTorch loop. The lines to add are between the marks.

`attach` puts a correspondence head on every decoder layer. `gasp.matches` turns point tracks into pairs of visual
tokens that show the same point. `gasp.loss` compares these tokens at every layer of the forward pass before it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from toy import model_inputs, room, tiny_model

# --- gasp_fast: begin
import gasp_fast

# --- gasp_fast: end

STEPS = 21


def train(folder: Path) -> None:
    model, processor = tiny_model(folder)
    sample = room(folder)
    [tracks] = sample.tracks  # uv [T, F, 2] and visible [T, F], from anywhere
    # --- gasp_fast: begin
    gasp = gasp_fast.attach(model, processor)
    matches = gasp.matches(sample.frames, tracks.uv, tracks.visible, depth_maps=sample.depth)
    # --- gasp_fast: end
    optimizer = torch.optim.AdamW([*model.parameters(), *gasp.parameters()], lr=2e-3)

    print(f"{'step':>4}  {'loss':>6}  {'text':>6}  {'corr':>6}  {'depth':>6}  {'PCK@2':>6}")
    for step in range(STEPS):
        batch = model_inputs(processor, [sample])
        text_loss = model(**batch).loss
        # --- gasp_fast: begin
        loss = text_loss + gasp.loss(gasp.visual_positions(batch["input_ids"]), matches)
        # --- gasp_fast: end
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            values = (loss, text_loss, *(gasp.metrics[name].mean() for name in ("corr", "depth", "pck")))
            print(f"{step:4d}", *(f"{value.item():6.3f}" for value in values), sep="  ")

    # --- gasp_fast: begin
    gasp.save(folder / "trained")  # heads.safetensors
    gasp.detach()
    # --- gasp_fast: end
    model.save_pretrained(folder / "trained")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder))
