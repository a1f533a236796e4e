"""Configuration and processor of a tiny model of each family, in transformers' own classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .tiny_parts import TinyConfig, decoder_sizes, tiny_tokenizer


def _qwen2_vl(config: TinyConfig) -> tuple[Any, Any, Any]:
    import transformers as hf

    processor = _qwen_processor(config, hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor)
    tokenizer = processor.tokenizer
    model_config = hf.Qwen2VLConfig(
        text_config={**decoder_sizes(config, tokenizer), **_mrope(config.hidden_size // config.query_heads)},
        vision_config={
            "depth": config.vision_depth,
            "embed_dim": config.vision_hidden_size,
            "mlp_ratio": (config.vision_intermediate_size or 2 * config.vision_hidden_size)
            // config.vision_hidden_size,
            "num_heads": config.vision_heads,
            "patch_size": config.patch_size,
            "hidden_size": config.hidden_size,  # of the decoder
        },
        **_qwen_tokens(tokenizer),
    )
    return hf.Qwen2VLForConditionalGeneration, model_config, processor


def _qwen2_5_vl(config: TinyConfig) -> tuple[Any, Any, Any]:
    import transformers as hf

    processor = _qwen_processor(config, hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor)
    tokenizer = processor.tokenizer
    model_config = hf.Qwen2_5_VLConfig(
        text_config={**decoder_sizes(config, tokenizer), **_mrope(config.hidden_size // config.query_heads)},
        vision_config={
            **_qwen_tower(config),
            "tokens_per_second": 2,
            "window_size": 8 * config.patch_size,
            "fullatt_block_indexes": list(config.vision_full_layers or [config.vision_depth - 1]),
        },
        **_qwen_tokens(tokenizer),
    )
    return hf.Qwen2_5_VLForConditionalGeneration, model_config, processor


def _qwen3_vl(config: TinyConfig, experts: bool = False) -> tuple[Any, Any, Any]:
    import transformers as hf

    processor = _qwen_processor(config, hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor)
    tokenizer = processor.tokenizer
    head_dim = 3 * config.hidden_size // config.query_heads // 2  # not hidden_size / heads, as in several sizes
    sizes = {**decoder_sizes(config, tokenizer), "head_dim": head_dim, **_mrope(head_dim)}
    if experts:
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": sizes["intermediate_size"] // 2}
    config_class: Any = hf.Qwen3VLMoeConfig if experts else hf.Qwen3VLConfig
    model_class = hf.Qwen3VLMoeForConditionalGeneration if experts else hf.Qwen3VLForConditionalGeneration
    model_config = config_class(
        text_config=sizes,
        vision_config={
            **_qwen_tower(config),
            "num_position_embeddings": (config.frame_size // config.patch_size) ** 2,
            "deepstack_visual_indexes": list(range(config.vision_depth)),
        },
        **_qwen_tokens(tokenizer),
    )
    return model_class, model_config, processor


def _qwen_processor(config: TinyConfig, processor_class: Any, video_class: Any) -> Any:
    from transformers import Qwen2VLImageProcessor

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    specials += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    block = 2 * config.patch_size
    pixels = {"shortest_edge": 4 * block**2, "longest_edge": config.frame_size**2}
    patches: dict[str, Any] = {
        "patch_size": config.patch_size, "merge_size": 2, "temporal_patch_size": 2, "size": pixels
    }  # fmt: skip
    return processor_class(
        image_processor=Qwen2VLImageProcessor(**patches),
        video_processor=video_class(**patches),
        tokenizer=tiny_tokenizer(specials, config, pad_token="<|endoftext|>", eos_token="<|im_end|>"),
        chat_template=_QWEN_TEMPLATE,
    )


def _qwen_tower(config: TinyConfig) -> dict[str, Any]:
    return {
        "depth": config.vision_depth,
        "hidden_size": config.vision_hidden_size,
        "intermediate_size": config.vision_intermediate_size or 2 * config.vision_hidden_size,
        "num_heads": config.vision_heads,
        "patch_size": config.patch_size,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": config.hidden_size,
    }


def _mrope(head_dim: int) -> dict[str, Any]:
    """Frequencies of the rotary embedding, divided 2 : 3 : 3 among time, row and column, as in Qwen2.5-VL-7B."""
    spatial = 3 * (head_dim // 2) // 8
    section = [head_dim // 2 - 2 * spatial, spatial, spatial]
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}}


def _qwen_tokens(tokenizer: Any) -> dict[str, Any]:
    id_of = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": id_of("<|image_pad|>"),
        "video_token_id": id_of("<|video_pad|>"),
        "vision_start_token_id": id_of("<|vision_start|>"),
        "vision_end_token_id": id_of("<|vision_end|>"),
        "tie_word_embeddings": False,
    }


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
        text_config=LlamaConfig(**decoder_sizes(config, tokenizer, config.query_heads)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        image_seq_length=patches,
        video_seq_length=patches // 4,
    )
    return LlavaNextVideoForConditionalGeneration, model_config, processor


def _llava_onevision(config: TinyConfig) -> tuple[Any, Any, Any]:
    import transformers as hf

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    tokenizer = tiny_tokenizer(specials, config, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    size = config.frame_size
    square, pinpoints = {"height": size, "width": size}, [[size, 2 * size], [2 * size, size], [2 * size, 2 * size]]
    processor = hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=pinpoints),
        video_processor=hf.LlavaOnevisionVideoProcessor(size=square),
        tokenizer=tokenizer,
        num_image_tokens=(size // config.patch_size) ** 2,
        vision_feature_select_strategy="full",
        chat_template=_ONEVISION_TEMPLATE,
    )
    model_config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**_square_tower(config), vision_use_head=False),
        text_config=hf.Qwen2Config(**decoder_sizes(config, tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
    )
    return hf.LlavaOnevisionForConditionalGeneration, model_config, processor


def _internvl(config: TinyConfig) -> tuple[Any, Any, Any]:
    import transformers as hf

    named = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>",
    }  # fmt: skip
    tokenizer = tiny_tokenizer([*named.values(), "<|im_start|>"], config, **named)
    square = {"height": config.frame_size, "width": config.frame_size}
    tokens = (config.frame_size // config.patch_size // 2) ** 2
    processor = hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=square, crop_to_patches=True),
        video_processor=hf.InternVLVideoProcessor(size=square),
        tokenizer=tokenizer,
        image_seq_length=tokens,
        chat_template=_INTERNVL_TEMPLATE,
    )
    model_config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**_square_tower(config), attention_bias=True),
        text_config=hf.Qwen2Config(**decoder_sizes(config, tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=tokens,
        tie_word_embeddings=False,
    )
    return hf.InternVLForConditionalGeneration, model_config, processor


def _square_tower(config: TinyConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.vision_hidden_size,
        "intermediate_size": config.vision_intermediate_size or 2 * config.vision_hidden_size,
        "num_hidden_layers": config.vision_depth,
        "num_attention_heads": config.vision_heads,
        "image_size": config.frame_size,
        "patch_size": config.patch_size,
    }


BUILDERS: dict[str, Callable[[TinyConfig], tuple[Any, Any, Any]]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": partial(_qwen3_vl, experts=True),
    "llava_next_video": _llava_next_video,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
}

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
_ONEVISION_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}<video>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}\n{{ part['text'] }}{% endfor %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_INTERNVL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n"
    "{% elif part['type'] == 'video' %}<video>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
