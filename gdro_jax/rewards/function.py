"""A verifier that is a function of the user's, given by its import path and run in processes that can be killed."""

from collections.abc import Iterable

from gdro_jax.rewards.base import Pair, Plan, PooledVerifier
from gdro_jax.rewards.verifier import check_name
from gdro_jax.rewards.worker_pool import WorkerPool

MAX_RESPONSE_CHARS = 1_000_000
"""Longest response that is handed to the function."""


class FunctionVerifier(PooledVerifier):
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
        super().__init__(WorkerPool(workers=workers, timeout=timeout, memory_mb=memory_mb, arguments=(path,)))

    def check(self, answers: Iterable[str]) -> dict[int, str]:
        """Nothing: what a right response looks like is the function's own business."""
        return {}

    def _plan(self, response: object, answer: object) -> Plan:
        if not isinstance(response, str) or not isinstance(answer, str):
            return "the response or the gold answer is not a string"
        if len(response) > MAX_RESPONSE_CHARS:
            return f"the response is longer than {MAX_RESPONSE_CHARS} characters"
        return Pair(answer, response)
