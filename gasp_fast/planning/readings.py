"""What the paper's "1.75 M annotations plus 100 K question samples" may mean: sequences and questions of an epoch.

The paper trains for 3 epochs in about 10 hours on 32 H200. It does not say what an annotation is.
"""

from __future__ import annotations

from dataclasses import dataclass

from .plan import PAPER_QUESTIONS, PAPER_SEQUENCES


@dataclass(frozen=True)
class Reading:
    """One meaning of the 1.75 M, as samples of an epoch."""

    meaning: str
    sequences: int
    questions: int

    def steps(self, epochs: float, batch_size: int) -> int:
        return max(1, round(epochs * (self.sequences + self.questions)) // batch_size)


def readings(epochs: float, grids: int, frames: float, tracks: float, pairs: float) -> list[Reading]:
    """The readings, from the most sequences to the fewest.

    A sequence has one annotation for each of `grids`, and in the mean `frames` frames, `tracks` tracks and `pairs`
    ordered pairs of points that a track joins.
    """
    annotations, questions = PAPER_SEQUENCES, PAPER_QUESTIONS
    found = [
        Reading("sequences of an epoch", annotations, questions),
        Reading("sequences x grids", round(annotations / grids), questions),
        Reading("sequences of all epochs", round(annotations / epochs), round(questions / epochs)),
        Reading("frames of sequences", round(annotations / frames), questions),
        Reading("tracks", round(annotations / tracks), questions),
        Reading("pairs of points", round(annotations / pairs), questions),
    ]
    return sorted(found, key=lambda reading: -reading.sequences)
