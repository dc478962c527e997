"""Grades responses as they finish, on a thread beside the decoding of the others."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType, TracebackType
from typing import Self

import numpy as np

from gdro_jax import rewards
from gdro_jax.evaluation.run import texts
from gdro_jax.sampling import Rollouts

_Part = tuple[rewards.Grades, list[str]]


class Grader:
    """Collects the grades of one step's rows, handed in as they finish; one `verifier.grade` runs at a time.

    Args:
      verifier: used from one thread, which `with` ends.
      tokenizer, stop_tokens: see `evaluation.run.texts`.
      answers: the gold answer of each row.
    """

    def __init__(self, verifier: rewards.Verifier, tokenizer, stop_tokens: Sequence[int], answers: Sequence[str]):
        self._verifier, self._tokenizer, self._stops = verifier, tokenizer, stop_tokens
        self._answers = answers
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grader")
        self._pending: list[tuple[np.ndarray, Future[_Part]]] = []

    def submit(self, out: Rollouts, rows: np.ndarray) -> None:
        """Grades these rows of `out`, which are final, in the background."""
        if len(rows):
            rows = np.sort(rows)
            part = Rollouts(*(x[rows] for x in out))
            self._pending.append((rows, self._thread.submit(self._grade, part, [self._answers[r] for r in rows])))

    def result(self) -> tuple[rewards.Grades, list[str]]:
        """Grades and texts of all rows in their order, once every one is there.

        Raises:
          whatever the verifier raised.
        """
        scores, scorable = np.zeros(len(self._answers), np.float32), np.zeros(len(self._answers), bool)
        reasons: dict[int, str] = {}
        said = [""] * len(self._answers)
        for rows, future in self._pending:
            grades, responses = future.result()
            scores[rows], scorable[rows] = grades.scores, grades.scorable
            reasons |= {int(rows[i]): reason for i, reason in grades.reasons.items()}
            for row, response in zip(rows.tolist(), responses, strict=True):
                said[row] = response
        return rewards.Grades(scores, scorable, MappingProxyType(dict(sorted(reasons.items())))), said

    def _grade(self, part: Rollouts, answers: Sequence[str]) -> _Part:
        responses = texts(part, self._tokenizer, self._stops)
        return self._verifier.grade(responses, answers), responses

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
