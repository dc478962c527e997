"""Updates left out because their loss or gradient was not finite: counted, and too many in a row end a run."""

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from gdro_jax.training import processes
from gdro_jax.training.step import Batch


class NotFiniteError(RuntimeError):
    """Too many updates in a row were left out; its text is one line."""


class LeftOut(NamedTuple):
    """How many updates were left out, in a row up to now and in all, and the most in a row that the last step saw."""

    in_row: int = 0
    total: int = 0
    most: int = 0

    def after(self, applied: np.ndarray) -> "LeftOut":
        """With a step's updates, bool[M], added."""
        in_row, most = self.in_row, 0
        for was in applied.tolist():
            in_row = 0 if was else in_row + 1
            most = max(most, in_row)
        return LeftOut(in_row, self.total + int((~applied).sum()), most)


def batch_file(folder: pathlib.Path, number: int) -> pathlib.Path:
    """Where the batch of a step is kept."""
    return folder / f"not_finite_step_{number}.npz"


def keep(folder: pathlib.Path, number: int, batch: Batch) -> None:
    """Writes the arrays of a step's batch, by the names of `Batch` and, for how it was cut, `pieces.NAME`.

    In streams `pieces.of_rows.NAME` and `pieces.of_prompts.NAME`, too. Of several processes all call it; the errors of
    `processes.on_first`.
    """
    leaves = jax.tree.leaves_with_path(batch)
    arrays: dict[str, Any] = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x) for path, x in leaves
    }
    processes.on_first(lambda: np.savez(batch_file(folder, number), **arrays))


def check(left_out: LeftOut, limit: int, folder: pathlib.Path, number: int) -> None:
    """NotFiniteError past `limit` in a row; step `number`'s batch has been kept."""
    if left_out.most > limit:
        raise NotFiniteError(
            f"step {number}: {left_out.most} updates in a row had a loss or gradient that is not finite, more than "
            f"train.max_skipped={limit}; the step's batch is in {batch_file(folder, number)}, parameters and optimiser "
            "are as without them"
        )
