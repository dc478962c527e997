"""Counts XLA compilations, so that a shape that changes by mistake is seen."""

from types import TracebackType
from typing import Self

import jax.monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts the compilations of this process while its `with` block is open."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _EVENT:
            self.count += 1
            self.seconds += duration_secs

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)
