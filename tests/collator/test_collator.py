"""The collator maps tracks to the tokens that the model's processor assigns to the tracked pixels."""

import pickle
from collections import Counter
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from support.recorded import recorded_scene

import gasp_fast
from gasp_fast.collator import Collator, CollatorConfig, Sample, geometry_sample
from gasp_fast.data.synthetic.scenes import SyntheticConfig, make_scene, write_scene
from gasp_fast.data.tracks.build import Tracks, Views, grid_queries
from gasp_fast.supervision.heads import CorrespondenceHeads
from gasp_fast.supervision.layer_capture import LayerCapture


def tracks_at(uv, visible=None, depth=None) -> Tracks:
    """Tracks at given positions [T, F, 2]; by default visible everywhere, at depth 2."""
    uv = np.asarray(uv, np.float64)
    visible = np.ones(uv.shape[:2], bool) if visible is None else np.asarray(visible, bool)
    depth = np.full(uv.shape[:2], 2.0) if depth is None else np.asarray(depth, np.float64)
    return Tracks(np.arange(uv.shape[1]), uv[:, 0], uv, visible, depth)


def random_sample(frames=4, tracks=10, width=224, height=224, seed=0, **fields) -> Sample:
    draw = np.random.default_rng(seed)
    return Sample(
        frames=[draw.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(frames)],
        tracks=[
            tracks_at(
                draw.uniform(0, [width, height], (tracks, frames, 2)),
                draw.random((tracks, frames)) < 0.8,
                draw.uniform(1, 5, (tracks, frames)),
            )
        ],
        depth=[draw.uniform(1, 5, (height // 2, width // 2)).astype(np.float32) for _ in range(frames)],
        **fields,
    )


def pairs_of(matches):
    return sorted(zip(matches.anchor.tolist(), matches.target.tolist(), strict=True))


@pytest.mark.parametrize("size", [(224, 224), (320, 180), (181, 317), (960, 540)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_a_match_joins_the_tokens_whose_pixels_the_painted_point_changes(family, size):
    """A track is painted into its frames where it is visible; the processor's pixel values show which tokens change."""
    width, height = size
    grid = family.backbone.frame_grid(width, height)
    draw = np.random.default_rng(width)
    blank = np.full((height, width, 3), 90, np.uint8)
    for visible in ([1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 0]):
        places = grid.centres()[draw.integers(grid.tokens, size=4)].round() - 0.5
        places[3] = (6.5, 6.5)  # LLaVA's crop cuts this corner off if the frame is not square
        frames = [blank.copy() for _ in visible]
        for frame, (x, y), seen in zip(frames, places.astype(int), visible, strict=True):
            if seen:
                frame[y - 1 : y + 2, x - 1 : x + 2] = (255, 32, 0)
        sample = Sample(frames=[*frames, blank], tracks=[tracks_at([[*places, (0, 0)]], [[*visible, 0]])])
        batch = Collator(family.backbone)([sample])
        pixels = family.pixels_by_token(batch, grid.tokens)
        change = (pixels[:4] - pixels[4:]).abs().sum(-1)  # [4, tokens]
        # The square may extend into neighbouring tokens; the point's own token changes most.
        changed = [f * grid.tokens + int(row.argmax()) for f, row in enumerate(change) if row.max() > 0]
        if visible[3] and grid.locate(places[3]) < 0:
            changed = [token for token in changed if token < 3 * grid.tokens]
        assert pairs_of(batch["matches"]) == sorted(permutations(changed, 2))


def test_matches_equal_those_of_a_plain_loop(family):
    sample = random_sample(frames=4, tracks=30, width=300, height=200)
    batch = Collator(family.backbone)([sample])
    (tracks,), expected = sample.tracks, []
    grids = [family.backbone.frame_grid(300, 200)] * 4
    for t in range(30):
        for a, b in permutations(range(4), 2):
            at, to = (int(grids[f].locate(tracks.uv[t, f])) for f in (a, b))
            if tracks.visible[t, a] and tracks.visible[t, b] and at >= 0 and to >= 0:
                expected.append((a * grids[0].tokens + at, b * grids[0].tokens + to, np.float32(tracks.depth[t, b])))
    matches = batch["matches"]
    found = zip(matches.anchor.tolist(), matches.target.tolist(), matches.target_depth.numpy(), strict=True)
    assert sorted(found) == sorted(expected) and len(expected) > 20


def test_positions_and_matches_number_the_same_tokens(family):
    samples = [random_sample(seed=1), random_sample(seed=2)]
    batch = Collator(family.backbone)(samples)
    matches, positions = batch["matches"], batch["visual_positions"]
    assert len(positions) == matches.tokens == len(matches.token_xy) == len(matches.patch_depth)
    assert (batch["input_ids"].flatten()[positions] == family.backbone.visual_token_id).all()
    assert matches.sequence_offsets.tolist() == [0, 4, 8]
    starts = matches.frame_offsets.tolist()
    for start, end in pairwise(starts):
        assert matches.token_xy[start:end].tolist() == family.backbone.frame_grid(224, 224).xy().tolist()


def test_patch_depth_is_the_mean_of_the_pixels_that_lie_in_the_token(family):
    sample = random_sample(frames=2, width=300, height=200)
    sample.depth[1][::3] = 0.0
    sample.depth[1][:40] = np.nan
    matches = Collator(family.backbone)([sample])["matches"]
    grid = family.backbone.frame_grid(300, 200)
    height, width = sample.depth[1].shape
    x, y = np.meshgrid((np.arange(width) + 0.5) * 300 / width, (np.arange(height) + 0.5) * 200 / height)
    token = grid.locate(np.stack([x, y], axis=-1))
    for index in range(grid.tokens):
        inside = sample.depth[1][(token == index) & (sample.depth[1] > 0)]
        expected = inside.mean(dtype=np.float64) if inside.size else 0.0
        assert float(matches.patch_depth[grid.tokens + index]) == pytest.approx(expected, rel=1e-6)
    assert (matches.patch_depth == 0).any()


def test_frames_of_several_sizes_keep_their_order_in_patch_depth(qwen):
    sample = random_sample(frames=5)
    sample.frames[2] = np.zeros((180, 320, 3), np.uint8)
    whole = Collator(qwen.backbone)([sample])["matches"]
    assert len(set(np.diff(whole.frame_offsets.tolist()))) == 2
    for f, (start, end) in enumerate(pairwise(whole.frame_offsets.tolist())):
        pair = [f, (f + 1) % 5]
        part = Sample(
            frames=[sample.frames[i] for i in pair],
            tracks=[tracks_at(np.full((1, 2, 2), 50.0))],
            depth=[sample.depth[i] for i in pair],
        )
        alone = Collator(qwen.backbone)([part])["matches"].patch_depth[: end - start]
        assert torch.equal(whole.patch_depth[start:end], alone)


def test_anchors_come_from_the_first_frame_from_all_or_from_drawn_pairs(qwen):
    sample = random_sample(frames=5, tracks=20)
    tokens = qwen.backbone.frame_grid(224, 224).tokens

    def frame_pairs(config, position=0):
        sample_at = Sample(**{**vars(sample), "position": position})
        matches = Collator(qwen.backbone, config)([sample_at])["matches"]
        return set(zip((matches.anchor // tokens).tolist(), (matches.target // tokens).tolist(), strict=True))

    assert frame_pairs(CollatorConfig(anchors="first")) == {(0, f) for f in range(1, 5)}
    assert frame_pairs(CollatorConfig(anchors="all")) == set(permutations(range(5), 2))
    drawn = CollatorConfig(anchors="pairs", pairs=6)
    assert len(frame_pairs(drawn)) == 6
    assert frame_pairs(drawn) == frame_pairs(drawn)
    assert len({frozenset(frame_pairs(drawn, position)) for position in range(8)}) > 4
    assert frame_pairs(CollatorConfig(anchors="pairs", pairs=99)) == set(permutations(range(5), 2))


@pytest.mark.parametrize("unit", ["anchor", "track"])
def test_the_matches_of_an_anchor_or_of_a_track_share_a_weight_of_one(qwen, unit):
    """Of planted tracks: seen in 4 frames, in 2, and in 1; the fourth starts in the token of the first."""
    uv = np.array([[[50.0, 50]] * 4, [[100, 100]] * 4, [[180, 180]] * 4, [[51, 51], [120, 20], [120, 20], [120, 20]]])
    sample = random_sample(frames=4)
    seen = [[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]]
    sample = Sample(frames=sample.frames, tracks=[tracks_at(uv[:3], seen), tracks_at(uv[3:], [[1, 1, 0, 0]])])
    matches = Collator(qwen.backbone, unit=unit)([sample])["matches"]
    assert len(matches) == 12 + 2 + 2
    share = 1 / 12 if unit == "track" else 1 / 3
    expected = [share] * 12 + ([1 / 2] * 2 if unit == "track" else [1] * 2) + [1 / 2 if unit == "track" else 1] * 2
    if unit == "anchor":  # the first token is the anchor of 3 + 1 matches
        expected[:3], expected[14] = [1 / 4] * 3, 1 / 4
    assert matches.weight.tolist() == pytest.approx(expected)
    assert Collator(qwen.backbone)([sample])["matches"].weight is None


def test_sorting_the_frames_changes_the_order_of_a_samples_matches_only(rendered, qwen):
    tracks = [gasp_fast.build_tracks(rendered, [3, 0, 2, 5], grid=grid, keep=1.0) for grid in (5, 9)]
    assert not all(one.visible.all() for one in tracks)
    ordered = [one.in_temporal_order() for one in tracks]
    samples = [geometry_sample(rendered, of) for of in (tracks, ordered)]
    assert [one.frames.tolist() for one in ordered] == [[0, 2, 3, 5]] * 2
    assert all(map(np.array_equal, samples[1].frames, (rendered.image(n) for n in (0, 2, 3, 5))))
    tokens, place = qwen.backbone.frame_grid(*rendered.image_size(0)).tokens, (2, 0, 1, 3)  # of frames 3, 0, 2, 5

    def moved(token):
        return place[token // tokens] * tokens + token % tokens

    for anchors in ("first", "all"):
        first, sorted_ = (
            Collator(qwen.backbone, CollatorConfig(anchors=anchors))([sample])["matches"] for sample in samples
        )
        expected = sorted((moved(anchor), moved(target)) for anchor, target in pairs_of(first))
        assert pairs_of(sorted_) == expected and len(expected) > 50
        assert sorted(first.target_depth.tolist()) == sorted(sorted_.target_depth.tolist())
        assert torch.equal(first.patch_depth.view(4, -1)[[1, 2, 0, 3]], sorted_.patch_depth.view(4, -1))


def test_coarse_and_fine_grids_are_supervised_together(qwen):
    coarse, fine = random_sample(tracks=5), random_sample(tracks=40, seed=3)
    both = Sample(frames=coarse.frames, tracks=[*coarse.tracks, *fine.tracks])
    collate = Collator(qwen.backbone)
    alone = [pairs_of(collate([Sample(frames=coarse.frames, tracks=s.tracks)])["matches"]) for s in (coarse, fine)]
    assert pairs_of(collate([both])["matches"]) == sorted(alone[0] + alone[1])


@pytest.mark.parametrize("stored", [np.float64, np.float32], ids=["tracked", "annotated"])
@pytest.mark.parametrize("size", [(300, 200), (953, 541)], ids=str)
def test_a_query_point_of_both_grids_is_supervised_once(qwen, stored, size):
    """All cell centres of an 8 x 8 grid are centres of a 24 x 24 grid. Here some tracks of either are not kept."""
    views = Views([np.ones((4, 4), np.float32)], np.zeros((1, 3, 3)), np.zeros((1, 4, 4)), np.array([size]))
    draw = np.random.default_rng(0)

    def tracks(grid, kept):
        query = grid_queries(views, grid)
        query = query[np.sort(draw.permutation(len(query))[:kept])].astype(stored).astype(np.float64)
        return tracks_at(np.repeat(query[:, None], 3, axis=1))  # the points do not move

    coarse, fine = tracks(8, 40), tracks(24, 400)
    frames = [np.zeros((size[1], size[0], 3), np.uint8)] * 3
    matches = Collator(qwen.backbone)([Sample(frames=frames, tracks=[coarse, fine])])["matches"]
    points = {(round(float(x), 2), round(float(y), 2)) for x, y in np.concatenate([coarse.query, fine.query])}
    assert 400 < len(points) < 440
    assert len(matches) == 6 * len(points)
    grid = qwen.backbone.frame_grid(*size)
    expected = Counter(int(grid.locate(np.array(point))) for point in points)
    found = Counter((matches.anchor % grid.tokens).tolist())
    assert found == {token: 6 * count for token, count in expected.items()}


def test_tracks_can_be_ranked_by_what_the_crop_leaves_of_them(family):
    """Frames twice as wide as high; LLaVA's crop cuts off a quarter on each side."""
    inside, outside = (200.0, 100.0), (20.0, 100.0)
    kinds = [[outside] * 4, [outside, inside, inside, outside], [inside] * 3 + [outside], [inside] * 4]
    sample = random_sample(frames=4, width=400, height=200)
    sample = Sample(frames=sample.frames, tracks=[tracks_at(np.array(kinds) + np.arange(4)[:, None, None])])
    cropped = family.backbone.frame_grid(400, 200).locate(np.array(outside)) < 0
    seen = [0, 2, 3, 4] if cropped else [4, 4, 4, 4]
    for keep, kept in ((1.0, [1, 2, 3] if cropped else [0, 1, 2, 3]), (0.5, [2, 3] if cropped else [0, 1])):
        matches = Collator(family.backbone, CollatorConfig(keep=keep))([sample])["matches"]
        assert len(matches) == sum(seen[n] * (seen[n] - 1) for n in kept)
    assert cropped == (family.backbone.model_type != "qwen2_5_vl")


def test_language_and_geometry_share_a_batch(family):
    answered = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}]
    silent = random_sample(seed=4)
    batch = Collator(family.backbone)(
        [Sample(frames=silent.frames, messages=answered), Sample(frames=[], messages=answered), random_sample(seed=5)]
    )
    length = batch["input_ids"].shape[1]
    assert set((batch["visual_positions"] // length).tolist()) == {2}
    assert [(row != -100).any().item() for row in batch["labels"]] == [True, True, False]
    alone = Collator(family.backbone)([random_sample(seed=5)])
    assert pairs_of(batch["matches"]) == pairs_of(alone["matches"])


def test_a_batch_without_tracks_has_no_tokens_and_no_matches(shipped):
    batch = Collator(shipped.backbone)([Sample(frames=random_sample().frames)])
    assert len(batch["visual_positions"]) == len(batch["matches"]) == batch["matches"].tokens == 0
    embeddings = torch.zeros(2, 0, 16, requires_grad=True)
    loss = gasp_fast.gasp_loss(embeddings, batch["matches"]).loss
    loss.backward()
    assert float(loss) == 0.0 and embeddings.grad.shape == embeddings.shape


def test_sequences_of_unequal_length_give_in_a_batch_what_they_give_alone(family):
    samples = [random_sample(frames=4), random_sample(frames=7, seed=1)]
    together = Collator(family.backbone)(samples)
    assert together["matches"].sequence_offsets.tolist() == [0, 4, 11]

    def logits(batch):
        inputs = {name: value for name, value in batch.items() if name not in ("matches", "visual_positions", "labels")}
        with torch.no_grad():
            return family.model(**inputs).logits

    rows, offset = logits(together), 0
    for row, sample in zip(rows, samples, strict=True):
        alone = Collator(family.backbone)([sample])
        length = alone["input_ids"].shape[1]
        torch.testing.assert_close(row[:length], logits(alone)[0], rtol=1e-4, atol=1e-5)
        pairs = [(a + offset, t + offset) for a, t in pairs_of(alone["matches"])]
        assert set(pairs) <= set(pairs_of(together["matches"]))
        offset += alone["matches"].tokens
    assert sum(len(Collator(family.backbone)([s])["matches"]) for s in samples) == len(together["matches"])


def test_a_pickled_collator_gives_the_same_batch(shipped):
    collate = Collator(shipped.backbone, CollatorConfig(anchors="first"))
    copy = pickle.loads(pickle.dumps(collate))
    ours, theirs = collate([random_sample()]), copy([random_sample()])
    assert pairs_of(ours["matches"]) == pairs_of(theirs["matches"])
    assert torch.equal(ours["visual_positions"], theirs["visual_positions"])


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "room"
    write_scene(make_scene(3, SyntheticConfig(frames=6, samples=1)), folder)
    return gasp_fast.open_scene(folder)


@pytest.fixture(params=["rendered", "hololens_dvmvs_a"])
def sequence(request, rendered):
    """A scene and three of its frames."""
    if request.param == "rendered":
        return rendered, [0, 2, 4]
    return gasp_fast.open_scene(recorded_scene(request.param)), [0, 3, 6]


def test_on_a_scene_the_depth_of_a_match_is_found_in_its_token(shipped, sequence):
    """Tracks, pixel map and pooling agree: a point's depth lies within the range of depths of its target token."""
    scene, frames = sequence
    sample = geometry_sample(scene, [gasp_fast.build_tracks(scene, frames, grid=grid) for grid in (8, 24)])
    matches = Collator(shipped.backbone)([sample])["matches"]
    ranges = [depth_range(shipped, *pair) for pair in zip(sample.frames, sample.depth, strict=True)]
    nearest, furthest = np.concatenate(ranges).T
    depth, target = matches.target_depth.numpy(), matches.target.numpy()

    def share_inside(token):
        # A visible point agrees to 5 % with a pixel beside it, which may lie in the neighbouring token.
        return ((depth >= 0.95 * nearest[token]) & (depth <= 1.05 * furthest[token])).mean()

    assert len(matches) > 200
    assert share_inside(target) > 0.98
    assert share_inside((target + 7) % matches.tokens) < 0.8
    pooled, known = matches.patch_depth.numpy(), furthest > 0
    assert np.array_equal(pooled > 0, known)
    assert ((pooled >= nearest * (1 - 1e-6)) & (pooled <= furthest * (1 + 1e-6)))[known].all()


def depth_range(family, frame, depth):
    """Least and largest known depth in each token of a frame, `[tokens, 2]`; 0 where none is known."""
    height, width = depth.shape
    grid = family.backbone.frame_grid(frame.shape[1], frame.shape[0])
    x = (np.arange(width) + 0.5) * frame.shape[1] / width
    y = (np.arange(height) + 0.5) * frame.shape[0] / height
    token = grid.locate(np.stack(np.meshgrid(x, y), axis=-1))
    known = (depth > 0) & (token >= 0)
    least, largest = np.full(grid.tokens, np.inf), np.zeros(grid.tokens)
    np.minimum.at(least, token[known], depth[known])
    np.maximum.at(largest, token[known], depth[known])
    return np.stack([np.where(largest > 0, least, 0), largest], axis=-1)


def test_gradients_flow_from_the_loss_through_the_heads_into_the_first_layer(shipped, rendered):
    """From a scene through tracks, collator, model, capture and heads to the loss."""
    backbone, model = shipped.backbone, shipped.model
    tracks = gasp_fast.build_tracks(rendered, [0, 1, 2], grid=8)
    batch = Collator(backbone)([geometry_sample(rendered, [tracks])])
    matches, positions = batch.pop("matches"), batch.pop("visual_positions")
    heads = CorrespondenceHeads.from_query_projections(
        {layer: backbone.query_projection(model, layer) for layer in (1, 3)}
    )
    layers = LayerCapture(backbone.decoder_layers(model), backbone.final_norm(model), heads.layers)
    with layers as capture:
        model(**batch)
    embeddings = [heads(layer, capture.tokens(layer, positions)) for layer in heads.layers]
    result = gasp_fast.gasp_loss(embeddings, matches)
    model.zero_grad()
    result.loss.backward()
    first = backbone.attention(model, 0).q_proj.weight.grad
    assert first.isfinite().all() and first.norm() > 0
    assert all(p.grad is not None and p.grad.norm() > 0 for p in heads.parameters())
    assert float(result.corr) > 0 and float(result.depth) > 0
    model.zero_grad()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda s: Sample(frames=s.frames[:3], tracks=s.tracks), "sample 0 has 3 frames and tracks through 4"),
        (lambda s: Sample(frames=s.frames, tracks=s.tracks, depth=s.depth[:2]), "4 frames and 2 depth maps"),
        (lambda s: Sample(frames=s.frames[:1], tracks=[tracks_at(s.tracks[0].uv[:, :1])]), "a match needs two"),
    ],
)
def test_inconsistent_samples_raise_an_error_with_their_index(qwen, make, message):
    with pytest.raises(ValueError, match=message):
        Collator(qwen.backbone)([make(random_sample())])


def test_wrong_settings_raise_an_error_with_their_name():
    with pytest.raises(ValueError, match="anchors = 'some' is unknown; choose one of first, all, pairs"):
        CollatorConfig(anchors="some")
    with pytest.raises(ValueError, match="pairs = 0"):
        CollatorConfig(pairs=0)
    with pytest.raises(ValueError, match=r"keep = 0.0 is a share of the tracks; give 0 < keep <= 1"):
        CollatorConfig(keep=0.0)
