"""A minibatch of the step on the streams of `packing`: prompts, then its pieces, then the prompts' gradient.

All prompts of the minibatch are run before its pieces and their keys and values kept, so that a prompt is shared
whatever pieces its rows are in. The gradient with respect to those is added up over the pieces and goes through the
prompts after them, which are run a second time for it: no more activations are held than one piece has. Prompts go in
streams, too, and from there to a place of L tokens each, where responses find them.
Letters: S shards, n rows of the minibatch on each, Q prompts, N tokens and K rows of a piece, L, T and D as in `step`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gdro_jax.losses.linear_grpo import Places
from gdro_jax.losses.reduction import LossSums
from gdro_jax.models import qwen3, ragged
from gdro_jax.models.sharding import over_heads
from gdro_jax.training import packing, piece
from gdro_jax.training.config import TrainConfig
from gdro_jax.training.logprobs import head_logprobs
from gdro_jax.training.mesh import Layout
from gdro_jax.training.packing import Packed, Shapes, Sizes

Floats = tuple[
    jax.Array, jax.Array, jax.Array
]  # prompts' keys and values [S, layers, Q, L, ...], last states [S, Q, D]
Sums = tuple[LossSums, jax.Array, jax.Array]  # see `piece.sums`; rows' losses are [S, K] here


class Step(NamedTuple):
    """What all pieces of a step read; `batch` is a `step.Batch`, `rows` of `piece.of_rows`."""

    reference: qwen3.Qwen3 | None
    batch: Any
    rows: piece.Rows
    config: TrainConfig
    temperature: float
    layout: Layout

    def sizes(self, cut: Packed) -> Shapes:
        return self._sizes(cut)[0]

    def prompt_sizes(self, cut: Packed) -> Shapes:
        return self._sizes(cut)[1]

    def _sizes(self, cut: Packed) -> tuple[Shapes, Shapes]:
        longest, prompt = self.batch.tokens.shape[1], self.batch.prompts.shape[1]
        return packing.step_sizes(self.config, cut.rows.shape[-1], cut.prompts.shape[-1], longest, prompt)


class _Window(NamedTuple):
    """A piece: places int32[S, K] of its rows, or prompts, in the minibatch, which are there bool[S, K], and its steps
    int32[X, 2] of `ragged.key_tiles`."""

    place: jax.Array
    live: jax.Array
    steps: jax.Array

    @classmethod
    def of(cls, streams: packing.Streams, number: jax.Array, shape: Sizes, held: int) -> "_Window":
        pieces = jnp.asarray(streams.pieces)
        place = pieces[:, number, None] + jnp.arange(shape.rows, dtype=jnp.int32)
        live = place < pieces[:, number + 1, None]
        return cls(jnp.minimum(place, held - 1), live, jnp.asarray(streams.steps)[number, : shape.blocks])

    def take(self, x: Any) -> jax.Array:
        return jnp.take_along_axis(jnp.asarray(x), self.place, axis=1)


def _each(shapes: Shapes, of: packing.Streams, add: Callable[[Sizes, jax.Array, Any], Any], start: Any) -> Any:
    """`add(shape, number, carry)` of every piece in turn: a loop a shape, for a branch would copy what is carried."""
    begin, carry = jnp.int32(0), start
    for kind, shape in enumerate(shapes):
        end = jnp.asarray(of.ends)[kind]
        carry = jax.lax.fori_loop(begin, end, functools.partial(add, shape), carry)
        begin = end
    return carry


def accumulate(
    step: Step, trained: piece.Trained, cut: Packed, keep: Callable[[Any], Any] = lambda grad: grad
) -> tuple[LossSums, jax.Array, jax.Array, Any]:
    """Sums, rows' losses [S, n] in the order of `cut.rows`, largest gap, and gradient of one minibatch's loss sum."""
    run = functools.partial(_piece, step, cut, _kept(step, step.reference, cut))
    floats = _prompts(step, piece.policy(trained, step.reference), cut)

    def gradient(shape: Sizes, number: jax.Array) -> tuple[Sums, tuple[Any, Floats]]:
        def objective(trained: Any, floats: Floats) -> tuple[jax.Array, Sums]:
            out = run(trained, floats, shape, number)
            return out[0].loss, out

        (_, out), grads = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(trained, floats)
        own, shared = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return out, (keep(own), shared)

    def add(shape: Sizes, number: jax.Array, carry: tuple) -> tuple:
        def with_gradient(carry: tuple) -> tuple:
            out, grads = gradient(shape, number)
            return _added(cut, carry[0], out, number), jax.tree.map(jnp.add, carry[1], grads)

        def without(carry: tuple) -> tuple:
            return _added(cut, carry[0], run(trained, floats, shape, number), number), carry[1]

        if step.config.kl_coef > 0:
            return with_gradient(carry)
        return jax.lax.cond(_has_gradient(step, cut, number), with_gradient, without, carry)

    shapes = step.sizes(cut)
    first = functools.partial(gradient, shapes[0])
    start = _zeros(cut, shapes[0].rows, *jax.eval_shape(first, jnp.int32(0)))
    (sums, plain, gap), (own, shared) = _each(shapes, cut.of_rows, add, start)
    grad = _prompts_gradient(step, trained, cut, shared, own, keep)
    return sums, plain[:, : cut.rows.shape[1]], gap, grad


def losses(step: Step, trained: piece.Trained, cut: Packed) -> jax.Array:
    """The rows' losses of `accumulate` alone."""
    run = functools.partial(_piece, step, cut, _kept(step, step.reference, cut))
    floats = _prompts(step, piece.policy(trained, step.reference), cut)
    one, shapes = functools.partial(run, trained, floats), step.sizes(cut)
    first = functools.partial(one, shapes[0])
    start, _ = _zeros(cut, shapes[0].rows, jax.eval_shape(first, jnp.int32(0)), None)

    def add(shape: Sizes, number: jax.Array, carry: Sums) -> Sums:
        return _added(cut, carry, one(shape, number), number)

    out = _each(shapes, cut.of_rows, add, start)
    return out[1][:, : cut.rows.shape[1]]


def logprobs(step: Step, model: qwen3.Qwen3, cut: Packed) -> jax.Array:
    """Log-probs float32[S, n, T] of a minibatch's rows, in the order of `cut.rows`; 0 where they do not matter."""
    shapes, floats = step.sizes(cut), _prompts(step, model, cut)

    def add(shape: Sizes, number: jax.Array, found: jax.Array) -> jax.Array:
        window = _Window.of(cut.of_rows, number, shape, cut.rows.shape[1])

        def shard(given: tuple) -> jax.Array:
            rows, of, places = _stream(step, shape, *given[:3])
            hidden = _hidden(model, _prompt_kv(step, *given[3:]), given[-1][2], rows, of, window.steps, shape)
            return _head(step, model, hidden, rows, places)

        new = step.layout.over_shards(
            shard, (window.take(cut.rows), window.take(cut.local_index), window.live, cut.prompts, floats)
        )
        return _put(found, new, cut.of_rows.pieces[:, number])

    shards, rows = cut.rows.shape
    start = jnp.zeros((shards, rows + shapes[0].rows, step.batch.tokens.shape[1]), jnp.float32)
    return _each(shapes, cut.of_rows, add, start)[:, :rows]


def _piece(
    step: Step,
    cut: Packed,
    ref_floats: Floats | None,
    trained: piece.Trained,
    floats: Floats,
    shape: Sizes,
    number: jax.Array,
) -> Sums:
    """A piece's sums; `per_row` of them is not used."""
    window = _Window.of(cut.of_rows, number, shape, cut.rows.shape[1])

    def shard(given: tuple) -> Sums:
        rows, of, places = _stream(step, shape, *given[:3])
        *_, prompts, floats, ref_floats = given
        model, ref = piece.policy(trained, step.reference), None
        if ref_floats is not None:
            assert step.reference is not None
            kv = _prompt_kv(step, prompts, ref_floats)
            hidden = _hidden(step.reference, kv, ref_floats[2], rows, of, window.steps, shape)
            ref = _head(step, step.reference, hidden, rows, places)
        hidden = _hidden(model, _prompt_kv(step, prompts, floats), floats[2], rows, of, window.steps, shape)
        return piece.sums(model, hidden, ref, rows, step.config, step.temperature, places)

    given = (window.take(cut.rows), window.take(cut.local_index), window.live, cut.prompts, floats, ref_floats)
    sums, plain, gap = step.layout.over_shards(shard, given)
    added = jax.tree.map(lambda x: x.sum(0), sums._replace(per_row=jnp.zeros_like(plain[:, 0])))
    return added, plain, gap.max()


def _stream(
    step: Step, shape: Sizes, ids: jax.Array, prompts: jax.Array, live: jax.Array
) -> tuple[piece.Rows, ragged.Stream, Places]:
    """A shard's rows of a piece, their inputs end to end, and where the predicted tokens are: first ones in front."""
    rows: piece.Rows = {name: jnp.asarray(value)[ids] for name, value in step.rows.items()}
    rows["mask"] = rows["mask"] & live[:, None]
    rows["row_weights"] = jnp.where(live, rows["row_weights"], 0.0)
    length = piece.active(rows).sum(1, dtype=jnp.int32)
    of = ragged.stream(jnp.maximum(length - 1, 0), prompts, shape.tokens)
    count, longest = rows["tokens"].shape
    nowhere, steps = count * longest, jnp.arange(longest)
    heads = jnp.where(length > 0, jnp.arange(count) * longest, nowhere)
    later = jnp.where(of.real, of.row * longest + of.step + 1, nowhere)
    place = jnp.where(steps == 0, jnp.arange(count)[:, None], count + of.start[:, None] + steps - 1)
    place = jnp.where(steps < length[:, None], place, count + shape.tokens)
    return rows, of, Places(jnp.concatenate([heads, later]), place)


def _hidden(
    model: qwen3.Qwen3,
    kv: qwen3.PromptKV,
    last: jax.Array,
    rows: piece.Rows,
    of: ragged.Stream,
    steps: jax.Array,
    shape: Sizes,
) -> jax.Array:
    """Final hidden states [K + N, D] in the order of `_stream`; NaN where the rows are more than the stream holds."""
    tokens = jnp.asarray(rows["tokens"])[of.row, of.step]
    later = ragged.extend(model, tokens, kv, of, steps, shape.tiling)
    hidden = jnp.concatenate([last[of.prompt_index], later])
    return jnp.where(of.length.sum() <= shape.tokens, hidden, jnp.nan)


def _head(step: Step, model: qwen3.Qwen3, hidden: jax.Array, rows: piece.Rows, places: Places) -> jax.Array:
    targets, active = places.take(jnp.asarray(rows["tokens"])), places.take(piece.active(rows))
    return places.put(head_logprobs(model, hidden, targets, active, step.temperature))


def _has_gradient(step: Step, cut: Packed, number: jax.Array) -> jax.Array:
    """Whether any advantage of the piece is not 0, without a KL term what a gradient comes from."""
    place = jnp.arange(cut.rows.shape[1])
    inside = (place >= cut.of_rows.pieces[:, number, None]) & (place < cut.of_rows.pieces[:, number + 1, None])
    return (_moving(step)[cut.rows] & inside).any()


def _moving(step: Step) -> jax.Array:
    return jnp.asarray((step.rows["advantages"] != 0) & (step.rows["row_weights"] != 0))


def _added(cut: Packed, carry: Sums, out: Sums, number: jax.Array) -> Sums:
    """Rows past a piece's last are written over by the piece after it."""
    plain = _put(carry[1], out[1], cut.of_rows.pieces[:, number])
    return jax.tree.map(jnp.add, carry[0], out[0]), plain, jnp.maximum(carry[2], out[2])


def _put(found: jax.Array, new: jax.Array, first: jax.Array) -> jax.Array:
    """`found` with `new` in place of as many of a shard's rows, from `first` int32[S] on."""
    return jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0))(found, new, first)


def _zeros(cut: Packed, rows: int, out: Any, grads: Any) -> tuple[Sums, Any]:
    sums, grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (out[0], grads))
    return (sums, jnp.zeros((cut.rows.shape[0], cut.rows.shape[1] + rows), jnp.float32), jnp.float32(0)), grads


# Prompts -----------------------------------------------------------------------------------------------------------
def _kept(step: Step, reference: qwen3.Qwen3 | None, cut: Packed) -> Floats | None:
    if reference is None or not piece.needs_reference(reference, step.config):
        return None
    return _prompts(step, reference, cut)


def _prompts(step: Step, model: qwen3.Qwen3, cut: Packed) -> Floats:
    """Keys, values and last states of the minibatch's prompts; 0 behind a prompt's tokens."""
    held = cut.prompts.shape[1]

    def add(shape: Sizes, number: jax.Array, floats: Floats) -> Floats:
        window, chosen = _prompt_window(cut, number, shape)

        def shard(given: tuple) -> Floats:
            (k, v, last), new, chosen = given
            tokens, prompts = _prompt_places(step, shape, held, *chosen)
            k, v = (x.at[:, *tokens].set(y, mode="drop") for x, y in ((k, new[0]), (v, new[1])))
            return over_heads(k, 3), over_heads(v, 3), last.at[prompts].set(new[2], mode="drop")

        return step.layout.over_shards(shard, (floats, _prefill(step, model, window, chosen, shape), chosen))

    config, (shards, prompts), longest = model.config, cut.prompts.shape, step.batch.prompts.shape[1]
    dtype = qwen3.embed_tokens(model, jnp.zeros(1, jnp.int32)).dtype
    state = jnp.zeros((shards, config.num_layers, prompts, longest, config.num_kv_heads, config.head_dim), dtype)
    last = jnp.zeros((shards, prompts, config.hidden_size), dtype)
    return _each(step.prompt_sizes(cut), cut.of_prompts, add, (state, state, last))


def _prompts_gradient(
    step: Step, trained: piece.Trained, cut: Packed, bars: Floats, grad: Any, keep: Callable[[Any], Any]
) -> Any:
    """`grad` and what comes to the parameters through the prompts' states."""
    moving, held = _moving_prompts(step, cut), cut.prompts.shape[1]

    def shard(shape: Sizes, given: tuple) -> Floats:
        (k, v, last), chosen = given
        tokens, prompts = _prompt_places(step, shape, held, *chosen)
        k, v = (x.at[:, *tokens].get(mode="fill", fill_value=0) for x in (k, v))
        return k, v, last.at[prompts].get(mode="fill", fill_value=0)

    def add(shape: Sizes, number: jax.Array, grad: Any) -> Any:
        window, chosen = _prompt_window(cut, number, shape)

        def with_gradient(grad: Any) -> Any:
            def states(trained: piece.Trained) -> Floats:
                return _prefill(step, piece.policy(trained, step.reference), window, chosen, shape)

            out, back = jax.vjp(states, trained)
            of_piece = step.layout.over_shards(functools.partial(shard, shape), (bars, chosen))
            (new,) = back(jax.tree.map(lambda bar, x: bar.astype(x.dtype), of_piece, out))
            return keep(jax.tree.map(lambda total, x: total + x.astype(jnp.float32), grad, new))

        return jax.lax.cond((window.take(moving) & window.live).any(), with_gradient, lambda grad: grad, grad)

    return _each(step.prompt_sizes(cut), cut.of_prompts, add, grad)


def _moving_prompts(step: Step, cut: Packed) -> jax.Array:
    """Which prompts a gradient comes to, bool[S, Q]."""
    if step.config.kl_coef > 0:
        return jnp.asarray(cut.prompt_used)
    rows = _moving(step)[cut.rows]
    shard = jnp.arange(len(cut.rows))[:, None]
    return jnp.zeros(cut.prompts.shape, bool).at[shard, cut.local_index].max(rows)


def _prompt_window(cut: Packed, number: jax.Array, shape: Sizes) -> tuple[_Window, tuple[jax.Array, ...]]:
    """A piece of prompts, and its ids, places and which are there: not what `cut.prompts` is filled up with."""
    window = _Window.of(cut.of_prompts, number, shape, cut.prompts.shape[1])
    window = window._replace(live=window.live & window.take(cut.prompt_used))
    return window, (window.take(cut.prompts), window.place, window.live)


def _prompt_stream(step: Step, shape: Sizes, ids: jax.Array, live: jax.Array) -> ragged.Stream:
    length = jnp.where(live, step.batch.prompt_mask[ids].sum(-1, dtype=jnp.int32), 0)
    return ragged.stream(length, jnp.zeros_like(ids), shape.tokens)


def _prompt_places(
    step: Step, shape: Sizes, held: int, ids: jax.Array, place: jax.Array, live: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Of a piece's stream, each token's prompt and step, and of its prompts, each one's place; Q where nothing is."""
    of = _prompt_stream(step, shape, ids, live)
    return (jnp.where(of.real, place[of.row], held), of.step), jnp.where(live, place, held)


def _prefill(step: Step, model: qwen3.Qwen3, window: _Window, chosen: tuple, shape: Sizes) -> Floats:
    """Of a piece of prompts, keys and values in the order of their stream, [S, layers, N, ...], last states [S, Q, D];
    NaN where they are more than the stream holds."""

    def shard(given: tuple) -> Floats:
        ids, _, live = given
        of = _prompt_stream(step, shape, ids, live)
        tokens = jnp.asarray(step.batch.prompts)[ids[of.row], of.step]
        k, v, last = ragged.prefill(model, tokens, of, window.steps, shape.tiling)
        return k, v, jnp.where(of.length.sum() <= shape.tokens, last, jnp.nan)

    return step.layout.over_shards(shard, chosen)


def _prompt_kv(step: Step, prompts: jax.Array, floats: Floats) -> qwen3.PromptKV:
    k, v, _ = floats
    mask = step.batch.prompt_mask[prompts]
    return qwen3.PromptKV(over_heads(k, 3), over_heads(v, 3), mask, mask.sum(-1, dtype=jnp.int32))
