"""Records with `messages`, as chat templates take them, in the schema of LLaVA-Video.

    {"messages": [{"role": "user", "content": "<video>What is it?"}, {"role": "assistant", "content": "..."}],
     "videos": ["clip.mp4"]}

`content` is a text, or a list of `{"type": "text", "text": ...}` and `{"type": "video", "video": PATH}`. The video may
be named there, in `video`, or in a list `videos` of one.
"""

from __future__ import annotations

from typing import Any

SPEAKER_OF = {"user": "human", "assistant": "gpt"}
PLACE = "<image>"  # of the frames, in the schema of LLaVA-Video
VIDEO_PLACE = "<video>"


def with_conversations(fields: dict[str, Any]) -> dict[str, Any]:
    """The record in the schema of LLaVA-Video; what is wrong is a `ValueError` in a few words."""
    messages = fields["messages"]
    if not isinstance(messages, list):
        raise ValueError("messages is not a list")
    videos = [fields["video"]] if "video" in fields else []
    listed = fields.get("videos", [])
    videos += listed if isinstance(listed, list) else [listed]
    turns = []
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in SPEAKER_OF:
            raise ValueError(f"message {number} is not of user or assistant")
        text, named = _content(message.get("content"), number)
        videos += named
        turns.append({"from": SPEAKER_OF[role], "value": text.replace(VIDEO_PLACE, PLACE)})
    if len(videos) != 1:
        raise ValueError(f"names {len(videos)} videos; one is read")
    if turns and PLACE not in turns[0]["value"]:
        turns[0]["value"] = f"{PLACE}\n{turns[0]['value']}"
    others = {name: value for name, value in fields.items() if name not in ("messages", "videos")}
    return {**others, "conversations": turns, "video": videos[0]}


def _content(content: Any, number: int) -> tuple[str, list[Any]]:
    """The text of a message, with a place for each video, and the videos."""
    if isinstance(content, str):
        return content, []
    parts, videos = [], []
    for part in content if isinstance(content, list) else [None]:
        values = part if isinstance(part, dict) else {}
        kind = values.get("type")
        if kind == "text" and isinstance(values.get("text"), str):
            parts.append(values["text"])
        elif kind == "video":
            parts.append(VIDEO_PLACE)
            videos.append(values.get("video"))
        else:
            raise ValueError(f"message {number} has content that is neither text nor a video")
    return "\n".join(parts), videos
