"""What a step optimises does not depend on how it is divided into micro-batches and among processes."""

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import get_args

import pytest
import torch
from support.runs import run_to_end
from support.tiny_training import backward_of_step

from gasp_fast.collator import Collator
from gasp_fast.config.loader import to_yaml
from gasp_fast.data.tracks.sequences import SequenceConfig
from gasp_fast.loss.function import gasp_loss
from gasp_fast.loss.matches import Matches
from gasp_fast.training.averages import Average, averaged, mean_of_sequences, unit_of_matches
from gasp_fast.training.loader import SteadyCollator
from gasp_fast.training.model import build_model
from gasp_fast.training.stream import SampleStream

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")
SEQUENCES = SequenceConfig(min_frames=2, max_frames=5, window=4, per_scene=4)


@pytest.fixture
def step_of_16(config):
    """The configuration of a run with 16 scenes and questions of different lengths in a step."""

    def make(family="qwen2_5_vl", average="sequence", **train):
        # So large a bound clips nothing.
        train = {"steps": 2, "batch_size": 16, "clip": 1e9, "warmup": 0.0, **train}
        return config(family, mixed=True, scenes={"sequences": SEQUENCES}, train=train, loss={"average": average})

    return make


def plain_gradient(settings, average="sequence"):
    """Loss and gradient of the first step, a sequence at a time, by code that the training loop does not use."""
    model = build_model(settings, CPU).train()
    stream, collate = SampleStream(settings.data), Collator(model.backbone)
    samples = [stream[position] for position in range(settings.train.batch_size)]
    sequences = [collate([sample]) for sample in samples]
    if len(sequences) == 16:
        assert len({batch["input_ids"].shape[1] for batch in sequences}) > 5
        assert 4 <= sum(len(batch["matches"]) > 0 for batch in sequences) <= 12
    weights = None
    if average != "sequence":
        units = [
            units_of_matches(sample, batch["matches"], model.backbone, average)
            for sample, batch in zip(samples, sequences, strict=True)
        ]
        weights = [torch.tensor([1 / own.count(unit) for unit in own]) for own in units]
    loss = backward_of_step(model, sequences, weights)
    zero = torch.zeros(())
    named = {name: p.grad if p.grad is not None else zero for name, p in model.named_parameters() if p.requires_grad}
    return loss, named


@pytest.fixture(scope="module")
def plain_gradients():
    return {}


@pytest.fixture
def plain_gradient_of(step_of_16, plain_gradients):
    """`plain_gradient` of a model and an average, computed once: it has no micro-batches on which it could depend."""

    def of(family, average="sequence"):
        if (family, average) not in plain_gradients:
            plain_gradients[family, average] = plain_gradient(step_of_16(family, average), average)
        return plain_gradients[family, average]

    return of


def units_of_matches(sample, matches, backbone, average):
    """What counts once, for each match of a sample: the sequence, the anchor token, the track, or the match itself."""
    if average != "track":
        count = len(matches)
        return {"sequence": [0] * count, "anchor": matches.anchor.tolist(), "match": list(range(count))}[average]
    tracks, targets = [], []
    for grid_number, grid_tracks in enumerate(sample.tracks):
        grids = [backbone.frame_grid(frame.shape[1], frame.shape[0]) for frame in sample.frames]
        for t in range(len(grid_tracks)):
            at = [int(grid.locate(grid_tracks.uv[t, f])) for f, grid in enumerate(grids)]
            seen = [f for f in range(len(grids)) if grid_tracks.visible[t, f] and at[f] >= 0]
            for _, to in permutations(seen, 2):
                tracks.append((grid_number, t))
                targets.append(int(matches.frame_offsets[to]) + at[to])
    assert targets == matches.target.tolist()
    return tracks


def gradient_of_first_step(settings):
    """The same of the training loop, on this process."""
    from gasp_fast.training.distributed import Processes
    from gasp_fast.training.gasp import Gasp
    from gasp_fast.training.loop import TrainingLoop
    from gasp_fast.training.stream import Share

    model = build_model(settings, CPU)
    share = Share.of(settings.train, 0, 1)
    loop = TrainingLoop(Gasp(settings, SampleStream(settings.data), model=model), share, 2, Processes(0, 1, CPU))
    record = loop.try_step()
    state = loop.state.optimizer.state
    return record, {name: state[p]["exp_avg"] / 0.1 for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradient(found, expected, what):
    assert found.keys() == expected.keys()
    size = sum(float(gradient.norm()) ** 2 for gradient in expected.values()) ** 0.5
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) < 1e-5 * size, (what, name)
    difference = sum(float((found[name] - gradient).norm()) ** 2 for name, gradient in expected.items()) ** 0.5
    assert difference < 1e-5 * size, what


PACKED = {"tokens_at_once": 400, "packing": True}


@pytest.mark.parametrize("average", get_args(Average))
@pytest.mark.parametrize(
    "division",
    [
        {},
        *({"micro_batch_size": n} for n in (2, 4, 16)),
        {"tokens_at_once": 400},
        PACKED,
        {"micro_batch_size": 16, "packing": True},
    ],
    ids=str,
)
def test_the_size_of_micro_batches_does_not_change_the_gradient(
    step_of_16, plain_gradient_of, family, average, division
):
    settings = step_of_16(family, average, **division)
    loss, expected = plain_gradient_of(family, average)
    record, found = gradient_of_first_step(settings)
    assert_same_gradient(found, expected, division)
    assert record["loss"] == pytest.approx(loss, rel=1e-5)
    assert record["loss"] == pytest.approx(record["lm"] + 0.3 * record["corr"] + record["depth"], rel=1e-5)


@pytest.mark.parametrize("average", get_args(Average))
def test_metrics_are_means_over_the_step_however_it_is_divided(step_of_16, family, average):
    records = [gradient_of_first_step(step_of_16(family, average, **how))[0] for how in ({}, PACKED)]
    for name in ("pck_per_layer", "cosine_per_layer"):
        assert records[1][name] == pytest.approx(records[0][name], rel=1e-4)
    settings = step_of_16(family, average)
    model, stream = build_model(settings, CPU), SampleStream(settings.data)
    collate, total, count = Collator(model.backbone), torch.zeros(4), 0
    for sample in map(stream.__getitem__, range(16)):
        batch = collate([sample])
        units = len(set(units_of_matches(sample, batch["matches"], model.backbone, average)))
        with torch.no_grad():
            total, count = total + units * model(**batch)["cosine"], count + units
    assert records[0]["cosine_per_layer"] == pytest.approx((total / count).tolist(), rel=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", ["full", "reentrant"])
def test_packing_does_not_change_the_gradient(step_of_16, plain_gradient_of, family, attention, checkpointing):
    settings = step_of_16(family, **PACKED)
    loss, expected = plain_gradient_of(family)
    settings = replace(
        settings,
        model=replace(settings.model, attention=attention),
        train=replace(settings.train, checkpointing=checkpointing),
    )
    record, found = gradient_of_first_step(settings)
    assert_same_gradient(found, expected, attention)
    assert record["loss"] == pytest.approx(loss, rel=1e-5)


DIVISIONS = {
    **{f"{n} at once": {"micro_batch_size": n} for n in (1, 2, 4)},
    "by tokens": {"tokens_at_once": 400},
    "packed": PACKED,
    "nothing for the second process": {"tokens_at_once": 400, "batch_size": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2", "zero3"])
def test_the_division_of_a_step_does_not_change_its_gradient(step_of_16, tmp_path, kind):
    """16, 8, 4 or some micro-batches on two processes, and under ZeRO also on one."""
    expected = {size: plain_gradient(step_of_16(batch_size=size)) for size in (1, 16)}
    runs = [(2, name) for name in DIVISIONS]
    if kind != "ddp":
        runs += [(1, name) for name in ("2 at once", "by tokens", "packed")]
    arguments, folders = [], {}
    for processes, name in runs:
        base, folder = step_of_16(**DIVISIONS[name]), tmp_path / f"{processes} {name}"
        preset = None if kind == "ddp" else str(REPOSITORY / f"configs/deepspeed/{kind}.json")
        path = folder.with_suffix(".yaml")
        path.write_text(to_yaml(replace(base, deepspeed=preset, run=replace(base.run, out=str(folder)))))
        arguments += [str(processes), str(path)]
        folders[folder] = base.train.batch_size
    done = run_to_end(1, Path(__file__).with_name("gradients_of_a_step.py"), *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, size in folders.items():
        loss, gradient = expected[size]
        assert_same_gradient(torch.load(folder / "gradient.pt", weights_only=True), gradient, folder.name)
        record = json.loads((folder / "loss.json").read_text())
        assert record["loss"] == pytest.approx(loss, rel=1e-5), folder.name


def matches_of(*counts, tokens=4, depth=True):
    """A `Matches` of sequences with two frames of `tokens` tokens and so many matches each."""
    parts = [
        Matches(
            frame_offsets=torch.tensor([0, tokens, 2 * tokens]),
            anchor=torch.arange(count) % tokens,
            target=tokens + torch.arange(count) % 3,
            target_depth=torch.linspace(1, 3, count) if depth else None,
            depth_valid=torch.arange(count) % 3 > 0 if depth else None,
            patch_depth=torch.linspace(1, 4, 2 * tokens) if depth else None,
        )
        for count in counts
    ]
    return Matches.pack(parts), parts


@pytest.mark.parametrize("counts", [(5,), (1, 7), (3, 0, 6, 0), (0, 2), (0, 0)])
@pytest.mark.parametrize("depth", [True, False])
def test_the_mean_of_sequences_is_that_of_the_means_of_each(counts, depth):
    matches, parts = matches_of(*counts, depth=depth)
    torch.manual_seed(0)
    embeddings = torch.randn(3, matches.tokens, 8)
    together, units = mean_of_sequences(matches)
    out = gasp_loss(embeddings, together, return_metrics=True)
    alone = [gasp_loss(rows, part) for rows, part in zip(embeddings.split(8, 1), parts, strict=True) if len(part)]
    assert units == len(alone)
    for name in ("loss", "corr", "depth"):
        expected = sum(float(getattr(one, name)) for one in alone) / max(1, units)
        assert float(getattr(out, name)) == pytest.approx(expected, rel=1e-5, abs=1e-7), name


def test_a_match_without_weight_counts_neither_in_its_sequence_nor_makes_one():
    matches, _ = matches_of(2, 3)
    weighted = replace(matches, weight=torch.tensor([0.0, 0.0, 1.0, 3.0, 0.0]))
    mean, units = mean_of_sequences(weighted)
    assert units == 1
    assert mean.index.corr_share.tolist() == [0, 0, 0.25, 0.75, 0]


def test_a_batch_counts_what_its_terms_are_averaged_over(config, family):
    settings = config(family, mixed=True)
    model = build_model(settings, CPU)
    stream = SampleStream(settings.data)
    samples = [stream[position] for position in range(8)]
    for average in get_args(Average):
        batch = SteadyCollator(Collator(model.backbone, unit=unit_of_matches(average)), average)(samples)
        matches = batch["matches"]
        answers, units, with_depth = batch["counts"].tolist()
        assert answers == (batch["labels"][:, 1:] != -100).sum() > 0
        sequences = sum(bool(sample.tracks) for sample in samples)
        if average == "sequence":
            assert units == with_depth == sequences > 1
        elif average == "anchor":
            assert units == pytest.approx(len(set(matches.anchor.tolist()))) and 0 < with_depth < 1.000001 * units
        elif average == "track":
            tracks = sum(len(sample.tracks[0]) for sample in samples if sample.tracks)
            assert units == pytest.approx(round(units)) and 0 < with_depth < 1.000001 * units <= 1.00001 * tracks
        else:
            assert units == len(matches) and with_depth == int(matches.index.has_depth.sum()) <= units
        assert batch["matches"].index.corr_share.expand(len(matches)).sum() == pytest.approx(1)


def test_a_batch_without_answers_and_matches_counts_nothing(config):
    model = build_model(config(), CPU)
    empty = SteadyCollator(Collator(model.backbone))([])
    assert empty["counts"].tolist() == [0, 0, 0]
    assert averaged(empty, "match")["counts"].tolist() == [0, 0, 0]
    assert model(**empty)["loss"] == 0
