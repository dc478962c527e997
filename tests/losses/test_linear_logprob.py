"""Chunked log-probs against the form that holds all logits: values, gradients, and what is held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdro_jax.losses import linear_logprob
from gdro_jax.losses.linear_logprob import chunk_rows, token_logprobs, token_logprobs_and_entropy


def problem(rows, width, vocab, seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (rows, width), dtype)
    weight = jax.random.normal(keys[1], (vocab, width), dtype)
    targets = jax.random.randint(keys[2], (rows,), 0, vocab)
    return hidden, weight, targets, jax.random.normal(keys[3], (2, rows))


def naive(hidden, weight, targets, temperature):
    logits = jnp.float32(hidden) @ jnp.float32(weight).T / temperature
    logp = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logp, targets[:, None], 1)[:, 0], -(jnp.exp(logp) * logp).sum(-1)


def test_hand_number():  # logits (0, ln 3): probabilities 1/4, 3/4; at temperature 1/2 they are 1/10, 9/10
    hidden, weight = jnp.ones((2, 1)), jnp.array([[0.0], [np.log(3.0)]])
    got, entropy = token_logprobs_and_entropy(hidden, weight, jnp.array([0, 1]))
    np.testing.assert_allclose(got, np.log([0.25, 0.75]), rtol=1e-6)
    np.testing.assert_allclose(entropy, np.full(2, -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))), rtol=1e-6)
    np.testing.assert_allclose(token_logprobs(hidden, weight, jnp.array([0, 1]), 0.5), np.log([0.1, 0.9]), rtol=1e-6)


def both(form, hidden, weight, mix):
    """A form's outputs, and the gradients of a random mix of both and of the log-probs alone."""

    def mixed(h, w, scale):
        logp, entropy = form(h, w)
        return (mix[0] * logp).sum() + scale * (mix[1] * entropy).sum()

    gradient = jax.grad(mixed, (0, 1))
    return form(hidden, weight), gradient(hidden, weight, 1.0), gradient(hidden, weight, 0.0)


@pytest.mark.parametrize(
    ("rows", "chunk", "temperature"),
    [
        (1, None, 1.0),
        (1, 8, 0.6),
        (37, None, 0.6),
        (37, 1, 1.0),
        (37, 8, 0.6),
        (64, 13, 1.0),
        (64, 64, 1.0),
        (64, 99, 0.6),
    ],
)
def test_values_and_gradients_are_the_naive_ones(rows, chunk, temperature):
    hidden, weight, targets, mix = problem(rows, 12, 50)

    def pair(h, w):
        return token_logprobs_and_entropy(h, w, targets, temperature, chunk=chunk)

    def single(h, w):
        return token_logprobs(h, w, targets, temperature, chunk=chunk), jnp.zeros(rows)

    @jax.jit
    def run(h, w):
        want = both(lambda h, w: naive(h, w, targets, temperature), h, w, mix)
        return want, both(pair, h, w, mix), both(single, h, w, mix)

    want, got, alone = run(hidden, weight)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5)
    for a, b in zip(jax.tree.leaves((alone[0][0], alone[2])), jax.tree.leaves((want[0][0], want[2])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5)


@pytest.mark.slow
def test_bfloat16_inputs_are_summed_in_float32():
    hidden, weight, targets, mix = problem(40, 16, 300, dtype=jnp.bfloat16)
    got = token_logprobs(hidden, weight, targets, chunk=16)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, naive(hidden, weight, targets, 1.0)[0], rtol=1e-4, atol=1e-4)
    fused = jax.jit(jax.grad(lambda h, w: (mix[0] * token_logprobs(h, w, targets, chunk=16)).sum(), (0, 1)))
    grads = fused(hidden, weight)
    exact = jax.grad(lambda h, w: (mix[0] * naive(h, w, targets, 1.0)[0]).sum(), (0, 1))(
        jnp.float32(hidden), jnp.float32(weight)
    )
    for a, b in zip(grads, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.abs(jnp.float32(a) - b).max() < 0.02 * np.abs(b).max()


def test_huge_logits_stay_finite():
    hidden, weight = jnp.array([[1e4]]), jnp.array([[1.0], [-1.0], [0.9999]])
    value, grad = jax.value_and_grad(lambda h: token_logprobs(h, weight, jnp.array([1]))[0])(hidden)
    np.testing.assert_allclose(value, -2e4 - np.log1p(np.exp(-1.0)), rtol=1e-5)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("junk", [np.nan, np.inf])
@pytest.mark.parametrize("chunk", [8, 64])
def test_masked_rows_never_matter(junk, chunk):
    hidden, weight, targets, mix = problem(20, 6, 30)
    mask = jnp.arange(20) % 3 != 0
    dirty = jnp.where(mask[:, None], hidden, junk)

    def run(h):
        def loss(h, w):
            logp, entropy = token_logprobs_and_entropy(h, w, jnp.where(mask, targets, -100), chunk=chunk)
            return jnp.where(mask, mix[0] * logp + mix[1] * entropy, 0.0).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(h, weight)

    for a, b in zip(jax.tree.leaves(run(dirty)), jax.tree.leaves(run(hidden)), strict=True):
        assert np.isfinite(a).all() and np.array_equal(a, b)


def test_a_target_outside_the_vocabulary_is_seen():
    hidden, weight, _, _ = problem(3, 4, 7)
    got = token_logprobs(hidden, weight, jnp.array([-1, 7, 6]))
    assert np.isnan(got).tolist() == [True, True, False]


def avals(jaxpr):
    """Every array that a program makes, inner programs included."""
    for eqn in jaxpr.eqns:
        yield from (v.aval for v in eqn.outvars)
        for param in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(param, "jaxpr", param)
            if hasattr(inner, "eqns"):
                yield from avals(inner)


@pytest.mark.parametrize(("rows", "vocab"), [(1000, 3000), (4096, 512)])
def test_nothing_of_rows_times_vocabulary_is_held(rows, vocab):
    hidden, weight, targets, mix = problem(rows, 8, vocab)

    def loss(f):
        return lambda h, w: sum((m * x).sum() for m, x in zip(mix, f(h, w), strict=True))

    def fused(h, w):
        return token_logprobs_and_entropy(h, w, targets, 0.7)

    def largest(f):
        jaxpr = jax.make_jaxpr(jax.grad(loss(f), (0, 1)))(hidden, weight)
        return max(a.size for a in avals(jaxpr.jaxpr) if hasattr(a, "size"))

    assert largest(lambda h, w: naive(h, w, targets, 0.7)) >= rows * vocab  # the measure sees it where it is
    assert largest(fused) <= rows * vocab // 2

    def temporary(f):
        compiled = jax.jit(jax.grad(loss(f), (0, 1))).lower(hidden, weight).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = 4 * rows * vocab
    assert temporary(fused) < whole
    assert temporary(lambda h, w: naive(h, w, targets, 0.7)) >= whole


def test_chunk_sizes():
    assert chunk_rows(4096, 64) == 4096  # small problems are not split
    assert chunk_rows(100, 64) == 100
    assert chunk_rows(3072, 151936) == linear_logprob.CHUNK_ROWS
    for rows in (1, 3, 200, 1111, 100_000):
        for vocab in (64, 1000, 151936):
            size = chunk_rows(rows, vocab)
            assert 1 <= size <= rows and (size == rows or -(-rows // size) * size - rows < 8 * -(-rows // size))


def test_small_problem_has_no_loop():
    hidden, weight, targets, _ = problem(512, 8, 64)
    jaxpr = jax.make_jaxpr(jax.grad(lambda h: token_logprobs(h, weight, targets).sum()))(hidden)
    assert "scan" not in str(jaxpr) and "while" not in str(jaxpr)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"chunk": 0}, "chunk=0"),
        ({"targets": jnp.zeros((4,), int)}, "they are"),
    ],
)
def test_bad_arguments_are_named(args, words):
    hidden, weight, targets, _ = problem(3, 4, 7)
    with pytest.raises(ValueError, match=words):
        token_logprobs(hidden, weight, **({"targets": targets} | args))
