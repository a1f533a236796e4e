"""All-Angles Bench: questions about several views of one scene, with three choices; scored by the letter.

The data are `ch-chenyu/All-Angles-Bench`: `data.json` and the images beside it. Most images are from Ego-Exo4D,
which has its own licence. A question is left out if one of its images is missing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from PIL import Image

FOLDER = Path("ch-chenyu/All-Angles-Bench")  # in the folder of data, which is the working folder
LETTERS = ("A", "B", "C")


def keep_present(dataset: Any) -> Any:
    """The questions all of whose images are there."""
    return dataset.filter(lambda doc: all((FOLDER / path).is_file() for path in doc["image_path"]))


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(FOLDER / path).convert("RGB") for path in doc["image_path"]]


def doc_to_text(doc: dict[str, Any]) -> str:
    options = [f"{letter}. {doc[letter]}" for letter in LETTERS if doc.get(letter) not in (None, "")]
    ask = "Answer with the option's letter from the given choices directly."
    return "\n".join([doc["question"].strip(), *options, ask])


def letter_of(answer: str) -> str:
    """The letter that an answer gives: its first word, or the one after "answer is", or the only one in parentheses."""
    text = answer.strip()
    patterns = (r"^\(?([A-C])\)?(?![A-Za-z])", r"answer(?: is|:)?\s*\(?([A-C])\)?(?![A-Za-z])", r"\(([A-C])\)")
    for pattern in patterns:
        letters = set(re.findall(pattern, text))
        if len(letters) == 1:
            return str(letters.pop())
    return ""


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    right = letter_of(results[0]) == doc["answer"].strip().strip("()")
    judged = {"score": float(right), "category": doc["category"], "source": doc.get("sourced_dataset") or "unknown"}
    return {"all_angles_acc": judged}


def accuracy(results: list[dict[str, Any]]) -> float:
    return sum(one["score"] for one in results) / len(results) if results else float("nan")
