"""A run's log as every process knows it: process 0 alone writes it."""

import pathlib
from collections.abc import Mapping

from gdro_jax.training import processes, records
from gdro_jax.training.setup import InputError


class RunLog:
    """`metrics.jsonl` of a run.

    Args:
      path: the file.
      keep_until: see `records.MetricsFile`.

    Attributes:
      steps, last: see there.

    Raises:
      InputError: it does not fit the checkpoint.
    """

    def __init__(self, path: pathlib.Path, keep_until: int | None):
        try:
            self._file = processes.on_first(lambda: records.MetricsFile(path, keep_until))
        except ValueError as error:
            raise InputError(str(error)) from None
        known = None if self._file is None else (sorted(self._file.steps), self._file.last)
        steps, self.last = processes.gathered(known)[0]
        self.steps = set(steps)

    def write(self, record: Mapping[str, object]) -> None:
        """Adds one record; numbers that are not finite become null; the errors of `processes.on_first`."""
        file = self._file
        processes.together(lambda: None if file is None else file.write(record))

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
