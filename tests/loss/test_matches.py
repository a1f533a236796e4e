"""Wrong `Matches` and wrong arguments of the loss raise errors that name value and cure; packing and moving."""

import pickle

import pytest
import torch
from support.problems import random_problem

import gasp_fast
from gasp_fast import Matches
from gasp_fast.kernels.engines import ENGINES

OFFSETS = torch.tensor([0, 4, 6, 9])


def index(*values):
    return torch.tensor(values, dtype=torch.int64)


GOOD = {"frame_offsets": OFFSETS, "anchor": index(0, 5), "target": index(5, 8)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"anchor": index(0, 9)}, ValueError, ["anchor[1] = 9", "9 tokens"]),
        ({"target": index(-1, 8)}, ValueError, ["target[0] = -1", "9 tokens"]),
        ({"target": index(3, 8)}, ValueError, ["target[0] = 3", "frame 0", "two frames"]),
        ({"sequence_offsets": index(0, 2, 3)}, ValueError, ["target[1] = 8", "sequence 1", "sequence 0"]),
        ({"sequence_offsets": index(0, 2)}, ValueError, ["sequence_offsets ends at 2", "3 frames"]),
        ({"frame_offsets": index(1, 4, 6, 9)}, ValueError, ["frame_offsets[0] = 1", "must be 0"]),
        ({"frame_offsets": index(0, 6, 4, 9)}, ValueError, ["frame_offsets[2] = 4", "ascend"]),
        ({"frame_offsets": index(0)}, ValueError, ["frame_offsets has 1 entries", "at least 2"]),
        ({"anchor": index(0)}, ValueError, ["anchor has 1", "target 2", "pairs"]),
        ({"anchor": torch.tensor([0.0, 5.0])}, TypeError, ["anchor has dtype torch.float32", "anchor.long()"]),
        ({"anchor": index(0, 5).int()}, TypeError, ["anchor has dtype torch.int32", "int64"]),
        ({"anchor": [0, 5]}, TypeError, ["anchor is a list", "torch tensor"]),
        ({"anchor": index(0, 5)[None]}, ValueError, ["anchor has shape [1, 2]", "1 dimension"]),
        ({"target_depth": torch.ones(3)}, ValueError, ["target_depth has 3 entries", "anchor 2"]),
        ({"target_depth": index(1, 1)}, TypeError, ["target_depth has dtype torch.int64", "float()"]),
        ({"depth_valid": torch.ones(2, dtype=torch.bool)}, ValueError, ["depth_valid", "without target_depth"]),
        ({"patch_depth": torch.ones(8)}, ValueError, ["patch_depth has 8 entries", "ends at 9"]),
        ({"token_xy": torch.zeros(9, 3, dtype=torch.long)}, ValueError, ["token_xy has shape [9, 3]", "[N, 2]"]),
        ({"token_xy": torch.zeros(9, 2)}, TypeError, ["token_xy has dtype torch.float32", "integer"]),
        ({"weight": torch.ones(3)}, ValueError, ["weight has 3 entries", "anchor 2"]),
        ({"weight": index(1, 1)}, TypeError, ["weight has dtype torch.int64", "float()"]),
        ({"weight": torch.tensor([1.0, -0.5])}, ValueError, ["weight[1] = -0.5", "not negative"]),
        ({"weight": torch.tensor([float("nan"), 1.0])}, ValueError, ["weight[0] = nan", "finite"]),
        ({"weight": torch.ones(2, requires_grad=True)}, ValueError, ["weight requires grad", "detach()"]),
        ({"patch_depth": torch.ones(9, device="meta")}, ValueError, ["patch_depth lies on meta", "cpu"]),
        ({name: value.to("meta") for name, value in GOOD.items()}, ValueError, ["meta", "no values", "on the CPU"]),
        ({"frame_offsets": index(0, 4, 6, 2**40)}, ValueError, [f"frame_offsets ends at {2**40}", "at most"]),
        ({"weight": torch.ones(2).to(torch.float8_e4m3fn)}, TypeError, ["weight has dtype torch.float8", "float()"]),
    ],
)
def test_bad_ground_truth_is_named_with_value_and_cure(change, error, words):
    with pytest.raises(error) as caught:
        Matches(**{**GOOD, **change})
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


PROBLEM = random_problem(0, [[4, 2, 3]], layers=2)
E = PROBLEM.embeddings.float()


class Partitioned(torch.Tensor):
    ds_id = 7


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"temperature": 0.0}, ValueError, ["temperature = 0.0", "positive"]),
        ({"temperature": -1.0}, ValueError, ["temperature = -1.0", "positive"]),
        ({"temperature": float("nan")}, ValueError, ["temperature = nan"]),
        ({"temperature": torch.tensor(float("nan"))}, ValueError, ["temperature = nan"]),
        ({"temperature": 1e308}, ValueError, ["temperature = 1e+308", "1e+18"]),
        ({"temperature": 1e-40}, ValueError, ["temperature = 1e-40", "1e-18"]),
        ({"temperature": torch.tensor(1e308, dtype=torch.float64)}, ValueError, ["temperature = 1e+308", "1e+18"]),
        ({"temperature": torch.ones(2)}, ValueError, ["temperature has shape [2]", "0-dim"]),
        ({"temperature": "0.07"}, TypeError, ["temperature is a str"]),
        ({"negatives": "batch"}, ValueError, ["negatives = 'batch'", "'sequence', 'frame'"]),
        ({"reduction": "avg"}, ValueError, ["reduction = 'avg'", "'none'"]),
        ({"corr_weight": -0.1}, ValueError, ["corr_weight = -0.1"]),
        ({"depth_weight": float("inf")}, ValueError, ["depth_weight = inf"]),
        ({"eps": 0.0}, ValueError, ["eps = 0.0", "positive"]),
        ({"layer_weights": torch.ones(3)}, ValueError, ["layer_weights has shape [3]", "2 layers"]),
        ({"layer_weights": [1.0, 1.0]}, TypeError, ["layer_weights"]),
        ({"backend": "cuda"}, ValueError, ["backend = 'cuda'", "triton"]),
        ({"backend": "cpp", "embeddings": E.double()}, ValueError, ["float64", "backend='torch'"]),
        ({"embeddings": E[:, :8]}, ValueError, ["8 tokens", "ends at 9"]),
        ({"embeddings": E[0, 0]}, ValueError, ["embeddings has shape [16]", "[L, N, D]"]),
        ({"embeddings": E.long()}, TypeError, ["embeddings has dtype torch.int64"]),
        ({"embeddings": []}, TypeError, ["non-empty list"]),
        ({"embeddings": [E[0], E[1, :, :8]]}, ValueError, ["embeddings[1] has shape", "embeddings[0]"]),
        ({"embeddings": [E[0], E[1].double()]}, ValueError, ["embeddings[1] has dtype torch.float64"]),
        ({"embeddings": [E[0], None]}, TypeError, ["embeddings[1] is a NoneType"]),
        ({"embeddings": E[:0]}, ValueError, ["embeddings has shape [0, 9, 16]", "at least one layer"]),
        ({"embeddings": E[..., :0]}, ValueError, ["embeddings has shape [2, 9, 0]", "width of 1"]),
        ({"embeddings": [E[0, :, :0]]}, ValueError, ["embeddings[0] has shape [9, 0]", "width of 1"]),
        ({"embeddings": E.to(torch.float8_e4m3fn)}, TypeError, ["embeddings has dtype torch.float8_e4m3fn"]),
        ({"embeddings": E.to_sparse()}, TypeError, ["embeddings has layout torch.sparse_coo", "to_dense()"]),
        ({"embeddings": E.to("meta")}, ValueError, ["embeddings lies on meta", "CPU or GPU"]),
        ({"embeddings": E.to("meta"), "matches": PROBLEM.matches.to("meta")}, ValueError, ["embeddings lies on meta"]),
        ({"embeddings": E.as_subclass(Partitioned)}, TypeError, ["ZeRO-3", "GatheredParameters"]),
        ({"keys": E[:, :8]}, ValueError, ["keys has 1 tensor(s) with shape [2, 8, 16]", "[2, 9, 16]"]),
        ({"keys": E.double()}, ValueError, ["keys has", "torch.float64", "form of the embeddings"]),
        ({"keys": [E[0]], "embeddings": [E[0], E[1]]}, ValueError, ["keys has 1 tensor(s)", "embeddings 2"]),
        ({"keys": 0.07}, TypeError, ["keys is the number 0.07", "temperature=0.07"]),
        ({"keys": torch.tensor(0.5)}, TypeError, ["keys is the number 0.5", "temperature=0.5"]),
        ({"keys": "q"}, TypeError, ["keys is a str"]),
        ({"other_targets": "positives"}, ValueError, ["other_targets = 'positives'", "'ignored'"]),
        ({"workspace": 0}, ValueError, ["workspace = 0", "MiB"]),
        ({"workspace": 1.5}, TypeError, ["workspace is a float", "MiB"]),
        ({"matches": "truth"}, TypeError, ["matches is a str", "gasp_fast.Matches"]),
    ],
)
def test_bad_arguments_are_named_with_value_and_cure(arguments, error, words):
    with pytest.raises(error) as caught:
        gasp_fast.gasp_loss(**{"embeddings": E, "matches": PROBLEM.matches, **arguments})
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dtensor_is_refused_with_the_way_out(tmp_path):
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = DTensor.from_local(E, mesh, [Replicate()])
        with pytest.raises(TypeError, match="full_tensor"):
            gasp_fast.gasp_loss(sharded, PROBLEM.matches)
    finally:
        torch.distributed.destroy_process_group()


def test_bad_input_is_refused_before_any_kernel_runs(monkeypatch):
    def never(*_):
        raise AssertionError("a kernel ran")

    monkeypatch.setitem(ENGINES, "cpp", never)
    with pytest.raises(ValueError, match="temperature"):
        gasp_fast.gasp_loss(E, PROBLEM.matches, temperature=-1.0)
    with pytest.raises(AssertionError, match="a kernel ran"):
        gasp_fast.gasp_loss(E, PROBLEM.matches)


def test_packing_is_the_same_as_two_losses():
    first, second = random_problem(1, [[9, 4, 6]], matches=8), random_problem(2, [[5, 5]], matches=5)
    packed = Matches.pack([first.matches, second.matches])
    both = torch.cat([first.embeddings, second.embeddings], dim=1)
    assert packed.sequence_offsets.tolist() == [0, 3, 5]
    together = gasp_fast.gasp_loss(both, packed, reduction="none", backend="torch")
    apart = [gasp_fast.gasp_loss(p.embeddings, p.matches, reduction="none", backend="torch") for p in (first, second)]
    assert torch.allclose(together.corr, torch.cat([part.corr for part in apart], dim=1))
    assert torch.allclose(together.depth, torch.cat([part.depth for part in apart], dim=1))


def test_packing_fills_what_a_part_lacks_with_unknown():
    first = random_problem(1, [[9, 4, 6]], matches=8).matches
    bare = Matches(frame_offsets=OFFSETS, anchor=index(0), target=index(5), token_xy=torch.zeros(9, 2, dtype=int))
    packed = Matches.pack([first, bare])
    assert packed.target_depth[-1].isnan() and not packed.depth_valid[-1]
    assert (packed.patch_depth[-9:] == 0).all()
    with pytest.raises(ValueError, match=r"parts\[1\].token_xy is None"):
        Matches.pack([first, Matches(frame_offsets=OFFSETS, anchor=index(0), target=index(5))])
    with pytest.raises(ValueError, match="parts is empty"):
        Matches.pack([])


def test_packing_gives_a_weight_of_one_where_a_part_has_none():
    plain = random_problem(1, [[9, 4, 6]], matches=3).matches
    weighted = random_problem(2, [[5, 5]], matches=2, weighted=True).matches
    packed = Matches.pack([plain, weighted])
    assert torch.equal(packed.weight, torch.cat([torch.ones(3), weighted.weight]))
    assert Matches.pack([plain, plain]).weight is None


def test_packs_of_packs_are_packs():
    parts = [random_problem(seed, [[6, 3, 5]], matches=4).matches for seed in range(4)]
    flat = Matches.pack(parts)
    nested = Matches.pack([Matches.pack(parts[:2]), Matches.pack(parts[2:])])
    for name in ("frame_offsets", "sequence_offsets", "anchor", "target", "depth_valid", "token_xy"):
        assert torch.equal(getattr(flat, name), getattr(nested, name))


def test_repr_tells_what_is_inside():
    text = repr(Matches.pack([PROBLEM.matches, PROBLEM.matches]))
    for words in ("24 matches", "18 tokens", "6 frames", "2 sequences", "cpu"):
        assert words in text


def test_each_token_knows_its_row():
    rows = Matches.pack([random_problem(seed, [[6, 3, 5]], matches=4).matches for seed in range(3)]).index.rows
    for sequence in rows.sequences:
        of_token = rows.token_row[slice(*sequence.tokens)]
        tokens = rows.row_column[slice(*sequence.rows)]
        assert torch.equal((of_token >= 0).nonzero()[:, 0], tokens)
        assert of_token[tokens].tolist() == list(range(sequence.row_count))


def test_matches_travel_through_pickle_and_cannot_be_changed():
    copy = pickle.loads(pickle.dumps(PROBLEM.matches))
    assert torch.equal(copy.index.order, PROBLEM.matches.index.order)
    with pytest.raises(AttributeError):
        copy.anchor = index(1)


def test_moving_keeps_what_the_host_reads_on_the_host():
    moved = PROBLEM.matches.to("meta")
    assert moved.anchor.device.type == moved.index.order.device.type == "meta"
    assert moved.index.rows.spans.device.type == moved.index.rows.frame_ends.device.type == "cpu"
    assert PROBLEM.matches.to("cpu") is PROBLEM.matches
