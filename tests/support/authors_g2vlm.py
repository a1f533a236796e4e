"""What the authors of G²VLM call their weights, and a slow computation of their geometry heads.

Names, shapes and the order of operations are facts of the model code in InternRobotics/G2VLM (Apache-2.0), commit
5310772: `modeling/g2vlm/g2vlm.py`, `qwen2vl.py` and `dinov2_model.py`, `modeling/qwen2vl/modeling_qwen2_vl.py`, and
`modeling/pi3/models/layers/`. Their checkpoint was not at hand, and their file of position embeddings has another
licence and was not opened: that the first half of a head's dimensions turns by the row, in pairs (i, i + n / 2), is
what that family of models does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def layer_norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def mlp(name: str, width: int, inner: int) -> Shapes:
    return linear(f"{name}.fc1", width, inner) | linear(f"{name}.fc2", inner, width)


def head_shapes() -> Shapes:
    width, points, camera, pixels = 1536, 1024, 512, 3 * 14 * 14
    shapes: Shapes = {}
    for decoder, out in (("point_decoder", points), ("camera_decoder", camera), ("global_points_decoder", points)):
        for layer in range(5):
            block = f"{decoder}.blocks.{layer}"
            shapes |= layer_norm(f"{block}.norm1", width) | layer_norm(f"{block}.norm2", width)
            shapes |= linear(f"{block}.attn.qkv", width, 3 * width) | linear(f"{block}.attn.proj", width, width)
            shapes |= mlp(f"{block}.mlp", width, 4 * width)
            if decoder == "global_points_decoder":
                shapes |= layer_norm(f"{block}.norm3", width) | layer_norm(f"{block}.norm_y", width)
                for name in ("q_proj", "k_proj", "v_proj", "proj"):
                    shapes |= linear(f"{block}.cross_attn.{name}", width, width)
        shapes |= linear(f"{decoder}.linear_out", width, out)
    shapes |= linear("point_head.proj", points, pixels) | linear("global_point_head.proj", points, pixels)
    for block, layer in ((block, layer) for block in range(2) for layer in (1, 2, 3)):
        shapes |= linear(f"camera_head.res_conv.{block}.res_conv{layer}", camera, camera)
    shapes |= linear("camera_head.more_mlps.0", camera, camera) | linear("camera_head.more_mlps.2", camera, camera)
    return shapes | linear("camera_head.fc_t", camera, 3) | linear("camera_head.fc_rot", camera, 9)


def language_shapes() -> Shapes:
    width, inner, queries, keys, vocabulary = 1536, 8960, 1536, 256, 151936
    model = "language_model.model"
    shapes: Shapes = {f"{model}.embed_tokens.weight": (vocabulary, width)}
    shapes |= linear("language_model.lm_head", width, vocabulary, bias=False)
    for kind in ("", "_moe_geo"):
        shapes[f"{model}.norm{kind}.weight"] = (width,)
        for layer in (f"{model}.layers.{index}" for index in range(28)):
            for letter, out in (("q", queries), ("k", keys), ("v", keys)):
                shapes |= linear(f"{layer}.self_attn.{letter}_proj{kind}", width, out)
            shapes |= linear(f"{layer}.self_attn.o_proj{kind}", queries, width, bias=False)
            shapes |= {f"{layer}.self_attn.{letter}_norm{kind}.weight": (128,) for letter in "qk"}
            shapes |= {f"{layer}.{name}_layernorm{kind}.weight": (width,) for name in ("input", "post_attention")}
            for name, sizes in (("gate", (width, inner)), ("up", (width, inner)), ("down", (inner, width))):
                shapes |= linear(f"{layer}.mlp{kind}.{name}_proj", *sizes, bias=False)
            shapes |= {f"{layer}.{name}.gamma": (width,) for name in ("ls1", "ls2")}
    return shapes


def vision_shapes() -> Shapes:
    """Of Qwen2-VL's tower, DINOv2-large with registers, and the map from it."""
    width, vit, dino = 1536, 1280, 1024
    shapes: Shapes = {"vit_model.patch_embed.proj.weight": (vit, 3, 2, 14, 14)}
    for block in (f"vit_model.blocks.{index}" for index in range(32)):
        shapes |= layer_norm(f"{block}.norm1", vit) | layer_norm(f"{block}.norm2", vit)
        shapes |= linear(f"{block}.attn.qkv", vit, 3 * vit) | linear(f"{block}.attn.proj", vit, vit)
        shapes |= mlp(f"{block}.mlp", vit, 4 * vit)
    shapes |= layer_norm("vit_model.merger.ln_q", vit) | linear("vit_model.merger.mlp.0", 4 * vit, 4 * vit)
    shapes |= linear("vit_model.merger.mlp.2", 4 * vit, width) | linear("dino2llm", dino, width)
    tokens = {"cls_token": (1, 1, dino), "mask_token": (1, dino), "register_tokens": (1, 4, dino)}
    tokens |= {"position_embeddings": (1, 1370, dino), "patch_embeddings.projection.weight": (dino, 3, 14, 14)}
    tokens |= {"patch_embeddings.projection.bias": (dino,)}
    shapes |= {f"dino_model.embeddings.{name}": shape for name, shape in tokens.items()}
    for layer in (f"dino_model.encoder.layer.{index}" for index in range(24)):
        shapes |= layer_norm(f"{layer}.norm1", dino) | layer_norm(f"{layer}.norm2", dino)
        for name in ("attention.query", "attention.key", "attention.value", "output.dense"):
            shapes |= linear(f"{layer}.attention.{name}", dino, dino)
        shapes |= mlp(f"{layer}.mlp", dino, 4 * dino)
        shapes |= {f"{layer}.layer_scale{index}.lambda1": (dino,) for index in (1, 2)}
    return shapes | layer_norm("dino_model.layernorm", dino)


class SlowHeads:
    """The heads from weights by their names, frame by frame, patch size `patch`, in float64."""

    def __init__(self, weights: dict[str, Tensor], heads: int, patch: int) -> None:
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.heads, self.patch = heads, patch

    def points(self, hidden: Tensor, rows: int, columns: int) -> Tensor:
        """Of one frame: [P, D] -> [H, W, 3]."""
        a, b, c = self._pixels("point_head", self.decoded("point_decoder", hidden, columns), rows, columns)
        return torch.stack([a * c.exp(), b * c.exp(), c.exp()], -1)

    def global_points(self, hidden: Tensor, first: Tensor, rows: int, columns: int) -> Tensor:
        decoded = self.decoded("global_points_decoder", hidden, columns, first)
        return torch.stack(self._pixels("global_point_head", decoded, rows, columns), -1)

    def pose(self, hidden: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Of one frame: [P, D] -> [3, 3], [3]."""
        x = self.decoded("camera_decoder", hidden, columns)
        for block in ("camera_head.res_conv.0", "camera_head.res_conv.1"):
            y = x
            for layer in (1, 2, 3):
                y = self._linear(f"{block}.res_conv{layer}", y).relu()
            x = x + y
        x = sum(x) / len(x)
        for layer in (0, 2):
            x = self._linear(f"camera_head.more_mlps.{layer}", x).relu()
        matrix = torch.stack([row / row.norm() for row in self._linear("camera_head.fc_rot", x).view(3, 3)])
        u, _, vt = torch.linalg.svd(matrix)
        rotation = u @ torch.diag(torch.tensor([1.0, 1.0, float(torch.det(u @ vt))]).double()) @ vt
        return rotation, self._linear("camera_head.fc_t", x)

    def decoded(self, name: str, x: Tensor, columns: int, first: Tensor | None = None) -> Tensor:
        x, count = x.double(), len({key.split(".")[2] for key in self.weights if key.startswith(f"{name}.blocks.")})
        for block in (f"{name}.blocks.{index}" for index in range(count)):
            fused = self._linear(f"{block}.attn.qkv", self._norm(f"{block}.norm1", x)).chunk(3, -1)
            x = x + self._linear(f"{block}.attn.proj", self._attended(*fused, columns))
            last = "norm2"
            if first is not None:
                y, context, last = (
                    self._norm(f"{block}.norm2", x),
                    self._norm(f"{block}.norm_y", first.double()),
                    "norm3",
                )
                parts = (self._linear(f"{block}.cross_attn.{letter}_proj", of)
                         for letter, of in (("q", y), ("k", context), ("v", context)))  # fmt: skip
                x = x + self._linear(f"{block}.cross_attn.proj", self._attended(*parts, columns))
            inner = self._linear(f"{block}.mlp.fc1", self._norm(f"{block}.{last}", x))
            x = x + self._linear(f"{block}.mlp.fc2", F.gelu(inner))
        return self._linear(f"{name}.linear_out", x)

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, columns: int) -> Tensor:
        out = []
        for q, k, v in zip(*(x.chunk(self.heads, -1) for x in (query, key, value)), strict=True):
            q, k = self._turned(q, columns), self._turned(k, columns)
            out.append((q @ k.mT / q.shape[1] ** 0.5).softmax(-1) @ v)
        return torch.cat(out, -1)

    def _turned(self, x: Tensor, columns: int) -> Tensor:
        """The first half of the dimensions by the row, the second by the column; base 100."""
        place, halves = torch.arange(len(x)), []
        for half, at in zip(x.chunk(2, -1), (place // columns, place % columns), strict=True):
            real, imaginary = half.chunk(2, -1)
            angle = at[:, None] * 100.0 ** (-torch.arange(real.shape[1]) / real.shape[1]).double()
            turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
            halves += [turned.real, turned.imag]
        return torch.cat(halves, -1)

    def _pixels(self, name: str, x: Tensor, rows: int, columns: int) -> list[Tensor]:
        """Three maps [H, W]: the values of a patch by coordinate, row and column."""
        values = self._linear(f"{name}.proj", x).T.reshape(1, -1, rows, columns)
        return list(F.pixel_shuffle(values, self.patch)[0])

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
