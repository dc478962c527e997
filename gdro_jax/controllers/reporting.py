"""What a rule logs: flat dicts of scalars and float32[B] arrays. NaN stands where a bin is empty in the step."""

import math

import jax
import jax.numpy as jnp

from gdro_jax.controllers import diagnostics, prompt_gdro, rollout_gdro, theory
from gdro_jax.controllers.square_root import square_root_law


def step(num_bins: int, bins: jax.Array, weights: jax.Array, rollouts: jax.Array) -> dict[str, jax.Array]:
    """Shares of the bins, mean rollouts and mean weight of their prompts, and the lead-lag of the weights."""
    mean_rollouts, counts = prompt_gdro.bin_means(num_bins, bins, rollouts.astype(jnp.float32))
    mean_weight, _ = prompt_gdro.bin_means(num_bins, bins, weights)
    share = counts / bins.shape[0]
    return {
        "share": share,
        "rollouts_per_bin": jnp.where(counts > 0, mean_rollouts, jnp.nan),
        "weight_per_bin": jnp.where(counts > 0, mean_weight, jnp.nan),
        "lead_lag": diagnostics.lead_lag(share * mean_weight, share),
    }


def prompt_adversary(cfg: prompt_gdro.Config, state: prompt_gdro.State, share: jax.Array) -> dict[str, jax.Array]:
    """q, the scores, effective bins, and the regret against the best fixed bin next to its bounds.

    The regret of a bin sums, over the steps in which it had a signal, its loss minus the loss under q over the bins
    present; "regret" is the largest. Bounds are for losses in [0, 1]: EXP3.P's, and that of exponential weights with
    full information, log(B)/eta + eta T/8 + gamma T. Both are for summed losses: the EMA of Eq. 12 forgets, so the log
    shows whether it stays under them.
    """
    q = prompt_gdro.distribution(cfg, state)
    steps = state.step.astype(jnp.float32)
    full = math.log(cfg.num_bins) / max(cfg.step_size, 1e-6) + steps * (cfg.step_size / 8.0 + cfg.exploration)
    return {
        "q": q,
        "scores": prompt_gdro.debiased_scores(cfg, state),
        "bin_visits": state.visits,
        "effective_bins": diagnostics.effective_bins(q),
        "q_lead_lag": diagnostics.lead_lag(q, share),
        "regret": jnp.max(state.regret),
        "regret_bound": theory.exp3p_regret_bound(cfg.num_bins, steps),
        "regret_bound_full_information": full,
    }


def rollout_adversary(
    cfg: rollout_gdro.Config, state: rollout_gdro.State, plan: rollout_gdro.Plan, logged: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Price, variances, the square-root law beside the plan, how often it was forced to uniform, and the arms' regret.

    The regret is against the best fixed arms of each bin that meet the budget on average; its bound is EXP3.P's,
    once for each bin, for losses in [0, 1].
    """
    share, steps = logged["share"], jnp.maximum(state.step, 1).astype(jnp.float32)
    weight = share * plan.weights
    variances = prompt_gdro.or_others_mean(state.variances, state.variance_visits)  # as the allocator takes them
    law = square_root_law(variances * plan.weights, share, cfg.mean_rollouts, cfg.min_rollouts, cfg.max_rollouts)
    counts = jnp.where(share > 0, logged["rollouts_per_bin"], 1.0)
    proxy = theory.variance_proxy(weight, state.variances, counts)
    uniform = theory.variance_proxy(weight, state.variances, jnp.full_like(counts, cfg.mean_rollouts))
    best = theory.best_fixed_arms_loss(
        state.arm_losses, state.mass, jnp.array(cfg.arms, jnp.float32), cfg.mean_rollouts
    )
    return {
        "price": state.price,
        "variances": state.variances,
        "arm_per_bin": plan.per_bin,
        "arm_probability": plan.probability,
        "square_root_law": law,
        "forced_uniform": plan.forced_uniform,
        "forced_uniform_share": state.forced.astype(jnp.float32) / steps,
        "variance_proxy": proxy,
        "variance_proxy_uniform": uniform,
        "arm_regret": state.played - best,
        "arm_regret_bound": cfg.num_bins * theory.exp3p_regret_bound(len(cfg.arms), state.step),
    }
