"""`attach` adds correspondence heads and their loss to a Hugging Face model that a trainer of the user's own trains.

    gasp = gasp_fast.attach(model, processor)
    optimizer = torch.optim.AdamW([*model.parameters(), *gasp.parameters()])
    ...
    loss = model(**inputs).loss + gasp.loss(gasp.visual_positions(inputs["input_ids"]), matches)

Hooks keep the hidden states of each forward pass until `loss` has used them. `loss` computes the heads of a few layers
at a time, with their gradients (`supervision/geometric.py`), so that little memory is added to the model's own.

`Gasp.join` is for trainers that call the model themselves. The heads become a submodule, so that optimisers, DDP and
DeepSpeed's stages 1 and 2 include them, and `matches` becomes an argument of the forward pass. The loss is then added
where no trainer can miss it: an identity after the final norm, whose backward pass also starts that of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, cast
from weakref import WeakSet

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from gasp_fast.backbones import Backbone, supported_models, unwrap
from gasp_fast.backbones.base import BACKBONES
from gasp_fast.backbones.discovered import DiscoveredBackbone, FrameGrid
from gasp_fast.collator import Anchors, Collator, CollatorConfig, no_matches
from gasp_fast.loss.config import LossConfig
from gasp_fast.loss.matches import Matches
from gasp_fast.run_folder import HEADS
from gasp_fast.supervision.geometric import GeometricSupervision
from gasp_fast.supervision.head_files import read_heads, write_heads
from gasp_fast.supervision.heads import CorrespondenceHeads, HeadsConfig
from gasp_fast.supervision.layer_capture import HeadInput

from .build import ModelDtype, build_heads, build_supervision
from .tracked_frames import tracked_sample, warn_without_matches

SUBMODULE = "gasp"  # the name of the heads in a model that they have joined
_WITH_HEADS: WeakSet[nn.Module] = WeakSet()  # language models that have heads until `detach`


def attach(
    model: nn.Module,
    processor: Any = None,
    layers: str = "all",
    init: Literal["svd", "random"] | str | Path = "svd",
    *,
    loss: LossConfig | None = None,
    input: HeadInput = "output",
    mid_size: int | None = None,
    out_size: int | None = None,
    compute: Literal["auto", "fp32", "tf32", "bf16"] = "auto",
    embeddings: Literal["auto", "fp32", "bf16"] = "auto",
    frame_grid: FrameGrid | None = None,
    visual_token_id: int | None = None,
) -> Gasp:
    """Add correspondence heads to the decoder layers of `model`, with adapters (peft) or without.

    `layers` is "all" or a range that counts from 1 ("18-25"). `init="svd"` starts each head from its layer's query
    projection, "random" from noise; a folder continues the heads of its `heads.safetensors`, with their layers, sizes
    and input. `input`, `mid_size`, `out_size`, `compute` and `embeddings` are those of `HeadsConfig`; `loss` sets
    weights, temperature and negatives. `processor` is needed for `Gasp.matches`.

    Families that the package knows have their own pixel -> token map. In other models the parts are found and the map
    is measured (`backbones/discovered.py`); `frame_grid` and `visual_token_id` state what cannot be found.
    """
    _check_arguments(processor, init, loss, frame_grid)
    given = init if init in ("svd", "random") else None
    config = HeadsConfig(
        layers=layers,
        init=cast(Any, given or "svd"),
        input=input,
        mid_size=mid_size,
        out_size=out_size,
        compute=compute,
        embeddings=embeddings,
    )
    inner = unwrap(model)
    if getattr(getattr(inner, "config", None), "get_text_config", None) is None:
        raise TypeError(f"model is a {type(inner).__name__}; attach takes a transformers model, in wrappers or not")
    family = getattr(inner.config, "model_type", None)
    backbone: Backbone
    if family in supported_models() and frame_grid is None and visual_token_id is None:
        backbone = BACKBONES[family](inner.name_or_path, inner.config, processor)
    else:
        backbone = DiscoveredBackbone(model, processor, frame_grid, visual_token_id)
    if backbone.language_model(model) in _WITH_HEADS:
        raise RuntimeError(
            "model: it has the heads of an earlier attach; call detach() of what that returned, or load the model anew"
        )
    first = next(backbone.decoder_layers(model)[0].parameters())
    if first.device.type == "meta" or first.numel() == 0:
        raise ValueError("model: its weights are not in memory (meta device or ZeRO-3); attach before they are divided")
    dtype: ModelDtype = "bf16" if inner.dtype == torch.bfloat16 else "fp32"
    if given is None:
        heads = _read_fitting(Path(init) / HEADS, backbone)
    else:
        heads = build_heads(config, backbone, model, first.device, dtype)
    supervision = build_supervision(config, LossConfig() if loss is None else loss, backbone, model, heads, dtype)
    return Gasp(model, backbone, supervision.to(first.device))


def _check_arguments(processor: Any, init: str | Path, loss: Any, frame_grid: FrameGrid | None) -> None:
    if loss is not None and not isinstance(loss, LossConfig):
        raise TypeError(
            f"loss = {loss!r} is a {type(loss).__name__}; pass a gasp_fast.LossConfig, for example "
            "loss=gasp_fast.LossConfig(temperature=0.1)"
        )
    parts = ("image_processor", "video_processor")
    if processor is not None and frame_grid is None and not any(hasattr(processor, part) for part in parts):
        raise TypeError(
            f"processor is a {type(processor).__name__} without an image processor; pass the model's whole processor: "
            "transformers.AutoProcessor.from_pretrained(...)"
        )
    if init not in ("svd", "random") and not (Path(init) / HEADS).is_file():
        raise FileNotFoundError(
            f'init = {str(init)!r}: no such file {Path(init) / HEADS}; use init="svd", init="random", or a folder '
            f"with a {HEADS}"
        )


def _read_fitting(file: Path, backbone: Backbone) -> CorrespondenceHeads:
    heads = read_heads(file)
    head: Any = heads.by_layer[str(heads.layers[-1])]
    if heads.layers[-1] >= backbone.layer_count or head.first.in_features != backbone.hidden_size:
        raise ValueError(
            f"init: the heads of {file} are of layers up to {heads.layers[-1] + 1} and {head.first.in_features} wide "
            f"states; this model has {backbone.layer_count} layers of {backbone.hidden_size}"
        )
    return heads


class Gasp:
    """What `attach` returns. `backbone` describes the model, `supervision` is the module of heads and loss."""

    def __init__(self, model: nn.Module, backbone: Backbone, supervision: GeometricSupervision) -> None:
        self.backbone, self.supervision = backbone, supervision
        # Of the latest loss: `loss`, and `corr`, `depth`, `pck`, `cosine` [L]. Empty if it had no matches. `depth` is
        # NaN without depth maps.
        self.metrics: dict[str, Tensor] = {}
        # Training passes of a joined model, with an argument `matches` (also None, on purpose) and without.
        self.passes_with_matches = self.passes_without_matches = 0
        self.share = 1.0  # of a forward pass in the loss of an optimiser step, in a model that the heads have joined
        self._joined: nn.Module | None = None
        self._pending: tuple[Tensor, Matches] | None = None  # of the forward pass that runs, in a joined model
        layers: Any = backbone.decoder_layers(model)
        self._norm = backbone.final_norm(model)
        self._hooks = ExitStack()
        self._capture = self._hooks.enter_context(supervision.capture(layers, self._norm))
        decoder: nn.Module = backbone.language_model(model)
        self._hooks.callback(decoder.register_forward_pre_hook(lambda *_: self._capture.clear()).remove)
        _WITH_HEADS.add(decoder)
        self._hooks.callback(_WITH_HEADS.discard, decoder)

    @property
    def layers(self) -> list[int]:
        """Indices of the supervised decoder layers, from 0."""
        return self.supervision.layers

    def parameters(self) -> list[nn.Parameter]:
        """Of the heads. They are part of `model.parameters()` only after `join`."""
        return list(self.supervision.parameters())

    def to(self, device: torch.device | str) -> Gasp:
        """Move the heads, after the model has been moved."""
        self.supervision.to(device)
        return self

    # ---- data --------------------------------------------------------------------------------------------------------

    def matches(
        self,
        images: Sequence[Any],
        uv: ArrayLike,
        visible: ArrayLike,
        depth: ArrayLike | None = None,
        *,
        depth_maps: Sequence[ArrayLike] | None = None,
        anchors: Anchors = "all",
        query_frame: int = 0,
        seed: int = 0,
    ) -> Matches:
        """The matches that point tracks from anywhere imply for the visual tokens of one sequence.

        `images` are the F frames as the processor gets them (arrays [H, W, 3] or PIL images), `uv` [T, F, 2] the T
        points in pixels of them (x, y, with pixel centres at integer + 0.5), `visible` [T, F] where each is seen.
        The depth term needs `depth_maps`, one [h, w] for each frame at any resolution, with 0 where depth is unknown.
        `depth` [T, F] is each point's depth in each frame, beside the maps; None: as the maps say. `anchors="first"`
        takes the matches that start in `query_frame` only. No match at all is a warning.

        Join the sequences of a batch with `Matches.pack`.
        """
        if self.backbone.processor is None and not isinstance(self.backbone, DiscoveredBackbone):
            raise ValueError("processor = None: its resize and crop are needed here; pass it to attach")
        sample = tracked_sample(images, uv, visible, depth, depth_maps, query_frame)
        matches = Collator(self.backbone, CollatorConfig(anchors=anchors, seed=seed)).matches(sample)
        warn_without_matches(matches, sample)
        return matches

    def visual_positions(self, input_ids: Tensor) -> Tensor:
        """The tokens of all frames of `input_ids` [B, S] as flat indices into `B * S`, sequence by sequence."""
        return self.backbone.frame_tokens(input_ids).flatten().nonzero()[:, 0]

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def loss(self, visual_positions: Tensor, matches: Matches) -> Tensor:
        """The geometric loss of the model's latest forward pass, mean over layers, with its weights.

        `visual_positions` int64 [N] are the tokens that `matches` number, as flat indices into `B * S`. Each forward
        pass can be used once; its hidden states are freed here.
        """
        if len(visual_positions) != matches.tokens:
            raise ValueError(
                f"visual_positions has {len(visual_positions)} tokens and matches are over {matches.tokens}; both must "
                "be of the same frames, sequence by sequence"
            )
        if self._capture.empty:
            raise ValueError(
                "gasp.loss: there is no forward pass that it has not used; call the model first, each forward pass "
                "serves one gasp.loss"
            )
        device = self.parameters()[0].device
        out = self.supervision(self._capture, visual_positions.to(device), matches.to(device))
        self._capture.clear()
        self.metrics = {name: value.detach() for name, value in out.items()} if len(matches) else {}
        if self.metrics and (matches.patch_depth is None or matches.target_depth is None):
            self.metrics["depth"] = torch.full_like(self.metrics["depth"], torch.nan)
        return out["loss"]

    # ---- in a trainer that calls the model itself --------------------------------------------------------------------

    def join(self, module: nn.Module) -> None:
        """Make the heads a submodule of `module`, the model that the trainer calls, before it is wrapped.

        Each forward pass then takes two more arguments: `matches`, and `visual_positions` (None: all visual tokens).
        Its backward pass adds the gradient of `share` times the loss; what the model returns is unchanged. A pass
        without matches counts as one with none. State dicts of `module` leave the heads out: see `save` and `load`.
        """
        if self._joined is not None:
            raise RuntimeError(f"the heads have joined a {type(self._joined).__name__} already; call detach() first")
        self._joined = module
        self.supervision.to(next(module.parameters()).device)
        module.add_module(SUBMODULE, self.supervision)
        hidden = [
            self.supervision.register_state_dict_post_hook(_leave_out),
            self.supervision.register_load_state_dict_post_hook(_not_missing),
            module.register_forward_pre_hook(self._take_matches, with_kwargs=True),
            self._norm.register_forward_hook(self._add_gradient),
        ]
        for hook in hidden:
            self._hooks.callback(hook.remove)

    def _take_matches(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kwargs = dict(kwargs)
        if module.training and torch.is_grad_enabled():
            self.passes_with_matches += "matches" in kwargs
            self.passes_without_matches += "matches" not in kwargs
        matches, positions = kwargs.pop("matches", None), kwargs.pop("visual_positions", None)
        if matches is None:
            matches, positions = no_matches(), torch.zeros(0, dtype=torch.long)
        elif positions is None:
            if "input_ids" not in kwargs:
                raise ValueError("visual_positions = None needs input_ids; pass one of them to the model")
            positions = self.visual_positions(kwargs["input_ids"])
        self._pending = positions, matches
        return args, kwargs

    def _add_gradient(self, norm: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self._pending is None:  # not within a forward pass of the joined model
            return None
        pending, self._pending = self._pending, None
        loss = self.loss(*pending)
        return cast(Tensor, _WithGradientOf.apply(output, loss * self.share)) if loss.requires_grad else None

    # ---- weights -----------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write the heads to `folder/heads.safetensors`, where `gasp-fast evaluate` finds them beside a saved model."""
        file = Path(folder) / HEADS
        file.parent.mkdir(parents=True, exist_ok=True)
        write_heads(file, self._heads().state_dict(), self._compute(), self.supervision.reads)
        return file

    def load(self, folder: str | Path) -> None:
        """Read the heads that `save` wrote, or those of a checkpoint of `gasp_fast.train`."""
        file, own = Path(folder) / HEADS, self._heads()
        stored = read_heads(file)
        expected, found = (self._describe(heads) for heads in (own, stored))
        if expected != found:
            raise ValueError(f"{file} has heads {found}, and attached are {expected}; attach with the same settings")
        own.load_state_dict(stored.state_dict())

    def detach(self) -> None:
        """Remove hooks and heads: the model is what it was."""
        self._hooks.close()
        self._capture.clear()
        if self._joined is not None:
            delattr(self._joined, SUBMODULE)
            self._joined = None

    def _heads(self) -> CorrespondenceHeads:
        heads = self.supervision.heads
        assert heads is not None
        return heads

    def _compute(self) -> str:
        head: Any = next(iter(self._heads().by_layer.values()))
        compute: str = head.first.compute
        return compute

    @staticmethod
    def _describe(heads: CorrespondenceHeads) -> str:
        shapes = {tuple(value.shape) for value in heads.state_dict().values() if value.ndim == 2}
        layers = [layer + 1 for layer in heads.layers]
        return f"on the layers {layers}, of the shapes {sorted(shapes)}, reading {heads.reads}"


class _WithGradientOf(torch.autograd.Function):
    """`value` unchanged; its backward pass also starts that of `loss`, with a gradient of 1."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, loss: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones((), dtype=torch.float32)


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]


def _not_missing(module: nn.Module, keys: Any) -> None:
    own = {name for name, _ in module.named_parameters()}
    missing = [name for name in keys.missing_keys if any(name.endswith(f"{SUBMODULE}.{one}") for one in own)]
    for name in missing:
        keys.missing_keys.remove(name)
