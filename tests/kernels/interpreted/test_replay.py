"""Layers and calls that repeat a recording give the bits that they give by themselves."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from support.agreement import in_given_metric
from support.half_products import HalfProducts
from support.problems import random_problem
from torch.utils._python_dispatch import TorchDispatchMode

import gasp_fast
from gasp_fast.kernels import chunked, rows_triton
from gasp_fast.kernels.blocks import Blocks, blocks_for, in_gradient
from gasp_fast.kernels.chunk import MatchTerms, Problem, TermDefinition, TermWeights
from gasp_fast.kernels.chunked import ChunkedEngine, Gradients
from gasp_fast.kernels.engines import ENGINES
from gasp_fast.kernels.products import Products
from gasp_fast.kernels.replay import CallTensors, Recording, current, store, take

SEQUENCES = [[5, 1, 3], [4, 3]]
LAYERS = 3
# Bytes: columns are cut; rows are cut, and gradients accumulate; one block.
WORKSPACES = [250, 300, 1 << 20]


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first layer of each repetition."""
    seen: list[int] = []
    repeat = Recording.repeat

    def spy(self: Recording, first: int) -> None:
        seen.append(first)
        repeat(self, first)

    monkeypatch.setattr(Recording, "repeat", spy)
    return seen


def use_engine(patch: pytest.MonkeyPatch, workspace: int, replays: bool, layers: int = 1) -> None:
    def blocks_of_layers(sizes, workspace_bytes: int) -> Blocks:
        return replace(blocks_for(sizes, workspace_bytes), layers=layers)

    patch.setattr(chunked, "blocks_for", blocks_of_layers)
    engine = ChunkedEngine(operations=rows_triton, workspace_bytes=workspace, replays=replays)
    patch.setitem(ENGINES, "triton", lambda embeddings, mib: engine)


def results(problem, dtype, device, backward=True, temperature=False, **options):
    embeddings = problem.embeddings.to(device, dtype).requires_grad_(backward)
    beside = {"keys": problem.keys, "metric": problem.metric}
    beside = {name: of.to(device, dtype).requires_grad_(backward) for name, of in beside.items() if of is not None}
    tau = torch.tensor(problem.temperature, device=device, requires_grad=temperature)
    options = {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}
    with torch.set_grad_enabled(backward):
        out = gasp_fast.gasp_loss(
            in_given_metric(embeddings, beside), problem.matches.to(device), keys=beside.get("keys"), temperature=tau,
            backend="triton", negatives=problem.negatives, other_targets=problem.other_targets, **options,
        )  # fmt: skip
    if backward:
        out.loss.backward(torch.ones_like(out.loss))
    grads = [t.grad for t in (embeddings, *beside.values(), tau) if t.grad is not None]
    return [out.loss.detach(), out.corr_per_layer, out.depth_per_layer, *grads]


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize(
    ("dtype", "problem_options", "loss_options"),
    [
        (torch.float32, {}, {"layer_weights": torch.arange(1.0, LAYERS + 1), "reduction": "sum"}),
        (torch.bfloat16, {"other_targets": "ignored", "negatives": "frame", "weighted": True}, {}),
        (torch.float32, {"metric": True}, {}),
    ],
)
def test_repeated_layers_have_the_same_bits(
    monkeypatch, repeated, poisoned_memory, device, workspace, dtype, problem_options, loss_options
):
    problem = random_problem(0, SEQUENCES, width=8, matches=12, layers=LAYERS, **problem_options)
    found = []
    for replays in (False, True):
        use_engine(monkeypatch, workspace, replays)
        found.append(results(problem, dtype, device, **loss_options))
    assert repeated == [1, 2] * len(SEQUENCES)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["whole columns", "cut columns", "folded"])
def test_layers_with_x_in_the_memory_of_their_gradients_have_the_same_bits(monkeypatch, repeated, device, kind):
    HalfProducts.use(monkeypatch, torch.bfloat16, multiprocessors=8)
    engines = {again: ChunkedEngine(operations=rows_triton, workspace_bytes=0, replays=again) for again in (0, 1)}

    def blocks_of_kind(sizes, workspace_bytes: int) -> Blocks:
        if kind == "folded":  # two groups of layers, and a rest
            blocks = Blocks(2, sizes.rows, sizes.rows, sizes.tokens, panel=3, folded=True)
            assert in_gradient(sizes, blocks)
            return blocks
        return Blocks(1, 3, 2, min(4 if kind == "cut columns" else 100, sizes.tokens))

    monkeypatch.setattr(chunked, "blocks_for", blocks_of_kind)
    layers = 5 if kind == "folded" else LAYERS
    problem, found = random_problem(0, SEQUENCES, width=16, matches=12, layers=layers), []
    for engine in engines.values():
        monkeypatch.setitem(ENGINES, "triton", lambda embeddings, mib, engine=engine: engine)
        found.append(results(problem, torch.bfloat16, device))
    assert repeated == ([2] if kind == "folded" else [1, 2]) * len(SEQUENCES)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_groups_of_layers_and_a_rest(monkeypatch, repeated, device):
    problem = random_problem(0, SEQUENCES, width=8, matches=12, layers=5)
    found = []
    for replays in (False, True):
        use_engine(monkeypatch, 1 << 20, replays, layers=2)
        found.append(results(problem, torch.float32, device))
    assert repeated == [2] * len(SEQUENCES)  # layers 0 and 1 are recorded, 2 and 3 repeat them, 4 is alone
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_a_forward_pass_repeats_too(monkeypatch, repeated, device, workspace):
    problem = random_problem(0, SEQUENCES, width=8, matches=12, layers=LAYERS, keys=True)
    found = []
    for replays in (False, True):
        use_engine(monkeypatch, workspace, replays)
        found.append(results(problem, torch.float32, device, backward=False))
    assert len(repeated) == (LAYERS - 1) * len(SEQUENCES)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("dtype", "keys", "temperature"),
    [(torch.float16, False, False), (torch.float32, True, False), (torch.float32, False, True)],
)
def test_layers_that_compute_otherwise_are_not_repeated(monkeypatch, repeated, device, dtype, keys, temperature):
    problem = random_problem(0, SEQUENCES, width=8, matches=12, layers=LAYERS, keys=keys)
    found = []
    for replays in (False, True):
        use_engine(monkeypatch, 1500, replays)
        found.append(results(problem, dtype, device, temperature=temperature))
    assert repeated == []
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize(("keys", "with_duals"), [(True, False), (False, False), (False, True)])
def test_a_recorded_group_computes_nothing_else(monkeypatch, device, workspace, backward, keys, with_duals):
    """Launches and products do nothing here, so every operation of torch but a view would be missed by a recording."""
    computed: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if current() is not None and not function.is_view:
                computed.add(function.__name__)
            return function(*args, **(kwargs or {}))

    drawn = random_problem(0, SEQUENCES, width=8, matches=12, layers=LAYERS)
    index, embeddings = drawn.matches.to(device).index, drawn.embeddings.to(device, torch.bfloat16)
    keys_or_same = embeddings.clone() if keys else embeddings
    tau, gradient = torch.tensor(0.07, device=device), torch.empty_like(embeddings)
    duals = embeddings.clone() if with_duals else None
    problem = Problem(embeddings, keys_or_same, index.rows, tau, index.values, index.known, True, duals)
    weights = TermWeights(*torch.ones(2, LAYERS, 12, device=device)) if backward else None
    terms, definition = MatchTerms.empty(LAYERS, 12, device), TermDefinition("sequence", "negatives", 1e-6)
    gradients = Gradients(None if keys else gradient, gradient) if backward else Gradients()
    use_engine(monkeypatch, workspace, replays=True)
    engine = ENGINES["triton"](embeddings, workspace)
    monkeypatch.setattr(rows_triton, "launch", lambda *arguments, **options: None)
    for name in ("similarity", "row_gradient", "token_gradient"):
        monkeypatch.setattr(Products, name, lambda *arguments: None)
    with Watch():  # not around `gasp_loss`: a mode does not see what happens in an operator of ours
        engine.terms_and_gradients(problem, index, weights, terms, definition, gradients)
    assert computed and computed <= {"empty.memory_format", "empty_like.default", "new_empty.default"}  # memory


def one_call(matches, embeddings):
    """The loss, a metric and the gradient; alignment and strides are those of `embeddings`."""
    leaf = embeddings.detach().requires_grad_()
    out = gasp_fast.gasp_loss(leaf, matches, backend="triton")
    out.loss.backward()
    return [out.loss.detach(), out.corr_per_layer, leaf.grad]


@pytest.mark.parametrize(
    ("workspace", "dtype"), [(250, torch.bfloat16), (300, torch.bfloat16), (1 << 20, torch.float32)]
)
def test_later_calls_with_the_same_matches_repeat(monkeypatch, repeated, poisoned_memory, device, workspace, dtype):
    """The first call notes its form, the second records, others repeat: with other embeddings and other memory."""
    problem = random_problem(0, SEQUENCES, width=8, matches=12, layers=1)
    embeddings = [problem.embeddings.to(device, dtype) * (call + 1) + call for call in range(4)]
    found = []
    for replays in (False, True):
        use_engine(monkeypatch, workspace, replays)
        matches = problem.matches.to(device)
        found.append([result for each in embeddings for result in one_call(matches, each)])
    assert repeated == [0] * len(SEQUENCES) * 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_calls_of_another_form_do_not_repeat(monkeypatch, repeated, device):
    problem = random_problem(0, SEQUENCES, width=8, matches=12, layers=1)
    plain = problem.embeddings.to(device, torch.float32)
    wider = torch.zeros(*plain.shape[:2], 12, device=device)
    strided, shifted = wider[..., :8].copy_(plain), torch.zeros(plain.numel() + 1, device=device)[1:].view_as(plain)
    shifted.copy_(plain)
    use_engine(monkeypatch, 1 << 20, replays=True)
    matches = problem.matches.to(device)
    expected = one_call(matches, plain)
    for each in (strided, shifted, plain.bfloat16()):
        found = one_call(matches, each)
        tolerance = 0 if each.dtype == plain.dtype else 0.1
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.to(b), b, rtol=tolerance, atol=tolerance)
    assert repeated == []


def test_a_recording_holds_neither_the_memory_of_a_call_nor_its_matches(monkeypatch, repeated, device):
    problem = random_problem(0, SEQUENCES, width=8, matches=12, layers=1)
    use_engine(monkeypatch, 1 << 20, replays=True)
    matches = problem.matches.to(device)
    index = weakref.ref(matches.index)
    made: list[weakref.ref[torch.Tensor]] = []
    add_scratch, place = Recording.add_scratch, Recording.place

    def seen_scratch(self: Recording, memory: torch.Tensor) -> None:
        made.append(weakref.ref(memory))
        add_scratch(self, memory)

    def seen_place(self: Recording, call: CallTensors) -> None:
        place(self, call)
        made.extend(weakref.ref(base) for base in self.bases)

    monkeypatch.setattr(Recording, "add_scratch", seen_scratch)
    monkeypatch.setattr(Recording, "place", seen_place)
    for _ in range(4):
        one_call(matches, problem.embeddings.to(device, torch.float32))
    gc.collect()
    assert len(repeated) == 2 * len(SEQUENCES) and len(made) > 20
    assert not [memory for memory in made if memory() is not None]
    del matches
    problem = None
    gc.collect()
    assert index() is None


def call_tensors(*layered: torch.Tensor) -> CallTensors:
    matches = random_problem(0, SEQUENCES, width=8, matches=12, layers=1).matches.index
    return CallTensors(matches, "form", list(layered), [])


def test_tensors_that_share_memory_keep_a_recording_from_lasting():
    """A place in one may be a place in the other, and those of another call may lie elsewhere."""
    memory = torch.zeros(4, 20)
    call = call_tensors(memory[:, :10], memory[:, 10:])
    recording = Recording(call)
    assert not recording.reusable and Recording(call_tensors(memory[:2], memory[2:])).reusable
    store(call, "group", recording)
    assert take(call, "group") == (True, None)


def test_a_tensor_of_nobody_keeps_a_recording_from_lasting():
    call = call_tensors(torch.zeros(2, 3))
    recording = Recording(call)
    recording.add_call(lambda value: None, torch.zeros(3))
    assert not recording.reusable


def test_one_call_at_a_time_has_a_recording():
    call = call_tensors(torch.zeros(2, 3))
    assert take(call, "group") == (False, None)
    store(call, "group", Recording(call))
    assert take(call, "group")[1] is not None
    assert take(call, "group") == (False, None)


def test_layers_in_each_others_memory_are_refused():
    memory = torch.zeros(100)
    recording = Recording(call_tensors(memory.as_strided((3, 10), (30, 1)), memory.as_strided((3, 10), (20, 1))))
    with pytest.raises(ValueError, match="copy one of them"):
        recording.span_of(memory[5:])


def test_a_failed_group_ends_the_recording():
    with pytest.raises(RuntimeError), Recording(call_tensors(torch.zeros(2, 3))):
        raise RuntimeError
    assert current() is None
