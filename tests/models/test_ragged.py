"""Attention in tiles over streams: `prefill` and `extend` of padded rows, whatever the tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdro_jax.models import qwen3, ragged
from tests.conftest import TINY

PROMPTS, RESPONSES = np.array([7, 2, 5]), np.array([13, 1, 0, 5, 4, 8])
OWNER = np.array([0, 0, 1, 1, 2, 2])
LONGEST, PROMPT_STREAM = 13, 20
rng = np.random.default_rng(0)
PROMPT = rng.integers(0, TINY.vocab_size, (3, 7))
TOKENS = rng.integers(0, TINY.vocab_size, (6, LONGEST))
SLOPE = rng.standard_normal((6, LONGEST, TINY.hidden_size)).astype(np.float32)
SEEN, REAL = np.arange(7) < PROMPTS[:, None], np.arange(LONGEST) < RESPONSES[:, None]


def padded(model):
    kv, last = qwen3.prefill(model, jnp.asarray(PROMPT), jnp.asarray(SEEN))
    hidden = qwen3.extend(model, jnp.asarray(TOKENS), jnp.asarray(REAL), kv, jnp.asarray(OWNER))
    return jnp.where(REAL[..., None], hidden, 0), last


def in_streams(model, tiling, tokens, fewer=0):
    """The same from streams, the second of so many tokens; with `fewer` tiles of keys than there are."""
    of = ragged.stream(jnp.asarray(PROMPTS), jnp.zeros(3, jnp.int32), PROMPT_STREAM)
    steps = ragged.key_tiles(PROMPTS[None], 0 * PROMPTS[None], tiling, tiling.blocks(PROMPT_STREAM, 3))
    k, v, last = ragged.prefill(model, jnp.asarray(PROMPT)[of.row, of.step], of, jnp.asarray(steps), tiling)
    place = np.minimum((np.cumsum(PROMPTS) - PROMPTS)[:, None] + np.arange(7), PROMPT_STREAM - 1)
    k, v = (jnp.where(SEEN[None, :, :, None, None], x[:, place], 0) for x in (k, v))
    kv = qwen3.PromptKV(k, v, jnp.asarray(SEEN), jnp.asarray(PROMPTS))
    of = ragged.stream(jnp.asarray(RESPONSES), jnp.asarray(OWNER), tokens)
    steps = ragged.key_tiles(RESPONSES[None], PROMPTS[OWNER][None], tiling, tiling.blocks(tokens, 6))
    steps = jnp.asarray(np.maximum(steps - fewer, 0))
    hidden = ragged.extend(model, jnp.asarray(TOKENS)[of.row, of.step], kv, of, steps, tiling)
    place = np.minimum((np.cumsum(RESPONSES) - RESPONSES)[:, None] + np.arange(LONGEST), tokens - 1)
    return jnp.where(REAL[..., None], hidden[place], 0), last


def weighed(out):
    return (out[0] * SLOPE).sum() + out[1].sum()


@pytest.fixture(scope="module")
def want(tiny_model):
    return jax.jit(padded)(tiny_model), jax.jit(jax.grad(lambda model: weighed(padded(model))))(tiny_model)


@pytest.mark.slow
@pytest.mark.parametrize(("tiling", "tokens"), [((4, 3), 31), ((5, 8), 40)])
def test_values_and_gradients_are_those_of_padded_rows(tiny_model, want, tiling, tokens):
    """In a stream that the rows fill, and in one with room, whose prompts' tiles do not divide a prompt."""
    tiling = ragged.Tiling(*tiling)
    got = jax.jit(lambda model: in_streams(model, tiling, tokens))(tiny_model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want[0])
    grads = jax.jit(jax.grad(lambda model: weighed(in_streams(model, tiling, tokens))))(tiny_model)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.slow
def test_bfloat16_is_close(tiny_model, want):
    """To the numbers of float32, gradients of the float32 parameters too."""
    model = qwen3.Qwen3(TINY, tiny_model.arrays(), "bfloat16")
    run = lambda model: in_streams(model, ragged.Tiling(4, 3), 31)  # noqa: E731
    got = jax.jit(run)(model)
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}
    for a, b in zip(got, want[0], strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=0.05 * np.abs(b).max())
    grads = jax.jit(jax.grad(lambda model: weighed(run(model))))(model)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want[1]), strict=True):
        assert a.dtype == jnp.float32
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)


def test_keys_that_are_left_out_make_all_nan(tiny_model):
    out, _ = jax.jit(lambda model: in_streams(model, ragged.Tiling(4, 3), 31, fewer=1))(tiny_model)
    assert np.isnan(np.asarray(out)[REAL]).all()


@pytest.mark.slow
def test_shards_of_unlike_rows(tiny_model):
    """Mapped over: one with all rows and one with hardly any, which meets as many tiles."""
    tiling, lengths = ragged.Tiling(4, 3), np.stack([RESPONSES, [0, 2, 0, 0, 0, 0]])
    steps = ragged.key_tiles(lengths, np.stack([PROMPTS[OWNER]] * 2), tiling, tiling.blocks(31, 6))
    kv, _ = qwen3.prefill(tiny_model, jnp.asarray(PROMPT), jnp.asarray(SEEN))

    def summed(model, length):
        of = ragged.stream(length, jnp.asarray(OWNER), 31)
        hidden = ragged.extend(model, jnp.asarray(TOKENS)[of.row, of.step], kv, of, jnp.asarray(steps), tiling)
        place = jnp.minimum((jnp.cumsum(length) - length)[:, None] + jnp.arange(LONGEST), 30)
        return (jnp.where((jnp.arange(LONGEST) < length[:, None])[..., None], hidden[place], 0) * SLOPE).sum()

    def padded(model, length):
        real = jnp.arange(LONGEST) < length[:, None]
        hidden = qwen3.extend(model, jnp.asarray(TOKENS), real, kv, jnp.asarray(OWNER))
        return (jnp.where(real[..., None], hidden, 0) * SLOPE).sum()

    def both(function):
        return jax.jit(jax.value_and_grad(lambda model: jax.vmap(lambda x: function(model, x))(lengths).sum()))

    (value, grads), (want, slopes) = both(summed)(tiny_model), both(padded)(tiny_model)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_key_tiles_by_hand():
    """Tiles of two tokens, two at a time, of two shards."""
    tiling = ragged.Tiling(2, 2)
    lengths, before = np.array([[3, 1, 4], [5, 0, 0]]), np.array([[3, 3, 0], [1, 0, 0]])
    found = ragged.key_tiles(lengths, before, tiling, tiling.blocks(8, 3))
    assert tiling.blocks(8, 3) == 4
    # first shard (ahead, own): (2, 2) (2, 1) | (2, 1) (0, 2) | (0, 1); second: (1, 3) (1, 2) | (1, 1)
    assert found.tolist() == [[2, 3], [2, 2], [0, 1], [0, 0]]
