"""The compiled part of sampling: slots that decode rows, and rows that enter at the step their slot falls free.

Letters: S slots, R rows, N steps of a segment, P prompts, L prompt tokens. All numbers are those of one shard of the
mesh: shards decode their own rows and wait for nobody within a segment.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gdro_jax.models import decode, qwen3
from gdro_jax.models.pages import Writing
from gdro_jax.sampling import caches
from gdro_jax.sampling.config import SamplingConfig
from gdro_jax.sampling.distribution import sample


class Rows(NamedTuple):
    """R rows in the order they enter.

    Attributes:
      prompt: int32[R]; keys: one random key each; limit: int32[R], most tokens of each.
      number: int32[1], how many are real; the others stand last.
    """

    prompt: jax.Array
    keys: jax.Array
    limit: jax.Array
    number: jax.Array


class Context(NamedTuple):
    """What decoding reads and never changes: prompts, rows, and the hidden state [P, D] before each first token."""

    prompts: decode.Prompts
    last: jax.Array
    rows: Rows


class State(NamedTuple):
    """Slots between segments.

    Attributes:
      row: int32[S], the row in each slot, -1 for none.
      position: int32[S], tokens drawn for it so far.
      hidden: [S, D], predicts its next token.
      entered: int32[1], rows that have had a slot.
      cache: of the slots.
    """

    row: jax.Array
    position: jax.Array
    hidden: jax.Array
    entered: jax.Array
    cache: caches.Cache


class Drawn(NamedTuple):
    """Tokens of a segment, [N, S] each: of which row, at which position, and whether the row ended with it.

    `row` is -1 where a slot was idle or the segment was over; `stopped` where the token is a stop token.
    """

    row: jax.Array
    position: jax.Array
    token: jax.Array
    logprob: jax.Array
    policy_logprob: jax.Array
    ended: jax.Array
    stopped: jax.Array


class Look(NamedTuple):
    """What the host sees of a segment.

    Attributes:
      drawn: of all shards' slots.
      live, waiting: int32, the largest over shards of rows in slots and of rows without one; the shapes that come
        next must hold every shard.
      full: int32, 1 where the cache of some shard must grow before it goes on, else 0.
      slot_steps: int32, steps times slots over all shards.
    """

    drawn: Drawn
    live: jax.Array
    waiting: jax.Array
    full: jax.Array
    slot_steps: jax.Array


def row_keys(key: jax.Array, prompt_ids: jax.Array, ranks: jax.Array) -> jax.Array:
    """One key per row from its prompt's identity and its rank among that prompt's rollouts, both int32[R]."""
    return jax.vmap(lambda i, r: jax.random.fold_in(jax.random.fold_in(key, i), r))(prompt_ids, ranks)


def start(
    model: qwen3.Qwen3,
    tokens: jax.Array,
    mask: jax.Array,
    rows: Rows,
    slots: int,
    window: int,
    config: SamplingConfig,
    in_pages: bool,
) -> tuple[Context, State]:
    """Runs the prompts int32[P, L] and seats the first rows."""
    prompts, last, cache = caches.start(model, tokens, mask, slots, window, config, in_pages)
    seat = jnp.arange(slots, dtype=jnp.int32)
    row = jnp.where(seat < rows.number, seat, -1)
    state = State(
        row=row,
        position=jnp.zeros(slots, jnp.int32),
        hidden=last[rows.prompt[jnp.maximum(row, 0)]],
        entered=jnp.minimum(rows.number, slots),
        cache=cache,
    )
    return Context(prompts, last, rows), state


def resize(state: State, slots: int, window: int) -> State:
    """The same rows in other shapes, rows in use first; they must fit."""
    keep = jnp.argsort(state.row < 0, stable=True)[:slots]
    return State(
        state.row[keep],
        state.position[keep],
        state.hidden[keep],
        state.entered,
        caches.resize(state.cache, keep, window),
    )


def segment(
    model: qwen3.Qwen3,
    context: Context,
    state: State,
    leave_at: jax.Array,
    config: SamplingConfig,
    tile: int,
    axes: tuple[str, ...] = (),
    in_step: bool = False,
    reader: str | None = None,
) -> tuple[State, Look]:
    """Decodes until `config.segment` steps are done, the cache must grow, or few rows are left.

    Args:
      model: the policy.
      context: prompts and rows.
      state: the slots; the cache may be full, then nothing is decoded.
      leave_at: int32, end when so many rows are left and none waits, 0 to go on to the last.
      config: static, as are the others that follow.
      tile: slots that read a prompt together (`decode.tiles_of`).
      axes: mesh axes that the shards lie along.
      in_step: whether all shards take equally many steps, which they must where devices work together in a step.
      reader: of a cache in pages (`paged.choose`), None for a contiguous one.
    """
    steps, slots = config.segment, state.row.shape[0]
    stops = jnp.asarray(config.stop_tokens, jnp.int32)

    def goes_on(carry: tuple[jax.Array, State, Drawn]) -> jax.Array:
        step, state, _ = carry
        live, _, full = _numbers(state, context)
        if in_step:
            live, full = jax.lax.pmax((live, full), axes)
        return (step < steps) & (live > leave_at) & (full == 0)

    def one_step(carry: tuple[jax.Array, State, Drawn]) -> tuple[jax.Array, State, Drawn]:
        step, state, so_far = carry
        rows, row = context.rows, jnp.maximum(state.row, 0)
        live = state.row >= 0
        out = sample(qwen3.unembed(model, state.hidden), rows.keys[row], state.position, config)
        stopped = live & (out.token[:, None] == stops).any(-1)
        ended = live & (stopped | (state.position + 1 >= rows.limit[row]))
        now = Drawn(state.row, state.position, out.token, out.logprob, out.policy_logprob, ended, stopped)
        so_far = Drawn(*(x.at[step].set(y) for x, y in zip(so_far, now, strict=True)))

        writing = Writing(live, state.position, rows.prompt[row])
        hidden, cache = caches.advance(model, out.token, writing, ended, context.prompts, state.cache, tile, reader)

        following = state.entered + jnp.cumsum(ended) - 1
        enters = ended & (following < rows.number)
        row = jnp.where(enters, following, jnp.where(ended, -1, state.row))
        return (
            step + 1,
            State(
                row=row,
                position=jnp.where(live & ~ended, state.position + 1, 0),
                hidden=jnp.where(enters[:, None], context.last[rows.prompt[jnp.maximum(row, 0)]], hidden),
                entered=state.entered + enters.sum(dtype=jnp.int32),
                cache=cache,
            ),
            so_far,
        )

    def blank(value: int | bool, dtype: jax.typing.DTypeLike) -> jax.Array:
        return jnp.full((steps, slots), value, dtype)

    numbers = [blank(0, jnp.float32)] * 2
    nothing = Drawn(blank(-1, jnp.int32), *[blank(0, jnp.int32)] * 2, *numbers, *[blank(False, bool)] * 2)
    done, state, drawn = jax.lax.while_loop(goes_on, one_step, (jnp.int32(0), state, nothing))
    return state, _look(done, state, drawn, context, axes)


def _look(done: jax.Array, state: State, drawn: Drawn, context: Context, axes: tuple[str, ...]) -> Look:
    numbers, slot_steps = _numbers(state, context), done * state.row.shape[0]
    if axes:
        drawn = jax.tree.map(lambda x: jax.lax.all_gather(x, axes, axis=1, tiled=True), drawn)
        numbers = jax.lax.pmax(numbers, axes)
        slot_steps = jax.lax.psum(slot_steps, axes)
    return Look(drawn, *numbers, slot_steps)


def _numbers(state: State, context: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows in slots, rows still waiting, and whether the cache is full."""
    rows, live = context.rows, state.row >= 0
    writing = Writing(live, state.position, rows.prompt[jnp.maximum(state.row, 0)])
    return live.sum(), (rows.number - state.entered)[0], caches.full(state.cache, context.prompts, writing)
