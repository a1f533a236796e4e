"""Sequences that are packed into one row have the logits that each has alone, whatever attention keeps them apart."""

import copy
from dataclasses import replace

import pytest
import torch
from support.families import EVERY_FAMILY
from transformers import AttentionInterface

from gasp_fast.backbones.packing import attention_arguments, pack
from gasp_fast.backbones.unmasked_attention import UNMASKED, use_unmasked_attention
from gasp_fast.collator import Collator, Sample

FLASH = "flash_attention_stand_in"
CLOSE = {"rtol": 0, "atol": 1e-5}  # the largest logits are about 1
ATTENTIONS = ("sdpa", "eager", FLASH)


def varlen_stand_in(module, query, key, value, attention_mask, scaling, dropout=0.0, **options):
    """What FlashAttention's kernel for sequences of different lengths computes, from the arguments it takes."""
    offsets, others = options["cu_seq_lens_q"], options["cu_seq_lens_k"]
    assert attention_mask is None and offsets.dtype == others.dtype == torch.int32 and torch.equal(offsets, others)
    assert options["max_length_q"] == options["max_length_k"] == int(offsets.diff().max())
    assert offsets[0] == 0 and offsets[-1] == query.shape[2] == key.shape[2] and len(query) == 1
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    attended = torch.zeros_like(query)
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        scores = query[:, :, start:end] @ key[:, :, start:end].transpose(2, 3) * scaling
        later = torch.ones(end - start, end - start).triu(1).bool()
        attended[:, :, start:end] = scores.masked_fill(later, -torch.inf).softmax(-1) @ value[:, :, start:end]
    return attended.transpose(1, 2), None


AttentionInterface.register(FLASH, varlen_stand_in)


@pytest.fixture
def samples(talk, noise):
    """Sequences of different lengths, by what they hold."""
    frames = [talk(noise(2)), talk(noise(1, 320, 180, seed=1), "There are nine boxes and a lamp."), talk(noise(1))]
    words = [talk([]), talk([], "No."), talk([], "There is a lamp on the table, and a box below it.")]
    conversations = {"frames": frames, "words": words, "both": [words[2], frames[1], words[0], frames[0], words[1]]}
    return {name: [Sample(frames=c.frames, messages=c.messages) for c in some] for name, some in conversations.items()}


def collated(backbone, samples):
    batch = Collator(backbone)(samples)
    return {**batch, "token_index": backbone.index_tokens(batch)}


def attending(family, attention):
    """The family's model as training changes it, with this attention in its decoder."""
    model = copy.deepcopy(family.model)
    family.backbone.replace_slow_modules(model)
    model.set_attn_implementation({"text_config": attention})
    use_unmasked_attention(model)
    return model


def logits_of_row(family, model, batch):
    states = family.backbone.last_states(model, batch, batch["token_index"])
    return model.get_output_embeddings()(states)[0]  # [T, V]


def logits_alone(family, samples):
    """Of transformers' whole model, a sequence at a time, with the positions and masks that it makes itself."""
    logits = []
    for sample in samples:
        inputs = Collator(family.backbone)([sample])
        for name in ("labels", "matches", "visual_positions"):
            del inputs[name]
        logits.append(family.model(**inputs, use_cache=False).logits[0])
    return logits


@EVERY_FAMILY
@torch.no_grad()
@pytest.mark.parametrize("content", ["frames", "words", "both"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_each_sequence_of_a_row_has_the_logits_that_it_has_alone(family, samples, attention, content):
    chosen = samples[content]
    batch = pack(collated(family.backbone, chosen))
    alone = logits_alone(family, chosen)
    assert batch["token_index"].row.lengths == tuple(map(len, alone)) and len(set(map(len, alone))) == len(chosen)
    assert batch["input_ids"].shape == (1, sum(map(len, alone)))
    packed = logits_of_row(family, attending(family, attention), batch)
    for found, expected in zip(packed.split(batch["token_index"].row.lengths), alone, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_sequences_that_see_each_other_have_other_logits(family, samples, attention):
    """The comparison above would find them."""
    batch = pack(collated(family.backbone, samples["both"]))
    index, model = batch["token_index"], attending(family, attention)
    lengths, length = index.row.lengths, batch["input_ids"].shape[1]
    one = replace(index.row, lengths=(length,), offsets=torch.tensor([0, length], dtype=torch.int32))
    right = logits_of_row(family, model, batch)
    other = logits_of_row(family, model, {**batch, "token_index": replace(index, row=one)})
    torch.testing.assert_close(other[: lengths[0]], right[: lengths[0]], **CLOSE)
    assert float((other - right)[lengths[0] :].abs().max()) > 1e-3


@EVERY_FAMILY
def test_positions_are_those_that_the_model_gives_each_sequence(family, samples):
    """Logits depend on differences of positions alone, so they would not show where a sequence begins."""
    batch = pack(collated(family.backbone, samples["both"]))
    index = batch["token_index"]
    for found, sample in zip(index.rotary.split(index.row.lengths, -1), samples["both"], strict=True):
        inputs = Collator(family.backbone)([sample])
        expected = torch.arange(inputs["input_ids"].shape[1])[None]
        if family.backbone.model_type.startswith("qwen") and sample.frames:
            names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
            expected, _ = family.model.model.get_rope_index(**{name: inputs[name] for name in names})
        assert torch.equal(found, expected.expand_as(found))


def test_no_token_is_predicted_from_another_sequence(family, samples):
    """Every token is labelled here, also the first of each sequence."""
    batch = collated(family.backbone, samples["both"])
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    batch["token_index"] = family.backbone.index_tokens(batch)
    row = pack(batch)
    index, ids = row["token_index"], row["input_ids"][0]
    first = {int(offset) for offset in index.row.offsets[:-1]}
    assert (index.predicting + 1).tolist() == [place for place in range(len(ids)) if place not in first]
    assert torch.equal(ids[index.predicting + 1], index.answers)
    again = family.backbone.index_tokens({**row, "attention_mask": torch.ones_like(row["input_ids"])})
    assert torch.equal(again.predicting, index.predicting) and torch.equal(again.answers, index.answers)


@EVERY_FAMILY
def test_visual_tokens_are_found_again_in_the_row(family, samples):
    batch = collated(family.backbone, samples["both"])
    row = pack({**batch, "visual_positions": batch["token_index"].visual})
    expected = (row["input_ids"][0] == family.backbone.visual_token_id).nonzero()[:, 0]
    assert len(expected) and torch.equal(row["token_index"].visual, expected)
    assert torch.equal(row["visual_positions"], expected)
    assert row["attention_mask"].all() and row["labels"].shape == row["input_ids"].shape


def test_a_single_sequence_is_not_changed(family, samples):
    batch = collated(family.backbone, samples["frames"][:1])
    assert pack(batch) is batch and batch["token_index"].row is None


def test_each_attention_gets_what_keeps_sequences_apart(family, samples):
    row = pack(collated(family.backbone, samples["words"]))["token_index"].row
    states = torch.zeros(1, sum(row.lengths), 8)
    assert attention_arguments(row, UNMASKED, states) == {"sequence_lengths": row.lengths}
    flash = attention_arguments(row, "flash_attention_3", states)
    assert flash.keys() == {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    mask = attention_arguments(row, "eager", states)["attention_mask"]
    blocks = torch.block_diag(*(torch.ones(n, n).tril() for n in row.lengths)).bool()
    assert torch.equal(mask == 0, blocks[None, None]) and mask.max() == 0
    assert (mask[~blocks[None, None]] == torch.finfo(torch.float32).min).all()


def test_offsets_move_and_lengths_stay(family, samples):
    index = pack(collated(family.backbone, samples["both"]))["token_index"]
    moved = index.to("meta")
    assert moved.row.offsets.is_meta and moved.rotary.is_meta and moved.row.lengths == index.row.lengths
