r"""Verifiers of the last ``\boxed{}`` that need no parser, and so no process of their own: a number, a letter."""

import re
from abc import abstractmethod
from collections.abc import Iterable

from gdro_jax.rewards import plain_numbers
from gdro_jax.rewards.base import BaseVerifier, Rows
from gdro_jax.rewards.boxed import AnswerTooLong, last_boxed

_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}")
_LETTER = re.compile(r"[(\[]?([A-Z])[)\]]?(?:[.:)].*)?", re.DOTALL)


class _BoxVerifier(BaseVerifier):
    """Grades the last box of each response, in this process; its work is linear in the response's length.

    A row whose gold answer is none of the verifier's kind, or whose box is too long, is unscorable.
    """

    def check(self, answers: Iterable[str]) -> dict[int, str]:
        """Rows of gold answers that cannot be used, and why."""
        verdicts = ((row, self._verdict(str(answer), answer)) for row, answer in enumerate(answers))
        return {row: str(verdict or "does not equal itself") for row, verdict in verdicts if verdict is not True}

    def _verdicts(self, rows: Rows) -> list[bool | str]:
        return [self._row(response, answer) for response, answer in rows]

    def _row(self, response: object, answer: object) -> bool | str:
        if not isinstance(response, str):
            return "the response is not a string"
        try:
            given = last_boxed(response)
        except AnswerTooLong as error:
            return str(error)
        return self._verdict("" if given is None else given, answer)

    @abstractmethod
    def _verdict(self, given: str, answer: object) -> bool | str: ...


class NumericVerifier(_BoxVerifier):
    """Right if the box holds the gold number, to a relative 1e-6 or as near as ``4.2 within 0.1`` says."""

    def _verdict(self, given: str, answer: object) -> bool | str:
        wanted = plain_numbers.target(answer) if isinstance(answer, str) else None
        if wanted is None:
            return "the gold answer is not a number"
        number = plain_numbers.read(given.partition(" within ")[0])
        return number is not None and plain_numbers.meets(wanted, number)


class ChoiceVerifier(_BoxVerifier):
    r"""Right if the box holds the gold option's letter: ``B``, ``(B)``, ``\text{B}``, ``B. 12 m`` are the same."""

    def _verdict(self, given: str, answer: object) -> bool | str:
        wanted = _letter(answer) if isinstance(answer, str) else None
        if wanted is None:
            return "the gold answer is not an option's letter"
        return _letter(given) == wanted


def _letter(text: str) -> str | None:
    match = _LETTER.fullmatch(_WRAPPED.sub(r"\1", text).strip().strip("$").strip())
    return None if match is None else match[1]
