"""Predicts the size of a sample before it is read, so that a step's samples can be dealt out by cost.

The number of frames is known exactly. All frames of a source are taken to have the size of the first ones that can be
read. Scenes of a library usually agree in it. Videos do not: theirs have at most as many tokens as a square frame that
is as long as the longer side. Texts are measured in bytes: to divide each into tokens would take longer than all else.
The tokens of a byte are those of some samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gasp_fast.backbones import Backbone
from gasp_fast.planning.assumptions import Assumptions
from gasp_fast.planning.training_setup import SequenceSize

from .config import TrainConfig
from .stream import SampleStream
from .workload import anchors_of

READ = 64  # samples of a source whose texts are divided into tokens


@dataclass(frozen=True)
class SourceTokens:
    """How many tokens the samples of a source have."""

    frame: int
    most_frame: int
    byte: float  # of text
    most_byte: float


class PredictedSizes:
    """The predicted size of the sample at a position of the stream. The same in every process."""

    def __init__(
        self,
        config: TrainConfig,
        backbone: Backbone,
        stream: SampleStream,
        frame_sizes: Mapping[str, tuple[int, int]],  # (width, height), by source
    ) -> None:
        self.config, self.backbone, self.stream = config, backbone, stream
        self.prompt = (config.data.collator.prompt,)
        self.sources = {name: self._source_tokens(name, *size) for name, size in frame_sizes.items()}
        self._around: dict[tuple[int, int], int] = {}

    def __call__(self, position: int) -> SequenceSize:
        source, outline = self.stream.outline(position)
        of_source, texts = self.sources[source], outline.texts or self.prompt
        frames = self.config.model.grids_of(outline.frames)  # what the model merges into one grid counts as one
        written, answered = _bytes(texts), _bytes(texts[1::2])
        around = self._tokens_around(outline.frames, len(texts))
        visual, tracked = frames * of_source.frame, not outline.texts and self.config.loss.geometric
        return SequenceSize(
            frames=frames,
            tokens=visual + around + round(of_source.byte * written),
            visual=visual,
            tracked=visual if tracked else 0,
            anchors=anchors_of(self.config, frames, of_source.frame, Assumptions()) if tracked else 0,
            labelled=round(of_source.byte * answered) + len(texts) // 2,  # an answer's end is a label, too
            # A text may be divided into a token more where the template goes on.
            most_tokens=frames * of_source.most_frame + around + round(of_source.most_byte * written) + len(texts),
        )

    def _source_tokens(self, name: str, width: int, height: int) -> SourceTokens:
        source, longest = self.stream.sources[name], max(width, height)
        frame = self.backbone.frame_grid(width, height).tokens
        most_frame = frame if source.one_frame_size else self.backbone.frame_grid(longest, longest).tokens
        count = min(READ, len(source))
        texts = [source.outline(0, number * len(source) // count).texts or self.prompt for number in range(count)]
        tokens, written = [sum(map(self._tokens, some)) for some in texts], [_bytes(some) for some in texts]
        by_byte = [of_texts / max(1, bytes_) for of_texts, bytes_ in zip(tokens, written, strict=True)]
        return SourceTokens(frame, most_frame, sum(tokens) / max(1, sum(written)), max(by_byte))

    def _tokens(self, text: str) -> int:
        return len(self.backbone.chat.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tokens_around(self, frames: int, turns: int) -> int:
        """What the chat template adds to so many turns about so many frames, without the visual tokens."""
        if (frames, turns) not in self._around:
            chat, short = self.backbone.chat, "a"
            roles = ("user", "assistant")
            messages = [{"role": roles[turn % 2], "content": short} for turn in range(turns)]
            ids = chat.tokenizer(chat.render(messages, self.backbone.visual_content(frames)).text)["input_ids"]
            placeholders = ids.count(self.backbone.visual_token_id)
            self._around[frames, turns] = len(ids) - placeholders - turns * self._tokens(short)
        return self._around[frames, turns]


def _bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)
