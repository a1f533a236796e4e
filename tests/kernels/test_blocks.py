"""Blocks fit the workspace, cover the matrix, and are as large as they can be."""

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gasp_fast.kernels.blocks import LEAST_CPU_PANEL, TILE_ROWS, Sizes, blocks_for, bytes_of

MIB = 1 << 20
W1 = Sizes(28, 6912, 13824, 3584, element=2, backward=True, multiprocessors=132)
W3 = Sizes(28, 2304, 4096, 3584, element=2, backward=True, multiprocessors=132)
W5 = Sizes(1, 65536, 131072, 1024, element=2, backward=True, multiprocessors=132)


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    tokens = draw(st.integers(1, 200_000))
    return Sizes(
        layers=draw(st.integers(1, 40)),
        rows=draw(st.integers(1, tokens)),
        tokens=tokens,
        width=draw(st.sampled_from([1, 64, 256, 1000, 3584, 8192])),
        element=draw(st.sampled_from([2, 4])),
        backward=draw(st.booleans()),
        multiprocessors=draw(st.sampled_from([0, 132])),
        wide=draw(st.booleans()),
        foldable=draw(st.booleans()),
    )


# Its block fits, but not with the columns that folding copies, and its similarities are larger than a panel.
TIGHT = Sizes(37, 793, 25252, 256, element=2, backward=True, multiprocessors=0, foldable=True)


@settings(max_examples=300, deadline=None)
@given(sizes(), st.sampled_from([32, 128, 512]))
@example(TIGHT, 128)
def test_a_block_fits_the_workspace(sizes, mib):
    blocks = blocks_for(sizes, mib * MIB)
    assert bytes_of(sizes, blocks) <= mib * MIB + (sizes.accumulator if blocks.panel else 0)
    assert 1 <= blocks.part <= blocks.rows <= sizes.rows
    assert 1 <= blocks.columns <= sizes.tokens and 1 <= blocks.layers <= sizes.layers
    if not sizes.multiprocessors:
        assert blocks.layers == 1 and blocks.part == blocks.rows


@settings(max_examples=50, deadline=None)
@given(sizes(), st.sampled_from([1, 20, 60, 100]))
@example(Sizes(1, 140_000, 140_000, 64, element=2, backward=False, multiprocessors=132, frames=4), 96)
@example(Sizes(2, 140_000, 140_000, 64, element=4, backward=True, multiprocessors=132, foldable=True), 110)
@example(Sizes(1, 200_000, 400_000, 1024, element=2, backward=False, multiprocessors=132, frames=4), 20)
def test_the_rows_of_a_part_fit_a_grid(sizes, gib):
    if sizes.multiprocessors:
        assert blocks_for(sizes, gib * 1024 * MIB).part <= 2 * 65_535


@settings(max_examples=100, deadline=None)
@given(sizes(), st.integers(0, 4000))
def test_the_smallest_workspace_still_gives_blocks(sizes, workspace):
    blocks = blocks_for(sizes, workspace)
    assert min(blocks.layers, blocks.rows, blocks.part, blocks.columns) >= 1


@settings(max_examples=100, deadline=None)
@given(sizes(), st.sampled_from([64, 256]))
def test_rows_on_a_gpu_are_whole_tiles(sizes, mib):
    if sizes.multiprocessors:
        blocks = blocks_for(sizes, mib * MIB)
        assert blocks.rows % TILE_ROWS == 0 or blocks.rows in (sizes.rows, blocks.columns) or blocks.rows < TILE_ROWS


@settings(max_examples=100, deadline=None)
@given(sizes(), st.sampled_from([24, 256]))
def test_only_a_block_of_all_rows_and_columns_has_panels(sizes, mib):
    blocks = blocks_for(sizes, mib * MIB)
    if blocks.panel:
        assert sizes.backward and (blocks.rows, blocks.columns) == (sizes.rows, sizes.tokens)
        least = TILE_ROWS if sizes.multiprocessors else LEAST_CPU_PANEL // 2  # equal ones may be smaller than the least
        tokens = max(1, sizes.tokens - sizes.rows) if blocks.folded else sizes.tokens
        assert min(least, tokens) <= blocks.panel <= tokens + TILE_ROWS
    else:
        assert not blocks.folded


def test_a_panel_counts_as_workspace():
    blocks = blocks_for(W3, 256 * MIB)
    assert blocks.panel > 0
    gradients = 4 * blocks.layers * (W3.rows + blocks.panel) * W3.width
    operands = 2 * blocks.layers * W3.rows * (W3.width + W3.tokens)
    assert bytes_of(W3, blocks) >= operands + gradients
    assert bytes_of(W3, replace(blocks, panel=2 * blocks.panel)) > bytes_of(W3, blocks)


def test_one_block_for_all_rows_is_taken_where_it_fits():
    assert blocks_for(W1, 256 * MIB).rows < W1.rows  # X alone takes 182 MiB
    blocks = blocks_for(W1, 512 * MIB)
    assert blocks.rows == W1.rows and blocks.panel > 0


def test_one_block_for_all_rows_may_take_the_memory_of_the_accumulator():
    foldable = replace(W1, foldable=True, frames=24)
    blocks = blocks_for(foldable, 256 * MIB)
    assert blocks.folded and 256 * MIB < bytes_of(foldable, blocks) <= (256 + 189) * MIB  # 4 x 13,824 x 3,584 bytes
    assert [replace(foldable, **without).accumulator for without in (
        {"backward": False}, {"wide": True}, {"foldable": False}, {"multiprocessors": 0},
    )] == [0] * 4  # fmt: skip


def test_blocks_of_all_rows_are_folded_where_the_width_is_large():
    foldable = [replace(sizes, foldable=True, frames=24) for sizes in (W1, W3, W5)]
    assert [blocks_for(sizes, 512 * MIB).folded for sizes in foldable] == [True, True, False]
    assert not blocks_for(replace(foldable[0], width=256), 512 * MIB).folded
    assert blocks_for(replace(foldable[1], rows=256, tokens=512, width=256, multiprocessors=0), 24 * MIB).folded


def test_the_columns_of_a_folded_block_count_as_workspace():
    blocks = blocks_for(replace(W3, foldable=True), 256 * MIB)
    assert blocks.folded and blocks.panel <= W3.tokens - W3.rows
    one = replace(blocks, panel=1)  # similarities are larger than row gradients and one token of a panel
    rest = 2 * blocks.layers * W3.rows * (W3.tokens - W3.rows)
    assert bytes_of(W3, one) == bytes_of(W3, replace(one, folded=False)) + rest


def test_the_panel_of_a_folded_block_takes_the_place_of_the_row_gradients():
    blocks = replace(blocks_for(replace(W3, foldable=True), 256 * MIB), part=128)  # few similarities
    gradients = 4 * blocks.layers * W3.rows * W3.width
    few, many = (bytes_of(W3, replace(blocks, panel=panel)) for panel in (1, W3.rows))
    assert (
        few
        == many
        == bytes_of(W3, replace(blocks, folded=False, panel=W3.rows))
        - gradients
        + (2 * blocks.layers * W3.rows * (W3.tokens - W3.rows))
    )


def test_columns_are_not_cut_where_enough_rows_fit():
    for frames in (2, 64):
        assert blocks_for(replace(W5, frames=frames), 1024 * MIB).columns == W5.tokens


@pytest.mark.parametrize("mib", [128, 256, 512])
@pytest.mark.parametrize("width", [256, 3584])
def test_a_forward_pass_keeps_columns_whole_where_many_rows_fit(mib, width):
    forward = replace(W1, width=width, frames=24, backward=False)
    assert blocks_for(forward, mib * MIB).columns == W1.tokens


def test_gradient_products_have_many_rows_where_they_fit():
    assert blocks_for(W1, 256 * MIB).rows >= 2304
    assert blocks_for(W1, 128 * MIB).rows >= 1152
    assert blocks_for(W1, 1024 * MIB).rows == W1.rows


@pytest.mark.parametrize("mib", [32, 256])
def test_columns_of_a_long_sequence_are_cut_where_few_rows_would_fit(mib):
    blocks = blocks_for(W5, mib * MIB)
    assert blocks.columns < W5.tokens
    assert blocks.rows >= 896


def test_small_layers_go_together():
    small = Sizes(32, 1024, 2304, 4096, element=2, backward=True, multiprocessors=132)
    assert blocks_for(small, 256 * MIB).layers >= 4
    assert blocks_for(small, 256 * MIB).rows == small.rows
