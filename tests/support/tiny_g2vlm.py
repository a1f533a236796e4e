"""A tiny G²VLM of the real transformers classes, and a slow one that shares nothing with it but the weights."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gasp_fast.g2vlm.checkpoint import official_weights
from gasp_fast.g2vlm.experts import ExpertsConfig
from gasp_fast.g2vlm.losses import Geometry
from gasp_fast.g2vlm.model import G2VLM

WIDTH, LAYERS, HEADS, KEY_HEADS, DIM = 64, 3, 4, 2, 16
SECTIONS, THETA, EPS = (2, 3, 3), 1e6, 1e-5
IMAGE, START, END = 90, 92, 93  # tokens


@dataclass(frozen=True)
class Tail:
    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None


class StandInHeads(nn.Module):
    """Has the interface of the geometry heads."""

    def __init__(self):
        super().__init__()
        self.points = nn.Linear(WIDTH, 3)

    def forward(self, hidden: Tensor, rows: int, columns: int) -> Geometry:
        points = self.points(hidden).unflatten(2, (rows, columns))  # [B, F, rows, columns, 3]
        pixels = points.repeat_interleave(14, 2).repeat_interleave(14, 3)
        rotation = torch.eye(3, device=hidden.device).expand(*points.shape[:2], 3, 3)
        return Geometry(pixels, pixels, rotation, points.mean((2, 3)))


def tiny_qwen():
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {
        "vocab_size": 100, "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "rms_norm_eps": EPS,
        "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA, "mrope_section": list(SECTIONS)},
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": WIDTH, "mlp_ratio": 2}
    tokens = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": START, "vision_end_token_id": END}
    return drawn(Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)))


def tiny_g2vlm(seed=0, zero_map=False, **config) -> G2VLM:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(seed)
    qwen = tiny_qwen()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14, "image_size": 56}
    encoder = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes))
    model = G2VLM(qwen, encoder, StandInHeads(), ExpertsConfig(**{"checkpointing": "off", **config}))
    return model if zero_map else drawn(model)


def drawn(model, noise=0.1):
    """With a little noise on all weights: new ones are zeros and ones that hide errors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model.eval()


def drawn_images(batch=2, frames=3, seed=0) -> Tensor:
    return torch.randn(batch, frames, 3, 28, 42, generator=torch.Generator().manual_seed(seed))


def drawn_tail(seed=0, images=True) -> Tail:
    """Two sequences: one with an image of 2 x 2 tokens, one with one of 2 x 2 and one of 1 x 3."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 90, (2, 16), generator=generator)
    labels = torch.where(torch.rand(2, 16, generator=generator) < 0.5, ids, -100)
    if not images:
        return Tail(ids, labels)
    ids[0, 3:7], ids[1, 1:5], ids[1, 8:11] = IMAGE, IMAGE, IMAGE
    grids = torch.tensor([[1, 4, 4], [1, 4, 4], [1, 2, 6]])
    pixels = torch.randn(int(grids.prod(1).sum()), 1176, generator=generator)
    return Tail(ids, labels, pixels, grids)


def visible(frames: int, patches: int, prefix: int, tail: int, pattern: str) -> Tensor:
    """bool [N, N]: which token (row) sees which, in the order of the sequence."""
    frame_of = torch.arange(frames).repeat_interleave(patches + 2)
    part = torch.cat([torch.full((prefix,), -1), frame_of, torch.full((tail,), frames)])  # -1: prefix, frames: tail
    place = torch.arange(len(part))
    query, key = part[:, None], part[None]
    earlier = place[:, None] >= place[None]
    in_block = (query >= 0) & (query < frames) & (key >= 0) & (key < frames)
    allowed = {"global": in_block, "block_causal": in_block & (query >= key), "frame": in_block & (query == key)}
    return allowed[pattern] | (key < query) & ~in_block | (key == query) & ~in_block & earlier


def memory_order(frames: int, patches: int, prefix: int, tail: int) -> Tensor:
    """Where each token in memory lies in the sequence."""
    in_frames = prefix + torch.arange(frames * (patches + 2)).view(frames, patches + 2)
    marks, inner = in_frames[:, [0, -1]], in_frames[:, 1:-1]
    after = prefix + in_frames.numel()
    return torch.cat([inner.flatten(), marks.flatten(), torch.arange(prefix), after + torch.arange(tail)])


def slow_states(model: G2VLM, images: Tensor, prefix: Tensor, ids: Tensor, patterns: list[str]) -> Tensor:
    """Final states in the order of the sequence: images [F, 3, 28, 42], prefix [T], tail [S] of text -> [N, WIDTH]."""
    weights = official_weights(model)
    frames, rows, columns = len(images), 2, 3
    embedding = weights["language_model.model.embed_tokens.weight"]
    patches = model.encoder(images).last_hidden_state[:, -rows * columns :]  # [F, 6, 32]
    patches = patches @ weights["dino2llm.weight"].T + weights["dino2llm.bias"]
    states, positions, geometric = [], [], []

    def token(state, position, of_patch=False):
        states.append(state), positions.append(position), geometric.append(of_patch)

    free = 0
    for index in prefix:
        token(embedding[index], (free, free, free))
        free += 1
    for frame in patches:
        token(embedding[START], (free,) * 3)
        for at, patch in enumerate(frame):
            row, column = divmod(at, columns)
            token(patch, (free + 1, free + 1 + row, free + 1 + column), True)
        free += 1 + max(rows, columns)
        token(embedding[END], (free,) * 3)
        free += 1
    for index in ids:
        token(embedding[index], (free,) * 3)
        free += 1
    hidden = torch.stack(states)
    angle = torch.tensor(positions).T.float()[[axis for axis, size in enumerate(SECTIONS) for _ in range(size)]].T
    angle = angle / THETA ** (torch.arange(0, DIM, 2) / DIM)  # [N, DIM / 2]
    kinds = ["_moe_geo" if of_patch else "" for of_patch in geometric]
    for layer, pattern in enumerate(patterns):
        mask = visible(frames, rows * columns, len(prefix), len(ids), pattern)
        hidden = _slow_layer(weights, f"language_model.model.layers.{layer}.", hidden, kinds, angle, mask)
    norms = [weights[f"language_model.model.norm{kind}.weight"] for kind in kinds]
    return torch.stack([_norm(state, norm) for state, norm in zip(hidden, norms, strict=True)])


def _slow_layer(weights, layer, hidden, kinds, angle, mask):
    def linear(state, name, kind):
        bias = weights.get(f"{layer}{name}{kind}.bias", 0)
        return weights[f"{layer}{name}{kind}.weight"] @ state + bias

    def heads(state, letter, kind, turn):
        states = linear(state, f"self_attn.{letter}_proj", kind).view(-1, DIM)
        if turn is None:
            return states
        states = _norm(states, weights[f"{layer}self_attn.{letter}_norm{kind}.weight"])
        number = torch.complex(states[:, : DIM // 2], states[:, DIM // 2 :]) * torch.polar(torch.ones_like(turn), turn)
        return torch.cat([number.real, number.imag], -1)

    normed = [_norm(s, weights[f"{layer}input_layernorm{kind}.weight"]) for s, kind in zip(hidden, kinds, strict=True)]
    tokens = list(zip(normed, kinds, angle, strict=True))
    query = torch.stack([heads(state, "q", kind, turn) for state, kind, turn in tokens])  # [N, heads, DIM]
    key = torch.stack([heads(state, "k", kind, turn) for state, kind, turn in tokens])
    value = torch.stack([heads(state, "v", kind, None) for state, kind, turn in tokens])
    key, value = (states.repeat_interleave(HEADS // KEY_HEADS, 1) for states in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / DIM**0.5
    shares = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    attended = torch.einsum("hqk,khd->qhd", shares, value).flatten(1)
    out = []
    for state, each, kind in zip(hidden, attended, kinds, strict=True):
        scale = [weights[f"{layer}{name}.gamma"] if kind else 1 for name in ("ls1", "ls2")]
        state = state + scale[0] * linear(each, "self_attn.o_proj", kind)
        inner = _norm(state, weights[f"{layer}post_attention_layernorm{kind}.weight"])
        gate, up = (weights[f"{layer}mlp{kind}.{name}_proj.weight"] @ inner for name in ("gate", "up"))
        out.append(state + scale[1] * (weights[f"{layer}mlp{kind}.down_proj.weight"] @ (F.silu(gate) * up)))
    return torch.stack(out)


def _norm(state, weight):
    return state * torch.rsqrt(state.pow(2).mean(-1, keepdim=True) + EPS) * weight
