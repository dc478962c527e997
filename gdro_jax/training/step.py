"""The GRPO step: one compiled program from a step's rollouts to new parameters.

Advantages over uneven groups (Eq. 3), weighted per prompt (Eq. 16), clipped surrogate with KL to a frozen reference
(Eq. 5 to 7) over minibatches, AdamW behind a clip of the gradient's norm. "Eq." is of arXiv 2601.19280.
Letters: P prompts, R rows, T response tokens, L prompt tokens, M minibatches, A microbatches, Q prompts of a piece.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdro_jax.losses import grpo, linear_logprob
from gdro_jax.losses.reduction import LossSums, finish, finish_grad
from gdro_jax.models import lora, qwen3
from gdro_jax.training.batching import Pieces
from gdro_jax.training.config import TrainConfig

Array = jax.Array | np.ndarray


class Batch(NamedTuple):
    """A step's rollouts.

    Attributes:
      prompts: int32[P, L], prompt_mask bool[P, L].
      weights: float32[P], what each prompt's advantages are multiplied by.
      prompt_index: int32[R].
      tokens: int32[R, T], mask bool[R, T], logprobs float32[R, T] of the distribution sampled from.
      rewards: float32[R], scorable bool[R]; an unscorable row carries no weight anywhere.
      pieces: the cut into M * A pieces of R / (M A) rows.
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
    pieces: Pieces


class Learner(NamedTuple):
    """What the optimiser changes: the policy, or adapters on a frozen one, and the optimiser's own state."""

    model: qwen3.Qwen3 | lora.Adapters
    opt_state: Any


class StepResult(NamedTuple):
    """Signal float32[P] is Eq. 7 without the adversary's weights, NaN for a prompt without a scorable row."""

    learner: Learner
    signal: jax.Array
    metrics: dict[str, jax.Array]


def make_optimiser(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with a linear warm-up to a constant rate, behind a clip of the gradient's global norm."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate(config), config.adam_b1, config.adam_b2, config.adam_eps, weight_decay=config.weight_decay
        ),
    )


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Update number (from 0) to learning rate."""
    if config.warmup_steps == 0:
        return optax.constant_schedule(config.learning_rate)
    return lambda count: config.learning_rate * jnp.minimum(1.0, (count + 1) / config.warmup_steps)


def response_logprobs(
    model: qwen3.Qwen3,
    prompts: Array,
    prompt_mask: Array,
    prompt_index: Array,
    tokens: Array,
    mask: Array,
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy, float32[R, T] each, of every response token given what came before it.

    Every prompt is run once, whatever the number of its rows (`prefill`, then `extend` over whole responses).
    """
    prompt_index, tokens, mask = jnp.asarray(prompt_index), jnp.asarray(tokens), jnp.asarray(mask)
    kv, last = qwen3.prefill(model, jnp.asarray(prompts), jnp.asarray(prompt_mask))
    hidden = last[prompt_index][:, None]
    if tokens.shape[1] > 1:
        later = qwen3.extend(model, tokens[:, :-1], mask[:, :-1], kv, prompt_index)
        hidden = jnp.concatenate([hidden, later], axis=1)
    flat = hidden.reshape(-1, hidden.shape[-1])
    weight = qwen3.unembed_weight(model)
    logprobs, entropy = linear_logprob.token_logprobs_and_entropy(flat, weight, tokens.reshape(-1), temperature)
    return logprobs.reshape(tokens.shape), entropy.reshape(tokens.shape)


def update(
    learner: Learner, reference: qwen3.Qwen3 | None, batch: Batch, config: TrainConfig, temperature: float
) -> StepResult:
    """One GRPO step. Jit it with `config` and `temperature` static.

    Args:
      learner: policy and optimiser state.
      reference: the frozen policy, of the KL term and under adapters; None where there is neither.
      batch: the step's rollouts.
      config: of the step.
      temperature: that the rollouts were sampled at.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    sums_of = functools.partial(_piece_sums, reference, batch, _rows(batch, config), config, temperature)
    shape = (config.minibatches, config.microbatches)
    pieces = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), batch.pieces)
    optimiser = make_optimiser(config)

    def minibatch(learner: Learner, piece: Pieces) -> tuple[Learner, tuple[Any, ...]]:
        sums, plain, gap, grad = _accumulate(sums_of, learner.model, piece)
        grad = jax.tree.map(lambda g, p: g.astype(p.dtype), finish_grad(grad, sums), learner.model)
        updates, opt_state = optimiser.update(grad, learner.opt_state, learner.model)
        model = optax.apply_updates(learner.model, updates)
        out = finish(sums)
        metrics = out.metrics | {"loss": out.loss, "grad_norm": optax.global_norm(grad)}
        return Learner(model, opt_state), (plain, gap, metrics)

    learner, (plain, gap, metrics) = jax.lax.scan(minibatch, learner, pieces)
    stats = grpo.group_stats(batch.rewards, batch.prompt_index, batch.prompts.shape[0], batch.scorable)
    scored = jnp.maximum((stats.num_rollouts > 0).sum(), 1)
    summary = {name: value.mean() for name, value in metrics.items()}
    summary["all_equal_groups"] = (stats.all_equal & (stats.num_rollouts > 0)).sum() / scored
    summary["logprob_gap"] = gap[0].max()
    return StepResult(learner, _per_prompt(batch, plain), summary)


def surrogate_signal(
    model: qwen3.Qwen3 | lora.Adapters,
    reference: qwen3.Qwen3 | None,
    batch: Batch,
    config: TrainConfig,
    temperature: float,
) -> jax.Array:
    """`StepResult.signal` of a learner's model that is not changed, for weights that come from the step's own batch."""
    batch = jax.tree.map(jnp.asarray, batch)
    sums_of = functools.partial(_piece_sums, reference, batch, _rows(batch, config), config, temperature)
    return _per_prompt(batch, jax.lax.map(lambda piece: sums_of(model, piece)[1], batch.pieces))


def policy(trained: qwen3.Qwen3 | lora.Adapters, frozen: qwen3.Qwen3 | None) -> qwen3.Qwen3:
    """The policy that a learner's model stands for: itself, or the frozen one with these adapters on it."""
    if not isinstance(trained, lora.Adapters):
        return trained
    assert frozen is not None
    return qwen3.adapted(frozen, trained)


def _rows(batch: Batch, config: TrainConfig) -> dict[str, Array]:
    """What the loss needs of each row, [R, ...]; made for the whole step, so that no cut of it matters."""
    num_prompts = batch.prompts.shape[0]
    chex.assert_equal_shape([batch.tokens, batch.mask, batch.logprobs])
    chex.assert_equal_shape([batch.rewards, batch.scorable, batch.prompt_index])
    chex.assert_shape(batch.weights, (num_prompts,))
    advantages = grpo.group_advantages(
        batch.rewards,
        batch.prompt_index,
        num_prompts,
        scale=config.advantage_scale,
        clip=config.advantage_clip,
        baseline=config.advantage_baseline,
        valid=batch.scorable,
    )
    weights = grpo.row_weights(batch.prompt_index, num_prompts, weighting=config.row_weighting, valid=batch.scorable)
    return {
        "tokens": batch.tokens,
        "mask": batch.mask,
        "old": batch.logprobs,
        "unweighted": advantages,
        "advantages": advantages * batch.weights[batch.prompt_index],
        "row_weights": weights * config.minibatches,  # the mean over minibatches is the step's loss
    }


def _per_prompt(batch: Batch, per_row: jax.Array) -> jax.Array:
    """Eq. 7, float32[P], from the losses of the pieces' rows in the order of `batch.pieces.rows`."""
    in_order = jnp.zeros(batch.rewards.shape).at[batch.pieces.rows.reshape(-1)].set(per_row.reshape(-1))
    return grpo.prompt_surrogate(in_order, batch.prompt_index, batch.prompts.shape[0], batch.scorable)


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
    logprobs, entropy = response_logprobs(model, *prompts, part["tokens"], part["mask"], temperature)
    ref = None
    if reference is not None and config.kl_coef > 0:
        ref, _ = response_logprobs(reference, *prompts, part["tokens"], part["mask"], temperature)
    sums_with = functools.partial(
        grpo.loss_sums,
        logprobs,
        part["old"],
        mask=part["mask"],
        ref_logprobs=ref,
        row_weights=part["row_weights"],
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        kl_coef=config.kl_coef,
        kl_estimator=config.kl_estimator,
        dual_clip=config.dual_clip,
    )
    weighted = sums_with(advantages=part["advantages"], aggregate=config.aggregate, token_metrics={"entropy": entropy})
    plain = jax.lax.stop_gradient(sums_with(advantages=part["unweighted"], aggregate="sequence").per_row)  # Eq. 6
    gap = jnp.max(jnp.where(part["mask"], jnp.abs(jax.lax.stop_gradient(logprobs) - part["old"]), 0.0))
    return weighted, plain, gap


def _accumulate(sums_of: Any, model: Any, pieces: Pieces) -> tuple[LossSums, jax.Array, jax.Array, Any]:
    """Sums, plain row losses [A, rows], largest gap and gradient of the sum over a minibatch's A microbatches."""

    def one(piece: Pieces) -> tuple[Any, Any]:
        def objective(model: Any) -> tuple[jax.Array, Any]:
            sums, plain, gap = sums_of(model, piece)
            return sums.loss, (sums._replace(per_row=jnp.zeros(())), plain, gap)

        (_, aux), grad = jax.value_and_grad(objective, has_aux=True)(model)
        return aux, jax.tree.map(lambda g: g.astype(jnp.float32), grad)  # summed so, whatever the parameters are

    first, rest = jax.tree.map(lambda x: x[0], pieces), jax.tree.map(lambda x: x[1:], pieces)
    (sums, plain, gap), grad = one(first)
    if pieces.rows.shape[0] == 1:
        return sums, plain[None], gap, grad

    def add(carry: tuple[Any, Any], piece: Pieces) -> tuple[tuple[Any, Any], tuple[jax.Array, jax.Array]]:
        (sums, plain, gap), grad = one(piece)
        return jax.tree.map(jnp.add, carry, (sums, grad)), (plain, gap)

    (sums, grad), (more, gaps) = jax.lax.scan(add, (sums, grad), rest)
    return sums, jnp.concatenate([plain[None], more]), jnp.maximum(gap, gaps.max()), grad
