"""Heads on disk."""

import pytest
import torch

from gasp_fast.supervision.head_files import read_heads, write_heads
from gasp_fast.supervision.heads import CorrespondenceHead, CorrespondenceHeads


def test_heads_come_back_from_their_file(tmp_path):
    heads = CorrespondenceHeads({3: CorrespondenceHead(16, 8, 4, "bf16"), 7: CorrespondenceHead(16, 5, 4, "bf16")})
    write_heads(tmp_path / "heads.safetensors", heads.state_dict(), "bf16")
    back = read_heads(tmp_path / "heads.safetensors")
    assert back.layers == [3, 7] and back.by_layer["7"].first.compute == "bf16"
    for name, tensor in heads.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name])
    with pytest.raises(OSError, match="no such file"):
        read_heads(tmp_path / "nothing.safetensors")
