"""Deals a minibatch's rows to the shards of a mesh once their lengths are known, so that none waits long for another.

Prompts change places with all rows that a shard holds of them, against as many rows of another: shards keep their
number of rows and get no more prompts than they had. Which minibatch a row is in does not change, and so no gradient.
Letters: M minibatches, S shards, C = M S, n rows of a minibatch on a shard.
"""

import numpy as np

from gdro_jax.training.batching import Pieces


def deal(pieces: Pieces, work: np.ndarray, minibatches: int) -> Pieces:
    """The pieces of `batching.cut` into C with prompts swapped within each minibatch.

    Args:
      pieces: a minibatch's shards one after the other.
      work: int[R, K], kinds of work of each row; of every kind shards get about the same.
      minibatches: M.
    """
    shards = len(pieces.rows) // minibatches
    if shards == 1:
        return pieces
    out = Pieces(np.empty_like(pieces.rows), np.zeros_like(pieces.prompts), np.empty_like(pieces.local_index))
    for m in range(minibatches):
        each = [(s, place) for s in range(shards) for place in np.unique(pieces.local_index[m * shards + s])]
        rows = [pieces.rows[m * shards + s][pieces.local_index[m * shards + s] == place] for s, place in each]
        owner = [pieces.prompts[m * shards + s, place] for s, place in each]
        held = np.array([s for s, _ in each])
        held = _swapped(held, np.array([len(x) for x in rows]), np.array([work[x].sum(axis=0) for x in rows]), shards)
        for s in range(shards):
            mine = np.flatnonzero(held == s)
            prompts = list(dict.fromkeys(int(owner[i]) for i in mine))  # parts of one prompt may have met
            c, place = m * shards + s, {prompt: i for i, prompt in enumerate(prompts)}
            out.rows[c] = np.concatenate([rows[i] for i in mine])
            out.prompts[c, : len(prompts)] = prompts
            out.local_index[c] = np.concatenate([np.full(len(rows[i]), place[int(owner[i])]) for i in mine])
    return out


def _swapped(held: np.ndarray, rows: np.ndarray, work: np.ndarray, shards: int) -> np.ndarray:
    """The shard of each part after the swaps that lower the sum of squares most, from the shard farthest off."""
    held, work = held.copy(), np.asarray(work, np.int64)
    totals = np.stack([work[held == s].sum(axis=0) for s in range(shards)])
    for _ in range(2 * len(held)):
        for s in np.argsort(-((totals - totals.mean(axis=0)) ** 2).sum(axis=1), kind="stable"):
            mine, others = np.flatnonzero(held == s), np.flatnonzero(held != s)
            gets = work[others] - work[mine][:, None]
            change = (gets * (totals[s] - totals[held[others]] + gets)).sum(axis=2)
            change = np.where(rows[mine][:, None] == rows[others], change, 0)
            best = np.unravel_index(change.argmin(), change.shape)
            if change[best] < 0:
                i, j = mine[best[0]], others[best[1]]
                t, moved = held[j], gets[best]
                held[i], held[j] = t, s
                totals[s] += moved
                totals[t] -= moved
                break
        else:
            return held
    return held
