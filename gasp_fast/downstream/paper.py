"""What is known of the scores in the paper's tables (arXiv 2605.30231), in percent.

Its tables were not at hand. These numbers are from notes that readers of the paper have published; each is in at least
two of them. What notes contradict each other about is left out: the LoRA ranks of Table 4, and the overall score on
CV-Bench. So are the means in Table 4: they are means of the columns of Table 1, and no official scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Published(NamedTuple):
    """The scores of one backbone: fine-tuned on the same questions without geometry, and with all of GASP."""

    without: float
    gasp: float


# By `model_type` and benchmark: a part of a category's name, or "" for the whole benchmark.
SCORES: dict[str, dict[str, dict[str, Published]]] = {
    "llava_next_video": {
        "all_angles": {"camera": Published(22.7, 40.9)},
        "vsibench": {"object counting": Published(23.5, 52.5)},
        "blink": {"multi view": Published(42.1, 57.1)},
    },
    "qwen2_5_vl": {
        "all_angles": {"camera": Published(34.1, 52.8)},
        "vsibench": {"object counting": Published(33.8, 41.6)},
        "blink": {"multi view": Published(41.5, 53.4)},
        # Table 3. The notes do not name the model; no other of the paper's two is near these numbers.
        "videomme": {"": Published(60.6, 63.2)},
        "tempcompass": {"": Published(68.4, 70.3)},
        "nextqa": {"": Published(76.6, 74.7)},
    },
}


def published(kind: str, benchmark: str, categories: Iterable[str]) -> dict[str, list[float]]:
    """What is known for a model of this type: [without, gasp] by category, and by "" of the whole benchmark."""
    known: Mapping[str, Published] = SCORES.get(kind, {}).get(benchmark, {})
    found = {"": list(known[""])} if "" in known else {}
    for name in categories:
        words = name.lower().replace("_", " ")
        for part, scores in known.items():
            if part and part in words:
                found[name] = list(scores)
    return found
