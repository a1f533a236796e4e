"""Positions of a pack's tokens."""

import torch
from support.tiny_g2vlm import IMAGE, drawn_tail, tiny_qwen

from gasp_fast.g2vlm.tokens import Arrangement, context_positions, text_positions


def test_positions_of_two_frames_of_two_by_three_patches():
    pack = Arrangement(frames=2, rows=2, columns=3, prefix=2, tail=4)
    time = [3] * 6 + [8] * 6
    row = [3, 3, 3, 4, 4, 4, 8, 8, 8, 9, 9, 9]
    column = [3, 4, 5, 3, 4, 5, 8, 9, 10, 8, 9, 10]
    others = [2, 6, 7, 11, 0, 1]  # start and end of each frame, prefix
    assert context_positions(pack).tolist() == [time + others, row + others, column + others]
    assert pack.tail_position == 12
    assert (pack.patches, pack.marks, pack.context, pack.total) == (12, 4, 18, 22)


def test_positions_of_the_tail_are_those_of_qwen():
    tail, qwen = drawn_tail(), tiny_qwen().model
    kinds = (tail.input_ids == IMAGE).int()
    expected, _ = qwen.get_rope_index(tail.input_ids, mm_token_type_ids=kinds, image_grid_thw=tail.image_grid_thw)
    assert torch.equal(text_positions(tail.input_ids, IMAGE, tail.image_grid_thw), expected)
    text = drawn_tail(images=False).input_ids
    assert torch.equal(text_positions(text, IMAGE), torch.arange(16).expand(3, 2, 16))
