"""Attention with a gradient that keeps no weights, against softmax written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdro_jax.models import recompute


def problem(queries, before, dtype=jnp.float32, rows=2, heads=4, kv_heads=2, size=8):
    """Queries and pieces: `before` keys of which some are padding, if any, and a causal piece with padding in it."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(0, 1, shape), dtype)

    real = np.asarray(rng.random((rows, 1, before + queries)) < 0.7) | (np.arange(before + queries) == before)
    masks = np.tril(np.ones((queries, queries), bool)) & real[..., before:], np.repeat(real[..., :before], queries, 1)
    parts = [(draw(rows, n, kv_heads, size), draw(rows, n, kv_heads, size), jnp.asarray(mask))
             for n, mask in ((before, masks[1]), (queries, masks[0])) if n]  # fmt: skip
    return draw(rows, queries, heads, size), parts


def naive(q, parts):
    k, v = (jnp.concatenate([p[i] for p in parts], 1) for i in (0, 1))
    mask = jnp.concatenate([p[2] for p in parts], 2)
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("nshc,nuhc->nhsu", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("nhsu,nuhc->nshc", jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), -1), v)


def gradients(form, q, parts):
    bar = jnp.asarray(np.random.default_rng(1).normal(0, 1, q.shape), jnp.float32)

    def loss(q, pairs):
        return (bar * form(q, [(*pair, part[2]) for pair, part in zip(pairs, parts, strict=True)])).sum()

    return jax.jit(jax.grad(loss, (0, 1)))(q, [part[:2] for part in parts])


@pytest.mark.parametrize(("queries", "before"), [(5, 3), (150, 4), (70, 0)])  # one, three and two blocks of queries
def test_values_and_gradients_are_the_naive_ones(queries, before):
    case = problem(queries, before)
    np.testing.assert_allclose(jax.jit(recompute.attend)(*case), naive(*case), rtol=1e-5, atol=1e-6)
    got, want = (gradients(form, *case) for form in (recompute.attend, naive))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_a_query_with_nothing_to_attend_to_is_finite():
    q, [(k, v, mask)] = problem(5, 0)
    case = q, [(k, v, mask.at[0, 0].set(False))]
    assert np.isfinite(recompute.attend(*case)).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients(recompute.attend, *case)))


def test_no_weights_are_kept_for_the_gradient():
    q, parts = problem(40, 40)
    _, pullback = jax.vjp(lambda q: recompute.attend(q, parts), q)
    kept = max(x.size for x in jax.tree.leaves(pullback) if x.dtype == jnp.float32)
    assert kept <= 2 * parts[0][0].size < q.shape[0] * q.shape[2] * 40 * 80  # keys of both pieces; weights are more


@pytest.mark.slow
def test_bfloat16_is_close():
    case = problem(70, 3, jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, case)
    out, got = recompute.attend(*case), jax.tree.leaves(gradients(recompute.attend, *case))
    assert {x.dtype for x in (out, *got)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(out.astype(jnp.float32), naive(*wide), rtol=0.05, atol=0.03)
    for a, b in zip(got, jax.tree.leaves(gradients(naive, *wide)), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=0.03 * np.abs(b).max())
