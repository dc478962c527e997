"""Mathematical equality by math-verify, in worker processes that are killed when a row takes too long.

The rows of one call are handed out one at a time to whichever worker is free. No signal handler and no thread is used,
so it works off the main thread; a hang, a crash or a memory bomb costs its own row and its own worker alone.
"""

import re
from collections.abc import Iterable

from gdro_jax.rewards import plain_numbers, spelling, units
from gdro_jax.rewards.base import Pair, Plan, PooledVerifier
from gdro_jax.rewards.boxed import MAX_ANSWER_CHARS, AnswerTooLong, last_boxed, nesting_depth
from gdro_jax.rewards.worker_pool import WorkerPool

MAX_DEPTH = 32
"""Deepest nesting of brackets that is handed to the parser."""

_INTEGER = re.compile(r"-?[0-9]{1,15}")
_ABOUT = re.compile(r"(?:[A-Za-z](?:_\{?\w{1,8}\}?)?\s*)?(?:=|\\approx|\\sim|~)\s*")
_CALL = re.compile(r"\(\s*\)")  # of a program, not of mathematics; math-verify reads the numbers around it


class MathVerifier(PooledVerifier):
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
        super().__init__(WorkerPool(workers=workers, timeout=float(timeout), memory_mb=memory_mb))

    def check(self, answers: Iterable[str]) -> dict[int, str]:
        """Rows of gold answers that do not parse or do not equal themselves, and why; plain numbers always do."""
        verdicts = enumerate(self._settled([_checked(answer) for answer in answers]))
        return {row: str(verdict or "does not equal itself") for row, verdict in verdicts if verdict is not True}

    def _plan(self, response: object, answer: object) -> Plan:
        return _plan(response, answer)


def _plan(response: object, answer: object) -> Plan:
    """The pair to hand to a worker, or the verdict where none is needed; the gold answer is looked at first."""
    gold = _gold(answer)
    if not isinstance(gold, Pair):
        return gold
    if not isinstance(response, str):
        return "the response is not a string"
    try:
        boxed = last_boxed(response)
    except AnswerTooLong as error:
        return str(error)
    given = spelling.plain("" if boxed is None else boxed.strip())
    return _compared(gold.gold, given) if given else False


def _compared(gold: str, given: str) -> Plan:
    bare, within, error = gold.partition(" within ")
    meant, said = units.split(bare, wrapped=True), units.split(given)
    if meant is not None:
        gold = meant.value + within + error
        if said is not None and said.unit != meant.unit:
            return _converted(gold, meant.unit, said)
        given = given if said is None else said.value
    if spelling.relation(gold) != spelling.relation(given):
        return False
    wanted = plain_numbers.target(gold) if " within " in gold else None
    if wanted is not None:
        number = plain_numbers.read(_ABOUT.sub("", given, count=1) if _ABOUT.match(given) else given)
        if number is not None:
            return plain_numbers.meets(wanted, number)
    elif _INTEGER.fullmatch(given) and _INTEGER.fullmatch(gold):
        return int(given) == int(gold)
    elif _same_number(gold, given):
        return True
    elif given == gold:
        return Pair(gold, None)
    elif spelling.differ(gold, given):
        return False
    if nesting_depth(given) > MAX_DEPTH:
        return f"the answer is nested deeper than {MAX_DEPTH}"
    if _CALL.search(given) and not _CALL.search(gold):
        return False
    return Pair(gold, given)


def _converted(gold: str, unit: units.Unit, said: units.Quantity) -> bool:
    """Whether a number of another unit is the gold number of its own."""
    wanted, number = plain_numbers.target(gold), plain_numbers.read(_ABOUT.sub("", said.value, count=1))
    if wanted is None or number is None or said.unit.kind != unit.kind:
        return False
    return plain_numbers.meets(wanted, number * said.unit.size / unit.size)


def _same_number(gold: str, given: str) -> bool:
    """Whether both are plain numbers, and equal: spellings that math-verify does not know, such as ``1e3``."""
    wanted = plain_numbers.read(gold, units=False)
    return wanted is not None and wanted == plain_numbers.read(given, units=False)


def _checked(answer: object) -> Plan:
    """What a worker is to be asked about a gold answer, or the verdict where no worker is needed."""
    gold = _gold(answer)
    return True if isinstance(gold, Pair) and plain_numbers.target(gold.gold) is not None else gold


def _gold(answer: object) -> Pair | str:
    r"""The gold answer as it is asked about, out of its ``\boxed{}`` if it is in one, or why it cannot be used."""
    if not isinstance(answer, str):
        return "the gold answer is not a non-empty string"
    if len(answer) > MAX_ANSWER_CHARS and "\\boxed" not in answer:
        return f"the gold answer is longer than {MAX_ANSWER_CHARS} characters"
    try:
        boxed = last_boxed(answer)
    except AnswerTooLong as error:
        return f"the gold answer: {error}"
    gold = spelling.plain((answer if boxed is None else boxed).strip())
    if not gold:
        return "the gold answer is not a non-empty string"
    if spelling.is_no_answer(gold):
        return f"the gold answer is {gold!r}, which says that there is none"
    if nesting_depth(gold) > MAX_DEPTH:
        return f"the gold answer is nested deeper than {MAX_DEPTH}"
    return Pair(gold, None)
