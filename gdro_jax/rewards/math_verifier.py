"""Mathematical equality by math-verify, in worker processes that are killed when a row takes too long.

The rows of one call are handed out one at a time to whichever worker is free. No signal handler and no thread is used,
so it works off the main thread; a hang, a crash or a memory bomb costs its own row and its own worker alone.
"""

import re
import threading
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from gdro_jax.rewards import plain_numbers
from gdro_jax.rewards.boxed import MAX_ANSWER_CHARS, AnswerTooLong, last_boxed, nesting_depth
from gdro_jax.rewards.verifier import Grades, check_lengths, grades_of
from gdro_jax.rewards.worker_pool import WorkerPool

MAX_DEPTH = 32
"""Deepest nesting of brackets that is handed to the parser."""

_INTEGER = re.compile(r"-?[0-9]{1,15}")


class Pair(NamedTuple):
    """A gold answer and the answer that a response gave."""

    gold: str
    given: str


class MathVerifier:
    r"""Grades responses by the last ``\boxed{}`` in them; a gold answer such as ``4.2 within 0.1`` allows that error.

    Right: it equals the gold answer. Wrong: it does not, or there is no box. Unscorable: the verifier failed, which is
    a deadline passed, a worker gone, memory or recursion exhausted, an answer longer than ``MAX_ANSWER_CHARS`` or
    nested deeper than ``MAX_DEPTH``, or a gold answer that is missing or does not parse.

    Args:
        workers: processes that grade, at least 1. They start at once and take a second or two to be ready.
        timeout: seconds of wall clock that one row may take.
        memory_mb: MiB of address space that one worker may use, at least 256.

    Raises:
        ValueError: a bad setting.
        VerifierError: (from grading) workers do not start at all, or the verifier was closed.
    """

    def __init__(self, *, workers: int = 2, timeout: float = 5.0, memory_mb: int = 2048) -> None:
        self._pool = WorkerPool(workers=workers, timeout=float(timeout), memory_mb=memory_mb)
        self._lock = threading.Lock()

    def grade(self, responses: Sequence[str], answers: Sequence[str]) -> Grades:
        """Grades of R responses; equal rows are graded once. Calls from several threads take turns."""
        check_lengths(responses, answers)
        plans = [_plan(response, answer) for response, answer in zip(responses, answers, strict=True)]
        pairs = list(dict.fromkeys(plan for plan in plans if isinstance(plan, Pair)))
        with self._lock:
            verdicts = dict(zip(pairs, self._pool.run([pair._asdict() for pair in pairs]), strict=True))
        return grades_of([verdicts[plan] if isinstance(plan, Pair) else plan for plan in plans])

    def score(self, responses: Sequence[str], answers: Sequence[str]) -> NDArray[np.float32]:
        """float32[R], 1.0 right, 0.0 wrong or unscorable; never hangs, never raises for a bad response."""
        return self.grade(responses, answers).scores

    def check(self, answers: Iterable[str]) -> dict[int, str]:
        """Rows of gold answers that do not parse or do not equal themselves, and why; plain integers always do."""
        golds = dict(enumerate(map(_checked, answers)))
        pairs = list(dict.fromkeys(gold for gold in golds.values() if isinstance(gold, Pair)))
        with self._lock:
            verdicts = dict(zip(pairs, self._pool.run([pair._asdict() for pair in pairs]), strict=True))
        final = {row: verdicts[gold] if isinstance(gold, Pair) else gold for row, gold in golds.items()}
        return {row: str(verdict or "does not equal itself") for row, verdict in final.items() if verdict is not True}

    def close(self) -> None:
        """Kill the workers."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _plan(response: object, answer: object) -> Pair | bool | str:
    """The pair to hand to a worker, or the verdict where none is needed."""
    if not isinstance(response, str):
        return "the response is not a string"
    try:
        gold = _gold(answer)
        given = last_boxed(response)
    except AnswerTooLong as error:
        return str(error)
    if gold is None:
        return "the gold answer is not a non-empty string"
    given = "" if given is None else given.strip()
    wanted = plain_numbers.target(gold) if " within " in gold else None
    if wanted is not None:
        number = plain_numbers.read(given)
        return number is not None and plain_numbers.meets(wanted, number)
    if not given or given == gold:
        return given == gold
    if _INTEGER.fullmatch(given) and _INTEGER.fullmatch(gold):
        return int(given) == int(gold)
    if _same_number(gold, given):
        return True
    if nesting_depth(given) > MAX_DEPTH:
        return f"the answer is nested deeper than {MAX_DEPTH}"
    return Pair(gold, given)


def _same_number(gold: str, given: str) -> bool:
    """Whether both are plain numbers, and equal: spellings that math-verify does not know, such as ``1e3``."""
    wanted = plain_numbers.read(gold, units=False)
    return wanted is not None and wanted == plain_numbers.read(given, units=False)


def _checked(answer: object) -> Pair | bool | str:
    """The pair of a gold answer with itself, or the verdict where no worker is needed."""
    try:
        gold = _gold(answer)
    except AnswerTooLong as error:
        return str(error)
    if gold is None:
        return "the gold answer is not a non-empty string"
    if nesting_depth(gold) > MAX_DEPTH:
        return f"the answer is nested deeper than {MAX_DEPTH}"
    plain = _INTEGER.fullmatch(gold) or (" within " in gold and plain_numbers.target(gold))
    return True if plain else Pair(gold, gold)


def _gold(answer: object) -> str | None:
    r"""The gold answer, out of its ``\boxed{}`` if it is in one."""
    if not isinstance(answer, str):
        return None
    if len(answer) > MAX_ANSWER_CHARS and "\\boxed" not in answer:
        raise AnswerTooLong(f"the gold answer is longer than {MAX_ANSWER_CHARS} characters")
    boxed = last_boxed(answer)
    return (answer if boxed is None else boxed).strip() or None
