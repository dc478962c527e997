"""Cuts a step for `train.length_buckets`: responses and prompts end to end in streams, attention over like lengths.

A piece is a stream of at most N tokens: the products with weights meet hardly any padding, whatever the lengths are.
Attention takes the stream's rows in groups, each padded to one of a few lengths. How many pieces there are, which rows
they hold and how their rows are grouped are numbers that the compiled step reads: no lengths compile anything.
Prompts have streams of their own, which are run before those of their responses.

All this is within minibatches, which are those of `batching.cut`, and row weights are fixed before: the cut changes no
gradient beyond rounding. On a mesh prompts are dealt to shards by their rows' tokens (`dealing`). Each shard has
streams of its own; all run equally many pieces, and groups of the same shapes, at the same time: the i-th row of a
piece counts as long there as the longest i-th row of the shards.
Letters: M minibatches, S shards, n rows of a minibatch on a shard, Q prompts of those, L prompt and T response tokens,
G groups.
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
PROMPT_BUCKETS = 3  # of prompts' attention, which is little work: each length is one more shape to compile
SHORT_PROMPT = 4  # behind prompts of at most such a part of L, responses see no more keys than that
RUNS = 4 / 3  # of prompts in streams, forward and backward: forward once more than responses, if all have a gradient
PROMPT_TOKENS = 512  # of a prompts' piece where no prompt is longer: enough for products at full rate


class Sizes(NamedTuple):
    """The compiled shapes of pieces; static.

    Attributes:
      tokens: N of a piece; a response's last token, which is only predicted, is not counted.
      rows: that a piece has room for.
      groups: (rows, tokens a row, keys before each) of attention, the shortest first.
    """

    tokens: int
    rows: int
    groups: tuple[tuple[int, int, int], ...]


class Streams(NamedTuple):
    """Pieces of rows, or of prompts, of which a minibatch has n on each shard.

    Attributes:
      number: int32[M], pieces.
      pieces: int32[M, S, 2 n + 1]; piece k holds a shard's rows from pieces[k] to pieces[k + 1].
      groups: int32[M, 2 n + 1], the same of a piece's groups.
      first, last, size: int32[M, G], a group's rows, counted from the piece's first on each shard, and which of
        `Sizes.groups` it is.
    """

    number: Array
    pieces: Array
    groups: Array
    first: Array
    last: Array
    size: Array

    @classmethod
    def empty(cls, minibatches: int, shards: int, rows: int) -> "Streams":
        most = 2 * rows + 1  # a piece more or less for each row with a gradient and for each without
        return cls(
            np.zeros(minibatches, np.int32), np.full((minibatches, shards, most), rows, np.int32),
            np.zeros((minibatches, most), np.int32),
            *(np.zeros((minibatches, shards * rows), np.int32) for _ in range(3)),
        )  # fmt: skip

    def fill(
        self, m: int, length: np.ndarray, idle: np.ndarray, shape: Sizes, before: np.ndarray | None = None
    ) -> np.ndarray:
        """Writes minibatch m, of rows with so many tokens int[S, n], and so many keys before them, none if None; the
        rows in their new order, int[S, n]."""
        before = np.zeros_like(length) if before is None else np.where(length > 0, before, 0)
        most = shape.groups[0][2]  # of the keys that the groups for short prompts hold
        pieces_of = [
            [piece[np.argsort(before[s][piece] <= most, kind="stable")] for piece in held]
            for s, held in enumerate(_streams(length, idle, shape))
        ]
        number = self.number[m] = len(pieces_of[0])
        longest, seen = np.zeros((2, number, shape.rows), length.dtype)
        for s, held in enumerate(pieces_of):
            self.pieces[m, s, : number + 1] = np.cumsum([0, *map(len, held)])
            for k, piece in enumerate(held):
                here = slice(len(piece))
                longest[k, here] = np.maximum(longest[k, here], length[s][piece])
                seen[k, here] = np.maximum(seen[k, here], before[s][piece])
        group = 0
        for k in range(number):
            self.groups[m, k] = group
            for found in _groups(longest[k], seen[k], shape):
                self.first[m, group], self.last[m, group], self.size[m, group] = found
                group += 1
        self.groups[m, number:] = group
        return np.stack([np.concatenate(held) for held in pieces_of])

    def work(self, shape: Sizes) -> tuple[int, int]:
        """Tokens and query-key pairs of all pieces on one shard."""
        run = np.concatenate([size[: ends[-1]] for size, ends in zip(self.size, self.groups, strict=True)])
        each = [rows * pairs(length, before) for rows, length, before in shape.groups]
        done = sum(each[size] for size in run.tolist())
        return int(self.number.sum()) * shape.tokens, done


class Packed(NamedTuple):
    """What `batching.Pieces` is without buckets; the pieces of a minibatch hold its rows and prompts in their order.

    Attributes:
      rows: int32[M, S, n], flat rows; local_index int32[M, S, n], the prompt of each as a position in `prompts`.
      prompts: int32[M, S, Q], filled up with prompt 0.
      prompt_used: bool[M, S, Q], False where filled up.
      of_rows, of_prompts: their pieces.
    """

    rows: Array
    local_index: Array
    prompts: Array
    prompt_used: Array
    of_rows: Streams
    of_prompts: Streams


def sizes(buckets: int, rows: int, microbatches: int, longest: int, prompt: int) -> Sizes:
    """Shapes for n rows of at most T tokens after L: a piece has as many tokens as a microbatch of full rows."""
    tokens = rows // microbatches * longest
    per_row = max(1, min(TOKENS_PER_ROW, longest // SHORTEST))
    before = tuple(sorted({-(-prompt // SHORT_PROMPT), prompt}))
    groups = _group_sizes(buckets, rows, tokens, max(longest - 1, 1), before)
    return Sizes(tokens, min(rows, tokens // per_row), groups)


def prompt_sizes(prompts: int, longest: int) -> Sizes:
    """Shapes for Q prompts of at most L tokens."""
    tokens = max(longest, min(prompts * longest, PROMPT_TOKENS))
    return Sizes(tokens, prompts, _group_sizes(PROMPT_BUCKETS, prompts, tokens, longest, (0,)))


def _group_sizes(
    buckets: int, rows: int, tokens: int, longest: int, before: tuple[int, ...]
) -> tuple[tuple[int, int, int], ...]:
    steps = range(buckets - 1, -1, -1)
    lengths = sorted({max(1, round(longest * SHORTEST ** (-i / max(buckets - 1, 1)))) for i in steps})
    return tuple(
        (min(rows, max(1, tokens // (GROUPS * length))), length, width) for length in lengths for width in before
    )


def pack(
    pieces: batching.Pieces, lengths: np.ndarray, before: np.ndarray, idle: np.ndarray, shape: Sizes, minibatches: int,
    longest: int,
) -> Packed:  # fmt: skip
    """The streams of a step.

    Args:
      pieces: of `batching.cut` into M * S.
      lengths: int[R], tokens of each response; 0 for one that is in no loss.
      before: int[P], tokens of each prompt.
      idle: bool[R], rows without a gradient; they share pieces with their like, whose backward pass is left out, and so
        do prompts that have no other.
      shape: of `sizes`.
      minibatches: M.
      longest: L.
    """
    inputs, idle = np.maximum(np.asarray(lengths), 1) - 1, np.asarray(idle)
    squares = inputs * inputs // (2 * shape.groups[-1][1])  # of attention, of the size of a long row's tokens
    pieces = dealing.deal(pieces, np.stack([2 * inputs, inputs * ~idle, squares], axis=1), minibatches)
    count, each = pieces.rows.shape
    shards, held = count // minibatches, pieces.prompts.shape[1]
    rows, local, prompts = (x.reshape(minibatches, shards, -1) for x in (pieces[0], pieces[2], pieces[1]))
    used, moving = np.zeros(prompts.shape, bool), np.zeros(prompts.shape, bool)
    of = tuple(np.indices(rows.shape)[:2])
    used[*of, local] = True
    np.logical_or.at(moving, (*of, local), ~idle[rows])
    out = Packed(
        np.empty_like(rows), np.empty_like(local), np.empty_like(prompts), np.empty_like(used),
        Streams.empty(minibatches, shards, each), Streams.empty(minibatches, shards, held),
    )  # fmt: skip
    prompt_shape = prompt_sizes(held, longest)
    for m in range(minibatches):
        tokens = np.where(used[m], np.asarray(before)[prompts[m]], 0)
        order = out.of_prompts.fill(m, tokens, ~moving[m], prompt_shape)
        out.prompts[m], out.prompt_used[m] = (np.take_along_axis(x[m], order, axis=1) for x in (prompts, used))
        place = np.argsort(order, axis=1)
        seen = np.take_along_axis(tokens, local[m], axis=1)
        order = out.of_rows.fill(m, inputs[rows[m]], idle[rows[m]], shape, seen)
        out.rows[m] = np.take_along_axis(rows[m], order, axis=1)
        out.local_index[m] = np.take_along_axis(place, np.take_along_axis(local[m], order, axis=1), axis=1)
    return out


def pack_step(
    pieces: batching.Pieces,
    train: TrainConfig,
    prompt_mask: np.ndarray,
    mask: np.ndarray,
    rewards: np.ndarray,
    scorable: np.ndarray,
) -> Packed:
    """`pack` of a graded step: prompt_mask bool[P, L]; of rows mask bool[R, T], rewards float[R], scorable bool[R].

    Without a KL term rows whose prompt's scorable rewards are all equal have no gradient.
    """
    index = np.empty(len(mask), np.int32)
    index[pieces.rows] = np.take_along_axis(pieces.prompts, pieces.local_index, axis=1)
    prompts = index.max() + 1
    high, low = np.full(prompts, -np.inf), np.full(prompts, np.inf)
    np.maximum.at(high, index[scorable], rewards[scorable])
    np.minimum.at(low, index[scorable], rewards[scorable])
    idle = ~scorable | (high <= low)[index] if train.kl_coef == 0 else np.zeros(len(mask), bool)
    prompt = np.shape(prompt_mask)[1]
    shape = sizes(train.length_buckets or 1, pieces.rows.shape[1], train.microbatches, mask.shape[1], prompt)
    used, before = lengths(mask, scorable), np.asarray(prompt_mask).sum(axis=1)
    return pack(pieces, used, before, idle, shape, train.minibatches, prompt)


def lengths(mask: np.ndarray, scorable: np.ndarray) -> np.ndarray:
    """Tokens int64[R] of each response, 0 where it is in no loss."""
    return np.where(scorable, np.asarray(mask).sum(axis=1), 0)


class Padding(NamedTuple):
    """Tokens and query-key pairs that a step works through, and what of it is of real tokens."""

    tokens: float
    real_tokens: float
    pairs: float
    real_pairs: float

    def plus(self, other: "Padding", times: float) -> "Padding":
        """With so many times the other's."""
        return Padding(*(mine + times * its for mine, its in zip(self, other, strict=True)))

    def share(self, per_token: float, per_pair: float) -> float:
        """Of the work in [0, 1], that was spent on padding."""
        done = self.tokens * per_token + self.pairs * per_pair
        return 1.0 - (self.real_tokens * per_token + self.real_pairs * per_pair) / done if done else 0.0


def padding(
    cut: batching.Pieces | Packed, train: TrainConfig, used: np.ndarray, before: np.ndarray, longest: int, prompt: int
) -> tuple[Padding, Padding]:
    """What a step works through, forward and backward once: responses, and prompts.

    Args:
      cut: either form of it; train: what it was cut for.
      used: int[R], of `lengths`; before: int[P], real tokens of each prompt.
      longest, prompt: T and L, what responses and prompts are padded to.
    """
    inputs, before = np.maximum(np.asarray(used, np.int64), 1) - 1, np.asarray(before, np.int64)
    seen = np.empty_like(inputs)
    seen[cut.rows] = before[np.take_along_axis(cut.prompts, cut.local_index, axis=-1)]
    real = int(inputs.sum()), int((inputs * seen + inputs * (inputs + 1) // 2).sum())
    if isinstance(cut, batching.Pieces):
        rows, runs = cut.rows.size, cut.prompts.size
        held = np.concatenate([prompts[np.unique(local)] for prompts, local in zip(cut[1], cut[2], strict=True)])
        responses, prompts = (rows * (longest - 1), rows * pairs(longest - 1, prompt)), (prompt, pairs(prompt, 0))
        prompts = runs * prompts[0], runs * prompts[1]
    else:
        _, shards, each = cut.rows.shape
        held = cut.prompts[cut.prompt_used]
        responses = cut.of_rows.work(sizes(train.length_buckets or 1, each, train.microbatches, longest, prompt))
        prompts = cut.of_prompts.work(prompt_sizes(cut.prompts.shape[2], prompt))
        responses, prompts = ((shards * tokens, shards * done) for tokens, done in (responses, prompts))
    own = before[held]
    return (
        Padding(responses[0], real[0], responses[1], real[1]),
        Padding(prompts[0], int(own.sum()), prompts[1], int((own * (own + 1) // 2).sum())),
    )


def share(
    cut: batching.Pieces | Packed,
    train: TrainConfig,
    used: np.ndarray,
    before: np.ndarray,
    longest: int,
    prompt: int,
    work: tuple[float, float],
) -> float:
    """Of a step's work in [0, 1], that was spent on padding: see `padding`, and `work` of `models.config`."""
    responses, prompts = padding(cut, train, used, before, longest, prompt)
    return responses.plus(prompts, RUNS if isinstance(cut, Packed) else 1).share(*work)


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


def _groups(lengths: np.ndarray, before: np.ndarray, shape: Sizes) -> list[tuple[int, int, int]]:
    """(first, last, size) of the cheapest groups for a piece's rows in their order; trailing empty rows need none."""
    rows = int(np.flatnonzero(lengths)[-1]) + 1 if lengths.any() else 0
    cost = [count * pairs(length, width) for count, length, width in shape.groups]
    reach = []  # of each shape, up to where rows fit it
    for _, length, width in shape.groups:
        over = np.where((lengths[:rows] > length) | (before[:rows] > width), np.arange(rows), rows)
        reach.append(np.minimum.accumulate(over[::-1])[::-1].tolist())
    best, chosen = [0] * (rows + 1), [(0, 0)] * rows
    for i in range(rows - 1, -1, -1):
        stops = ((b, min(reach[b][i], i + count)) for b, (count, _, _) in enumerate(shape.groups))
        best[i], b, stop = min((cost[b] + best[stop], b, stop) for b, stop in stops if stop > i)
        chosen[i] = b, stop
    out, i = [], 0
    while i < rows:
        b, stop = chosen[i]
        out.append((i, stop, b))
        i = stop
    return out
