"""`prefill` with `extend` or `decode` is the same function, with the same gradient, as the full sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import BASE, CASES, make_model, make_tokens

from gdro_jax.models import decode, qwen3

PROMPTS, ROWS, L, T = 3, 7, 6, 5
PROMPT_INDEX = np.array([2, 0, 0, 1, 2, 2, 0], np.int32)
PROMPT_MASK = np.arange(L)[None] < np.array([[6], [1], [4]])
MASK = np.arange(T)[None] < np.array([[5], [5], [1], [3], [5], [2], [4]])
CONFIGS = ("attention_bias", "bias_untied_multi_head")


def batch(cfg: qwen3.Qwen3Config) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(make_tokens(cfg, (PROMPTS, L), 3)), jnp.asarray(make_tokens(cfg, (ROWS, T), 4))


def by_full(model: qwen3.Qwen3) -> jax.Array:
    """Logits [R, 1 + T, V] that predict response tokens 0..T, by whole sequences."""
    prompts, responses = batch(model.config)
    tokens = jnp.concatenate([prompts[PROMPT_INDEX], responses], 1)
    mask = jnp.concatenate([PROMPT_MASK[PROMPT_INDEX], MASK], 1)  # prompt padding stands in the middle
    logits = qwen3.logits(model, tokens, mask)
    last = PROMPT_MASK[PROMPT_INDEX].sum(-1) - 1
    return jnp.concatenate([logits[jnp.arange(ROWS), last][:, None], logits[:, L:]], 1)


def by_extend(model: qwen3.Qwen3) -> jax.Array:
    """The same by `prefill` and one teacher-forced `extend`."""
    prompts, responses = batch(model.config)
    kv, last = qwen3.prefill(model, prompts, jnp.asarray(PROMPT_MASK))
    hidden = qwen3.extend(model, responses, jnp.asarray(MASK), kv, jnp.asarray(PROMPT_INDEX))
    return qwen3.unembed(model, jnp.concatenate([last[PROMPT_INDEX][:, None], hidden], 1))


def by_decode(model: qwen3.Qwen3, tile: int = 2) -> jax.Array:
    """The same by `prefill` and a token at a time, every row in a slot of its own."""
    prompts, responses = batch(model.config)
    kv, last = qwen3.prefill(model, prompts, jnp.asarray(PROMPT_MASK))
    prompt = jnp.asarray(PROMPT_INDEX)
    shared, tiles = decode.lay_out(kv), decode.tiles_of(prompt, PROMPTS, tile)
    cache = decode.empty_cache(shared, ROWS, T + 2)  # longer than needed: what is not filled must not be seen
    cache = jax.tree.map(lambda x: x + 1e3, cache)

    def step(cache: decode.Cache, at: jax.Array) -> tuple[decode.Cache, jax.Array]:
        hidden, cache = decode.decode(model, responses[:, at], jnp.full(ROWS, at), prompt, shared, tiles, cache)
        return cache, hidden

    _, hidden = jax.lax.scan(step, cache, jnp.arange(T))
    return qwen3.unembed(model, jnp.concatenate([last[PROMPT_INDEX][:, None], hidden.swapaxes(0, 1)], 1))


REAL = np.concatenate([np.ones((ROWS, 1), bool), MASK], 1)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("path", [by_extend, by_decode])
def test_logits_equal_those_of_the_full_sequence(name: str, path: object) -> None:
    model = make_model(CASES[name])
    want, got = np.asarray(jax.jit(by_full)(model)), np.asarray(jax.jit(path)(model))  # type: ignore[arg-type]
    np.testing.assert_allclose(got[REAL], want[REAL], atol=1e-5 * np.abs(want[REAL]).max(), rtol=0)


@pytest.mark.slow
def test_gradient_through_extend_equals_the_full_one() -> None:
    """Rows of one prompt share its keys and values; what flows back through them adds up to the full gradient."""
    model = make_model(CASES["attention_bias"])
    targets = jnp.asarray(make_tokens(model.config, (ROWS, T + 1), 5))
    weights = jnp.asarray(np.where(REAL, np.cos(np.arange(REAL.size)).reshape(REAL.shape), 0), jnp.float32)

    def loss(model: qwen3.Qwen3, path: object) -> jax.Array:
        logprobs = jax.nn.log_softmax(path(model))  # type: ignore[operator]
        return (weights * jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0]).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    want, got = gradient(model, by_full).arrays(), gradient(model, by_extend).arrays()
    for key in want:
        scale = float(jnp.abs(want[key]).max())
        assert scale > 1e-3, key
        np.testing.assert_allclose(got[key], want[key], atol=1e-5 * scale, rtol=0, err_msg=key)


def test_rows_see_their_own_prompt_only() -> None:
    model = make_model(BASE)
    prompts, responses = batch(BASE)
    changed = prompts.at[2, 0].add(1)

    @jax.jit
    def run(tokens: jax.Array) -> jax.Array:
        kv, _ = qwen3.prefill(model, tokens, jnp.asarray(PROMPT_MASK))
        return qwen3.extend(model, responses, jnp.asarray(MASK), kv, jnp.asarray(PROMPT_INDEX))

    moved = np.abs(np.asarray(run(prompts)) - np.asarray(run(changed))).max((1, 2))
    assert (moved[PROMPT_INDEX == 2] > 1e-3).all()
    assert (moved[PROMPT_INDEX != 2] == 0).all()


def test_attention_is_causal() -> None:
    model = make_model(BASE)
    tokens = make_tokens(BASE, (1, 8))
    changed = tokens.copy()
    changed[0, 5] = (changed[0, 5] + 1) % BASE.vocab_size
    logits = jax.jit(lambda tokens: qwen3.logits(model, tokens, jnp.ones((1, 8), bool)))
    moved = np.abs(np.asarray(logits(tokens)) - np.asarray(logits(changed))).max(-1)[0]
    assert (moved[:5] == 0).all()
    assert (moved[5:] > 1e-3).all()
