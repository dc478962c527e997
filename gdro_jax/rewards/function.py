"""A verifier that is a function of the user's, given by its import path and run in processes that can be killed."""

import threading
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gdro_jax.rewards.verifier import Grades, check_lengths, check_name, grades_of
from gdro_jax.rewards.worker_pool import WorkerPool

MAX_RESPONSE_CHARS = 1_000_000
"""Longest response that is handed to the function."""


class FunctionVerifier:
    """Grades by ``function(response, answer)``, which returns True, False, or None for unscorable.

    An error it raises, a hang, a crash or too much memory makes that one row unscorable. Its module is imported in the
    workers only, with the current folder first on the path.

    Args:
        path: ``package.module:function``.
        workers, timeout, memory_mb: as for ``MathVerifier``.

    Raises:
        ValueError: a bad setting, or a path that is not of that form.
        VerifierError: (from grading) the function cannot be imported.
    """

    def __init__(self, path: str, *, workers: int = 2, timeout: float = 5.0, memory_mb: int = 2048) -> None:
        if ":" not in path:
            raise ValueError(f"verifier: {path!r} is not allowed; package.module:function is needed")
        check_name(path)
        self._pool = WorkerPool(workers=workers, timeout=timeout, memory_mb=memory_mb, arguments=(path,))
        self._lock = threading.Lock()

    def grade(self, responses: Sequence[str], answers: Sequence[str]) -> Grades:
        """Grades of R responses; equal rows are graded once. Calls from several threads take turns."""
        check_lengths(responses, answers)
        plans = [_plan(response, answer) for response, answer in zip(responses, answers, strict=True)]
        pairs = list(dict.fromkeys(plan for plan in plans if isinstance(plan, tuple)))
        with self._lock:
            jobs = [{"given": given, "gold": gold} for given, gold in pairs]
            verdicts = dict(zip(pairs, self._pool.run(jobs), strict=True))
        return grades_of([verdicts[plan] if isinstance(plan, tuple) else plan for plan in plans])

    def score(self, responses: Sequence[str], answers: Sequence[str]) -> NDArray[np.float32]:
        """float32[R], 1.0 right, 0.0 wrong or unscorable."""
        return self.grade(responses, answers).scores

    def check(self, answers: Iterable[str]) -> dict[int, str]:
        """Nothing: what a right response looks like is the function's own business."""
        return {}

    def close(self) -> None:
        """Kill the workers."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _plan(response: object, answer: object) -> tuple[str, str] | str:
    if not isinstance(response, str) or not isinstance(answer, str):
        return "the response or the gold answer is not a string"
    if len(response) > MAX_RESPONSE_CHARS:
        return f"the response is longer than {MAX_RESPONSE_CHARS} characters"
    return response, answer
