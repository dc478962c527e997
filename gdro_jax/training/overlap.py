"""Grades responses as they finish, on a thread beside the decoding of the others; each process grades its share."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np

from gdro_jax import rewards
from gdro_jax.evaluation.run import texts
from gdro_jax.sampling import Rollouts
from gdro_jax.training import grading

_Part = tuple[rewards.Grades, list[str]]  # of the rows that fall to this process, and of all


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
            self._pending.append((rows, self._thread.submit(self._grade, part, rows)))

    def result(self) -> tuple[rewards.Grades, list[str]]:
        """Grades and texts of all rows in their order, once every one is there.

        Raises:
          whatever the verifier raised.
        """
        number = len(self._answers)
        scores, scorable = np.zeros(number, np.float32), np.zeros(number, bool)
        reasons: dict[int, str] = {}
        said = [""] * number
        for rows, future in self._pending:
            grades, responses = future.result()
            mine = rows[grading.share(rows)]
            scores[mine], scorable[mine] = grades.scores, grades.scorable
            reasons |= {int(mine[i]): reason for i, reason in grades.reasons.items()}
            for row, response in zip(rows.tolist(), responses, strict=True):
                said[row] = response
        return grading.merged(rewards.Grades(scores, scorable, reasons)), said

    def _grade(self, part: Rollouts, rows: np.ndarray) -> _Part:
        responses = texts(part, self._tokenizer, self._stops)
        mine = grading.share(rows).tolist()
        grades = self._verifier.grade([responses[i] for i in mine], [self._answers[rows[i]] for i in mine])
        return grades, responses

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
