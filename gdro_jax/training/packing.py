"""Cuts a step for `train.length_buckets`: responses end to end in streams, attention over rows of like length.

A piece is a stream of at most N tokens: the products with weights meet hardly any padding, whatever the lengths are.
Attention takes the stream's rows in groups, each padded to one of a few lengths. How many pieces there are, which rows
they hold and how their rows are grouped are numbers that the compiled step reads: no lengths compile anything.

All this is within minibatches, which are those of `batching.cut`, and row weights are fixed before: the cut changes no
gradient beyond rounding. On a mesh prompts are dealt to shards by their rows' tokens (`dealing`). Each shard has
streams of its own; all run equally many pieces, and groups of the same shapes, at the same time: the i-th row of a
piece counts as long there as the longest i-th row of the shards.
Letters: M minibatches, S shards, n rows of a minibatch on a shard, Q prompts of those, T response tokens, G groups.
"""

from typing import Any, NamedTuple

import numpy as np

from gdro_jax.models.recompute import pairs
from gdro_jax.training import batching, dealing
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
      piece_rows: int32[M, S, 2 n + 1]; piece k holds a shard's rows from piece_rows[k] to piece_rows[k + 1].
      piece_groups: int32[M, 2 n + 1], the same of its groups.
      group_first, group_last, group_size: int32[M, G], a group's rows, counted from the piece's first on each shard,
        and which of `Sizes.groups` it is.
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
    inputs, idle = np.maximum(np.asarray(lengths), 1) - 1, np.asarray(idle)
    squares = inputs * inputs // (2 * shape.groups[-1][1])  # of attention, of the size of a long row's tokens
    pieces = dealing.deal(pieces, np.stack([2 * inputs, inputs * ~idle, squares], axis=1), minibatches)
    count, each = pieces.rows.shape
    rows, local, prompts = (x.reshape(minibatches, count // minibatches, -1) for x in (pieces[0], pieces[2], pieces[1]))
    shards, most = rows.shape[1], 2 * each + 1  # a piece more or less for each row with a gradient and for each without
    out = Packed(
        np.empty_like(rows), np.empty_like(local), prompts, np.zeros(minibatches, np.int32),
        np.full((minibatches, shards, most), each, np.int32), np.zeros((minibatches, most), np.int32),
        *(np.zeros((minibatches, shards * each), np.int32) for _ in range(3)),
    )  # fmt: skip
    for m in range(minibatches):
        length, waiting = inputs[rows[m]], idle[rows[m]]
        pieces_of = _streams(length, waiting, shape)
        number = out.number[m] = len(pieces_of[0])
        longest = np.zeros((number, shape.rows), length.dtype)
        for s, held in enumerate(pieces_of):
            place = np.concatenate(held)
            out.rows[m, s], out.local_index[m, s] = rows[m, s][place], local[m, s][place]
            out.piece_rows[m, s, : number + 1] = np.cumsum([0, *map(len, held)])
            for k, piece in enumerate(held):
                longest[k, : len(piece)] = np.maximum(longest[k, : len(piece)], length[s][piece])
        group = 0
        for k in range(number):
            out.piece_groups[m, k] = group
            for found in _groups(longest[k], shape):
                out.group_first[m, group], out.group_last[m, group], out.group_size[m, group] = found
                group += 1
        out.piece_groups[m, number:] = group
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


def _streams(lengths: np.ndarray, idle: np.ndarray, shape: Sizes) -> list[list[np.ndarray]]:
    """The rows of each shard's pieces, equally many a shard, from int[S, n] and bool[S, n].

    Idle rows come in pieces behind the others, or in what room those have left if that saves a piece.
    """
    rest = [np.zeros(0, int)] * lengths.shape[1]
    first = [_bins(length, ~none, shape, []) for length, none in zip(lengths, idle, strict=True)]
    before = max(map(len, first))
    first = [held + rest[: before - len(held)] for held in first]
    apart = [_bins(length, none, shape, []) for length, none in zip(lengths, idle, strict=True)]
    together = [_bins(length, none, shape, held) for length, none, held in zip(lengths, idle, first, strict=True)]
    found = [held + more for held, more in zip(first, apart, strict=True)]
    if max(map(len, together)) < max(map(len, found)):
        found = together
    number = max(map(len, found))
    return [held + rest[: number - len(held)] for held in found]


def _bins(lengths: np.ndarray, chosen: np.ndarray, shape: Sizes, before: list[np.ndarray]) -> list[np.ndarray]:
    """Pieces with the chosen rows besides what is in them before, each longest first: first fit decreasing."""
    held = [piece.tolist() for piece in before]
    room = [shape.tokens - int(lengths[piece].sum()) for piece in before]
    for row in sorted(np.flatnonzero(chosen).tolist(), key=lambda i: -lengths[i]):
        length = int(lengths[row])
        found = (k for k, left in enumerate(room) if left >= length and len(held[k]) < shape.rows)
        k = next(found, len(held))
        if k == len(held):
            held.append([])
            room.append(shape.tokens)
        held[k].append(row)
        room[k] -= length
    return [np.array(sorted(piece, key=lambda i: -lengths[i]), int) for piece in held]


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
