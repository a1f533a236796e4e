"""Tiny models that give the same short answer to every question.

The first dimension of the hidden state says what comes next. It is -100 in every embedding, from which the model's
output is the answer, except in that of the answer, where it is 100, from which the output is the end of the text. What
the layers add is small beside it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from gasp_fast.backbones.tiny import TinyConfig, build_tiny


def build_answering(folder: Path, family: str, answer: str) -> Path:
    """Write a tiny model whose answer is the character `answer`, as an export would be written."""
    from transformers import AutoModelForImageTextToText, AutoProcessor  # after gasp_fast.backbones

    shape = TinyConfig(model_type=family, hidden_size=64, frame_size=112, vision_hidden_size=32, query_heads=2)
    build_tiny(folder, shape)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    token = tokenizer.convert_tokens_to_ids(answer)
    assert token != tokenizer.unk_token_id and tokenizer.decode([token]) == answer
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = -100
        model.get_input_embeddings().weight[token, 0] = 100
        model.model.language_model.norm.weight.zero_()[0] = 1
        head = model.get_output_embeddings().weight.zero_()
        head[token, 0], head[tokenizer.eos_token_id, 0] = -1, 1
    model.save_pretrained(folder)
    return folder
