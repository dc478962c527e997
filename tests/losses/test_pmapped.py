"""The pmapped loss over 8 host devices against one device, with a policy made of hidden states and a head."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gdro_jax.losses import grpo, linear_grpo, linear_logprob, pmapped, reduction
from gdro_jax.losses.surrogate import Options

needs_devices = pytest.mark.skipif(
    jax.local_device_count() < 8, reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8"
)
PROMPTS, ROWS, TOKENS, WIDTH, VOCAB = 4, 13, 5, 6, 17
COUNTS = (5, 1, 4, 3)  # uneven groups, none of which ends where a device's rows end


def step(seed=0):
    rng = np.random.default_rng(seed)
    index = np.repeat(np.arange(PROMPTS), COUNTS)
    rewards = rng.integers(0, 2, ROWS)
    valid = np.arange(ROWS) != 6
    batch = {
        "tokens": jnp.asarray(rng.integers(0, VOCAB, (ROWS, TOKENS))),
        "mask": jnp.asarray(np.arange(TOKENS) < rng.integers(1, TOKENS + 1, (ROWS, 1))),
        "old": jnp.float32(rng.normal(-3, 0.3, (ROWS, TOKENS))),
        "ref": jnp.float32(rng.normal(-3, 0.3, (ROWS, TOKENS))),
        "advantages": grpo.group_advantages(rewards, index, PROMPTS, valid=valid),
        "prompt_index": jnp.asarray(index),
        "row_weights": grpo.row_weights(index, PROMPTS, valid=valid),
    }
    return batch, jnp.float32(rng.normal(0, 1, (PROMPTS, WIDTH)))


class Policy(nnx.Module):
    def __init__(self, seed):
        keys = jax.random.split(jax.random.key(seed), 2)
        self.embed = nnx.Param(jax.random.normal(keys[0], (VOCAB, WIDTH)) * 0.5)
        self.mix = nnx.Param(jax.random.normal(keys[1], (WIDTH, WIDTH)) * 0.5)


def policy_sums(policy, rows, prompts, aggregate="sequence"):
    """Shared prompts, rows that point to them, a head tied to the embedding."""
    previous = jnp.pad(rows["tokens"], ((0, 0), (1, 0)))[:, :-1]
    hidden = jnp.tanh((prompts[rows["prompt_index"]][:, None] + policy.embed[...][previous]) @ policy.mix[...])
    logp = linear_logprob.token_logprobs(
        hidden.reshape(-1, WIDTH), policy.embed[...], rows["tokens"].reshape(-1), chunk=8
    ).reshape(rows["tokens"].shape)
    return grpo.loss_sums(
        logp, rows["old"], rows["advantages"], rows["mask"], rows["ref"], rows["row_weights"],
        kl_coef=0.1, aggregate=aggregate,
    )  # fmt: skip


def one_pass_sums(policy, rows, prompts):
    """The same policy through the loss that makes its gradient in the forward pass."""
    previous = jnp.pad(rows["tokens"], ((0, 0), (1, 0)))[:, :-1]
    hidden = jnp.tanh((prompts[rows["prompt_index"]][:, None] + policy.embed[...][previous]) @ policy.mix[...])
    return linear_grpo.loss_sums(
        hidden, policy.embed[...], rows["tokens"], rows["old"], rows["advantages"], rows["mask"], rows["ref"],
        rows["row_weights"], options=Options(kl_coef=0.1), aggregate="token", chunk=8,
    ).sums  # fmt: skip


SUMS = {name: partial(policy_sums, aggregate=name) for name in grpo.AGGREGATES}


one_device = jax.jit(reduction.loss_and_grad, static_argnums=(0, 4))


def assert_same(got, want):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6, atol=1e-7)


@needs_devices
@pytest.mark.parametrize(
    ("aggregate", "devices"),
    [
        pytest.param("sequence", 1, marks=pytest.mark.slow),
        pytest.param("sequence", 3, marks=pytest.mark.slow),
        *(("sequence", 8), ("token", 8), ("constant", 8)),
    ],
)
def test_devices_give_the_one_device_number(aggregate, devices):
    batch, prompts = step()
    policy = Policy(0)
    want = one_device(SUMS[aggregate], policy, batch, prompts)
    got = pmapped.loss_and_grad(SUMS[aggregate], policy, batch, prompts, num_devices=devices)
    assert got[0].per_row.shape == (ROWS,)
    assert np.abs(want[1].mix[...]).max() > 1e-3
    assert_same(got, want)


@pytest.mark.slow
@needs_devices
def test_the_one_pass_loss_on_devices():
    batch, prompts = step()
    plain = one_device(SUMS["token"], Policy(0), batch, prompts)
    want = one_device(one_pass_sums, Policy(0), batch, prompts)
    want[0].metrics.pop("entropy")
    assert_close = partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
    jax.tree.map(assert_close, want, plain)
    got = pmapped.loss_and_grad(one_pass_sums, Policy(0), batch, prompts, num_devices=8)
    got[0].metrics.pop("entropy")
    assert_same(got, want)


@needs_devices
def test_microbatches_on_devices():
    batch, prompts = step()
    want = one_device(SUMS["token"], Policy(0), batch, prompts)
    assert_same(pmapped.loss_and_grad(SUMS["token"], Policy(0), batch, prompts, num_devices=2, microbatches=3), want)


@needs_devices
def test_one_row_on_eight_devices():
    batch, prompts = step()
    one = {name: value[:1] for name, value in batch.items()}
    want = one_device(SUMS["token"], Policy(0), one, prompts)
    assert_same(pmapped.loss_and_grad(SUMS["token"], Policy(0), one, prompts), want)


@needs_devices
def test_compiled_once_and_gradients_lie_with_the_parameters():
    traces = []

    def counted(policy, rows, prompts):
        traces.append(1)
        return policy_sums(policy, rows, prompts)

    run = pmapped.make(counted, num_devices=8)
    policy = Policy(0)
    for seed in range(3):
        batch, prompts = step(seed)
        _, grad = run(policy, batch, prompts)
        policy = jax.tree.map(lambda p, g: p - 0.1 * g, policy, grad)
        if seed == 0:
            first = len(traces)
    pmapped.make(counted, num_devices=8)(policy, *step(4))
    assert first >= 1 and len(traces) == first
    assert grad.mix[...].sharding == policy.mix[...].sharding
    assert len(grad.mix[...].sharding.device_set) == 1


@needs_devices
def test_five_steps_stay_together():
    one, many = Policy(1), Policy(1)
    run = pmapped.make(SUMS["sequence"])
    for seed in range(5):
        batch, prompts = step(seed)
        _, grad = one_device(SUMS["sequence"], one, batch, prompts)
        one = jax.tree.map(lambda p, g: p - 0.5 * g, one, grad)
        _, grad = run(many, batch, prompts)
        many = jax.tree.map(lambda p, g: p - 0.5 * g, many, grad)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_split_rows_pads_with_weight_zero_only():
    batch, _ = step()
    parts = reduction.split_rows(batch, 4)
    assert parts["mask"].shape == (4, 4, TOKENS)
    np.testing.assert_allclose(parts["row_weights"].reshape(-1)[ROWS:], 0.0)
    np.testing.assert_array_equal(parts["tokens"].reshape(-1, TOKENS)[:ROWS], batch["tokens"])
    np.testing.assert_array_equal(parts["tokens"].reshape(-1, TOKENS)[ROWS], batch["tokens"][0])


def test_bad_arguments_are_named():
    batch, prompts = step()
    with pytest.raises(ValueError, match="num_devices=0"):
        pmapped.loss_and_grad(policy_sums, Policy(0), batch, prompts, num_devices=0)
    with pytest.raises(ValueError, match="row_weights"):
        pmapped.loss_and_grad(policy_sums, Policy(0), {"mask": batch["mask"]}, prompts)
    with pytest.raises(ValueError, match="rows first"):
        pmapped.loss_and_grad(policy_sums, Policy(0), batch | {"mask": batch["mask"][:3]}, prompts)
    with pytest.raises(ValueError, match="microbatches=0"):
        reduction.loss_and_grad(policy_sums, Policy(0), batch, prompts, microbatches=0)
