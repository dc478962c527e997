"""Every setting of every rule acts in some configuration: the table says in which."""

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from gdro_jax import controllers

N, P = 24, 12
DRAWN = {"selection": "sample", "utility": "surrogate"}
# setting: the rule, the settings beside it without which it would not act, and a value that is not the default
ACTS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "edges": ("uniform", {}, (0.6,)),
    "window": ("uniform", {"statistic": "any"}, 1),
    "hysteresis": ("uniform", {"statistic": "any"}, 0.45),
    "statistic": ("uniform", {}, "any"),
    "k": ("uniform", {}, 1),
    "unseen": ("uniform", {}, "hardest"),
    "prior": ("uniform", {}, (9.0, 1.0)),
    "credible": ("uniform", {}, 0.05),
    "prompt_step_size": ("prompt_gdro", {}, 3.0),
    "prompt_ema": ("prompt_gdro", {}, 1.0),
    "prompt_exploration": ("prompt_gdro", {"weights": "released"}, 0.5),
    "score_clip": ("prompt_gdro", {}, 0.1),
    "weight_cap": ("prompt_gdro", {}, 1.1),
    "divide_by_share": ("prompt_gdro", {}, True),
    "share_floor": ("prompt_gdro", {"divide_by_share": True}, 1.0),
    "ema_debias": ("prompt_gdro", {}, False),
    "weights": ("prompt_gdro", {}, "published"),
    "signal": ("prompt_gdro", {}, "surrogate"),
    "use_current_batch": ("random_weights", {}, True),
    "rollout_step_size": ("rollout_gdro", DRAWN, 9.0),
    "rollout_exploration": ("rollout_gdro", DRAWN | {"step_size": 9.0}, 1.0),
    "rollout_ema": ("rollout_gdro", {}, 1.0),
    "dual": ("rollout_gdro", DRAWN | {"dual_step_size": 50.0}, "relaxed"),
    "dual_step_size": ("rollout_gdro", DRAWN | {"dual": "relaxed"}, 500.0),
    "utility": ("rollout_gdro", {}, "coverage"),
    "selection": ("rollout_gdro", {}, "sample"),
    "per_prompt": ("rollout_gdro", {}, False),
    "min_rollouts": ("rollout_gdro", {"statistic": "pass_at_k", "k": 2}, 3),
    "max_rollouts": ("rollout_gdro", {"statistic": "pass_at_k", "k": 2}, 5),
}


@cache
def _history(name: str, settings: tuple[tuple[str, Any], ...]) -> np.ndarray:
    """Bins, counts and weights, before and after the update, of four steps; without jit, which compiles far less."""
    rule = controllers.make(name, num_prompts=N, prompts_per_step=P, mean_rollouts=4, **dict(settings))
    state, seen = rule.init(jax.random.key(0)), []
    for step in range(4):
        rng = np.random.default_rng(step)
        ids = rng.permutation(N)[:P].astype(np.int32)
        plan, state = rule.plan(state, ids, jax.random.key(step))
        n = np.asarray(plan.rollouts)
        c = np.minimum(np.round(rng.random(P) * 0.3 * n + (ids / N) ** 2 * n), n).astype(np.int32)
        variance = np.where(n > 1, (c / n) * (1 - c / n) * n / np.maximum(n - 1, 1), np.nan).astype(np.float32)
        signal = (rng.normal(size=P) + ids / N).astype(np.float32)
        state = rule.update(state, plan, controllers.Outcome(c, n, 0 * n, signal, variance))
        seen.append(np.stack([np.asarray(x) for x in (plan.bins, n, plan.weights, rule.reweigh(state, plan))]))
    return np.stack(seen)


def test_the_table_is_complete():
    known = set().union(*(controllers.settings(name) for name in controllers.names()))
    twice = {"step_size", "ema", "exploration"}  # joint has them once for each adversary
    assert set(ACTS) == known - twice


@pytest.mark.parametrize("setting", list(ACTS))
def test_every_setting_acts(setting):
    name, beside, value = ACTS[setting]
    field = setting if setting in controllers.settings(name) else setting.split("_", 1)[1]
    assert controllers.settings(name)[field] != value
    before = _history(name, tuple(beside.items()))
    assert (_history(name, (*beside.items(), (field, value))) != before).any()
