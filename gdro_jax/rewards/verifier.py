"""What every verifier is: a context manager that turns responses and gold answers into three-valued grades."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType, TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Grades:
    """Grades of R rows. Where ``scorable`` is False the score is 0 and means nothing: the row weighs nothing."""

    scores: NDArray[np.float32]
    """float32[R], 1.0 right, 0.0 wrong or unscorable."""
    scorable: NDArray[np.bool_]
    """bool[R], False where the verifier failed on the row."""
    reasons: Mapping[int, str] = field(default_factory=lambda: MappingProxyType({}))
    """Why, for each unscorable row."""

    @property
    def failures(self) -> list[str | None]:
        """Why, row by row of those that are unscorable; None where nobody said."""
        return [self.reasons.get(int(row)) for row in np.flatnonzero(~self.scorable)]


class UnscorableError(RuntimeError):
    """Too many responses could not be graded; its text is one line."""


class Grading(Protocol):
    """Grades responses."""

    def grade(self, responses: Sequence[str], answers: Sequence[str]) -> Grades:
        """Grades of R responses against R gold answers; never raises for a bad response.

        Raises:
            ValueError: the two lengths differ.
        """
        ...


class Verifier(Grading, Protocol):
    """Grades responses. ``close`` ends whatever the verifier started; leaving a ``with`` block does so too."""

    def check(self, answers: Iterable[str]) -> dict[int, str]:
        """Rows of gold answers that no response could match, or that do not equal themselves, and why."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def grades_of(verdicts: Sequence[bool | str]) -> Grades:
    """Grades from one verdict a row: True right, False wrong, a string is the reason why the row is unscorable."""
    reasons = {row: verdict for row, verdict in enumerate(verdicts) if isinstance(verdict, str)}
    return Grades(
        scores=np.array([verdict is True for verdict in verdicts], dtype=np.float32),
        scorable=np.array([not isinstance(verdict, str) for verdict in verdicts], dtype=np.bool_),
        reasons=MappingProxyType(reasons),
    )


def check_failures(failures: Sequence[str | None], rows: int, limit: float, where: str) -> None:
    """UnscorableError if more than the share ``limit`` of the rows failed.

    Args:
        failures: why, for each row that is unscorable.
        rows: all of them.
        limit: ``data.max_unscorable``.
        where: begins the error's text.
    """
    failed = len(failures) / rows
    if failed > limit:
        raise UnscorableError(
            f"{where}: {failed:.0%} of the responses could not be graded, more than data.max_unscorable={limit}; "
            f"the first because: {failures[0] or 'no reason given'}"
        )


def check_lengths(responses: Sequence[str], answers: Sequence[str]) -> None:
    """ValueError unless there is one gold answer for each response."""
    if len(responses) != len(answers):
        raise ValueError(f"answers: {len(answers)} of them for {len(responses)} responses; one for each is needed")


def _exact(workers: int, timeout: float) -> Verifier:
    from gdro_jax.rewards.exact import ExactVerifier

    return ExactVerifier()


def _math(workers: int, timeout: float) -> Verifier:
    from gdro_jax.rewards.math_verifier import MathVerifier

    return MathVerifier(workers=workers, timeout=timeout)


def _numeric(workers: int, timeout: float) -> Verifier:
    from gdro_jax.rewards.boxes import NumericVerifier

    return NumericVerifier()


def _choice(workers: int, timeout: float) -> Verifier:
    from gdro_jax.rewards.boxes import ChoiceVerifier

    return ChoiceVerifier()


_FACTORIES: Mapping[str, Callable[[int, float], Verifier]] = MappingProxyType(
    {"exact": _exact, "math": _math, "numeric": _numeric, "choice": _choice}
)


def names() -> tuple[str, ...]:
    """The verifiers that ``make`` knows."""
    return tuple(_FACTORIES)


def make(name: str, *, workers: int = 2, timeout: float = 5.0) -> Verifier:
    """The verifier of that name.

    Args:
        name: ``exact`` (the whole response: string or number equality), ``math`` (math-verify on the last box, in
            worker processes), ``numeric`` (the last box, to a tolerance), ``choice`` (an option's letter in the last
            box), or ``package.module:function`` (the user's own, in worker processes).
        workers: worker processes, for the verifiers that have them.
        timeout: seconds of wall clock that one row may take, for the verifiers that need a deadline.

    Raises:
        ValueError: an unknown name, or a bad setting.
    """
    check_name(name)
    if ":" in name:
        from gdro_jax.rewards.function import FunctionVerifier

        return FunctionVerifier(name, workers=workers, timeout=timeout)
    return _FACTORIES[name](workers, timeout)


def check_name(name: str) -> None:
    """ValueError unless ``make`` would know what to make of the name."""
    if name in _FACTORIES:
        return
    module, _, function = str(name).partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), function)):
        close = get_close_matches(str(name), names(), n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        known = f"{', '.join(names())} or package.module:function"
        raise ValueError(f"verifier: {name!r} is unknown; it must be one of {known}{hint}")
