"""The matrix products of a chunk: each way of running them gives the same float32 numbers."""

import pytest
import torch
from support.agreement import gradient_of, judge, leaves, run
from support.half_products import HalfProducts
from support.problems import random_problem, relative_error

import gasp_fast
from gasp_fast.kernels import products, rows_torch
from gasp_fast.kernels.chunked import ChunkedEngine
from gasp_fast.kernels.engines import ENGINES
from gasp_fast.kernels.products import Products


@pytest.fixture
def amx(monkeypatch):
    """Use the bf16 path wherever torch contains MKL, which emulates the product on processors without AMX."""
    if products.mkl_bf16_function() is None:
        pytest.skip("this torch carries no MKL")
    monkeypatch.setattr(products, "has_amx", lambda: True)


def test_bf16_similarities_are_not_rounded_to_bf16(amx):
    generator = torch.Generator().manual_seed(0)
    anchors = torch.randn(1, 9, 300, generator=generator).bfloat16()
    tokens = torch.randn(1, 41, 300, generator=generator).bfloat16()[:, 3:37]
    out = torch.full((1, 9, 34), float("nan"))
    Products.of(tokens).similarity(anchors, tokens, out)
    truth = anchors.double() @ tokens.double().mT
    assert relative_error(out, truth) < 1e-6
    assert relative_error((anchors @ tokens.mT).float(), truth) > 1e-4  # what torch's own product would give


def test_the_loss_through_the_bf16_unit_agrees_with_float64(amx):
    problem = random_problem(0, [[30, 7, 1, 22], [18, 25, 9]], width=64, matches=200, planted=2.0)
    rounded = problem.embeddings.bfloat16()
    truth = judge(problem, rounded)
    loss, embedding_gradient, _, _ = run(problem, rounded, "cpp")
    assert relative_error(loss, truth.loss) < 1e-4
    assert relative_error(embedding_gradient, truth.embedding_gradient) < 1e-2


@pytest.mark.parametrize("layout", [
    lambda e: e.mT.contiguous().mT,  # columns
    lambda e: torch.stack([e, e], dim=-1)[..., 0],  # every other number
    lambda e: e[:, :1].expand(-1, e.shape[1], -1),  # one row in memory, for all tokens
], ids=["columns", "strided", "expanded"])  # fmt: skip
@pytest.mark.parametrize("sequences", [[[30, 7, 1, 22], [18, 25, 9]], [[1]]], ids=["many", "one token"])
def test_the_bf16_unit_reads_embeddings_in_any_memory_layout(amx, layout, sequences):
    problem = random_problem(0, sequences, width=64, matches=200)
    embeddings = layout(problem.embeddings.bfloat16())
    anchors = embeddings[:, :5].contiguous()
    similarity = torch.full((1, anchors.shape[1], embeddings.shape[1]), float("nan"))
    Products.of(embeddings).similarity(anchors[:1], embeddings[:1], similarity)
    assert relative_error(similarity, anchors[:1].double() @ embeddings[:1].double().mT) < 1e-6
    losses = [
        gasp_fast.gasp_loss(e, problem.matches, backend="cpp").loss for e in (embeddings, embeddings.contiguous())
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("fp16_products", [True, False])
def test_float16_products_lose_no_small_gradient(monkeypatch, fp16_products):
    """As on a GPU: a mean over many matches of embeddings of norm 60 has gradients below float16's smallest number."""
    if fp16_products:
        HalfProducts.use(monkeypatch, torch.float16)
    engine = ChunkedEngine(operations=rows_torch, workspace_bytes=20_000)
    monkeypatch.setitem(ENGINES, "cpp", lambda embeddings, workspace: engine)
    problem = random_problem(0, [[30, 7, 1, 22], [18, 25, 9]], width=36, matches=300, scale=10.0)
    rounded = problem.embeddings.half()
    rounded[0] *= 8  # layers of different size
    truth = judge(problem, rounded, reduction="sum")
    embeddings, temperature = rounded.clone().requires_grad_(), torch.tensor(0.07, requires_grad=True)
    # The weights are 2^-12 of the usual ones, as if the loss were one of many. `backward` scales the gradient back.
    out = gasp_fast.gasp_loss(embeddings, problem.matches, temperature=temperature, corr_weight=0.3 / 4096,
                              depth_weight=1.0 / 4096, reduction="sum", backend="cpp")  # fmt: skip
    (out.loss * 4096).backward()
    # The gradient of the embeddings is stored in float16 before it is scaled back, so it is the less exact one.
    assert relative_error(temperature.grad, truth.temperature_gradient) < 2e-3
    assert relative_error(embeddings.grad, truth.embedding_gradient) < 2e-2


@pytest.mark.parametrize("fp16_products", [True, False])
@pytest.mark.parametrize("with_keys", [True, False])
def test_a_loss_scale_keeps_small_float16_gradients_exact(monkeypatch, fp16_products, with_keys):
    """The gradient of this mean is about 1e-6, where float16 has 4 bits. Training in float16 multiplies the loss by a
    large number first, and the gradient must then be as exact as float16 can be, although it was computed before."""
    if fp16_products:
        HalfProducts.use(monkeypatch, torch.float16)
    engine = ChunkedEngine(operations=rows_torch, workspace_bytes=20_000)
    monkeypatch.setitem(ENGINES, "cpp", lambda embeddings, workspace: engine)
    problem = random_problem(
        0, [[30, 7, 1, 22], [18, 25, 9]], width=600, matches=300, planted=2.0, keys=with_keys, scale=30.0
    )
    rounded = problem.embeddings.half()
    truth = judge(problem, rounded)
    assert relative_error(truth.embedding_gradient.half(), truth.embedding_gradient) > 3e-3
    embeddings, beside = leaves(problem, rounded)
    loss = gasp_fast.gasp_loss(embeddings, problem.matches, **beside, backend="cpp").loss
    (loss * 4096).backward()
    assert relative_error(gradient_of(embeddings, **beside).double() / 4096, truth.embedding_gradient) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_tokens_are_converted_block_by_block(monkeypatch, dtype):
    monkeypatch.setattr(products, "has_amx", lambda: False)
    monkeypatch.setattr(products, "CONVERTED_BYTES", 4 * 20 * 17)  # blocks of 17 tokens, the last one smaller
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 60, 20, generator=generator).to(dtype)
    anchors = tokens[:, ::7].float()
    ways = Products.of(tokens)
    x = torch.randn(1, 9, 60, generator=generator)
    similarity, rows, total = torch.empty(1, 9, 60), torch.empty(1, 9, 20), torch.ones(1, 60, 20)
    ways.similarity(anchors, tokens, similarity)
    ways.row_gradient(x, tokens, rows, False)
    ways.token_gradient(x, anchors, total, True)
    assert torch.allclose(similarity, anchors @ tokens.float().mT, atol=1e-5)
    assert torch.allclose(rows, x @ tokens.float(), atol=1e-5)
    assert torch.allclose(total, 1 + x.mT @ anchors, atol=1e-5)
