"""G²VLM as the training loop sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from gasp_fast.backbones import Backbone
from gasp_fast.backbones.base_model import load_backbone
from gasp_fast.backbones.fingerprint import fingerprint
from gasp_fast.planning.dealing import DealtStep
from gasp_fast.training.averages import mean_of_sequences
from gasp_fast.training.distributed import Processes
from gasp_fast.training.guards import GuardError
from gasp_fast.training.loader import make_data_loader
from gasp_fast.training.objective import Batch, Objective, Record, Term
from gasp_fast.training.optim import Group, Schedule
from gasp_fast.training.same_run import AT_BEGINNING, EVERY_RUN, SHAPES, WEIGHTS, Rules, run_facts
from gasp_fast.training.stream import Share
from gasp_fast.training.weights import gathered

from .batch import GeometryBatch
from .collator import GeometryCollator
from .config import G2TrainConfig
from .data_config import PackShape
from .heads import HeadsConfig
from .held_out import Scores, UnseenScenes, scores_of
from .model import IGNORED
from .planning import step_flops
from .question_samples import QuestionStream
from .samples import GeometryStream
from .supervision import sequence_matches
from .trained import GASP_TERMS, GEOMETRY_TERMS, G2Weights, TrainedG2VLM, build, gather_weights, read_weights

GROUPS = {"experts.": "experts", "heads.": "heads", "gasp.": "gasp"}  # by the beginning of names; others: "maps"
LEARNING_STEPS = 5
RULES = Rules(
    free=EVERY_RUN.free,
    rounding=(*EVERY_RUN.rounding, "experts.checkpointing", "heads.checkpointing"),
    fixed={
        **EVERY_RUN.fixed,
        "model.start": AT_BEGINNING,
        "experts.layer_scale": AT_BEGINNING,
        "experts.qk_norm": WEIGHTS,
        **{f"heads.{key.name}": SHAPES for key in fields(HeadsConfig) if key.name not in ("compute", "checkpointing")},
        "gasp.heads.layers": SHAPES,
        "gasp.heads.mid_size": SHAPES,
        "gasp.heads.out_size": SHAPES,
        "gasp.heads.init": AT_BEGINNING,
        "gasp.heads.bias": AT_BEGINNING,
    },
)


def packs_of(
    shape_of_step: Callable[[int], PackShape], batch_size: int, tokens_at_once: int, world_size: int
) -> Callable[[int], DealtStep]:
    """How each step is dealt: every process takes equally many successive sequences, in packs that are equally large.

    They are as few as hold them with at most `tokens_at_once` patches each, or one sequence.
    """
    own = batch_size // world_size

    def dealt(step: int) -> DealtStep:
        packs = -(-own // max(1, tokens_at_once // shape_of_step(step).tokens))
        ends = [own * number // packs for number in range(packs + 1)]
        places = [
            [list(range(rank * own + start, rank * own + end)) for start, end in pairwise(ends)]
            for rank in range(world_size)
        ]
        return DealtStep(places, np.ones((world_size, packs), np.int64), padding=0.0, meets_often=False)

    return dealt


class G2Collator:
    """Packs as the loop takes them: with `counts`, of labelled tokens, of sequences, and of those with matches."""

    def __init__(self, backbone: Backbone | None) -> None:
        self.collate = GeometryCollator(backbone)

    def __call__(self, samples: Sequence[Any]) -> Batch:
        pack = self.collate(samples)
        labelled = 0 if pack.questions is None else int((pack.questions.labels[:, 1:] != IGNORED).sum())
        matched = 0
        if pack.matches is not None:
            averaged, matched = mean_of_sequences(pack.matches)
            pack = replace(pack, matches=averaged)
        counts = torch.tensor([labelled, len(pack.images), matched], dtype=torch.float64)
        return {"pack": pack, "counts": counts, "skipped": pack.skipped}


class MovingWeights:
    """Checks that each group of trained parameters has moved after a few steps. One of its weights is enough.

    Some never move: in the last layer, what comes after attention serves its own kind of tokens alone.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        self.steps = LEARNING_STEPS
        self.groups = list(groups)
        self.before = self._sums()

    def _sums(self) -> dict[str, list[float]]:
        return {
            group.name: [float(gathered(weight).double().square().sum()) for weight in group.parameters]
            for group in self.groups
        }

    def add(self, outputs: dict[str, Any], batch: Batch) -> None:
        """Nothing: every pack of a run has the same losses."""

    def check(self) -> None:
        now = self._sums()
        if fixed := [name for name, before in self.before.items() if now[name] == before]:
            raise GuardError(
                f"no weight of {' and '.join(fixed)} has moved after {self.steps} steps: no gradient reaches them; "
                "look at train.mode and at the weights in loss"
            )


class G2Objective(Objective):
    """Trains a `TrainedG2VLM` on packs of a `GeometryStream`, or of a `QuestionStream` in the joint stage."""

    counts = ("answered", "measured", "matched")  # steps that have labelled tokens, sequences, and matches
    dtype = torch.float32  # of weights; the model itself chooses what its products run in
    rules = RULES
    next_command = "gasp-fast geometry --model {model} --scenes DIR"
    config: G2TrainConfig
    model: TrainedG2VLM
    stream: GeometryStream | QuestionStream
    sequences: UnseenScenes | None

    def __init__(self, config: G2TrainConfig, stage: int = 0, once: Callable[[Any], Any] = lambda read: read()) -> None:
        """Opens the scenes. `stage`: of ZeRO; `once` lets one process read the scenes for all of them."""
        if stage == 3:
            raise GuardError(f"deepspeed = {config.deepspeed!r} is ZeRO-3, which G²VLM is not trained with; use zero2")
        self.config, data, batch_size = config, config.data, config.train.batch_size
        self.backbone = load_backbone(config.model.source) if data.questions else None
        self.stream = once(partial(GeometryStream, data, batch_size)) if self.backbone is None else self._questions()
        self.sequences = UnseenScenes(config) if config.evaluate.scenes else None
        text, geometry = config.loss.text_weight > 0, config.loss.geometry_weight > 0
        self.terms = (
            *((Term("lm", "answered"),) if text else ()),
            *(Term(name, "measured") for name in GEOMETRY_TERMS if geometry),
        )
        # The last layer's output of patches serves geometry alone, that of semantic tokens the text alone.
        self.may_skip_weights = config.train.mode != "geometric"

    def _questions(self) -> QuestionStream:
        config, matches_of = self.config, None
        if config.gasp.weight and self.backbone is not None:
            matches_of = partial(sequence_matches, self.backbone, config.gasp)
        return QuestionStream(config.data, config.train.batch_size, matches_of)

    # ---- before the first step --------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        return self.config.train.steps

    def share(self, processes: Processes) -> Share:
        train, world = self.config.train, processes.world_size
        if train.batch_size % world:
            raise ValueError(
                f"train.batch_size = {train.batch_size} does not divide among {world} processes; give a multiple of it"
            )
        return Share(processes.rank, world, train.batch_size, tokens_at_once=train.tokens_at_once)

    def build(self, device: torch.device) -> None:
        self.model = build(self.config, device)
        if self.model.model.gasp is not None:
            layers = len(self.model.model.gasp.layers)
            self.terms += tuple(Term(name, "matched", layers, is_loss=name != "pck") for name in GASP_TERMS)
        self.hidden_size = self.model.model.qwen_config.text_config.hidden_size

    def groups(self) -> Iterator[Group]:
        groups: dict[str, list[torch.nn.Parameter]] = {}
        for name, parameter in self.model.model.named_parameters():
            if parameter.requires_grad:
                kind = next((kind for part, kind in GROUPS.items() if name.startswith(part)), "maps")
                groups.setdefault(kind, []).append(parameter)
        return (Group(name, parameters) for name, parameters in groups.items())

    def make_optimizer(self) -> torch.optim.Optimizer:
        train = self.config.train
        parameters = [parameter for group in self.groups() for parameter in group.parameters]
        return torch.optim.AdamW(
            parameters, train.learning_rate, (train.beta1, train.beta2), train.epsilon, weight_decay=0.0, fused=True
        )

    def schedule(self, steps: int) -> Schedule:
        train = self.config.train
        return Schedule.of(train.warmup, steps, train.last_learning_rate / train.learning_rate)

    def loader(self, share: Share, steps: int, done: int, pin_memory: bool) -> DataLoader[Any]:
        collate = G2Collator(self.backbone)
        return make_data_loader(self.stream, collate, share, steps, done, self.config.data.workers, pin_memory)

    def deal(self, share: Share, processes: Processes) -> Callable[[int], DealtStep]:
        """Evenly, in packs of at most `train.tokens_at_once` patches: all sequences of a step have one shape."""
        train = self.config.train
        return packs_of(self.stream.shape_of_step, train.batch_size, train.tokens_at_once, processes.world_size)

    def learning_guard(self) -> MovingWeights:
        return MovingWeights(self.groups())

    def describe(self, share: Share, processes: Processes) -> str:
        lines = [f"{'group':<10} {'parameters':>15} {'learning rate':>14}"]
        rate = self.config.train.learning_rate
        lines += [f"{group.name:<10} {group.count:>15,} {rate:>14g}" for group in self.groups()]
        frozen = sum(parameter.numel() for parameter in self.model.parameters() if not parameter.requires_grad)
        lines.append(f"{'frozen':<10} {frozen:>15,} {'-':>14}")
        world = f"{share.world_size} process{'es' if share.world_size > 1 else ''}"
        at_once = f"at most {share.tokens_at_once:,} patches at once"
        lines.append(f"{world}; a step is {share.batch_size} sequences: {at_once}")
        return "\n".join(lines)

    # ---- a step -----------------------------------------------------------------------------------------------------

    def flops(self, batch: Batch) -> float:
        pack: GeometryBatch = batch["pack"]
        return step_flops(self.config, self.model.model, pack)

    def tokens(self, batch: Batch) -> int:
        """Patches and text."""
        pack: GeometryBatch = batch["pack"]
        text = 0 if pack.questions is None else pack.questions.input_ids.numel()
        return pack.patches + text

    def score(self, record: Record) -> float | None:
        loss = record["loss"]
        return None if loss is None else -float(loss)

    # ---- evaluation and checkpoints ---------------------------------------------------------------------------------

    def usable(self, indices: Sequence[int]) -> list[int]:
        assert self.sequences is not None
        return self.sequences.usable(indices)

    def outcomes(self, indices: Sequence[int], device: torch.device) -> Mapping[int, Scores]:
        assert self.sequences is not None
        return {index: scores_of(self.model.model, self.sequences.pack(index), device) for index in indices}

    def gather_weights(self, processes: Processes, in_place: bool = False) -> G2Weights:
        return gather_weights(self.model.model, processes, in_place)

    def write_weights(self, folder: Path, weights: G2Weights) -> None:
        """All are divided among the processes."""

    def read_weights(self, folder: Path) -> None:
        read_weights(self.model.model, folder)

    def facts(self) -> dict[str, Any]:
        facts, encoder = run_facts(self.config.model.source, self.stream, self.steps), self.config.model.encoder
        of_encoder = {f"encoder's {part}": value for part, value in (fingerprint(encoder) or {}).items()}
        return {**facts, "base": {**(facts["base"] or {}), **of_encoder} or None}
