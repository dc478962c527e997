"""What sampling hands out, assembled on the host from what segments drew."""

from typing import NamedTuple

import numpy as np

from gdro_jax.sampling.segment import Drawn


class Rollouts(NamedTuple):
    """Responses of R rows.

    Attributes:
      tokens: int32[R, T], 0 past the end.
      mask: bool[R, T], true on the response's tokens, its stop token included.
      logprobs: float32[R, T], of the distribution sampled from (0 under greedy decoding); 0 past the end.
      finished: bool[R], whether a stop token came before the length limit.
      policy_logprobs: float32[R, T], of the policy at the sampling temperature (1 where greedy) with nothing cut off;
        0 past the end. The same numbers as `logprobs` unless the configuration `truncates` or is greedy.
    """

    tokens: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    finished: np.ndarray
    policy_logprobs: np.ndarray


class Progress(NamedTuple):
    """How far a call is.

    Attributes:
      rows: int[n], the rows that ended since the last one.
      done, total: rows ended so far and in all.
      tokens: drawn so far; slot_steps: steps times slots so far, so tokens / slot_steps is the useful share.
    """

    rows: np.ndarray
    done: int
    total: int
    tokens: int
    slot_steps: int


def empty(rows: int, length: int) -> Rollouts:
    """Rollouts of nothing yet."""
    shape = (rows, length)
    return Rollouts(
        np.zeros(shape, np.int32),
        np.zeros(shape, bool),
        np.zeros(shape, np.float32),
        np.zeros(rows, bool),
        np.zeros(shape, np.float32),
    )


def book(out: Rollouts, drawn: Drawn, row_of: np.ndarray) -> np.ndarray:
    """Writes a segment's tokens into `out`; returns the rows that ended, int[n], in the order they did.

    Args:
      out: written to.
      drawn: [N, D * S], slots of D shards one after the other; its rows are numbered within their shard.
      row_of: int[D, R'], what a shard's row is called outside.
    """
    steps, slots = np.nonzero(drawn.row >= 0)
    shard = slots // (drawn.row.shape[1] // len(row_of))
    at = steps, slots
    row, position = row_of[shard, drawn.row[at]], drawn.position[at]
    out.tokens[row, position] = drawn.token[at]
    out.mask[row, position] = True
    out.logprobs[row, position] = drawn.logprob[at]
    out.policy_logprobs[row, position] = drawn.policy_logprob[at]
    out.finished[row] |= drawn.stopped[at]
    return row[drawn.ended[at]]
