"""Frozen parts of a model run forward once a step, without a graph, under gradient checkpointing too.

Autograd records nothing where neither the inputs nor the weights need a gradient: a frozen vision tower, which reads
pixels, and a frozen projector above it cost their forward pass. transformers' gradient checkpointing undoes this. For
the sake of adapters it makes the output of every input embedding require a gradient, also of a vision tower's patch
embedding. A frozen tower is then checkpointed, recomputed and differentiated, and its gradient is thrown away.

`exempt_frozen_parts` takes this back. One case does need inputs that require a gradient: reentrant checkpointing gives
no gradient to a block whose input needs none, even if the block is trained. Therefore the embeddings of trained parts
keep their hook under that kind.
"""

from __future__ import annotations

from typing import Any


def exempt_frozen_parts(model: Any, reentrant: bool) -> None:
    """Take frozen encoders out of the gradient checkpointing of a transformers model.

    Call it after transformers has set up checkpointing, and after it is decided which weights are trained. What has an
    input embedding and is neither the decoder nor the model around it is an encoder: it reads pixels, so that nothing
    trained lies below it.
    """
    from transformers import PreTrainedModel

    model.disable_input_require_grads()
    decoder = model.get_decoder()
    encoders = [
        part for part in model.modules() if isinstance(part, PreTrainedModel) and decoder not in set(part.modules())
    ]
    for encoder in encoders:
        if any(parameter.requires_grad for parameter in encoder.parameters()):
            if reentrant:
                encoder.enable_input_require_grads()
            continue
        for module in encoder.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False  # type: ignore[assignment]
    if reentrant:
        decoder.enable_input_require_grads()
