"""The sizes of tiny models, and their tokenizer: `tiny.py` writes the models of `tiny_families.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Sizes of a model. The defaults are tiny; the last fields serve to describe real sizes, see `SIZES_7B`."""

    model_type: str = "qwen2_5_vl"
    hidden_size: int = 128
    layers: int = 4
    query_heads: int = 4
    key_heads: int = 2  # but for LLaVA-NeXT-Video, whose Vicuna has a key head for each query head
    vision_depth: int = 2
    vision_hidden_size: int = 64
    patch_size: int = 8
    frame_size: int = 224  # a square frame of this size is not resized; the Qwens shrink frames of more pixels
    vocabulary: int = 512
    context: int = 16384
    seed: int = 0
    intermediate_size: int | None = None  # None: twice the hidden size
    embeddings: int | None = None  # rows of the embedding and of the lm head; None: the tokenizer's number of tokens
    vision_heads: int = 2
    vision_intermediate_size: int | None = None  # None: twice vision_hidden_size
    vision_full_layers: tuple[int, ...] | None = None  # for Qwen2.5-VL: layers without windows; None: the last one


def decoder_sizes(config: TinyConfig, tokenizer: Any, key_heads: int | None = None) -> dict[str, Any]:
    return {
        "vocab_size": config.embeddings or len(tokenizer),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size or 2 * config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": key_heads or config.key_heads,
        "max_position_embeddings": config.context,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def tiny_tokenizer(specials: Sequence[str], config: TinyConfig, **named: str) -> Any:
    """A byte-level BPE tokenizer, trained on sentences like those of the synthetic questions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary - len(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens(list(specials))
    if "bos_token" in named:  # prepended to every text, as by Llama's tokenizer
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    extra = [token for token in specials if token not in named.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=extra, model_max_length=config.context, **named
    )


_CORPUS = (
    "How many boxes are in the room? There are 0 1 2 3 4 5 6 7 8 9 boxes.",
    "Which colour is nearer to the camera in the first image, red or blue? The green box is nearer than the grey box.",
    "Which way did the camera turn? The camera turned to the left, then to the right, up and down.",
    "Which labelled point in image 2 corresponds to point A in image 1? Answer with one letter: A, B, C or D.",
    "Give the [x, y] position of the same point in image 3. The point is at [0.25, 0.75].",
    "What is shown in the video? A room with textured walls, a floor, a ceiling and boxes of several colours.",
    "How far is the table from the door in metres? system user assistant You are a helpful assistant. Describe it.",
    "yellow white black orange purple brown pink cyan magenta yes no one two three four five six seven eight nine ten",
)
