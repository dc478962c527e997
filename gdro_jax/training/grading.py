"""Grading by several processes: each grades its share of the rows with its own workers, and all get all grades."""

from collections.abc import Sequence
from types import MappingProxyType

import numpy as np

from gdro_jax import rewards
from gdro_jax.training import processes


def share(rows: np.ndarray) -> np.ndarray:
    """Positions of the rows int[n] that fall to this process; all of them if it is alone."""
    return np.flatnonzero(rows % processes.count() == processes.number())


def merged(grades: rewards.Grades) -> rewards.Grades:
    """Grades of all rows, of which each process has filled in its share and left 0 elsewhere; all processes call it."""
    said = (grades.scores.tolist(), grades.scorable.tolist(), {str(row): why for row, why in grades.reasons.items()})
    scores, scorable, reasons = zip(*processes.gathered(said), strict=True)
    why = {int(row): text for part in reasons for row, text in part.items()}
    return rewards.Grades(
        np.sum(scores, axis=0, dtype=np.float32), np.any(scorable, axis=0), MappingProxyType(dict(sorted(why.items())))
    )


class SharedVerifier:
    """A verifier that all processes call with the same rows; each grades its share."""

    def __init__(self, verifier: rewards.Verifier):
        self._verifier = verifier

    def grade(self, responses: Sequence[str], answers: Sequence[str]) -> rewards.Grades:
        """As `Verifier.grade`."""
        mine = share(np.arange(len(responses)))
        grades = self._verifier.grade([responses[i] for i in mine], [answers[i] for i in mine])
        scores, scorable = np.zeros(len(responses), np.float32), np.zeros(len(responses), bool)
        scores[mine], scorable[mine] = grades.scores, grades.scorable
        reasons = {int(mine[i]): reason for i, reason in grades.reasons.items()}
        return merged(rewards.Grades(scores, scorable, reasons))
