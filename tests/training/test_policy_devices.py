"""The loss of the real policy in pmapped form: eight devices and one give the same loss and gradient."""

from functools import partial

import jax
import numpy as np
import pytest

from gdro_jax.losses import grpo, pmapped, reduction
from gdro_jax.training import step


def policy_sums(model, rows, shared, aggregate):
    """GRPO loss sums of rows that share the step's prompts, as the trainer makes them."""
    prompts, prompt_mask, reference = shared
    owners = (prompts, prompt_mask, rows["prompt_index"], rows["tokens"], rows["mask"])
    logprobs, _ = step.response_logprobs(model, *owners, 1.0)
    ref, _ = step.response_logprobs(reference, *owners, 1.0)
    return grpo.loss_sums(
        logprobs, rows["old"], rows["advantages"], rows["mask"], ref, rows["row_weights"],
        kl_coef=0.1, aggregate=aggregate,
    )  # fmt: skip


@pytest.mark.skipif(jax.local_device_count() < 8, reason="needs 8 host devices")
@pytest.mark.parametrize("aggregate", ["sequence", "token"])
@pytest.mark.slow
def test_eight_devices_are_one(case, aggregate):
    batch = case.batch
    rows = {
        "tokens": batch.tokens,
        "mask": batch.mask,
        "old": batch.logprobs,
        "prompt_index": batch.prompt_index,
        "advantages": grpo.group_advantages(batch.rewards, batch.prompt_index, 4, valid=batch.scorable),
        "row_weights": grpo.row_weights(batch.prompt_index, 4, valid=batch.scorable),
    }
    shared = (batch.prompts, batch.prompt_mask, case.reference)
    sums = partial(policy_sums, aggregate=aggregate)
    want, want_grad = jax.jit(reduction.loss_and_grad, static_argnums=0)(sums, case.model, rows, shared)
    got, got_grad = pmapped.loss_and_grad(sums, case.model, rows, shared, num_devices=8)  # 12 uneven rows on 8
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
    np.testing.assert_allclose(got.per_row, want.per_row, rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(got_grad), jax.tree.leaves(want_grad), strict=True):
        assert np.abs(np.asarray(b)).max() > 1e-5
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
