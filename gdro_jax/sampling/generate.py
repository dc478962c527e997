"""The compiled sampling loop: prefill once per prompt, then decode all rows token by token with a cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gdro_jax.models import qwen3
from gdro_jax.sampling.config import SamplingConfig
from gdro_jax.sampling.distribution import inverse_cdf, warp


class Rollouts(NamedTuple):
    """Responses of R rows.

    Attributes:
      tokens: int32[R, T], 0 past the end.
      mask: bool[R, T], true on the response's tokens, its stop token included.
      logprobs: float32[R, T], of the distribution sampled from (0 under greedy decoding); 0 past the end.
      finished: bool[R], whether a stop token came before the length limit.
    """

    tokens: jax.Array
    mask: jax.Array
    logprobs: jax.Array
    finished: jax.Array


def row_keys(key: jax.Array, prompt_ids: jax.Array, ranks: jax.Array) -> jax.Array:
    """One key per row from its prompt's identity and its rank among that prompt's rollouts, both int32[R]."""
    return jax.vmap(lambda i, r: jax.random.fold_in(jax.random.fold_in(key, i), r))(prompt_ids, ranks)


def generate(
    model: qwen3.Qwen3,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    prompt_index: jax.Array,
    keys: jax.Array,
    config: SamplingConfig,
) -> Rollouts:
    """Samples one response per row. Jit it with `config` static.

    Args:
      model: the policy.
      prompts: int32[P, L], padded on the right, with bool[P, L] `prompt_mask`.
      prompt_index: int32[R], the prompt of each row.
      keys: one random key per row (`row_keys`); position t uses fold_in(key, t).
      config: static.
    """
    kv, last = qwen3.prefill(model, prompts, prompt_mask)
    kv = qwen3.row_kv(kv, prompt_index)
    rows, length = prompt_index.shape[0], config.max_new_tokens
    stops = jnp.asarray(config.stop_tokens, jnp.int32)

    def emit(step: jax.Array, hidden: jax.Array, out: Rollouts) -> tuple[jax.Array, Rollouts]:
        token, logprob = _draw(qwen3.unembed(model, hidden), keys, step, config)
        live = ~out.finished
        token = jnp.where(live, token, 0)
        stopped = (token[:, None] == stops).any(-1)
        return token, Rollouts(
            tokens=out.tokens.at[:, step].set(token),
            mask=out.mask.at[:, step].set(live),
            logprobs=out.logprobs.at[:, step].set(jnp.where(live, logprob, 0.0)),
            finished=out.finished | stopped,
        )

    def body(carry: tuple) -> tuple:
        step, token, cache, out = carry
        hidden, cache = qwen3.decode(model, token, step - 1, kv, cache)
        token, out = emit(step, hidden, out)
        return step + 1, token, cache, out

    empty = Rollouts(
        jnp.zeros((rows, length), jnp.int32),
        jnp.zeros((rows, length), bool),
        jnp.zeros((rows, length), jnp.float32),
        jnp.zeros(rows, bool),
    )
    token, out = emit(jnp.int32(0), last[prompt_index], empty)
    carry = (jnp.int32(1), token, qwen3.empty_cache(model, rows, length), out)
    return jax.lax.while_loop(lambda c: (c[0] < length) & ~c[3].finished.all(), body, carry)[3]


def _draw(logits: jax.Array, keys: jax.Array, step: jax.Array, config: SamplingConfig) -> tuple[jax.Array, jax.Array]:
    """One token int32[R] and its log-probability float32[R] under the distribution sampled from."""
    if config.temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32), jnp.zeros(logits.shape[0], jnp.float32)
    logprobs = warp(logits, config)
    uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, step), dtype=jnp.float32))(keys)
    token = inverse_cdf(logprobs, uniform)
    return token, jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
