"""Names, settings and the messages for what is not one of them."""

import jax
import numpy as np
import pytest

from gdro_jax import controllers
from gdro_jax.controllers import difficulty, prompt_gdro, rollout_gdro, rules

SIZE = {"num_prompts": 50, "prompts_per_step": 10, "mean_rollouts": 4}


def test_names():
    wanted = {"uniform", "prompt_gdro", "rollout_gdro", "joint", "prompt_gdro_published", "rollout_gdro_published"}
    assert wanted | {"permuted_budgets", "random_weights"} <= set(controllers.names())


@pytest.mark.parametrize("name", controllers.names())
def test_every_setting_is_accepted_and_named_once(name):
    given = {key: value for key, value in controllers.settings(name).items() if value is not None}
    assert {"edges", "window", "statistic"} <= set(given)
    controllers.make(name, **SIZE, **given)


def test_published_settings_are_section_9():
    got = controllers.settings("prompt_gdro_published")
    assert got["edges"] == (0.1, 0.2, 0.4, 0.6, 0.8, 0.9)
    assert (got["window"], got["hysteresis"], got["statistic"], got["signal"]) == (100, 0.03, "any", "surrogate")
    assert (got["ema"], got["step_size"], got["exploration"], got["weight_cap"]) == (0.12, 0.65, 0.01, 15.0)
    assert got["weights"] == "published"
    got = controllers.settings("rollout_gdro_published")
    assert len(got["edges"]) == 9
    assert (got["window"], got["ema"], got["dual_step_size"], got["utility"]) == (50, 0.4, 0.05, "surrogate")
    assert (got["selection"], got["dual"], got["per_prompt"]) == ("argmax", "exact", False)


def test_prefixes():
    joint = controllers.settings("joint")
    assert {"prompt_step_size", "rollout_step_size", "prompt_ema", "rollout_ema", "min_rollouts"} <= set(joint)
    assert "step_size" not in joint
    controllers.make("joint", **SIZE, prompt_step_size=1.0, rollout_step_size=0.1)
    controllers.make("prompt_gdro", **SIZE, step_size=1.0, difficulty_window=5)
    controllers.make("rollout_gdro", **SIZE, rollout_ema=0.1, difficulty_k=4)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("promt_gdro", {}, "unknown rule 'promt_gdro' .did you mean 'prompt_gdro'"),
        ("zzz", {}, "unknown rule 'zzz'; known: uniform"),
        ("prompt_gdro", {"step_sise": 1.0}, "no setting 'step_sise' .did you mean 'step_size'"),
        ("uniform", {"utility": "variance"}, "rule 'uniform' has no setting 'utility'"),
        ("uniform", {"signal": "error"}, "rule 'uniform' has no setting 'signal'"),
        ("rollout_gdro", {"signal": "error"}, "has no setting 'signal'"),
        ("joint", {"ema": 0.1}, "ambiguous: say 'prompt_ema' or 'rollout_ema'"),
        ("prompt_gdro", {"ema": 0.1, "prompt_ema": 0.2}, "are the same"),
        ("prompt_gdro", {"num_bins": 3}, "has no setting 'num_bins'"),
        ("prompt_gdro", {"signal": "reward"}, "signal='reward'"),
        ("prompt_gdro", {"ema": 2.0}, "ema=2.0"),
        ("prompt_gdro", {"use_current_batch": 1}, "use_current_batch=1"),
        ("rollout_gdro", {"min_rollouts": 5}, "min_rollouts=5 is not allowed: it must be at most mean_rollouts=4"),
        ("rollout_gdro", {"max_rollouts": 3}, "max_rollouts=3 is not allowed: it must be at least mean_rollouts=4"),
        ("rollout_gdro", {"edges": (0.5, 0.1)}, "edges="),
        ("uniform", {"statistic": "pass_at_k"}, "k=8 is not allowed: it must be at most mean_rollouts=4"),
        ("joint", {"statistic": "pass_at_k", "k": 3}, "k=3 is not allowed: it must be at most min_rollouts=2"),
    ],
)
def test_errors(name, settings, said):
    with pytest.raises(ValueError, match=said):
        controllers.make(name, **SIZE, **settings)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_prompts", 0), ("num_prompts", 9), ("prompts_per_step", 0), ("mean_rollouts", 0), ("mean_rollouts", 2.5)],
)
def test_bad_sizes(field, value):
    for name in ("uniform", "rollout_gdro"):
        with pytest.raises(ValueError, match=r"num_prompts=|prompts_per_step=|mean_rollouts="):
            controllers.make(name, **(SIZE | {field: value}))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": prompt_gdro.Config(3)}, "prompt.num_bins=3 is not allowed: it must be 10, that of difficulty"),
        ({"rollout": rollout_gdro.Config(9)}, "rollout.num_bins=9 is not allowed: it must be 10"),
        ({"rollout": rollout_gdro.Config(10, 8)}, "rollout.mean_rollouts=8 is not allowed: it must be mean_rollouts=4"),
        ({"shuffle": "bins"}, "shuffle='bins' is not allowed: it must be None, 'weights' with"),
        ({"shuffle": "weights", "rollout": rollout_gdro.Config(10)}, "shuffle='weights' is not allowed"),
        ({"shuffle": "budgets"}, "shuffle='budgets' is not allowed"),
    ],
)
def test_parts_that_do_not_fit_together(given, said):
    with pytest.raises(ValueError, match=said):
        rules.Config(**SIZE, difficulty=difficulty.Config(), **given)


def test_one_rollout_a_prompt_is_possible():
    rule = controllers.make("rollout_gdro", num_prompts=9, prompts_per_step=3, mean_rollouts=1)
    plan, _ = jax.jit(rule.plan)(rule.init(jax.random.key(0)), np.arange(3, dtype=np.int32), jax.random.key(1))
    assert plan.rollouts.tolist() == [1, 1, 1]
