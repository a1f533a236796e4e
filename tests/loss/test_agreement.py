"""The CPU backends against the definition in float64: the loss, each term, each metric and every gradient."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.agreement import EXACT, SIXTEEN_BITS, assert_agrees, cpp_workspace, judge, natural_sizes, run
from support.problems import Problem, problems, random_problem, relative_error

import gasp_fast
from gasp_fast.kernels import products
from gasp_fast.loss.naive import naive_loss

SMALL, LARGE = 1500, 24 << 20  # bytes of workspace: with the small one most problems take several blocks
SEQUENCES = [[30, 7, 1, 22], [18, 25, 9]]


@pytest.fixture(autouse=True, scope="module")
def folded_at_every_width():
    """Narrow embeddings, too: these problems have few tokens, so that most are one block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "LEAST_FOLDED_WIDTH", 1)
        yield


# With a single candidate the true gradient is zero, so rounding errors are not hidden. "none" weights the two layers
# -1 and 2.
SINGLE = Problem(
    embeddings=torch.tensor(
        [
            [[0.0020723548340924477, 0.0026986864543922257, 0.0055074529968499025],
             [0.002703641438858962, 0.006472479926153957, 0.0024900222346962444]],
            [[-0.003353951191618524, 0.004563527811756777, -0.00625465829322795],
             [0.0045387922866289235, -0.01373970385948389, 0.028474255010785387]],
        ],
        dtype=torch.float64,
    ),
    matches=gasp_fast.Matches(
        frame_offsets=torch.tensor([0, 1, 2]), anchor=torch.tensor([0]), target=torch.tensor([1]),
        target_depth=torch.tensor([3.2960011959075928]),
        patch_depth=torch.tensor([2.1587212085723877, 3.3582143783569336]),
        token_xy=torch.tensor([[0, 0], [1, 0]]),
    ),
    temperature=0.05,
    negatives="sequence",
)  # fmt: skip


@settings(max_examples=320, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems(), st.sampled_from(["mean", "sum", "none"]), st.sampled_from([SMALL, LARGE]))
@example(SINGLE, "none", LARGE)
def test_cpp_agrees_with_float64_in_float32(problem, reduction, workspace):
    with cpp_workspace(workspace):
        assert_agrees(problem, torch.float32, EXACT, "cpp", reduction=reduction)


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from([torch.bfloat16, torch.float16]), st.sampled_from([SMALL, LARGE]))
def test_cpp_agrees_with_float64_in_sixteen_bits(problem, dtype, workspace):
    with cpp_workspace(workspace):
        assert_agrees(problem, dtype, SIXTEEN_BITS, "cpp")


# The same problems in every run: at tau = 0.05 a log-sum-exp near 20 has steps of 2e-6 in float32, and of thousands of
# problems a few exceed the tolerance, where the gradient of the temperature nearly cancels.
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_dense_agrees_with_float64_in_float32(problem):
    assert_agrees(problem, torch.float32, EXACT, "torch")


@pytest.mark.parametrize("negatives", ["sequence", "frame"])
@pytest.mark.parametrize("temperature", [0.005, 0.01, 0.02])
def test_cold_temperatures_underflow_nowhere(negatives, temperature):
    """At 0.005 similarities span 400 units: a shared maximum would lose every token of known depth."""
    problem = random_problem(5, SEQUENCES, width=3, temperature=temperature, negatives=negatives, planted=9, holes=0.8)
    # Rounding of the embeddings themselves is magnified by 1 / tau; compare from the same float32 numbers.
    truth = judge(problem, problem.embeddings.float())
    ours = run(problem, problem.embeddings.float(), "cpp")
    assert relative_error(ours[0], truth.loss) < 1e-5
    assert relative_error(ours[1], truth.embedding_gradient) < 1e-5 * (0.07 / temperature)


@settings(max_examples=60, deadline=None)
@given(problems(widths=(8, 40)))
def test_error_is_at_most_twice_that_of_dense_arithmetic_in_the_same_type(problem):
    for dtype in (torch.bfloat16, torch.float16) if problem.metric is None else (torch.bfloat16,):
        rounded = problem.embeddings.to(dtype)
        truth = judge(problem, rounded)
        dense, ours = run(problem, rounded, "torch"), run(problem, rounded, "cpp")
        # One rounding of the result itself is allowed to both.
        rounding, natural = torch.finfo(dtype).eps, natural_sizes(problem)
        truths = {"loss": truth.loss, "dE": truth.embedding_gradient}
        for (name, t), d, o in zip(truths.items(), dense, ours, strict=False):
            size = natural[name]
            assert relative_error(o, t, size) <= 2 * relative_error(d, t, size) + rounding, name


@settings(max_examples=60, deadline=None)
@given(problems(widths=(8, 17, 40)))  # in one dimension every cosine is a tie
def test_metrics_are_those_of_the_definition(problem):
    truth = judge(problem, problem.embeddings.float())
    ours = run(problem, problem.embeddings.float(), "cpp")[3].metrics
    assert torch.allclose(ours.accuracy.double(), truth.accuracy.double(), atol=1e-6)
    assert torch.allclose(ours.pck.double(), truth.pck.double(), atol=1e-6)
    assert torch.allclose(ours.confidence.double(), truth.confidence.double(), atol=1e-4)


def test_metrics_of_planted_features_are_exact():
    problem = random_problem(1, [[20, 20]], layers=1, width=64, matches=0)
    anchor, target = torch.arange(20), torch.arange(20, 40)
    xy = torch.stack([torch.arange(40) % 20, torch.zeros(40, dtype=torch.long)], dim=1)
    matches = gasp_fast.Matches(frame_offsets=torch.tensor([0, 20, 40]), anchor=anchor, target=target, token_xy=xy)
    embeddings = problem.embeddings.clone()
    embeddings[:, 20:] = embeddings[:, :20].roll(2, dims=1)  # each anchor looks like the token two columns on
    metrics = gasp_fast.gasp_loss(embeddings.float(), matches, return_metrics=True).metrics
    assert metrics.accuracy.item() == 0.0
    assert metrics.pck.item() == pytest.approx(18 / 20)  # the last two wrap around the row


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_layer_weights_weigh_layers_and_learn(backend, reduction):
    problem = random_problem(2, SEQUENCES, layers=3)
    weights = torch.tensor([0.2, 0.0, 1.5], requires_grad=True)
    embeddings = problem.embeddings.float().requires_grad_()
    out = gasp_fast.gasp_loss(embeddings, problem.matches, layer_weights=weights, reduction=reduction, backend=backend)
    out.loss.sum().backward()
    single = [
        gasp_fast.gasp_loss(layer, problem.matches, reduction=reduction, backend=backend).loss.sum()
        for layer in problem.embeddings.float()
    ]
    assert float(out.loss.detach().sum()) == pytest.approx(0.2 * float(single[0]) + 1.5 * float(single[2]), rel=1e-5)
    assert weights.grad.tolist() == pytest.approx([float(loss) for loss in single], rel=1e-5)
    assert embeddings.grad[1].abs().max() == 0 < embeddings.grad[2].abs().max()


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_a_list_of_layers_is_the_same_as_a_stack(backend):
    problem = random_problem(2, SEQUENCES, layers=3)
    stack = problem.embeddings.float().requires_grad_()
    layers = [layer.detach().clone().requires_grad_() for layer in problem.embeddings.float()]
    one = gasp_fast.gasp_loss(stack, problem.matches, backend=backend)
    many = gasp_fast.gasp_loss(layers, problem.matches, backend=backend)
    one.loss.backward()
    many.loss.backward()
    assert torch.allclose(one.loss, many.loss, rtol=1e-6)
    assert torch.allclose(stack.grad, torch.stack([layer.grad for layer in layers]), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2, -3, 1)])
def test_every_output_can_be_differentiated(backend, weights):
    """`loss`, `corr` and `depth` alone, and a mixture of them."""
    problem = random_problem(4, SEQUENCES, layers=2)
    dtype = torch.float64 if backend == "torch" else torch.float32
    embeddings = problem.embeddings.to(dtype).clone().requires_grad_()
    out = gasp_fast.gasp_loss(embeddings, problem.matches, backend=backend)
    scalar = weights[0] * out.loss + weights[1] * out.corr + weights[2] * out.depth
    scalar.backward()
    truth = problem.embeddings.clone().requires_grad_()
    for corr_weight, depth_weight, weight in zip((0.3, 1.0, 0.0), (1.0, 0.0, 1.0), weights, strict=True):
        (weight * naive_loss(truth, problem.matches, 0.07, "sequence", corr_weight, depth_weight).loss).backward()
    assert relative_error(embeddings.grad, truth.grad) < EXACT


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_loss_is_its_two_terms(backend):
    problem = random_problem(4, SEQUENCES, layers=3)
    out = gasp_fast.gasp_loss(
        problem.embeddings.float(), problem.matches, corr_weight=0.7, depth_weight=2.0, backend=backend
    )
    assert float(out.loss) == pytest.approx(0.7 * float(out.corr) + 2.0 * float(out.depth), rel=1e-6)
    assert float(out.corr) == pytest.approx(float(out.corr_per_layer.mean()), rel=1e-6)
    assert float(out.depth) == pytest.approx(float(out.depth_per_layer.mean()), rel=1e-6)


def test_module_learns_its_temperature():
    problem = random_problem(4, SEQUENCES, planted=3.0)
    module = gasp_fast.GaspLoss(learnable_temperature=True)
    plain = gasp_fast.gasp_loss(problem.embeddings.float(), problem.matches)
    out = module(problem.embeddings.float(), problem.matches)
    assert torch.allclose(out.loss, plain.loss)
    out.loss.backward()
    assert module.log_temperature.grad.abs().item() > 0
