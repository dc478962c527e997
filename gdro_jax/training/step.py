"""The GRPO step: one compiled program from a step's rollouts to new parameters.

Advantages over uneven groups (Eq. 3), weighted per prompt (Eq. 16), clipped surrogate with KL to a frozen reference
(Eq. 5 to 7) over minibatches, one update of the optimiser each. "Eq." is of arXiv 2601.19280.
Letters: P prompts, R rows, T response tokens, L prompt tokens, M minibatches, A microbatches, Q prompts of a piece.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdro_jax.losses import grpo
from gdro_jax.losses.reduction import LossSums, finish, finish_grad
from gdro_jax.models import lora, qwen3
from gdro_jax.training import packed
from gdro_jax.training.batching import Pieces
from gdro_jax.training.config import TrainConfig
from gdro_jax.training.logprobs import active_logprobs, response_hidden, response_logprobs
from gdro_jax.training.mesh import ONE_DEVICE, Layout
from gdro_jax.training.optimiser import make_optimiser
from gdro_jax.training.packing import Packed
from gdro_jax.training.piece import Rows, active, needs_reference, of_rows, policy, sums

__all__ = [
    "Batch",
    "Learner",
    "StepResult",
    "begin",
    "compiled_update",
    "policy",
    "response_logprobs",
    "surrogate_signal",
    "update",
]

Array = jax.Array | np.ndarray


class Batch(NamedTuple):
    """A step's rollouts.

    Attributes:
      prompts: int32[P, L], prompt_mask bool[P, L].
      weights: float32[P], what each prompt's advantages are multiplied by.
      prompt_index: int32[R].
      tokens: int32[R, T], mask bool[R, T], logprobs float32[R, T] of the distribution sampled from.
      rewards: float32[R], scorable bool[R]; an unscorable row carries no weight anywhere.
      pieces: the cut into M * A pieces of R / (M A) rows, or, with `train.attention_tile`, into streams.
    """

    prompts: Array
    prompt_mask: Array
    weights: Array
    prompt_index: Array
    tokens: Array
    mask: Array
    logprobs: Array
    rewards: Array
    scorable: Array
    pieces: Pieces | Packed


class Learner(NamedTuple):
    """What the optimiser changes: the policy, or adapters on a frozen one, and the optimiser's own state."""

    model: qwen3.Qwen3 | lora.Adapters
    opt_state: Any


class StepResult(NamedTuple):
    """What a step gives.

    Attributes:
      learner: after the step.
      signal: float32[P], Eq. 7 without the adversary's weights, NaN for a prompt without a scorable row.
      metrics: scalars; means over the minibatches that were applied and have scorable tokens. `logprob_gap` is the
        largest of the first minibatch, the only one before any update.
      applied: bool[M]; False where the loss or the gradient was not finite, and nothing was changed.
    """

    learner: Learner
    signal: jax.Array
    metrics: dict[str, jax.Array]
    applied: jax.Array


def update(
    learner: Learner,
    reference: qwen3.Qwen3 | None,
    batch: Batch,
    config: TrainConfig,
    temperature: float,
    layout: Layout = ONE_DEVICE,
) -> StepResult:
    """One GRPO step. Jit it with `config`, `temperature` and `layout` static.

    A minibatch whose loss or gradient is not finite changes neither parameters nor optimiser; the metric `skipped`
    counts them.

    Args:
      learner: policy and optimiser state.
      reference: the frozen policy, of the KL term and under adapters; None where there is neither.
      batch: the step's rollouts.
      config: of the step.
      temperature: that the rollouts were sampled at.
      layout: of a mesh; its `shards` times as many pieces are needed. The result does not depend on it.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    rows = of_rows(batch, config)
    whole = packed.Step(reference, batch, rows, config, temperature, layout)
    if config.importance_cap is not None and config.minibatches > 1:
        rows["old"] = _policy_logprobs(whole, policy(learner.model, reference))
    optimiser, architecture = make_optimiser(config), _architecture(learner.model, reference)
    keep = functools.partial(layout.keep, architecture)
    gradient: Callable[[Any, Any], tuple[LossSums, jax.Array, jax.Array, Any]]
    pieces: Any = batch.pieces
    if isinstance(pieces, Packed):
        gradient = functools.partial(packed.accumulate, whole, keep=keep)
    else:
        pieces = jax.tree.map(lambda x: x.reshape(config.minibatches, -1, *x.shape[1:]), _sharded(pieces, layout))
        sums_of = functools.partial(_shards_sums, reference, batch, rows, config, temperature, layout)
        gradient = functools.partial(_accumulate, sums_of, keep=keep)

    def minibatch(learner: Learner, cut: Any) -> tuple[Learner, tuple[Any, ...]]:
        sums, plain, gap, grad = gradient(learner.model, cut)
        grad = finish_grad(grad, sums)
        out, norm = finish(sums), optax.global_norm(grad)
        finite = jnp.isfinite(out.loss) & jnp.isfinite(norm)
        updates, opt_state = optimiser.update(grad, learner.opt_state, learner.model)
        changed = Learner(optax.apply_updates(learner.model, updates), opt_state)
        learner = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, learner)
        return keep(learner), (plain, gap, out.metrics | {"loss": out.loss, "grad_norm": norm}, finite, sums.tokens > 0)

    learner, (plain, gap, metrics, applied, some) = jax.lax.scan(minibatch, learner, pieces)
    stats = grpo.group_stats(batch.rewards, batch.prompt_index, batch.prompts.shape[0], batch.scorable)
    scored = jnp.maximum((stats.num_rollouts > 0).sum(), 1)
    counted = applied & some  # not one without scorable tokens, whose metrics would be 0
    counted |= ~counted.any()  # all, where there is none: then the metrics say what went wrong
    summary = {name: jnp.where(counted, value, 0.0).sum() / counted.sum() for name, value in metrics.items()}
    summary["all_equal_groups"] = (stats.all_equal & (stats.num_rollouts > 0)).sum() / scored
    summary["logprob_gap"] = gap[0].max()
    summary["skipped"] = (~applied).sum().astype(jnp.float32)
    learner = keep(learner)  # behind the loop once more: the next step must find it as this one did
    return StepResult(learner, _per_prompt(batch, plain), summary, applied)


def begin(
    trained: qwen3.Qwen3 | lora.Adapters, architecture: qwen3.Qwen3Config, config: TrainConfig, layout: Layout
) -> Learner:
    """The learner at the start of a run: optimiser states lie as the parameters do."""
    return _begun(layout.put(architecture, trained), architecture, config, layout)


@functools.partial(jax.jit, static_argnames=("architecture", "config", "layout"))
def _begun(
    trained: qwen3.Qwen3 | lora.Adapters, architecture: qwen3.Qwen3Config, config: TrainConfig, layout: Layout
) -> Learner:
    return layout.keep(architecture, Learner(trained, make_optimiser(config).init(trained)))


def compiled_update() -> jax.stages.Wrapped:
    """`update`, jitted as a run does it: it takes over the learner's memory."""
    return jax.jit(update, static_argnames=("config", "temperature", "layout"), donate_argnames="learner")


def surrogate_signal(
    model: qwen3.Qwen3 | lora.Adapters,
    reference: qwen3.Qwen3 | None,
    batch: Batch,
    config: TrainConfig,
    temperature: float,
    layout: Layout = ONE_DEVICE,
) -> jax.Array:
    """`StepResult.signal` of a learner's model that is not changed, for weights that come from the step's own batch."""
    batch = jax.tree.map(jnp.asarray, batch)
    config = dataclasses.replace(config, minibatches=1)  # no update comes between: the policy before is this one
    rows = of_rows(batch, config)
    if isinstance(batch.pieces, Packed):
        whole = packed.Step(reference, batch, rows, config, temperature, layout)
        return _per_prompt(batch, jax.lax.map(lambda cut: packed.losses(whole, model, cut), batch.pieces))
    sums_of = functools.partial(_shards_sums, reference, batch, rows, config, temperature, layout)
    return _per_prompt(batch, jax.lax.map(lambda pieces: sums_of(model, pieces)[1], _sharded(batch.pieces, layout)))


def _architecture(trained: qwen3.Qwen3 | lora.Adapters, frozen: qwen3.Qwen3 | None) -> qwen3.Qwen3Config:
    known = trained if isinstance(trained, qwen3.Qwen3) else frozen
    assert known is not None
    return known.config


def _per_prompt(batch: Batch, per_row: jax.Array) -> jax.Array:
    """Eq. 7, float32[P], from the losses of the pieces' rows in the order of `batch.pieces.rows`."""
    in_order = jnp.zeros(batch.rewards.shape).at[batch.pieces.rows.reshape(-1)].set(per_row.reshape(-1))
    return grpo.prompt_surrogate(in_order, batch.prompt_index, batch.prompts.shape[0], batch.scorable)


def _sharded(pieces: Pieces, layout: Layout) -> Pieces:
    """Pieces [C, ...] as [C / shards, shards, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, layout.shards, *x.shape[1:]), pieces)


def _shards_sums(
    reference: qwen3.Qwen3 | None,
    batch: Batch,
    rows: dict[str, Array],
    config: TrainConfig,
    temperature: float,
    layout: Layout,
    model: qwen3.Qwen3 | lora.Adapters,
    pieces: Pieces,
) -> tuple[LossSums, jax.Array, jax.Array]:
    """`_piece_sums` of the pieces that the shards work on at the same time, [shards, ...], put together."""
    one = functools.partial(_piece_sums, reference, batch, rows, config, temperature, model)
    sums, plain, gap = layout.over_shards(one, pieces)
    added = jax.tree.map(lambda x: x.sum(0), sums._replace(per_row=jnp.zeros_like(plain[:, 0])))
    return added, plain.reshape(-1), gap.max()


def _piece_sums(
    reference: qwen3.Qwen3 | None,
    batch: Batch,
    rows: dict[str, Array],
    config: TrainConfig,
    temperature: float,
    trained: qwen3.Qwen3 | lora.Adapters,
    piece: Pieces,
) -> tuple[LossSums, jax.Array, jax.Array]:
    """Loss sums of a piece, its rows' losses without the adversary's weights, and the sampler's log-prob gap."""
    model = policy(trained, reference)
    part = {name: value[piece.rows] for name, value in rows.items()}
    prompts = (batch.prompts[piece.prompts], batch.prompt_mask[piece.prompts], piece.local_index)
    ref = None
    if reference is not None and needs_reference(reference, config):
        ref = active_logprobs(reference, *prompts, part["tokens"], part["mask"], active(part), temperature)
    hidden = response_hidden(model, *prompts, part["tokens"], part["mask"])
    return sums(model, hidden, ref, part, config, temperature)


def _policy_logprobs(whole: packed.Step, model: qwen3.Qwen3) -> jax.Array:
    """Log-probs float32[R, T] of all rows before the step, 0 where they do not matter."""
    batch, layout = whole.batch, whole.layout

    def one(piece: Pieces) -> jax.Array:
        rows: Rows = {name: jnp.asarray(value)[piece.rows] for name, value in whole.rows.items()}
        prompts = (batch.prompts[piece.prompts], batch.prompt_mask[piece.prompts], piece.local_index)
        return active_logprobs(model, *prompts, rows["tokens"], rows["mask"], active(rows), whole.temperature)

    if isinstance(batch.pieces, Packed):
        found = jax.lax.map(functools.partial(packed.logprobs, whole, model), batch.pieces)
    else:
        found = jax.lax.map(lambda pieces: layout.over_shards(one, pieces), _sharded(batch.pieces, layout))
    flat = found.reshape(-1, found.shape[-1])
    return jnp.zeros_like(flat).at[jnp.asarray(batch.pieces.rows).reshape(-1)].set(flat)


def _accumulate(
    sums_of: Any, model: Any, pieces: Pieces, keep: Callable[[Any], Any] = lambda grad: grad
) -> tuple[LossSums, jax.Array, jax.Array, Any]:
    """Sums, plain row losses [A, rows], largest gap and gradient of the sum over a minibatch's A microbatches."""

    def one(piece: Pieces) -> tuple[Any, Any]:
        def objective(model: Any) -> tuple[jax.Array, Any]:
            sums, plain, gap = sums_of(model, piece)
            return sums.loss, (sums._replace(per_row=jnp.zeros(())), plain, gap)

        (_, aux), grad = jax.value_and_grad(objective, has_aux=True)(model)
        grad = jax.tree.map(lambda g: g.astype(jnp.float32), grad)  # summed so, whatever the parameters are
        return aux, keep(grad)

    first = jax.tree.map(lambda x: x[0], pieces)
    if pieces.rows.shape[0] == 1:
        (sums, plain, gap), grad = one(first)
        return sums, plain[None], gap, grad

    def add(carry: tuple[Any, Any], piece: Pieces) -> tuple[tuple[Any, Any], tuple[jax.Array, jax.Array]]:
        (sums, plain, gap), grad = one(piece)
        return jax.tree.map(jnp.add, carry, (sums, grad)), (plain, gap)

    (sums, _, _), grad = jax.eval_shape(one, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (sums, grad))
    (sums, grad), (plain, gaps) = jax.lax.scan(add, zeros, pieces)
    return sums, plain, gaps.max(), grad
