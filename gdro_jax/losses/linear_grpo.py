"""The GRPO loss straight from hidden states and head weights: loss, gradient and metrics in one pass over tokens."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gdro_jax.losses import grpo
from gdro_jax.losses.linear_logprob import token_logprobs_and_entropy
from gdro_jax.losses.linear_loss import token_loss
from gdro_jax.losses.reduction import LossSums
from gdro_jax.losses.surrogate import Options, token_terms


class Linear(NamedTuple):
    """`sums`, and float32[R, T] constants: log-probs of the tokens and entropies in nats, 0 where not in the loss."""

    sums: LossSums
    logprobs: Array
    entropy: Array


class Places(NamedTuple):
    """Where the tokens of [R, T] stand in a stream of S without padding.

    `source` int32[S] is a token's position in [R * T], R * T where the stream is empty; `place` int32[R, T] is its
    position in the stream, S where it is not in it. Every token that counts must be.
    """

    source: Array
    place: Array

    def take(self, x: Array) -> Array:
        """[R, T] as the stream, 0 where that is empty."""
        return jnp.reshape(x, -1).at[self.source].get(mode="fill", fill_value=0)

    def put(self, x: Array) -> Array:
        """The stream as [R, T], 0 where a token is not in it."""
        return x.at[self.place].get(mode="fill", fill_value=0)


def loss_sums(
    hidden: ArrayLike,
    weight: ArrayLike,
    targets: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    ref_logprobs: ArrayLike | None,
    row_weights: ArrayLike,
    temperature: float = 1.0,
    options: Options | None = None,
    *,
    aggregate: str = "sequence",
    ratio_level: str = "token",
    constant: float | None = None,
    sampler_logprobs: ArrayLike | None = None,
    chunk: int | None = None,
    places: Places | None = None,
) -> Linear:
    """`grpo.loss_sums` of the log-probs of `targets` under softmax(hidden @ weight.T / temperature).

    Differentiable in `hidden` float[R, T, D] and `weight` float[V, D] through `sums.loss` alone. With a ratio per token
    the head costs three matrix products and nothing for what is masked (`linear_loss`); with one per response a token's
    slope waits for the whole response, and it costs four (`linear_logprob`). The mean entropy is among the metrics.

    Args: as of `grpo.loss_sums` and `linear_loss.token_loss`; int[R, T] `targets`. `old_logprobs` None: the policy's
      own, that is a ratio of 1 (on-policy: one update per batch of rollouts). With `places`, `hidden` is the stream's,
      [S, D].
    Raises: as `grpo.loss_sums`.
    """
    options = Options() if options is None else options
    grpo.check(options, aggregate, ratio_level, constant, ref_logprobs, sampler_logprobs)
    shape = jnp.shape(targets)
    row_weight = jax.lax.stop_gradient(jnp.asarray(row_weights, jnp.float32))
    active = jnp.asarray(mask, bool) & (row_weight != 0)[:, None]
    hidden, targets = jnp.asarray(hidden), jnp.asarray(targets)
    flat = hidden.reshape(-1, hidden.shape[-1])

    def take(x: Array) -> Array:
        return x.reshape(-1) if places is None else places.take(x)

    def put(x: Array) -> Array:
        return x.reshape(shape) if places is None else places.put(x)

    head = (flat, weight, take(targets))

    def sums_of(logprobs: Array, old: ArrayLike, entropy: Array) -> LossSums:
        return grpo.loss_sums(
            logprobs,
            old,
            advantages,
            mask,
            ref_logprobs,
            row_weights,
            aggregate=aggregate,
            ratio_level=ratio_level,
            constant=constant,
            sampler_logprobs=sampler_logprobs,
            token_metrics={"entropy": jax.lax.stop_gradient(entropy)},
            **options._asdict(),
        )

    if ratio_level == "sequence":
        pair = token_logprobs_and_entropy(*head, temperature, chunk=chunk)
        logp, entropy = (jnp.where(active, put(x), 0.0) for x in pair)
        old = jax.lax.stop_gradient(logp) if old_logprobs is None else old_logprobs
        return Linear(sums_of(logp, old, entropy), *jax.lax.stop_gradient((logp, entropy)))
    length = active.sum(-1, dtype=jnp.float32)
    scale = row_weight / grpo.divisor_of(aggregate, length, shape[1], constant)
    columns = {
        "scale": jnp.broadcast_to(scale[:, None], shape),
        "advantage": jnp.broadcast_to(jnp.asarray(advantages, jnp.float32)[:, None], shape),
        "old": old_logprobs,
        "ref": ref_logprobs,
        "sampler": sampler_logprobs,
    }
    given = {name: take(jnp.asarray(x, jnp.float32)) for name, x in columns.items() if x is not None}
    loss_fn = partial(_scaled_token_loss, options, tuple(given))
    out = token_loss(loss_fn, *head, take(active), tuple(given.values()), temperature, chunk=chunk)
    logp, entropy = put(out.logprobs), put(out.entropy)
    sums = sums_of(logp, logp if old_logprobs is None else old_logprobs, entropy)
    return Linear(sums._replace(loss=out.loss), logp, entropy)


def _scaled_token_loss(options: Options, names: tuple[str, ...], logprobs: Array, *columns: Array) -> Array:
    given = dict(zip(names, columns, strict=True))
    old = given.get("old", jax.lax.stop_gradient(logprobs))
    terms = token_terms(
        options, logprobs, logprobs - old, old, given["advantage"], given.get("ref"), given.get("sampler")
    )
    return given["scale"] * terms[0]
