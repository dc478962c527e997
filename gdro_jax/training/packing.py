"""Cuts a step for `train.attention_tile`: responses and prompts end to end in streams, attention in tiles.

A piece is a stream of at most N tokens: the products with weights meet hardly any padding, whatever the lengths are.
A few short ones, of N / 4, take what full ones would leave half empty. Attention takes the stream in tiles of one shape
(`models.ragged`). How many pieces there are, which rows they hold and how many tiles of keys each block of tiles meets
are numbers that the compiled step reads: no lengths compile anything.
Prompts have streams of their own, which are run before those of their responses.

All this is within minibatches, which are those of `batching.cut`, and row weights are fixed before: the cut changes no
gradient beyond rounding. On a mesh prompts are dealt to shards by their rows' tokens (`dealing`). Each shard has
streams of its own; all run equally many pieces, and equally many tiles, at the same time: a block of tiles meets as
many keys as the fullest such block of the shards.
Letters: M minibatches, S shards, n rows of a minibatch on a shard, Q prompts of those, L prompt and T response tokens,
X blocks of tiles.
"""

from typing import Any, NamedTuple

import numpy as np

from gdro_jax.models.ragged import Tiling, key_tiles
from gdro_jax.models.recompute import pairs
from gdro_jax.training import batching, dealing
from gdro_jax.training.config import TrainConfig

Array = Any  # of numpy on the host, of JAX inside the step
BLOCKS = 4  # tiles of about such a part of the piece's tokens go at a time
SHORT = 4  # a short piece has such a part of the tokens of a full one
TOKENS_PER_ROW = 16  # a piece has room for a row per so many tokens, or more rows where the longest row is short
RUNS = 4 / 3  # of prompts in streams, forward and backward: forward once more than responses, if all have a gradient
PROMPT_TOKENS = 512  # of a prompts' piece where no prompt is longer: enough for products at full rate


class Sizes(NamedTuple):
    """The compiled shape of a piece; static.

    Attributes:
      tokens: N of a piece; a response's last token, which is only predicted, is not counted.
      rows: that a piece has room for.
      tiling: of attention.
    """

    tokens: int
    rows: int
    tiling: Tiling

    @property
    def blocks(self) -> int:
        """X."""
        return self.tiling.blocks(self.tokens, self.rows)


Shapes = tuple[Sizes, ...]  # of full pieces, and of short ones where there are any


class Streams(NamedTuple):
    """Pieces of rows, or of prompts, of which a minibatch has n on each shard; k = 2 (n + SHORT) pieces at most.

    Attributes:
      ends: int32[M, 2]; the first ends[0] pieces are full, those behind them, up to ends[1], short.
      pieces: int32[M, S, k + 1]; piece i holds a shard's rows from pieces[i] to pieces[i + 1].
      steps: int32[M, k, X, 2], of each piece, see `ragged.key_tiles`; 0 behind those of its shape.
    """

    ends: Array
    pieces: Array
    steps: Array

    @classmethod
    def empty(cls, minibatches: int, shards: int, rows: int, shapes: Shapes) -> "Streams":
        most = 2 * (rows + SHORT)  # of rows with a gradient, and of such without: one each, and less than SHORT besides
        return cls(
            np.zeros((minibatches, 2), np.int32), np.full((minibatches, shards, most + 1), rows, np.int32),
            np.zeros((minibatches, most, max(shape.blocks for shape in shapes), 2), np.int32),
        )  # fmt: skip

    def fill(
        self, m: int, length: np.ndarray, idle: np.ndarray, shapes: Shapes, before: np.ndarray | None = None
    ) -> np.ndarray:
        """Writes minibatch m, of rows with so many tokens int[S, n], and so many keys before them, none if None; the
        rows in their new order, int[S, n]."""
        before = np.zeros_like(length) if before is None else before
        kinds, held = _streams(length, idle, shapes)
        self.ends[m] = kinds.count(0), len(kinds)
        for s, pieces in enumerate(held):
            self.pieces[m, s, : len(kinds) + 1] = np.cumsum([0, *map(len, pieces)])
        for k, kind in enumerate(kinds):
            shape = shapes[kind]
            of, ahead = np.zeros((2, len(held), shape.rows), np.int64)
            for s, pieces in enumerate(held):
                here = slice(len(pieces[k]))
                of[s, here], ahead[s, here] = length[s][pieces[k]], before[s][pieces[k]]
            self.steps[m, k, : shape.blocks] = key_tiles(of, ahead, shape.tiling, shape.blocks)
        return np.stack([np.concatenate(pieces) for pieces in held])

    def work(self, shapes: Shapes) -> tuple[int, int]:
        """Tokens and query-key pairs of all pieces on one shard."""
        tokens = done = 0
        for steps, ends in zip(self.steps, self.ends, strict=True):
            for shape, mine in zip(shapes, np.split(steps[: ends[1]], ends[:1]), strict=False):
                tokens += len(mine) * shape.tokens
                done += int(mine.sum()) * shape.tiling.together * shape.tiling.tokens**2
        return tokens, done


class Packed(NamedTuple):
    """What `batching.Pieces` is for padded rows; the pieces of a minibatch hold its rows and prompts in their order.

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


def sizes(tile: int, rows: int, microbatches: int, longest: int) -> Shapes:
    """Shapes for n rows of at most T tokens: a full piece has as many tokens as a microbatch of full rows."""
    tokens = rows // microbatches * longest
    return _shapes(tile, tokens, rows, max(1, min(TOKENS_PER_ROW, longest // TOKENS_PER_ROW)), longest)


def prompt_sizes(tile: int, prompts: int, longest: int) -> Shapes:
    """Shapes for Q prompts of at most L tokens."""
    return _shapes(tile, max(longest, min(prompts * longest, PROMPT_TOKENS)), prompts, 1, longest)


def _shapes(tile: int, tokens: int, rows: int, per_row: int, longest: int) -> Shapes:
    found = []
    for size in (tokens, tokens // SHORT):
        square = min(tile, longest, max(size, 1))
        tiling = Tiling(square, max(1, size // (BLOCKS * square)))
        found.append(Sizes(size, min(rows, size // per_row), tiling))
    return tuple(shape for shape in found if shape.tokens)


def step_sizes(train: TrainConfig, rows: int, prompts: int, longest: int, prompt: int) -> tuple[Shapes, Shapes]:
    """Of a step, for n rows of at most T tokens and Q prompts of at most L on each shard."""
    assert train.attention_tile is not None
    of_rows = sizes(train.attention_tile, rows, train.microbatches, longest)
    return of_rows, prompt_sizes(train.attention_tile, prompts, prompt)


def pack(
    pieces: batching.Pieces, lengths: np.ndarray, before: np.ndarray, idle: np.ndarray, shapes: Shapes,
    prompt_shapes: Shapes, minibatches: int, longest: int,
) -> Packed:  # fmt: skip
    """The streams of a step.

    Args:
      pieces: of `batching.cut` into M * S.
      lengths: int[R], tokens of each response; 0 for one that is in no loss.
      before: int[P], tokens of each prompt.
      idle: bool[R], rows without a gradient; they share pieces with their like, whose backward pass is left out, and so
        do prompts that have no other.
      shapes, prompt_shapes: of `sizes` and `prompt_sizes`.
      minibatches: M.
      longest: T.
    """
    inputs, idle = np.maximum(np.asarray(lengths), 1) - 1, np.asarray(idle)
    squares = inputs * inputs // (2 * max(longest - 1, 1))  # of attention, of the size of a long row's tokens
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
        Streams.empty(minibatches, shards, each, shapes), Streams.empty(minibatches, shards, held, prompt_shapes),
    )  # fmt: skip
    for m in range(minibatches):
        tokens = np.where(used[m], np.asarray(before)[prompts[m]], 0)
        order = out.of_prompts.fill(m, tokens, ~moving[m], prompt_shapes)
        out.prompts[m], out.prompt_used[m] = (np.take_along_axis(x[m], order, axis=1) for x in (prompts, used))
        place = np.argsort(order, axis=1)
        seen = np.take_along_axis(tokens, local[m], axis=1)
        order = out.of_rows.fill(m, inputs[rows[m]], idle[rows[m]], shapes, seen)
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
    shapes = step_sizes(train, pieces.rows.shape[1], pieces.prompts.shape[1], mask.shape[1], np.shape(prompt_mask)[1])
    used, before = lengths(mask, scorable), np.asarray(prompt_mask).sum(axis=1)
    return pack(pieces, used, before, idle, *shapes, train.minibatches, mask.shape[1])


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
        shapes = step_sizes(train, each, cut.prompts.shape[2], longest, prompt)
        responses, prompts = (of.work(shape) for of, shape in zip((cut.of_rows, cut.of_prompts), shapes, strict=True))
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


def _streams(lengths: np.ndarray, idle: np.ndarray, shapes: Shapes) -> tuple[list[int], list[list[np.ndarray]]]:
    """Of each piece its kind, the full ones first, and of each shard the rows of each, from int[S, n] and bool[S, n].

    Idle rows come in pieces of their own, or in what room the others have left if that takes fewer tokens.
    """
    first, held = _fewest(lengths, ~idle, shapes, [], [[] for _ in lengths])
    apart, more = _fewest(lengths, idle, shapes, [], [[] for _ in lengths])
    besides, together = _fewest(lengths, idle, shapes, first, held)
    kinds, found = first + besides, together
    if sum(shapes[kind].tokens for kind in besides) >= sum(shapes[kind].tokens for kind in apart):
        kinds, found = first + apart, [mine + behind for mine, behind in zip(held, more, strict=True)]
    order = np.argsort(kinds, kind="stable")
    return [kinds[k] for k in order], [[pieces[k] for k in order] for pieces in found]


def _fewest(
    lengths: np.ndarray, chosen: np.ndarray, shapes: Shapes, before: list[int], held: list[list[np.ndarray]]
) -> tuple[list[int], list[list[np.ndarray]]]:
    """The chosen rows in the pieces before and the fewest others: their kinds, and all pieces of every shard."""
    fewest = 0
    if not before and len(shapes) > 1:  # no fewer can hold them
        full, rest = divmod(int(np.where(chosen, lengths, 0).sum(axis=1).max()), shapes[0].tokens)
        fewest = full * SHORT + min(SHORT, -(-rest // shapes[1].tokens))
    while True:
        more = [0] * (fewest // SHORT) + [1] * (fewest % SHORT) if len(shapes) > 1 else [0] * fewest
        sizes = [shapes[kind] for kind in before + more]
        found = [_bins(length, which, sizes, mine) for length, which, mine in zip(lengths, chosen, held, strict=True)]
        if all(pieces is not None for pieces in found):
            return more, [pieces for pieces in found if pieces is not None]
        fewest += 1


def _bins(
    lengths: np.ndarray, chosen: np.ndarray, shapes: list[Sizes], before: list[np.ndarray]
) -> list[np.ndarray] | None:
    """Pieces with the chosen rows besides what was in them, first fit decreasing; None if they do not hold all."""
    held = [piece.tolist() for piece in before] + [[] for _ in shapes[len(before) :]]
    room = [shape.tokens - int(lengths[piece].sum()) for shape, piece in zip(shapes, held, strict=True)]
    for row in sorted(np.flatnonzero(chosen).tolist(), key=lambda i: -lengths[i]):
        length = int(lengths[row])
        fit = (k for k, left in enumerate(room) if left >= length and len(held[k]) < shapes[k].rows)
        k = next(fit, None)
        if k is None:
            return None
        held[k].append(row)
        room[k] -= length
    return [np.array(piece, int) for piece in held]
