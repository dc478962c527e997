"""The order of the data: which prompts a step takes, as a pure function of (seed, position), with random access.

`builtin` is `prompts.order`, in which the shipped runs were made. `grain` is the maintained loader of that name, and
the only one that mixes several sets: every step holds the same number of each, the nearest to its share, each set in
shuffled epochs of its own.
Every process holds all problems and computes the same order, so nothing is exchanged or saved; the rows of a step are
sharded over the processes by the mesh.
"""

import zlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from gdro_jax.data import prompts
from gdro_jax.data.files import DataError

LOADERS = ("builtin", "grain")

Order = Callable[[int], NDArray[np.int32]]
"""From the number of prompts taken so far to the ids of the next step's, int32[P], none of them twice."""


def make(loader: str, seed: int, parts: Sequence[Sequence[int]], shares: Sequence[float], per_step: int) -> Order:
    """The order of a run.

    Args:
        loader: one of `LOADERS`.
        parts: ids of the problems of each set.
        shares: of each set in a step, positive; only their ratios count.
        per_step: P.

    Raises:
        ValueError: an unknown loader, several sets for the builtin one, or a share that is not positive.
        DataError: a set that is too small for its share of a step, or a share too small for one prompt of it.
    """
    if loader not in LOADERS:
        raise ValueError(f"loader: {loader!r} is not allowed; it must be one of {', '.join(LOADERS)}")
    if loader == "grain":
        return _grain(seed, parts, split(per_step, shares, [len(part) for part in parts]))
    if len(parts) != 1:
        raise ValueError("loader: 'builtin' takes one set; mix several with 'grain'")
    size = len(parts[0])
    return lambda position: prompts.order(seed, position, size, per_step)


def split(per_step: int, shares: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Prompts of each set in a step: whole numbers that sum to `per_step`, by largest remainder."""
    if not all(0.0 < share < float("inf") for share in shares):
        raise ValueError(f"shares: {list(shares)} is not allowed; every share must be a positive number")
    ideal = np.asarray(shares, dtype=np.float64) / sum(shares) * per_step
    counts = np.floor(ideal + 1e-9).astype(np.int64)
    left = per_step - int(counts.sum())
    counts[np.argsort(counts - ideal, kind="stable")[:left]] += 1
    for place, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        if not 1 <= count <= size:
            what = "rounds to no prompt of it" if count < 1 else f"is {count} prompts, more than it holds"
            raise DataError(
                f"set {place + 1} of the mixture: its share of a step of {per_step} prompts {what} ({size})"
            )
    return [int(count) for count in counts]


def _grain(seed: int, parts: Sequence[Sequence[int]], counts: Sequence[int]) -> Order:
    import grain  # takes a second, and only this loader needs it

    streams = [
        grain.MapDataset.source(np.asarray(part, dtype=np.int32))
        .seed(zlib.crc32(f"{seed}/{place}".encode()))
        .shuffle()
        .batch(count, drop_remainder=True)  # before it repeats: no step runs over an epoch's end
        .repeat()
        for place, (part, count) in enumerate(zip(parts, counts, strict=True))
    ]
    per_step = sum(counts)

    def order(position: int) -> NDArray[np.int32]:
        step, rest = divmod(position, per_step)
        if position < 0 or rest:
            raise ValueError(f"position: {position!r} is not allowed; it must be a multiple of {per_step}, the step")
        return np.concatenate([np.asarray(stream[step]) for stream in streams]).astype(np.int32)

    return order
