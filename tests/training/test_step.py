"""The compiled step against a naive one written from full-sequence logits, and the laws it has to keep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gdro_jax.losses.reduction import LossSums
from gdro_jax.models import qwen3
from gdro_jax.training import step
from gdro_jax.training.batching import Pieces
from gdro_jax.training.config import TrainConfig
from gdro_jax.training.optimiser import make_optimiser

LENGTH = 5

# The parameters' change is the gradient itself: a rate of 1, no momentum, and an epsilon that hides the second moment.
PLAIN = TrainConfig(
    learning_rate=1.0, warmup_steps=0, adam_b1=0.0, adam_b2=0.0, adam_eps=1e3, max_grad_norm=1e9, kl_coef=0.1
)
compiled = jax.jit(step.update, static_argnames=("config", "temperature"))


def run(case, config=PLAIN, batch=None, reference=True, temperature=1.0) -> step.StepResult:
    """Compiled where it is cut, else operation by operation: these are the same few hundred for every option."""
    learner = step.Learner(case.model, make_optimiser(config).init(case.model))
    batch = case.cut(config) if batch is None else batch
    with jax.disable_jit(config.minibatches * config.microbatches == 1):
        return compiled(learner, case.reference if reference else None, batch, config, temperature)


def change(case, result: step.StepResult) -> dict[str, np.ndarray]:
    """What the step added to the parameters, times the epsilon: minus the gradient, nearly."""
    before, after = case.model.arrays(), result.learner.model.arrays()
    return {name: 1e3 * (np.asarray(after[name], np.float64) - np.asarray(before[name])) for name in before}


def assert_same(got: step.StepResult, want: step.StepResult, tolerance: float = 1e-6) -> None:
    for a, b in zip(jax.tree.leaves(got.learner), jax.tree.leaves(want.learner), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(got.signal, want.signal, rtol=1e-5, atol=1e-6)
    for name, value in want.metrics.items():
        np.testing.assert_allclose(got.metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


def differs(got: step.StepResult, want: step.StepResult) -> bool:
    pairs = zip(jax.tree.leaves(got.learner.model), jax.tree.leaves(want.learner.model), strict=True)
    return any(np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-9 for a, b in pairs)


# A naive step ------------------------------------------------------------------------------------------------------
def sequences(batch):
    """Every row as one whole sequence: tokens, mask, and where its response's tokens are predicted."""
    rows, length = batch.tokens.shape
    width = batch.prompts.shape[1] + length
    tokens, mask, starts = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool), []
    for row, owner in enumerate(batch.prompt_index):
        prompt = batch.prompts[owner][batch.prompt_mask[owner]].tolist()
        said = batch.tokens[row][batch.mask[row]].tolist()
        tokens[row, : len(prompt) + len(said)] = prompt + said
        mask[row, : len(prompt) + len(said)] = True
        starts.append(len(prompt) - 1)
    return tokens, mask, np.minimum(np.array(starts)[:, None] + np.arange(length), width - 1)


@jax.jit
def gathered(model, tokens, mask, at, targets, temperature):
    logprobs = jax.nn.log_softmax(qwen3.logits(model, tokens, mask) / temperature, -1)
    return logprobs[jnp.arange(len(at))[:, None], at, targets]


def sequence_logprobs(model, batch, temperature=1.0):
    return gathered(model, *sequences(batch), batch.tokens, temperature)


def naive_advantages(batch):
    out = np.zeros(len(batch.rewards))
    for p in range(len(batch.weights)):
        mine = (batch.prompt_index == p) & batch.scorable
        r = batch.rewards[mine].astype(float)
        out[mine] = (r - r.mean()) / (r.std() + 1e-6) if r.std() > 0 else 0.0
    return out


def row_losses(logp, ref, batch, advantages, kl_coef, low=0.2, high=0.28):
    """Eq. 6 of every row: mean over its tokens of -(clipped surrogate) + KL (k3)."""
    ratio, a = jnp.exp(logp - batch.logprobs), advantages[:, None]
    objective = jnp.minimum(ratio * a, jnp.clip(ratio, 1 - low, 1 + high) * a)
    kl = jnp.exp(ref - logp) - 1 - (ref - logp)
    token = jnp.where(batch.mask, -objective + kl_coef * kl, 0.0)
    return token.sum(1) / batch.mask.sum(1)


def naive_rows(model, reference, batch, advantages, kl_coef):
    logp, ref = sequence_logprobs(model, batch), sequence_logprobs(reference, batch)
    return row_losses(logp, ref, batch, np.asarray(advantages, np.float32), kl_coef)


def naive_weights(batch):
    counts = np.bincount(batch.prompt_index[batch.scorable], minlength=len(batch.weights))
    return np.where(batch.scorable, 1 / (len(batch.weights) * counts[batch.prompt_index]), 0)


@jax.jit
def loss_and_grad(model, reference, batch, whole, advantages, weights):
    def loss(model):
        logp, ref = (gathered(m, *whole, batch.tokens, 1.0) for m in (model, reference))
        return (weights * row_losses(logp, ref, batch, advantages, PLAIN.kl_coef)).sum()

    return jax.value_and_grad(loss)(model)


def naive(model, reference, batch, weights):
    """Loss of rows of these weights, and its gradient."""
    advantages = np.float32(naive_advantages(batch) * batch.weights[batch.prompt_index])
    arrays = batch._replace(pieces=None)
    return loss_and_grad(model, reference, arrays, sequences(batch), advantages, np.float32(weights))


@pytest.fixture(scope="module")
def plain(case):
    return run(case)


def test_loss_and_gradient_are_the_naive_ones(case, plain):
    loss, grad = naive(case.model, case.reference, case.batch, naive_weights(case.batch))
    np.testing.assert_allclose(plain.metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(plain.metrics["grad_norm"], optax.global_norm(grad), rtol=1e-5)
    optimiser = make_optimiser(PLAIN)
    updates, _ = optimiser.update(grad, optimiser.init(case.model), case.model)
    want = optax.apply_updates(case.model, updates)
    assert float(plain.metrics["grad_norm"]) > 0.05
    for a, b, before in zip(*map(jax.tree.leaves, (plain.learner.model, want, case.model)), strict=True):
        assert np.abs(np.asarray(b) - np.asarray(before)).max() > 1e-6  # every parameter has a gradient
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-7)


def test_metrics_are_the_naive_ones(case, plain):
    batch = case.batch
    active = batch.mask & batch.scorable[:, None]
    logp, ref = (np.asarray(sequence_logprobs(m, batch)) for m in (case.model, case.reference))
    ratio = np.exp(logp - batch.logprobs)
    a = (naive_advantages(batch) * batch.weights[batch.prompt_index])[:, None]
    clipped = ((a > 0) & (ratio > 1.28)) | ((a < 0) & (ratio < 0.8))
    assert 0.02 < clipped[active].mean() < 0.98
    np.testing.assert_allclose(plain.metrics["clip_fraction"], clipped[active].mean(), rtol=1e-5)
    np.testing.assert_allclose(plain.metrics["kl"], (np.exp(ref - logp) - 1 - ref + logp)[active].mean(), rtol=1e-4)
    np.testing.assert_allclose(plain.metrics["logprob_gap"], np.abs(logp - batch.logprobs)[active].max(), rtol=1e-4)
    np.testing.assert_allclose(plain.metrics["all_equal_groups"], 0.25)  # the last prompt's are 0, 0
    _, entropy = step.response_logprobs(case.model, *batch[:2], *batch[3:6], 1.0)
    np.testing.assert_allclose(plain.metrics["entropy"], np.asarray(entropy)[active].mean(), rtol=1e-5)


def test_signal_is_equation_7_without_the_adversarys_weights(case, plain):
    rows = np.asarray(naive_rows(case.model, case.reference, case.batch, naive_advantages(case.batch), PLAIN.kl_coef))
    want = [rows[(case.batch.prompt_index == p) & case.batch.scorable].mean() for p in range(4)]
    np.testing.assert_allclose(plain.signal, want, rtol=1e-4, atol=1e-6)
    alone = step.surrogate_signal(case.model, case.reference, case.batch, PLAIN, 1.0)
    np.testing.assert_allclose(alone, plain.signal, rtol=1e-5, atol=1e-6)
    other = run(case, batch=case.batch._replace(weights=np.float32([3, 2, 1, 0])))
    np.testing.assert_allclose(other.signal, plain.signal, rtol=1e-5, atol=1e-6)
    assert differs(other, plain)


def test_signal_alone_of_another_sampler(case):
    """The policy has not changed, so the ratio is 1 in all minibatches: -min(policy / sampler, cap) A is left."""
    config = dataclasses.replace(PLAIN, kl_coef=0.0, importance_cap=1.5, minibatches=2)
    batch = case.cut(config)
    weight = np.minimum(np.exp(np.asarray(sequence_logprobs(case.model, batch)) - batch.logprobs), 1.5)
    rows = np.where(batch.mask, -weight * naive_advantages(batch)[:, None], 0).sum(1) / batch.mask.sum(1)
    want = [rows[(batch.prompt_index == p) & batch.scorable].mean() for p in range(4)]
    assert np.abs(want).max() > 0.01
    got = step.surrogate_signal(case.model, None, batch, config, 1.0)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_on_policy_only_the_kl_is_left_of_the_signal(case):
    """Advantages of a prompt sum to zero, so at ratio 1 the surrogate says nothing (method, section 2)."""
    now, _ = step.response_logprobs(case.model, *case.batch[:2], *case.batch[3:6], 1.0)
    batch = case.batch._replace(logprobs=np.asarray(now), mask=np.ones_like(case.batch.mask))
    now, _ = step.response_logprobs(case.model, *batch[:2], *batch[3:6], 1.0)
    batch = batch._replace(logprobs=np.asarray(now))
    off = run(case, dataclasses.replace(PLAIN, kl_coef=0.0), batch, reference=False)
    np.testing.assert_allclose(off.signal, 0.0, atol=1e-6)
    assert float(off.metrics["grad_norm"]) > 0.01 and float(off.metrics["logprob_gap"]) < 1e-5


def test_weights_scale_the_advantages_but_not_the_kl(case):
    """At weight 0 what is left is the KL alone: the gradient of a batch in which all rewards are equal."""
    none = run(case, batch=case.batch._replace(weights=np.zeros(4, np.float32)))
    equal = run(case, batch=case.batch._replace(rewards=np.ones(12, np.float32)))
    assert_same(none, equal._replace(signal=none.signal, metrics={}))
    assert float(none.metrics["grad_norm"]) > 1e-3
    config = dataclasses.replace(PLAIN, kl_coef=0.0, clip_low=1.0, clip_high=1e9)
    one = change(case, run(case, config, case.batch._replace(weights=np.ones(4, np.float32)), reference=False))
    two = change(case, run(case, config, case.batch._replace(weights=np.full(4, 2, np.float32)), reference=False))
    for name in one:  # without clipping and KL the gradient is linear in the weights
        np.testing.assert_allclose(two[name], 2 * one[name], rtol=0.01, atol=2e-3)


@pytest.mark.parametrize("aggregate", [pytest.param("sequence", marks=pytest.mark.slow), "token"])
def test_microbatches_change_nothing(case, plain, aggregate):
    """Nor does the way that the step is cut into them, nor compilation."""
    one, four = (dataclasses.replace(PLAIN, aggregate=aggregate, microbatches=n) for n in (1, 4))
    want = plain if aggregate == "sequence" else run(case, one)
    for seed in range(3):
        assert_same(run(case, four, case.cut(four, seed)), want)


def test_minibatches_are_updates_in_turn(case):
    """Two minibatches: half of the rows each, at twice their weight, the second from where the first came to."""
    config = dataclasses.replace(PLAIN, minibatches=2, microbatches=2)
    batch = case.cut(config)
    got = run(case, config, batch)
    optimiser = make_optimiser(config)
    model, state, losses = case.model, optimiser.init(case.model), []
    for half in batch.pieces.rows.reshape(2, 6):
        mine = np.zeros(12)
        mine[half] = 2 * naive_weights(batch)[half]
        value, grad = naive(model, case.reference, batch, mine)
        updates, state = optimiser.update(grad, state, model)
        model = optax.apply_updates(model, updates)
        losses.append(float(value))
    assert abs(losses[0] - losses[1]) > 1e-3
    np.testing.assert_allclose(got.metrics["loss"], np.mean(losses), rtol=1e-4)
    for a, b in zip(jax.tree.leaves(got.learner.model), jax.tree.leaves(model), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-7)


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_masked_tokens_and_unscorable_rows_never_matter(case, microbatches):
    config = dataclasses.replace(PLAIN, microbatches=microbatches)
    batch = case.cut(config)
    garbage = np.where(batch.mask, batch.logprobs, np.nan).astype(np.float32)
    tokens = np.where(batch.mask, batch.tokens, 39)
    rewards = np.where(batch.scorable, batch.rewards, np.inf).astype(np.float32)
    lost = ~batch.scorable[:, None]
    prompts = np.where(batch.prompt_mask, batch.prompts, 17)
    spoiled = batch._replace(
        prompts=prompts,
        rewards=rewards,
        tokens=np.where(lost, 11, tokens),
        logprobs=np.where(lost & batch.mask, -50.0, garbage),
    )
    got, want = run(case, config, spoiled), run(case, config, batch)
    assert_same(got, want, tolerance=0)


def test_a_prompt_without_a_scorable_row_has_no_signal(case):
    batch = case.batch._replace(scorable=case.batch.prompt_index != 2)
    got = run(case, batch=batch)
    assert np.isnan(np.asarray(got.signal)).tolist() == [False, False, True, False]
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(got.learner))
    nothing = run(case, batch=case.batch._replace(scorable=np.zeros(12, bool)))
    assert np.isnan(np.asarray(nothing.signal)).all() and float(nothing.metrics["loss"]) == 0.0
    for a, b in zip(jax.tree.leaves(nothing.learner.model), jax.tree.leaves(case.model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_responses_of_one_token(case):
    batch = case.batch
    whole, one = (
        step.response_logprobs(case.model, *batch[:2], batch.prompt_index, batch.tokens[:, :n], batch.mask[:, :n], 1.0)
        for n in (LENGTH, 1)
    )
    for a, b in zip(whole, one, strict=True):
        assert b.shape == (12, 1)
        np.testing.assert_allclose(a[:, :1], b, rtol=1e-5)


def test_temperature_is_the_samplers(case):
    got = run(case, temperature=0.5)
    logp = np.asarray(sequence_logprobs(case.model, case.batch, 0.5))
    gap = np.abs(logp - case.batch.logprobs)[case.batch.mask & case.batch.scorable[:, None]].max()
    np.testing.assert_allclose(got.metrics["logprob_gap"], gap, rtol=1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kl_coef", 0.2),
        ("kl_estimator", "k2"),
        ("clip_low", 0.05),
        ("clip_high", 0.05),
        ("dual_clip", 1.05),
        ("ratio_level", "sequence"),
        ("importance_cap", 0.9),
        ("aggregate", "token"),
        ("aggregate", "constant"),
        ("row_weighting", "rollout"),
        ("advantage_scale", "none"),
        ("advantage_baseline", "leave_one_out"),
        ("advantage_clip", 0.3),
    ],
)
def test_every_option_of_the_loss_acts(case, plain, field, value):
    assert differs(run(case, dataclasses.replace(PLAIN, **{field: value})), plain)


@pytest.mark.parametrize("minibatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_importance_weights_make_up_for_another_sampler(case, minibatches):
    """min(old / sampler, cap) * new / old: without clipping or cap that is the ratio to the sampler itself."""
    free = dataclasses.replace(PLAIN, kl_coef=0.0, clip_low=1.0, clip_high=1e9, minibatches=minibatches)
    batch = case.cut(free)
    want = run(case, free, batch, reference=False)
    got = run(case, dataclasses.replace(free, importance_cap=1e9), batch, reference=False)
    for a, b in zip(jax.tree.leaves(got.learner.model), jax.tree.leaves(want.learner.model), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-7)
    np.testing.assert_allclose(got.metrics["loss"], want.metrics["loss"], rtol=1e-4)
    assert float(got.metrics["importance"]) > 1.01 and float(got.metrics["importance_cut"]) == 0.0
    if minibatches == 1:  # the first update is on-policy to the trainer, whatever the sampler was
        np.testing.assert_allclose(got.metrics["ratio"], 1.0, rtol=1e-5)


def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(case):
    """Once in the first of two minibatches, once in both."""
    config = dataclasses.replace(PLAIN, minibatches=2, adam_b1=0.9, kl_coef=0.0)
    batch = case.cut(config)
    spoiled = batch.logprobs.copy()
    spoiled[batch.pieces.rows[0]] = np.nan
    one = run(case, config, batch._replace(logprobs=spoiled), reference=False)
    assert np.asarray(one.applied).tolist() == [False, True] and float(one.metrics["skipped"]) == 1.0
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(one.learner))
    assert np.isfinite(float(one.metrics["loss"])) and float(one.metrics["grad_norm"]) > 0.01
    assert any(
        (np.asarray(one.learner.model.arrays()[n]) != np.asarray(x)).any() for n, x in case.model.arrays().items()
    )
    both = run(case, config, batch._replace(logprobs=np.full_like(spoiled, np.nan)), reference=False)
    assert float(both.metrics["skipped"]) == 2.0 and np.isnan(float(both.metrics["loss"]))
    before = step.Learner(case.model, make_optimiser(config).init(case.model))
    for a, b in zip(jax.tree.leaves(both.learner), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_minibatch_without_a_scorable_row_is_in_no_mean(case):
    config = dataclasses.replace(PLAIN, minibatches=2, adam_b1=0.9, kl_coef=0.0)  # of the test before: compiled once
    batch = case.cut(config)
    batch = batch._replace(scorable=batch.scorable & ~np.isin(np.arange(12), batch.pieces.rows[0]))
    got = run(case, config, batch, reference=False)
    ratio = np.exp(np.asarray(sequence_logprobs(case.model, batch)) - batch.logprobs)
    want = ratio[batch.mask & batch.scorable[:, None]].mean()  # nothing was changed before
    np.testing.assert_allclose(got.metrics["ratio"], want, rtol=1e-5)
    assert float(got.metrics["skipped"]) == 0.0 and float(got.metrics["response_length"]) >= 1.0


def test_bfloat16_gradients_are_summed_in_float32(case):
    """512 microbatches with a gradient of 1 each: a sum in bfloat16 would get no further than 256."""

    def sums_of(weight, piece):
        loss = weight.astype(jnp.float32) * piece.rows.sum()
        zero = jnp.zeros(())
        return LossSums(loss, None, jnp.zeros(1), {}, zero, zero), jnp.zeros(1), zero

    ones = jnp.ones((512, 1), jnp.int32)
    _, plain, _, grad = step._accumulate(sums_of, jnp.bfloat16(1.0), Pieces(ones, ones, ones))
    assert grad == 512.0 and grad.dtype == jnp.float32 and plain.shape == (512, 1)
