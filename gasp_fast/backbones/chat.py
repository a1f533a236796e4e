"""Renders conversations with a processor's chat template, and labels the tokens of the assistant's answers.

The characters of an answer follow from the template itself: the conversation is rendered up to just before the answer
(with the generation prompt) and up to just after it, and the answer is what the second text has beyond the first. This
needs no knowledge of any template. A rendering that is not the beginning of the next one raises an error.

The tokens of an answer then follow from the tokenizer's character offsets. The processor expands each visual
placeholder into as many tokens as the image needs, so its ids do not line up with the text. But visual tokens have no
label, and the other tokens are the same, in the same order. So labels are computed on the unexpanded text and copied
to the tokens that are not visual.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

IGNORE = -100  # the label that torch's cross entropy skips
TEMPLATE_SECONDS = 10.0  # of processor time; a template is a program, and takes milliseconds
_RECORD_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_PLACEHOLDERS = re.compile(r"[ \t]*<(?:image|video)>[ \t]*\n?")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    answers: list[tuple[int, int]]  # character ranges (start, end) of the assistant's answers


def messages_from_record(conversations: Sequence[dict[str, str]]) -> list[Message]:
    """The turns of a LLaVA-Video record (`[{"from": "human" | "gpt", "value": text}]`) as messages."""
    messages = []
    for turn in conversations:
        if turn["from"] not in _RECORD_ROLES:
            raise ValueError(f"conversations has a turn from {turn['from']!r}; expected {', '.join(_RECORD_ROLES)}")
        messages.append({"role": _RECORD_ROLES[turn["from"]], "content": turn["value"]})
    return messages


class ChatFormat:
    """The chat template and tokenizer of one processor."""

    def __init__(self, processor: Any, reserved: Sequence[str]) -> None:
        """`reserved` are the processor's visual placeholders, which a message must not contain."""
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.reserved = [token for token in reserved if token]
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} gives no character offsets, which label masking needs; "
                "load the fast tokenizer of this model"
            )
        added = (str(token.content) for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        self.special = sorted({*added, *self.tokenizer.all_special_tokens})
        # Some templates (Vicuna's) do not mark the end of an answer. A model trained on them would never stop, so the
        # eos token is added to answers where the template adds none.
        probe = self._template([_content("user", "?"), _content("assistant", "!")])
        end = self.tokenizer.eos_token
        self._answer_end = "" if end is None or end in probe.rpartition("!")[2] else end

    def render(
        self, messages: Sequence[Message], visual: Sequence[dict[str, str]], add_generation_prompt: bool = False
    ) -> Rendered:
        """The text of a conversation whose first user turn starts with the `visual` content entries."""
        turns = self._turns(messages, visual)
        text = self._template(turns, add_generation_prompt)
        answers = []
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant":
                before = self._template(turns[:index], add_generation_prompt=True)
                after = self._template(turns[: index + 1]).rstrip()
                if not (text.startswith(after) and after.startswith(before.rstrip())):
                    raise ValueError(
                        f"the chat template of {type(self.processor).__name__} rewrites earlier turns when later ones "
                        f"are added (message {index}); answers cannot be located, use a template that only appends"
                    )
                answers.append((len(before) if after.startswith(before) else len(before.rstrip()), len(after)))
        return Rendered(text, answers)

    def _turns(self, messages: Sequence[Message], visual: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
        turns: list[dict[str, Any]] = []
        pending = list(visual)
        for message in messages:
            role, text = message["role"], self._clean(message["content"])
            if role == "assistant":
                text += self._answer_end
                if not any(turn["role"] == "user" for turn in turns):
                    raise ValueError("messages has an assistant turn before any user turn; start with a user turn")
            turns.append(_content(role, text, pending if role == "user" else []))
            pending = [] if role == "user" else pending
        if pending or not turns:
            raise ValueError(f"messages has {len(messages)} turns and none from the user; frames need a user turn")
        return turns

    def _clean(self, text: str) -> str:
        """Remove the placeholders of a data set (frames always come first); refuse what the model reads as a signal."""
        text = _PLACEHOLDERS.sub("", text)
        for token in self.reserved:
            if token in text:
                raise ValueError(f"a message contains {token!r}, which this processor replaces by a frame; remove it")
        for token in self.special:
            if token in text:
                raise ValueError(f"a message contains {token!r}, a special token of this model; remove it")
        return text

    def _template(self, turns: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        with _time_limit(TEMPLATE_SECONDS, "the chat template does not end; is it the one of this model?"):
            return self.processor.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=add_generation_prompt
            )

    def labels(
        self, batch: Sequence[Rendered], input_ids: Tensor, attention_mask: Tensor, inserted_ids: Sequence[int]
    ) -> Tensor:
        """Labels `[B, S]` for the processor's `input_ids [B, S]`: the answers' ids, IGNORE elsewhere.

        `inserted_ids` are what the processor puts in the place of frames.
        """
        inserted = torch.tensor(inserted_ids)
        labels = torch.full_like(input_ids, IGNORE)
        for row, rendered in enumerate(batch):
            unexpanded = self.tokenizer(rendered.text, return_offsets_mapping=True)
            ids = torch.tensor(unexpanded["input_ids"])  # [S'], one visual token per placeholder
            in_answer = torch.tensor([_within(span, rendered.answers) for span in unexpanded["offset_mapping"]])
            kept = ~torch.isin(ids, inserted)
            is_text = attention_mask[row].bool() & ~torch.isin(input_ids[row], inserted)  # [S]
            if not torch.equal(input_ids[row][is_text], ids[kept]):
                raise ValueError(
                    f"sequence {row}: {type(self.processor).__name__} tokenizes its text differently from its own "
                    "tokenizer, so answers cannot be located; was the text truncated?"
                )
            labels[row, is_text] = torch.where(in_answer, ids, IGNORE)[kept]
        return labels


@contextmanager
def _time_limit(seconds: float, message: str) -> Iterator[None]:
    """Raises a `TimeoutError` after so much processor time of this process. No limit outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(message)

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def _content(role: str, text: str, visual: Sequence[dict[str, str]] = ()) -> dict[str, Any]:
    return {"role": role, "content": [*visual, {"type": "text", "text": text}]}


def _within(span: tuple[int, int], answers: Sequence[tuple[int, int]]) -> bool:
    """Whether a token's characters `span` start inside an answer. Tokens without characters do not."""
    start, end = span
    return start < end and any(first <= start < last for first, last in answers)
