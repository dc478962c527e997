"""The one-pass loss against the form that holds all logits: value, gradients, what is left out, what is held."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdro_jax.losses import grpo, linear_grpo, linear_logprob, linear_loss
from gdro_jax.losses.linear_blocks import BLOCK, BLOCKED, WHOLE
from gdro_jax.losses.surrogate import Options

ROWS, TOKENS, WIDTH, VOCAB = 7, 6, 12, 50


def importance(logprobs, old, gain):
    return -gain * jnp.exp(logprobs - old)


def tokens(count=42, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(3), 5)
    return (
        jax.random.normal(keys[0], (count, WIDTH), dtype),
        jax.random.normal(keys[1], (VOCAB, WIDTH), dtype),
        jax.random.randint(keys[2], (count,), 0, VOCAB),
        jnp.arange(count) % 3 != 1,
        (-3 + 0.3 * jax.random.normal(keys[3], (count,)), jax.random.normal(keys[4], (count,))),
    )


def naive(hidden, weight, targets, active, args, temperature=1.0):
    logp = jax.nn.log_softmax(jnp.float32(hidden) @ jnp.float32(weight).T / temperature)
    chosen = jnp.take_along_axis(logp, targets[:, None], 1)[:, 0]
    entropy = -(jnp.exp(logp) * logp).sum(-1)
    loss = jnp.where(active, importance(chosen, *args), 0.0).sum()
    return loss, jnp.where(active, chosen, 0), jnp.where(active, entropy, 0)


def test_hand_number():
    """Logits (0, ln 3), so p = (1/4, 3/4); loss 2 log p of token 1: d/dlogits = 2 (onehot - p) = (-1/2, 1/2)."""
    hidden, weight = jnp.ones((1, 1)), jnp.array([[0.0], [np.log(3.0)]])

    def loss(h, w):
        return linear_loss.token_loss(lambda lp: 2 * lp, h, w, jnp.array([1]), jnp.array([True])).loss

    value, (h_bar, w_bar) = jax.value_and_grad(loss, (0, 1))(hidden, weight)
    np.testing.assert_allclose(value, 2 * np.log(0.75), rtol=1e-6)
    np.testing.assert_allclose(h_bar, [[0.5 * np.log(3.0)]], rtol=1e-6)
    np.testing.assert_allclose(w_bar, [[-0.5], [0.5]], rtol=1e-6)


@pytest.mark.parametrize(("chunk", "temperature"), [(None, 1.0), (8, 0.6), (13, 1.0), (99, 0.6)])
def test_value_and_gradients_are_the_naive_ones(chunk, temperature):
    hidden, weight, targets, active, args = tokens()

    @jax.jit
    def run(h, w):
        def one(h, w):
            out = linear_loss.token_loss(importance, h, w, targets, active, args, temperature, chunk=chunk)
            return 1.5 * out.loss, out

        def two(h, w):
            out = naive(h, w, targets, active, args, temperature)
            return 1.5 * out[0], out

        return tuple(jax.value_and_grad(f, (0, 1), has_aux=True)(h, w) for f in (one, two))

    got, want = run(hidden, weight)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 8])
def test_tokens_that_are_not_active_never_matter(chunk):
    hidden, weight, targets, active, args = tokens()
    spoiled = jnp.where(active[:, None], hidden, jnp.nan)
    bad = (jnp.where(active, args[0], jnp.inf), jnp.where(active, args[1], jnp.nan))

    def run(h, t, a):
        def loss(h, w):
            out = linear_loss.token_loss(importance, h, w, t, active, a, chunk=chunk)
            return out.loss, out

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(h, weight)

    want, got = run(hidden, targets, args), run(spoiled, jnp.where(active, targets, -7), bad)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert (got[1][0][~active] == 0).all() and np.isfinite(got[0][0])
    nothing = linear_loss.token_loss(importance, spoiled, weight, targets, jnp.zeros(42, bool), args, chunk=chunk)
    assert nothing.loss == 0 and (nothing.logprobs == 0).all()


def test_an_active_target_outside_the_vocabulary_is_seen():
    hidden, weight, targets, active, args = tokens()
    out = linear_loss.token_loss(importance, hidden, weight, targets.at[0].set(VOCAB), active, args)
    assert np.isnan(out.loss) and np.isnan(out.logprobs[0])


def test_no_tokens_lose_nothing():
    def loss(hidden, weight):
        return linear_loss.token_loss(importance, hidden, weight, *tokens(0)[2:]).loss

    value, grads = jax.value_and_grad(loss, (0, 1))(*tokens(0)[:2])
    assert value == 0 and [x.shape for x in grads] == [(0, WIDTH), (VOCAB, WIDTH)] and not grads[1].any()


def test_bfloat16_is_summed_in_float32():
    hidden, weight, targets, active, args = tokens(dtype=jnp.bfloat16)
    out = linear_loss.token_loss(importance, hidden, weight, targets, active, args, chunk=8)
    want = naive(hidden, weight, targets, active, args)
    np.testing.assert_allclose(out.loss, want[0], rtol=1e-5)
    grad = jax.grad(lambda w: linear_loss.token_loss(importance, hidden, w, targets, active, args).loss)(weight)
    exact = jax.grad(lambda w: naive(hidden, w, targets, active, args)[0])(jnp.float32(weight))
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.float32(grad), exact, rtol=0.05, atol=0.02 * float(jnp.abs(exact).max()))


@pytest.mark.parametrize(("trained", "made"), [((0, 1), {3}), ((0,), {2}), ((1,), {2, 3})])
def test_nothing_of_rows_by_vocabulary_is_held_and_no_product_is_wasted(trained, made):
    """Of the gradient: the largest array, and multiplications inside the loop over chunks, in products of a whole chunk
    with the whole head, on each platform. Two where the head is frozen, as under adapters. Where it alone is trained
    the CPU makes a third, that of the entropy."""
    rows, width, vocab, chunk = 4096, 16, 3000, 512
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((rows, width), jnp.float32), ((vocab, width), jnp.float32))]
    rest = [jax.ShapeDtypeStruct((rows,), d) for d in (jnp.int32, bool, jnp.float32)]

    def loss(h, w, t, a, gain):
        return linear_loss.token_loss(lambda lp, g: g * lp, h, w, t, a, (gain,)).loss

    largest = 0

    def walk(jaxpr):
        """Multiplications, a set with a number for each choice of branches."""
        nonlocal largest
        totals = {0}
        for eqn in jaxpr.eqns:
            largest = max([largest, *(v.aval.size for v in eqn.outvars if hasattr(v.aval, "size"))])
            more = {0}
            if eqn.primitive.name == "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                more = {eqn.outvars[0].aval.size * int(np.prod([eqn.invars[0].aval.shape[i] for i in contracted]))}
            for value in eqn.params.values():
                if hasattr(value, "jaxpr"):
                    inner = walk(value.jaxpr)
                    more = {a + eqn.params.get("length", 1) * b for a in more for b in inner}
            if "branches" in eqn.params:
                more = set().union(*(walk(branch.jaxpr) for branch in eqn.params["branches"]))
            totals = {a + b for a in totals for b in more}
        return totals

    found = walk(jax.make_jaxpr(jax.grad(loss, trained))(*shapes, *rest).jaxpr)
    assert found == {n * chunk * width * vocab for n in made}
    assert largest <= max(rows * width, chunk * vocab) < rows * vocab / 7


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("dtype", "temperature"), [(jnp.float32, 0.7), (jnp.bfloat16, 1.0)])
def test_blocks_of_the_vocabulary_give_what_the_whole_gives(wanted, dtype, temperature):
    """At a vocabulary that is no multiple of a block, targets on both sides of every edge, and outside."""
    vocab, rng = 2 * BLOCK + 452, np.random.default_rng(0)
    edges = [0, BLOCK - 1, BLOCK, vocab - BLOCK - 1, vocab - BLOCK, 2 * BLOCK - 1, 2 * BLOCK, vocab - 1, vocab, -1]
    targets = jnp.int32(edges)
    hidden, weight = (jnp.asarray(3 * rng.normal(0, 1, (n, 16)), dtype) for n in (len(edges), vocab))
    slope, before = jnp.float32(rng.normal(0, 1, len(edges))), jnp.float32(rng.normal(0, 1, (vocab, 16)))
    found = []
    for form in (WHOLE, BLOCKED):
        room = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), form.room(len(edges), vocab)) if wanted[1] else None
        head = form.ahead(hidden, weight, targets, temperature, room)
        given = before if wanted[1] else None
        *bars, _ = form.back(head.held, slope, hidden, weight, targets, given, wanted[0])
        assert [bar is not None for bar in bars] == list(wanted)
        found.append((head.logprob, head.entropy, *(jnp.float32(bar) for bar in bars if bar is not None)))
    assert np.isnan(found[1][0][-2:]).all() and np.isfinite(found[1][0][:-2]).all()
    loose = {"rtol": 0.02, "atol": 0.02} if dtype == jnp.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for whole, blocks in zip(*found, strict=True):
        np.testing.assert_allclose(blocks, whole, **loose)


# The GRPO loss -----------------------------------------------------------------------------------------------------
def rollouts(seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.float32(rng.normal(0, 1, (ROWS, TOKENS, WIDTH)))
    weight = jnp.float32(rng.normal(0, 0.5, (VOCAB, WIDTH)))
    targets = jnp.asarray(rng.integers(0, VOCAB, (ROWS, TOKENS)))
    mask = jnp.asarray(np.arange(TOKENS) < rng.integers(1, TOKENS + 1, (ROWS, 1)))
    near = linear_logprob.token_logprobs(hidden.reshape(-1, WIDTH), weight, targets.reshape(-1)).reshape(ROWS, TOKENS)
    old, ref, sampler = (near + jnp.float32(rng.normal(0, 0.3, near.shape)) for _ in range(3))
    advantages = jnp.float32(rng.normal(0, 1, ROWS))
    weights = jnp.float32(rng.uniform(0.1, 0.3, ROWS)).at[2].set(0.0)
    return hidden, weight, targets, old, advantages, mask, ref, weights, sampler


@pytest.mark.parametrize(
    ("options", "rest"),
    [
        (Options(), {}),
        (Options(kl_coef=0.1, kl_estimator="k1"), {"aggregate": "token"}),
        (Options(kl_coef=0.2, kl_estimator="k2", dual_clip=1.2), {"aggregate": "constant", "constant": 9.0}),
        (Options(clip_low=0.1, clip_high=0.1, kl_coef=0.1), {"ratio_level": "sequence"}),
        (Options(importance_cap=1.1, kl_coef=0.1), {}),
    ],
)
def test_linear_form_is_the_plain_loss_of_its_logprobs(options, rest):
    hidden, weight, targets, old, advantages, mask, ref, weights, sampler = rollouts()
    ref = None if options.kl_coef == 0 else ref
    given = sampler if options.importance_cap else None
    fixed = dict(rest, sampler_logprobs=given)

    def plain(h, w):
        pair = linear_logprob.token_logprobs_and_entropy(h.reshape(-1, WIDTH), w, targets.reshape(-1), 0.8)
        logp, entropy = (x.reshape(targets.shape) for x in pair)
        sums = grpo.loss_sums(
            logp, old, advantages, mask, ref, weights, token_metrics={"entropy": entropy}, **options._asdict(), **fixed
        )
        return sums.loss, sums

    def linear(h, w):
        out = linear_grpo.loss_sums(h, w, targets, old, advantages, mask, ref, weights, 0.8, options, chunk=8, **fixed)
        return out.sums.loss, out.sums

    run = jax.jit(lambda h, w: tuple(jax.value_and_grad(f, (0, 1), has_aux=True)(h, w) for f in (linear, plain)))
    got, want = run(hidden, weight)
    assert float(jnp.abs(got[1][0]).max()) > 1e-4 and (np.asarray(got[1][0])[2] == 0).all()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_without_old_logprobs_the_ratio_is_one():
    hidden, weight, targets, _, advantages, mask, _, weights, _ = rollouts()
    run = partial(linear_grpo.loss_sums, hidden, weight, targets)
    rest = (advantages, mask, None, weights)
    free = run(None, *rest)
    given = run(free.logprobs, *rest)
    np.testing.assert_allclose(free.sums.metrics["ratio"], free.sums.tokens, rtol=1e-6)
    np.testing.assert_allclose(free.sums.loss, given.sums.loss, rtol=1e-6)


def test_truncated_importance_by_hand():
    """One row of two tokens, ratio 1, advantage 2: weights exp(old - sampler) = 3 cut to 2, and 1/2: -(2*2 + 2/2)/2."""
    old = jnp.log(jnp.array([[0.6, 0.2]]))
    sampler = jnp.log(jnp.array([[0.2, 0.4]]))
    ones = jnp.ones((1, 2), bool)
    out = grpo.policy_loss(old, old, jnp.array([2.0]), ones, sampler_logprobs=sampler, importance_cap=2.0)
    np.testing.assert_allclose(out.loss, -2.5, rtol=1e-6)
    np.testing.assert_allclose(out.metrics["importance"], (3 + 0.5) / 2, rtol=1e-6)
    np.testing.assert_allclose(out.metrics["importance_cut"], 0.5)
    with pytest.raises(ValueError, match=r"importance_cap=2\.0 and sampler_logprobs"):
        grpo.policy_loss(old, old, jnp.array([2.0]), ones, importance_cap=2.0)


def test_bad_arguments_are_named():
    hidden, weight, targets, active, args = tokens()
    run = partial(linear_loss.token_loss, importance, hidden, weight, targets)
    with pytest.raises(ValueError, match="temperature=0"):
        run(active, args, 0.0)
    with pytest.raises(ValueError, match="chunk=0"):
        run(active, args, chunk=0)
    with pytest.raises(ValueError, match="active must have shape"):
        run(active[:3], args)
    with pytest.raises(ValueError, match=r"args\[1\] must have shape"):
        run(active, (args[0], args[1][:3]))
    with pytest.raises(ValueError, match=r"\[N, D\], \[V, D\], \[N\]"):
        linear_loss.token_loss(importance, hidden, weight[:, :3], targets, active, args)
