"""Cuts a step for `train.length_buckets`: responses end to end in streams, attention over rows of like length.

A piece is a stream of at most N tokens: the products with weights meet hardly any padding, whatever the lengths are.
Attention takes the stream's rows in groups, each padded to one of a few lengths. How many pieces there are, which rows
they hold and how their rows are grouped are numbers that the compiled step reads: no lengths compile anything.

All this is within minibatches, which are those of `batching.cut`, and row weights are fixed before: the cut changes no
gradient beyond rounding. On a mesh the shards' longest rows lie side by side, and so on, as one column of rows; a
column counts as long as its longest row, so that all shards work on the same shapes at the same time.
Letters: M minibatches, S shards, n rows of a minibatch on a shard, Q prompts of those, T response tokens.
"""

from typing import Any, NamedTuple

import numpy as np

from gdro_jax.models.recompute import pairs
from gdro_jax.training import batching
from gdro_jax.training.config import TrainConfig

Array = Any  # of numpy on the host, of JAX inside the step
SHORTEST = 16  # the shortest length of attention is the longest's such part
GROUPS = 4  # a group of rows takes about such a part of the piece's tokens
TOKENS_PER_ROW = 16  # a piece has room for a row per so many tokens, or more rows where the longest row is short


class Sizes(NamedTuple):
    """The compiled shapes; static.

    Attributes:
      tokens: N of a piece, not counting each response's last token, which is only predicted.
      rows: that a piece has room for.
      groups: (rows, tokens a row) of attention, the shortest first.
    """

    tokens: int
    rows: int
    groups: tuple[tuple[int, int], ...]


class Packed(NamedTuple):
    """What `batching.Pieces` is without buckets; the pieces of a minibatch hold its rows in the order of `rows`.

    Attributes:
      rows: int32[M, S, n], flat rows; local_index int32[M, S, n], the prompt of each as a position in `prompts`.
      prompts: int32[M, S, Q], filled up with prompt 0.
      number: int32[M], pieces.
      piece_rows: int32[M, n + 1]; piece k holds the columns from piece_rows[k] to piece_rows[k + 1].
      piece_groups: int32[M, n + 1], the same of its groups.
      group_first, group_last, group_size: int32[M, n], columns of a group, and which of `Sizes.groups` it is.
    """

    rows: Array
    local_index: Array
    prompts: Array
    number: Array
    piece_rows: Array
    piece_groups: Array
    group_first: Array
    group_last: Array
    group_size: Array


def sizes(buckets: int, rows: int, microbatches: int, longest: int) -> Sizes:
    """Shapes for n rows of at most T tokens: a piece has as many tokens as a microbatch of full rows."""
    tokens = rows // microbatches * longest
    most = max(longest - 1, 1)
    steps = range(buckets - 1, -1, -1)
    lengths = sorted({max(1, round(most * SHORTEST ** (-i / max(buckets - 1, 1)))) for i in steps})
    groups = tuple((min(rows, max(1, tokens // (GROUPS * length))), length) for length in lengths)
    per_row = max(1, min(TOKENS_PER_ROW, longest // SHORTEST))
    return Sizes(tokens, min(rows, tokens // per_row), groups)


def pack(pieces: batching.Pieces, lengths: np.ndarray, idle: np.ndarray, shape: Sizes, minibatches: int) -> Packed:
    """The streams of a step.

    Args:
      pieces: of `batching.cut` into M * S.
      lengths: int[R], tokens of each response; 0 for one that is in no loss.
      idle: bool[R], rows without a gradient; they share pieces with their like, whose backward pass is left out.
      shape: of `sizes`.
      minibatches: M.
    """
    count, each = pieces.rows.shape
    inputs = np.maximum(np.asarray(lengths), 1) - 1
    work = np.where(np.asarray(idle)[pieces.rows], -1, 1) * inputs[pieces.rows]
    order = np.argsort(-work, axis=1, kind="stable")  # rows with a gradient, longest first; the idle, longest last
    rows, local = (np.take_along_axis(x, order, 1).reshape(minibatches, -1, each) for x in pieces[::2])
    shape_of = (minibatches, each)
    out = Packed(
        np.empty_like(rows), np.empty_like(local), pieces.prompts.reshape(minibatches, count // minibatches, -1),
        np.zeros(minibatches, np.int32), *(np.full((minibatches, each + 1), each, np.int32) for _ in range(2)),
        *(np.zeros(shape_of, np.int32) for _ in range(3)),
    )  # fmt: skip
    for m in range(minibatches):
        columns = inputs[rows[m]].max(axis=0)
        waiting = np.asarray(idle)[rows[m]].all(axis=0)
        bins = _bins(columns, ~waiting, shape) + _bins(columns, waiting, shape)
        place = np.concatenate(bins)
        out.rows[m], out.local_index[m] = rows[m][:, place], local[m][:, place]
        out.number[m] = len(bins)
        first = group = 0
        for k, held in enumerate(bins):
            out.piece_rows[m, k], out.piece_groups[m, k] = first, group
            for start, stop, size in _groups(columns[held], shape):
                out.group_first[m, group], out.group_last[m, group] = first + start, first + stop
                out.group_size[m, group], group = size, group + 1
            first += len(held)
        out.piece_groups[m, len(bins) :] = group
    return out


def pack_step(
    pieces: batching.Pieces, train: TrainConfig, mask: np.ndarray, rewards: np.ndarray, scorable: np.ndarray
) -> Packed:
    """`pack` of a graded step's rows: mask bool[R, T], rewards float[R], scorable bool[R].

    Without a KL term rows whose prompt's scorable rewards are all equal have no gradient.
    """
    index = np.empty(len(mask), np.int32)
    index[pieces.rows] = np.take_along_axis(pieces.prompts, pieces.local_index, axis=1)
    prompts = index.max() + 1
    high, low = np.full(prompts, -np.inf), np.full(prompts, np.inf)
    np.maximum.at(high, index[scorable], rewards[scorable])
    np.minimum.at(low, index[scorable], rewards[scorable])
    idle = ~scorable | (high <= low)[index] if train.kl_coef == 0 else np.zeros(len(mask), bool)
    shape = sizes(train.length_buckets or 1, pieces.rows.shape[1], train.microbatches, mask.shape[1])
    return pack(pieces, lengths(mask, scorable), idle, shape, train.minibatches)


def lengths(mask: np.ndarray, scorable: np.ndarray) -> np.ndarray:
    """Tokens int64[R] of each response, 0 where it is in no loss."""
    return np.where(scorable, np.asarray(mask).sum(axis=1), 0)


class Padding(NamedTuple):
    """Tokens and query-key pairs of responses: what the step works through, and what of it is of real tokens."""

    tokens: int
    real_tokens: int
    pairs: int
    real_pairs: int

    def share(self, per_token: float, per_pair: float) -> float:
        """Of the work in [0, 1], that was spent on padding."""
        done = self.tokens * per_token + self.pairs * per_pair
        return 1.0 - (self.real_tokens * per_token + self.real_pairs * per_pair) / done if done else 0.0


def padding(
    cut: batching.Pieces | Packed, train: TrainConfig, used: np.ndarray, before: np.ndarray, longest: int, prompt: int
) -> Padding:
    """What a step works through.

    Args:
      cut: either form of it; train: what it was cut for.
      used: int[R], of `lengths`; before: int[R], real tokens of each row's prompt.
      longest, prompt: T and L, what responses and prompts are padded to.
    """
    inputs = np.maximum(np.asarray(used, np.int64), 1) - 1
    real = int(inputs.sum()), int((inputs * before + inputs * (inputs + 1) // 2).sum())
    if isinstance(cut, batching.Pieces):
        rows = cut.rows.size
        return Padding(rows * (longest - 1), real[0], rows * pairs(longest - 1, prompt), real[1])
    _, shards, each = cut.rows.shape
    shape = sizes(train.length_buckets or 1, each, train.microbatches, longest)
    run = np.concatenate([size[: ends[-1]] for size, ends in zip(cut.group_size, cut.piece_groups, strict=True)])
    done = sum(shape.groups[size][0] * pairs(shape.groups[size][1], prompt) for size in run.tolist())
    return Padding(int(cut.number.sum()) * shards * shape.tokens, real[0], shards * done, real[1])


def _bins(columns: np.ndarray, chosen: np.ndarray, shape: Sizes) -> list[np.ndarray]:
    """Chosen columns in pieces, each longest first: first fit decreasing."""
    held: list[list[int]] = []
    room: list[int] = []
    for column in sorted(np.flatnonzero(chosen).tolist(), key=lambda i: -columns[i]):
        length = int(columns[column])
        found = (k for k, left in enumerate(room) if left >= length and len(held[k]) < shape.rows)
        k = next(found, len(held))
        if k == len(held):
            held.append([])
            room.append(shape.tokens)
        held[k].append(column)
        room[k] -= length
    return [np.array(piece) for piece in held]


def _groups(lengths: np.ndarray, shape: Sizes) -> list[tuple[int, int, int]]:
    """(first, last, size) of the cheapest groups for a piece's rows, longest first; rows of length 0 need none."""
    rows = int((lengths > 0).sum())
    cost = [count * pairs(length, length) for count, length in shape.groups]
    best, chosen = [0] * (rows + 1), [0] * rows
    for i in range(rows - 1, -1, -1):
        fitting = [b for b, (_, length) in enumerate(shape.groups) if length >= lengths[i]]
        totals = [cost[b] + best[min(rows, i + shape.groups[b][0])] for b in fitting]
        best[i], chosen[i] = min(zip(totals, fitting, strict=True))
    out, i = [], 0
    while i < rows:
        stop = min(rows, i + shape.groups[chosen[i]][0])
        out.append((i, stop, chosen[i]))
        i = stop
    return out
