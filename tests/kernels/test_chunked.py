"""The strategy with the row operations in plain PyTorch: any blocks give the result of the definition."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.agreement import EXACT, assert_agrees, judge, run
from support.allocations import allocations
from support.half_products import HalfProducts
from support.problems import problems, random_problem, relative_error

import gasp_fast
from gasp_fast.kernels import block_memory, blocks, chunked, products, rows_torch
from gasp_fast.kernels.chunked import ChunkedEngine
from gasp_fast.kernels.engines import ENGINES

SEQUENCES = [[30, 7, 1, 22], [18, 25, 9]]


def use_reference(patch: pytest.MonkeyPatch, workspace_bytes: int) -> None:
    engine = ChunkedEngine(operations=rows_torch, workspace_bytes=workspace_bytes)
    patch.setitem(ENGINES, "cpp", lambda embeddings, workspace: engine)


# The same problems in every run, for the reason given in tests/loss/test_agreement.py.
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    problems(largest_frame=5, widths=(3, 8), most=(2, 2, 4, 15)),
    st.sampled_from(["mean", "sum", "none"]),
    st.sampled_from([100, 700, 3000, 1 << 20]),  # bytes: columns are cut in the first ones
    st.booleans(),
)
def test_any_blocks_agree_with_float64(problem, reduction, workspace, folded):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "LEAST_FOLDED_WIDTH", 1 if folded else 1000)
        use_reference(patch, workspace)
        assert_agrees(problem, torch.float32, EXACT, "cpp", reduction=reduction)


@pytest.mark.parametrize("workspace", [700, 1 << 20])
@pytest.mark.parametrize("options", [{}, {"keys": True}, {"metric": True}, {"other_targets": "ignored"}])
def test_two_runs_agree_to_the_last_bit(monkeypatch, workspace, options):
    use_reference(monkeypatch, workspace)
    problem = random_problem(0, SEQUENCES, width=12, matches=40, **options)
    first, second = (run(problem, problem.embeddings.float(), "cpp") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"keys": True}])
def test_a_gradient_in_panels_is_that_of_one_panel(monkeypatch, dtype, options):
    problem = random_problem(0, [[300, 200, 250], [40, 30]], width=8, matches=30, **options)
    rows = int((problem.matches.index.rows.row_token < 750).sum())
    one_block = 4 * (rows * (750 + 8 + 8))  # similarities, anchors, row gradients
    panels: list[int] = []
    project = rows_torch.project_gradient

    def spy(gradient, *arguments, **options):
        panels.append(gradient.shape[1])
        project(gradient, *arguments, **options)

    monkeypatch.setattr(rows_torch, "project_gradient", spy)
    results = []
    for workspace in (1 << 20, one_block + 4 * 8 * 300):
        panels.clear()
        use_reference(monkeypatch, workspace)
        results.append(run(problem, problem.embeddings.to(dtype), "cpp")[:3])
        assert panels.count(250) == (0 if workspace == 1 << 20 else 3 * 2)  # three panels in each of two layers
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_one_block_of_all_rows_takes_no_more_memory_than_blocks_that_accumulate(monkeypatch):
    """As on a GPU, where it may be larger than the workspace."""
    of_cpu = products.Products.of
    monkeypatch.setattr(products.Products, "of", staticmethod(lambda some: replace(of_cpu(some), multiprocessors=8)))
    tokens, width, workspace = 1 << 12, 512, 20
    anchors = torch.arange(1 << 10)
    matches = gasp_fast.Matches(
        frame_offsets=torch.tensor([0, tokens // 2, tokens]), anchor=anchors, target=anchors + tokens // 2
    )
    embeddings = torch.randn(1, tokens, width).half().requires_grad_()  # multiplied in float32 by a CPU

    def work():
        embeddings.grad = None
        gasp_fast.gasp_loss(embeddings, matches, workspace=workspace, backend="cpp").loss.backward()

    def peak():
        blocks._blocks_on_gpu.cache_clear()
        work()  # allocates what is allocated only once
        return allocations(work)[1]

    of_one_block = peak()
    monkeypatch.setattr(blocks, "_whole_blocks", lambda *_: [])
    assert workspace << 20 < of_one_block - embeddings.nbytes
    assert of_one_block <= peak()
    blocks._blocks_on_gpu.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["whole columns", "cut columns", "folded", "panels"])
def test_what_is_in_the_memory_of_the_gradient_disturbs_nothing(monkeypatch, dtype, kind):
    """As on a GPU: `X` of one block after another, where the gradient is written at the end, or folded.

    Not with panels, which are written while later ones need `X`.
    """
    HalfProducts.use(monkeypatch, dtype, multiprocessors=8)
    use_reference(monkeypatch, 0)  # bytes; the blocks are these

    def blocks_for(sizes, _):
        if kind == "folded":
            return blocks.Blocks(2, sizes.rows, sizes.rows, sizes.tokens, panel=5, folded=True)
        if kind == "panels":
            return blocks.Blocks(1, sizes.rows, 4, sizes.tokens, panel=5)
        return blocks.Blocks(1, 9, 4, min(25 if kind == "cut columns" else 60, sizes.tokens))

    monkeypatch.setattr(chunked, "blocks_for", blocks_for)
    where = blocks.in_gradient
    width = 24 if kind in ("folded", "panels") else 12
    problem = random_problem(0, SEQUENCES[::-1], width=width, matches=40, layers=3)
    used: list[bool] = []

    def there(sizes, of):
        used.append(where(sizes, of))
        return used[-1]

    results = []
    for decided in (there, lambda *_: False):
        monkeypatch.setattr(block_memory, "in_gradient", decided)
        results.append(run(problem, problem.embeddings.to(dtype), "cpp")[:3])
    assert used == 2 * [kind != "panels"]  # once for each sequence
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    truth = judge(problem, problem.embeddings.to(dtype))
    assert relative_error(results[0][1], truth.embedding_gradient) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("anchors", [9, 60, None])  # of 96 tokens; None: each of them
def test_a_folded_gradient_is_that_of_both_products(monkeypatch, dtype, anchors):
    problem = random_problem(0, [[30, 7, 1, 22], [18, 18]], width=128, matches=40 if anchors else 0)
    if anchors is None:
        every = torch.arange(96)
        matches = gasp_fast.Matches(
            frame_offsets=problem.matches.frame_offsets, sequence_offsets=problem.matches.sequence_offsets,
            anchor=every, target=torch.where(every < 60, (every + 30) % 60, 60 + (every - 60 + 18) % 36),
        )  # fmt: skip
        problem = replace(problem, matches=matches)
    folded: list[tuple[int, int]] = []
    fold = rows_torch.fold

    def spy(x, own, row_of, others, rest):
        folded.append((len(own), len(others)))
        fold(x, own, row_of, others, rest)

    monkeypatch.setattr(rows_torch, "fold", spy)
    use_reference(monkeypatch, 1 << 20)
    results = []
    for least in (128, 129):
        monkeypatch.setattr(products, "LEAST_FOLDED_WIDTH", least)
        results.append(run(problem, problem.embeddings.to(dtype), "cpp")[:3])
    assert len(folded) == 2 * 2 and [sum(pair) for pair in folded] == [60, 60, 36, 36]  # two sequences in two layers
    for a, b in zip(*results, strict=True):
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


@pytest.mark.parametrize("workspace", [500, 1 << 20])
@pytest.mark.parametrize("needed", ["embeddings", "keys", "temperature", "both"])
def test_each_gradient_can_be_computed_alone(monkeypatch, workspace, needed):
    use_reference(monkeypatch, workspace)
    problem = random_problem(0, SEQUENCES, width=6, matches=30, keys=True)
    everything = {
        "embeddings": problem.embeddings.float(),
        "keys": problem.keys.float(),
        "temperature": torch.tensor(0.07),
    }
    expected = {}
    for names in (set(everything), set(everything) if needed == "both" else {needed}):
        inputs = {name: value.clone().requires_grad_(name in names) for name, value in everything.items()}
        gasp_fast.gasp_loss(matches=problem.matches, backend="cpp", **inputs).loss.backward()
        for name, value in inputs.items():
            if name not in names:
                assert value.grad is None
            else:
                assert torch.equal(value.grad, expected.setdefault(name, value.grad)), name


@pytest.mark.parametrize("exclude", [True, False])
def test_frame_match_takes_keys(monkeypatch, exclude):
    problem = random_problem(0, SEQUENCES, width=6, matches=0, keys=True)
    anchors, values = torch.tensor([3, 0, 22, 3]), torch.rand(112, 2)
    results = []
    for backend, dtype in (("cpp", torch.float32), ("torch", torch.float64)):
        use_reference(monkeypatch, 900)
        leaves = [part.to(dtype).requires_grad_() for part in (problem.embeddings.clone(), problem.keys.clone())]
        found = gasp_fast.frame_match(
            leaves[0], anchors, problem.matches.frame_offsets, values=values.to(dtype), keys=leaves[1],
            sequence_offsets=problem.matches.sequence_offsets, exclude_anchor=exclude, backend=backend,
        )  # fmt: skip
        (found.lse[found.lse.isfinite()].sum() + 3 * found.expected.sum()).backward()
        results.append((found.lse, found.expected, found.best, *(leaf.grad for leaf in leaves)))
    for ours, truth in zip(*results, strict=True):
        assert torch.allclose(ours.double(), truth.double(), rtol=1e-4, atol=1e-5)
