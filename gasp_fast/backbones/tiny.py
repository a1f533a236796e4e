"""Small random models for the demo, the tests and the examples, created without a download.

They use transformers' own model, processor and tokenizer classes, so all code for a 7B model also runs on them, in
milliseconds. A 224x224 frame becomes 14x14 tokens in both families. The default sizes learn correspondence on a CPU
within minutes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gasp_fast.files import complete_folder


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Sizes of a model. The defaults are tiny; the last fields serve to describe real sizes, see `SIZES_7B`."""

    model_type: str = "qwen2_5_vl"
    hidden_size: int = 128
    layers: int = 4
    query_heads: int = 4
    key_heads: int = 2  # for Qwen, which shares keys among query heads; LLaVA's Vicuna has one for each query head
    vision_depth: int = 2
    vision_hidden_size: int = 64
    patch_size: int = 8
    frame_size: int = 224  # a square frame of this size is not resized; Qwen shrinks frames of more pixels
    vocabulary: int = 512
    context: int = 16384
    seed: int = 0
    intermediate_size: int | None = None  # None: twice the hidden size
    embeddings: int | None = None  # rows of the embedding and of the lm head; None: the tokenizer's number of tokens
    vision_heads: int = 2
    vision_intermediate_size: int | None = None  # None: twice vision_hidden_size
    vision_full_layers: tuple[int, ...] | None = None  # for Qwen: layers without windows; None: the last one


# The sizes of both 7B models (with a tiny tokenizer), for benchmarks and FLOP counts with random weights.
SIZES_7B = {
    "qwen2_5_vl": TinyConfig(
        model_type="qwen2_5_vl", hidden_size=3584, layers=28, query_heads=28, key_heads=4, intermediate_size=18944,
        embeddings=152064, vision_depth=32, vision_hidden_size=1280, vision_heads=16, vision_intermediate_size=3420,
        vision_full_layers=(7, 15, 23, 31), patch_size=14, frame_size=672, context=128000,
    ),
    "llava_next_video": TinyConfig(
        model_type="llava_next_video", hidden_size=4096, layers=32, query_heads=32, key_heads=32,
        intermediate_size=11008, embeddings=32064, vision_depth=23, vision_hidden_size=1024, vision_heads=16,
        vision_intermediate_size=4096, patch_size=14, frame_size=336, context=4096,
    ),
}  # fmt: skip


def build_tiny(folder: str | os.PathLike[str], config: TinyConfig | None = None, weights: bool = True) -> Path:
    """Write a tiny model and its processor to `folder`, for `from_pretrained`. An error leaves no folder behind.

    Without `weights`, write only configuration and processor, for a model whose weights are created in memory.
    """
    config = TinyConfig() if config is None else config
    if config.model_type not in _BUILDERS:
        raise ValueError(
            f"model_type = {config.model_type!r} has no tiny version; choose one of {', '.join(_BUILDERS)}"
        )
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"folder = {str(folder)!r} exists already; remove it, or name another one")
    model_class, model_config, processor = _BUILDERS[config.model_type](config)
    with complete_folder(folder) as partial:
        if weights:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                model_class(model_config).save_pretrained(partial)
        else:
            model_config.save_pretrained(partial)
        processor.save_pretrained(partial)
    return folder


def _qwen2_5_vl(config: TinyConfig) -> tuple[Any, Any, Any]:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    specials += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = tiny_tokenizer(specials, config, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    id_of = tokenizer.convert_tokens_to_ids
    block = 2 * config.patch_size
    pixels = {"shortest_edge": 4 * block**2, "longest_edge": config.frame_size**2}
    patches: dict[str, Any] = {
        "patch_size": config.patch_size, "merge_size": 2, "temporal_patch_size": 2, "size": pixels
    }  # fmt: skip
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches),
        video_processor=Qwen2VLVideoProcessor(**patches),
        tokenizer=tokenizer,
        chat_template=_QWEN_TEMPLATE,
    )
    frequencies = config.hidden_size // config.query_heads // 2  # of rotary embedding, divided 2 : 3 : 3 as in 7B
    spatial = 3 * frequencies // 8
    model_config = Qwen2_5_VLConfig(
        text_config={
            **_decoder(config, tokenizer, config.key_heads),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [frequencies - 2 * spatial, spatial, spatial],  # time, row, column
            },
        },
        vision_config={
            "depth": config.vision_depth,
            "hidden_size": config.vision_hidden_size,
            "intermediate_size": config.vision_intermediate_size or 2 * config.vision_hidden_size,
            "num_heads": config.vision_heads,
            "patch_size": config.patch_size,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 8 * config.patch_size,
            "fullatt_block_indexes": list(config.vision_full_layers or [config.vision_depth - 1]),
            "out_hidden_size": config.hidden_size,
        },
        image_token_id=id_of("<|image_pad|>"),
        video_token_id=id_of("<|video_pad|>"),
        vision_start_token_id=id_of("<|vision_start|>"),
        vision_end_token_id=id_of("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration, model_config, processor


def _llava_next_video(config: TinyConfig) -> tuple[Any, Any, Any]:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextImageProcessor,
        LlavaNextVideoConfig,
        LlavaNextVideoForConditionalGeneration,
        LlavaNextVideoProcessor,
        LlavaNextVideoVideoProcessor,
    )

    specials = ["<unk>", "<s>", "</s>", "<pad>", "<video>", "<image>"]
    tokenizer = tiny_tokenizer(
        specials, config, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    size = config.frame_size
    pinpoints = [[size, 2 * size], [2 * size, size], [2 * size, 2 * size]]
    shape: dict[str, Any] = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    processor = LlavaNextVideoProcessor(
        image_processor=LlavaNextImageProcessor(image_grid_pinpoints=pinpoints, **shape),
        video_processor=LlavaNextVideoVideoProcessor(do_sample_frames=False, **shape),
        tokenizer=tokenizer,
        chat_template=_LLAVA_TEMPLATE,
        patch_size=config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    patches = (size // config.patch_size) ** 2
    model_config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=config.vision_hidden_size,
            intermediate_size=config.vision_intermediate_size or 2 * config.vision_hidden_size,
            num_hidden_layers=config.vision_depth + 1,  # the model uses the output of the last but one
            num_attention_heads=config.vision_heads,
            image_size=size,
            patch_size=config.patch_size,
            projection_dim=config.vision_hidden_size,
        ),
        text_config=LlamaConfig(**_decoder(config, tokenizer, config.query_heads)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        image_seq_length=patches,
        video_seq_length=patches // 4,
    )
    return LlavaNextVideoForConditionalGeneration, model_config, processor


_BUILDERS = {"qwen2_5_vl": _qwen2_5_vl, "llava_next_video": _llava_next_video}


def _decoder(config: TinyConfig, tokenizer: Any, key_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": config.embeddings or len(tokenizer),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size or 2 * config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": key_heads,
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

_QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() }}: {% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}<video>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
