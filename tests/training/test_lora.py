"""Low-rank adapters: the base at first, trained and checkpointed alone, sampled from, merged on export."""

import shutil

import jax
import numpy as np
import pytest

from gdro_jax.models import hf, lora, qwen3
from gdro_jax.training import config_io, setup, step
from gdro_jax.training.export import export

LOW = ("model.lora_rank=2", "model.lora_alpha=4")


def train(trainer, stop_at: int | None = None) -> None:
    """Runs and closes."""
    try:
        trainer.run(lambda record: None, lambda: stop_at is not None and trainer.step >= stop_at)
    finally:
        trainer.close()


def assert_equal(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def logprobs(trainer, model: qwen3.Qwen3, out) -> np.ndarray:
    """What the trainer makes of rollouts of all prompts, a response each."""
    index = np.arange(len(trainer.tokens))
    seen = step.response_logprobs(model, trainer.tokens, trainer.mask, index, out.tokens, out.mask, 1.0)[0]
    return np.where(out.mask, seen, 0)


def rollouts(trainer):
    index = np.arange(len(trainer.tokens))
    return trainer._sampler.rows(trainer.tokens, trainer.mask, index, index, jax.random.key(3))


@pytest.mark.slow
def test_adapters_alone_are_trained_and_checkpointed(configure, launch, tmp_path):
    config = configure(*LOW, "run.save_model=true", output="whole")
    trainer = launch(config)
    base, learner = trainer.reference, trainer.state.learner
    assert isinstance(learner.model, lora.Adapters) and set(learner.model.arrays) == {
        f"{name}_{side}" for name in lora.TARGETS for side in "ab"
    }
    assert_equal(qwen3.working(trainer._policy()).arrays(), base.arrays())  # step 0 is the base
    before = jax.tree.map(np.asarray, base)
    train(trainer)
    after = trainer.state.learner.model
    assert all(np.abs(x).max() > 0 for x in after.arrays.values())
    assert_equal(jax.tree.map(np.asarray, base), before)
    sizes = {x.size for x in jax.tree.leaves(trainer.state.learner)}
    assert max(sizes) == max(x.size for x in jax.tree.leaves(after))  # the optimiser holds nothing of the base

    policy = qwen3.working(trainer._policy())
    for name, array in policy.arrays().items():
        want = before.arrays()[name]
        if name in lora.TARGETS:
            a, b = (np.asarray(after.arrays[f"{name}_{side}"]) for side in "ab")
            want = want + 2.0 * np.einsum("lir,lro->lio", a, b)
            assert np.abs(want - before.arrays()[name]).max() > 1e-3
        np.testing.assert_allclose(array, want, atol=1e-6, err_msg=name)
    assert_equal(hf.load(tmp_path / "whole" / "model").arrays(), policy.arrays())
    assert_equal(hf.load(export(str(tmp_path / "whole"), str(tmp_path / "out"))).arrays(), policy.arrays())

    trainer._sampler.update(trainer._policy())
    out = rollouts(trainer)
    np.testing.assert_allclose(
        logprobs(trainer, trainer._policy(), out), np.where(out.mask, out.logprobs, 0), atol=2e-5
    )
    unlike = logprobs(trainer, base, out) - np.where(out.mask, out.logprobs, 0)
    assert np.abs(unlike).max() > 1e-3  # it was not the base that was sampled from


def test_adapters_go_on_no_other_base(configure, launch, tmp_path, tiny_folder):
    """A base that became another since would make a model of the two that nobody trained."""
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    config = configure(*LOW, f"model.path={model}")
    trainer = launch(config)
    trainer.save()
    trainer.close()
    whole = export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert_equal(hf.load(whole).arrays(), hf.load(tiny_folder).arrays())
    changed = jax.tree.map(lambda x: x * 1.01, hf.load(tiny_folder))
    hf.save(changed, model, tokenizer_from=tiny_folder)
    with pytest.raises(setup.InputError, match="are not the weights that the run began with"):
        export(str(tmp_path / "run"), str(tmp_path / "again"))
    with pytest.raises(setup.InputError, match=r"model\.path=.*: are not the weights that the run in run\.output="):
        launch(config)
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_was_not_stopped(configure, launch, tmp_path):
    whole, part = (configure(*LOW, "train.kl_coef=0", output=name) for name in ("whole", "part"))
    trainer = launch(whole)
    train(trainer)
    train(launch(part), stop_at=1)
    again = launch(part)
    assert again.step == 1
    train(again)
    assert_equal(again.state, trainer.state)


def test_options_reach_the_adapters(configure):
    given = configure("model.lora_rank=3", "model.lora_alpha=12", "model.lora_targets=q_proj, up_proj").model
    cfg = setup.architecture(given) if hasattr(setup, "architecture") else setup.load_policy(given).model.config
    found = setup.adapters(given, cfg, jax.random.key(0))
    assert found.scale == 4.0 and list(found.arrays) == ["q_proj_a", "q_proj_b", "up_proj_a", "up_proj_b"]
    assert found.arrays["q_proj_a"].shape == (cfg.num_layers, cfg.hidden_size, 3)
    assert found.arrays["up_proj_b"].shape == (cfg.num_layers, 3, cfg.intermediate_size)
    np.testing.assert_allclose(np.std(found.arrays["q_proj_a"]) * np.sqrt(cfg.hidden_size), 1, rtol=0.3)
    assert not found.arrays["up_proj_b"].any()


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([("model.lora_rank", "0")], "model.lora_rank=0: must be at least 1, or null"),
        ([("model.lora_rank", "2"), ("model.lora_targets", "embed")], "model.lora_targets='embed': must be all, or"),
        ([("model.lora_rank", "2"), ("model.lora_alpha", "0")], "model.lora_alpha=0.0: must be above 0"),
        ([("model.lora_alpha", "4")], "model.lora_alpha=4.0: must be 16.0 without model.lora_rank"),
        ([("model.lora_targets", "q_proj")], "model.lora_targets='q_proj': must be all without model.lora_rank"),
    ],
)
def test_bad_options_are_named(pairs, words):
    with pytest.raises(config_io.ConfigError, match=words):
        config_io.load(None, pairs)
