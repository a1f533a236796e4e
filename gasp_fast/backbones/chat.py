"""From a conversation to a prompt text, and from token ids to labels that supervise the assistant's words only.

Knows a processor's chat template and tokenizer; must not know images or any model.

Which characters are an answer is asked of the template itself: the conversation is rendered up to just before an
answer (with the generation prompt) and up to just after it, and what the second text has beyond the first is the
answer. No template has to be recognised, none can be misread silently: if one rendering is not the beginning of the
next, that is an error.

Which tokens are an answer then follows from the tokenizer's character offsets. The processor widens each visual
placeholder into as many tokens as the image needs, so its ids do not line up with the text; but visual tokens carry
no label, and the remaining tokens are the same in the same order. Labels are computed on the unwidened text and laid
onto the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

IGNORE = -100  # the label that torch's cross entropy skips
_RECORD_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_PLACEHOLDERS = re.compile(r"[ \t]*<(?:image|video)>[ \t]*\n?")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, with the character ranges of the assistant's answers."""

    text: str
    answers: list[tuple[int, int]]


def messages_from_record(conversations: Sequence[dict[str, str]]) -> list[Message]:
    """The turns of a LLaVA-Video record (`[{"from": "human" | "gpt", "value": text}]`) as messages."""
    messages = []
    for turn in conversations:
        if turn["from"] not in _RECORD_ROLES:
            raise ValueError(f"conversations has a turn from {turn['from']!r}; expected {', '.join(_RECORD_ROLES)}")
        messages.append({"role": _RECORD_ROLES[turn["from"]], "content": turn["value"]})
    return messages


class ChatFormat:
    """Renders conversations with one processor's template."""

    def __init__(self, processor: Any, reserved: Sequence[str]) -> None:
        """`reserved` are the processor's own visual placeholders, which a text must not contain."""
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.reserved = [token for token in reserved if token]
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} gives no character offsets, which label masking needs; "
                "load the fast tokenizer of this model"
            )
        # Templates that leave the end of an answer unmarked (Vicuna's) would train a model that never stops.
        probe = self._template([_content("user", "?"), _content("assistant", "!")], answer_next=False)
        end = self.tokenizer.eos_token
        self._answer_end = "" if end is None or end in probe.rpartition("!")[2] else end

    def render(
        self, messages: Sequence[Message], visual: Sequence[dict[str, str]], answer_next: bool = False
    ) -> Rendered:
        """Text of a conversation whose first user turn starts with the `visual` content entries.

        With `answer_next` the text ends where an assistant would begin to answer.
        """
        turns = self._turns(messages, visual)
        text = self._template(turns, answer_next)
        answers = []
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant":
                before = self._template(turns[:index], answer_next=True)
                after = self._template(turns[: index + 1], answer_next=False).rstrip()
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
        """A data set's own placeholders go (the frames stand at a fixed place); a model's own are refused."""
        text = _PLACEHOLDERS.sub("", text)
        for token in self.reserved:
            if token in text:
                raise ValueError(f"a message contains {token!r}, which this processor takes for a frame; remove it")
        return text

    def _template(self, turns: Sequence[dict[str, Any]], answer_next: bool) -> str:
        return self.processor.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=answer_next)

    def labels(self, batch: Sequence[Rendered], input_ids: Tensor, attention_mask: Tensor, visual_id: int) -> Tensor:
        """Labels `[B, S]` for the processor's `input_ids [B, S]`: the answers' ids, IGNORE elsewhere."""
        labels = torch.full_like(input_ids, IGNORE)
        for row, rendered in enumerate(batch):
            narrow = self.tokenizer(rendered.text, return_offsets_mapping=True)
            ids = torch.tensor(narrow["input_ids"])  # [S'], one visual token per placeholder
            answered = torch.tensor([_within(span, rendered.answers) for span in narrow["offset_mapping"]])
            spoken = attention_mask[row].bool() & (input_ids[row] != visual_id)
            if not torch.equal(input_ids[row][spoken], ids[ids != visual_id]):
                raise ValueError(
                    f"sequence {row}: {type(self.processor).__name__} tokenizes its text differently from its own "
                    "tokenizer, so answers cannot be located; was the text truncated?"
                )
            kept = torch.where(answered, ids, IGNORE)[ids != visual_id]
            labels[row, spoken] = kept
        return labels


def _content(role: str, text: str, visual: Sequence[dict[str, str]] = ()) -> dict[str, Any]:
    return {"role": role, "content": [*visual, {"type": "text", "text": text}]}


def _within(span: tuple[int, int], answers: Sequence[tuple[int, int]]) -> bool:
    start, end = span
    return start < end and any(first <= start < last for first, last in answers)
