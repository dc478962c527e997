"""Cuts a step's uneven flat rows into equal pieces, each with the few prompts its rows need.

Rows of one prompt stay together as far as they can; a prompt cut in two is prefilled in both pieces. Row weights are
fixed before the cut, so no gradient depends on it.
"""

import math
from typing import NamedTuple

import numpy as np


class Pieces(NamedTuple):
    """C pieces of R / C rows.

    Attributes:
      rows: int32[C, R / C], which flat rows a piece holds.
      prompts: int32[C, Q], which prompts it prefills, filled up with prompt 0.
      local_index: int32[C, R / C], the prompt of each row as a position in `prompts`.
    """

    rows: np.ndarray
    prompts: np.ndarray
    local_index: np.ndarray


def flat_index(rollouts: np.ndarray) -> np.ndarray:
    """The prompt of each flat row, int32[R], from rollouts per prompt int32[P]."""
    return np.repeat(np.arange(len(rollouts), dtype=np.int32), rollouts)


def cut(rollouts: np.ndarray, pieces: int, rng: np.random.Generator, most: int | None = None) -> Pieces:
    """Pieces of a step, prompts in an order that is random but keeps every piece near P / C prompts.

    Args:
      rollouts: int32[P], at least 0 each; their sum R is a multiple of `pieces`.
      pieces: C.
      rng: shuffles the prompts; unused for one piece.
      most: rollouts that a prompt can get, which bounds the prompts of a piece; None: three times their mean.

    Raises:
      ValueError: C does not divide R.
    """
    total = int(rollouts.sum())
    if total % pieces:
        raise ValueError(f"pieces={pieces}: must divide the step's {total} rows")
    prompt_of = flat_index(rollouts)
    if pieces == 1:
        everything = np.arange(len(rollouts), dtype=np.int32)
        return Pieces(np.arange(total, dtype=np.int32)[None], everything[None], prompt_of[None])
    starts = np.cumsum(rollouts) - rollouts
    order = _balanced_order(rollouts, rng)
    rows = np.concatenate([np.arange(starts[i], starts[i] + rollouts[i]) for i in order]).astype(np.int32)
    rows = rows.reshape(pieces, -1)
    needed = [list(dict.fromkeys(prompt_of[piece].tolist())) for piece in rows]
    width = prompts_per_piece(len(rollouts), total, pieces, most)
    if max(map(len, needed)) > width:  # counts beyond the most allowed: still right, one more compiled shape
        width = len(rollouts)
    prompts = np.zeros((pieces, width), np.int32)
    local = np.zeros_like(rows)
    for c, wanted in enumerate(needed):
        prompts[c, : len(wanted)] = wanted
        place = {prompt: i for i, prompt in enumerate(wanted)}
        local[c] = [place[p] for p in prompt_of[rows[c]].tolist()]
    return Pieces(rows, prompts, local)


def prompts_per_piece(num_prompts: int, total: int, pieces: int, most: int | None = None) -> int:
    """Prompts a piece has room for: enough whenever no prompt has more than `most` rollouts.

    In the balanced order the running sum of rollouts stays within the largest count of its mean course, so a window
    of w rows meets at most (w + 3 n_max) / n_bar prompts, and w of them. Where all have the mean, it is what a window
    can touch.
    """
    mean, rows = total / num_prompts, total // pieces
    if pieces == 1:
        return num_prompts
    if most is not None and most == mean:
        return min(num_prompts, rows // most if rows % most == 0 else (rows + most - 2) // most + 1)
    return min(num_prompts, rows, math.ceil((rows + 3 * (3 * mean if most is None else most)) / mean))


def _balanced_order(rollouts: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Shuffled prompts, then those above and below the mean picked so that the running sum follows its mean course."""
    mean = rollouts.mean()
    shuffled = rng.permutation(len(rollouts)).tolist()
    large = [i for i in shuffled if rollouts[i] > mean]
    small = [i for i in shuffled if rollouts[i] <= mean]
    order, ahead = [], 0.0
    while large or small:
        queue = large if large and (ahead <= 0 or not small) else small
        order.append(queue.pop())
        ahead += rollouts[order[-1]] - mean
    return order
