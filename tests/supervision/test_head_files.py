"""Heads on disk."""

import pytest
import torch
from safetensors.torch import save_file

from gasp_fast.supervision.head_files import read_heads, write_heads
from gasp_fast.supervision.heads import CorrespondenceHead, CorrespondenceHeads


def test_heads_come_back_from_their_file(tmp_path):
    heads = CorrespondenceHeads({3: CorrespondenceHead(16, 8, 4, "bf16"), 7: CorrespondenceHead(16, 5, 4, "bf16")})
    write_heads(tmp_path / "heads.safetensors", heads.state_dict(), "bf16", "layer_input_normed")
    back = read_heads(tmp_path / "heads.safetensors")
    assert back.reads == "layer_input_normed"
    write_heads(tmp_path / "again.safetensors", heads.state_dict(), "bf16", "layer_input_normed")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "heads.safetensors").read_bytes()
    assert back.layers == [3, 7] and back.by_layer["7"].first.compute == "bf16"
    for name, tensor in heads.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name])
    with pytest.raises(OSError, match="no such file"):
        read_heads(tmp_path / "nothing.safetensors")


def test_heads_of_an_earlier_version_read_the_output_of_their_layers(tmp_path):
    heads = CorrespondenceHeads({3: CorrespondenceHead(16, 8, 4)})
    save_file(heads.state_dict(), tmp_path / "heads.safetensors", {"compute": '"bf16"'})
    back = read_heads(tmp_path / "heads.safetensors")
    assert back.reads == "output" and back.by_layer["3"].first.compute == "bf16"
    save_file(heads.state_dict(), tmp_path / "heads.safetensors", {"heads": '{"compute": "bf16", "input": "nothing"}'})
    with pytest.raises(ValueError, match="reads = 'nothing' is unknown; choose one of output, output_normed"):
        read_heads(tmp_path / "heads.safetensors")
