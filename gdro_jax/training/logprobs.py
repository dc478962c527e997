"""Log-probs of responses as the trainer makes them: every prompt once, then all its responses over it.

Letters: P prompts, R rows, L prompt tokens, T response tokens, D width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gdro_jax.losses import linear_logprob, linear_loss
from gdro_jax.models import qwen3

Array = jax.Array | np.ndarray


def response_hidden(
    model: qwen3.Qwen3, prompts: Array, prompt_mask: Array, prompt_index: Array, tokens: Array, mask: Array
) -> jax.Array:
    """Final hidden states [R, T, D]; position t predicts response token t.

    Every prompt is run once, whatever the number of its rows (`prefill`, then `extend` over whole responses).
    """
    prompt_index, tokens, mask = jnp.asarray(prompt_index), jnp.asarray(tokens), jnp.asarray(mask)
    kv, last = qwen3.prefill(model, jnp.asarray(prompts), jnp.asarray(prompt_mask))
    hidden = last[prompt_index][:, None]
    if tokens.shape[1] > 1:
        later = qwen3.extend(model, tokens[:, :-1], mask[:, :-1], kv, prompt_index)
        hidden = jnp.concatenate([hidden, later], axis=1)
    return hidden


def response_logprobs(
    model: qwen3.Qwen3,
    prompts: Array,
    prompt_mask: Array,
    prompt_index: Array,
    tokens: Array,
    mask: Array,
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy, float32[R, T] each, of every response token given what came before it."""
    hidden = response_hidden(model, prompts, prompt_mask, prompt_index, tokens, mask)
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), jnp.asarray(tokens).reshape(-1)
    weight = qwen3.unembed_weight(model)
    logprobs, entropy = linear_logprob.token_logprobs_and_entropy(flat, weight, targets, temperature)
    return logprobs.reshape(tokens.shape), entropy.reshape(tokens.shape)


def active_logprobs(
    model: qwen3.Qwen3,
    prompts: Array,
    prompt_mask: Array,
    prompt_index: Array,
    tokens: Array,
    mask: Array,
    active: jax.Array,
    temperature: float,
) -> jax.Array:
    """Log-probs float32[R, T] of the active tokens, which alone the head is run for; 0 elsewhere, and no gradient."""
    model = jax.lax.stop_gradient(model)
    hidden = response_hidden(model, prompts, prompt_mask, prompt_index, tokens, mask)
    flat = hidden.reshape(-1, hidden.shape[-1])
    return head_logprobs(model, flat, jnp.ravel(tokens), active.reshape(-1), temperature).reshape(tokens.shape)


def head_logprobs(
    model: qwen3.Qwen3, hidden: jax.Array, targets: jax.Array, active: jax.Array, temperature: float
) -> jax.Array:
    """Log-probs float32[N] of the active targets from final hidden states [N, D]; 0 elsewhere, and no gradient."""
    hidden, weight = jax.lax.stop_gradient((hidden, qwen3.unembed_weight(model)))
    return linear_loss.token_loss(lambda x: x, hidden, weight, targets, active, (), temperature).logprobs
