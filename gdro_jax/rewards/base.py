"""What every verifier of this package is made of: verdicts row by row, and what follows from them."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from gdro_jax.rewards.verifier import Grades, check_lengths, grades_of
from gdro_jax.rewards.worker_pool import WorkerPool

Rows = Iterable[tuple[object, object]]
"""Responses, each with its gold answer."""


class BaseVerifier(ABC):
    """Grades from verdicts: True right, False wrong, a string is the reason why the row is unscorable."""

    def grade(self, responses: Sequence[str], answers: Sequence[str]) -> Grades:
        """Grades of R responses against R gold answers; never hangs, never raises for a bad response.

        Raises:
            ValueError: the two lengths differ.
        """
        check_lengths(responses, answers)
        return grades_of(self._verdicts(zip(responses, answers, strict=True)))

    def score(self, responses: Sequence[str], answers: Sequence[str]) -> NDArray[np.float32]:
        """float32[R], 1.0 right, 0.0 wrong or unscorable."""
        return self.grade(responses, answers).scores

    @abstractmethod
    def check(self, answers: Iterable[str]) -> dict[int, str]:
        """Rows of gold answers that cannot be used, and why."""

    def close(self) -> None:  # noqa: B027 (a verifier without workers has nothing to end)
        """Ends whatever was started; here nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _verdicts(self, rows: Rows) -> list[bool | str]: ...


class Pair(NamedTuple):
    """A gold answer and the answer that a response gave, None where the gold answer itself is asked about."""

    gold: str
    given: str | None


Plan = Pair | bool | str
"""What a worker is to be asked, or the verdict where none is needed."""


class PooledVerifier(BaseVerifier):
    """Grades in killable worker processes; equal rows are graded once, calls from several threads take turns."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._lock = threading.Lock()

    def close(self) -> None:
        """Kills the workers."""
        self._pool.close()

    @abstractmethod
    def _plan(self, response: object, answer: object) -> Plan: ...

    def _verdicts(self, rows: Rows) -> list[bool | str]:
        return self._settled([self._plan(response, answer) for response, answer in rows])

    def _settled(self, plans: Sequence[Plan]) -> list[bool | str]:
        pairs = list(dict.fromkeys(plan for plan in plans if isinstance(plan, Pair)))
        with self._lock:
            verdicts = dict(zip(pairs, self._pool.run([pair._asdict() for pair in pairs]), strict=True))
        return [verdicts[plan] if isinstance(plan, Pair) else plan for plan in plans]
