"""The gate at the start of a run, and grading beside decoding."""

import threading

import jax
import numpy as np
import pytest

from gdro_jax.commands import BAD_INPUT_ERRORS
from gdro_jax.models import qwen3
from gdro_jax.sampling import Engine, Progress, Sampler, SamplingConfig
from gdro_jax.training import agreement, engines, overlap, setup
from gdro_jax.training.loop import Trainer

PROMPTS = np.array([[5, 9, 33], [70, 1, 0], [12, 0, 0]], np.int32)
MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)
INDEX = np.array([0, 0, 1, 2, 2])
KEY = jax.random.key(1)


def gap_of(engine: Engine, model: qwen3.Qwen3, temperature: float) -> agreement.Gap:
    return agreement.measure(engine, model, PROMPTS, MASK, INDEX, INDEX, KEY, temperature, 6, at_once=2)


def test_the_same_weights_agree_and_others_do_not(tiny_model):
    sampler = Sampler(tiny_model, SamplingConfig(max_new_tokens=6, temperature=0.8, stop_tokens=(3, 9)))
    gap = gap_of(sampler, tiny_model, 0.8)
    assert gap.mean <= gap.largest < 1e-5 and len(INDEX) <= gap.tokens <= 6 * len(INDEX)
    agreement.check(gap, 1e-5)
    moved = jax.tree.map(lambda x: x * 1.01 if x.ndim > 2 else x, tiny_model)
    stale, wrong_temperature = gap_of(sampler, moved, 0.8), gap_of(sampler, tiny_model, 1.0)
    for gap in (stale, wrong_temperature, agreement.Gap(float("nan"), float("nan"), 3)):
        with pytest.raises(
            agreement.Disagreement, match=r"sampling.gap_tolerance=0.001: sampler and trainer differ by"
        ):
            agreement.check(gap, 1e-3)


def test_a_stop_is_heeded_before_and_within_the_gate(configure, launch, monkeypatch):
    asked, sampled = [], []

    def stream(out, *_):
        for done in range(4):
            sampled.append(done)
            yield Progress(np.arange(0), done, 4, done, done)

    monkeypatch.setattr(Trainer, "try_update", lambda trainer: asked.append("update"))
    trainer = launch(configure("sampling.gap_tolerance=1e-4"))
    monkeypatch.setattr(trainer._sampler, "stream", stream)
    assert trainer.run(lambda _: None, lambda: "update" in asked) is False
    assert not sampled  # asked for while the update was compiled
    assert trainer.run(lambda _: None, lambda: len(sampled) > 1) is False
    assert sampled == [0, 1] and trainer.step == trainer.checkpoints.latest() == 0


@pytest.mark.slow
def test_a_cache_of_fewer_bits_moves_the_sampler_a_little(tiny_model, configure, launch):
    """Within the run's own tolerance, and measurably: the option is not without effect."""
    gaps = []
    for dtype in ("bfloat16", "int8"):
        config = SamplingConfig(max_new_tokens=6, temperature=0.8, cache_dtype=dtype)
        gaps.append(gap_of(Sampler(tiny_model, config), tiny_model, 0.8).mean)
    assert 1e-4 < gaps[0] < 0.05 and 1e-4 < gaps[1] < 0.05
    trainer = launch(configure("sampling.cache_dtype=int8"))
    assert trainer._sampler.config.cache_dtype == "int8"


def test_a_run_may_keep_its_cache_in_pages(tiny_model, configure, monkeypatch):
    """What is sampled is the trainer's own distribution still; pages are as long as is said."""
    config = configure("sampling.cache=paged", "sampling.page_tokens=5", "sampling.max_new_tokens=6").sampling.build(
        stop_tokens=(3, 9)
    )
    sampler = engines.sampler(tiny_model, config)
    assert sampler.reader == "gather" and sampler.config.page_tokens == 5
    assert gap_of(sampler, tiny_model, 1.0).largest < 1e-5
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(setup.InputError, match=r"sampling\.cache='paged': needs heads of a multiple of 128 on a TPU"):
        engines.sampler(tiny_model, config)


def test_a_run_whose_sampler_disagrees_does_not_start(configure, launch):
    trainer = launch(configure("sampling.gap_tolerance=1e-4"))
    assert trainer.check_agreement().largest < 1e-4
    assert trainer._sampler._model is trainer.state.learner.model  # the same arrays, no copy
    trainer._sampler.update = lambda model: None  # the sampler keeps old weights
    trainer._sampler._model = jax.tree.map(lambda x: x * 1.1, trainer.state.learner.model)
    records = []
    with pytest.raises(agreement.Disagreement, match=r"gap_tolerance=0\.0001") as caught:
        trainer.run(records.append)
    assert "\n" not in str(caught.value) and isinstance(caught.value, BAD_INPUT_ERRORS)
    assert not records and trainer.step == 0 and trainer.checkpoints.latest() is None
    trainer.close()
    launch(configure("sampling.gap_tolerance=1")).close()  # who allows more may go on in the same folder
    unchecked = launch(configure(output="unchecked"))  # its tolerance is null
    assert unchecked.check_agreement() is None


@pytest.mark.slow
def test_segments_are_handed_to_the_grader_as_they_end(configure, launch):
    """Rows of an early segment are graded before sampling is over, on another thread; the grades are the same."""
    records = {}
    for segment in (1, 32):
        trainer = launch(configure(f"sampling.segment={segment}", "run.steps=1", output=f"run{segment}"))
        calls, grade = [], trainer.verifier.grade

        def watched(responses, answers, calls=calls, grade=grade):
            calls.append((len(responses), threading.current_thread()))
            return grade(responses, answers)

        trainer.verifier.grade = watched
        records[segment] = trainer.one_step()
        assert sum(size for size, _ in calls) == 24
        assert all(thread is not threading.main_thread() for _, thread in calls)
        assert (len(calls) > 1) == (segment == 1)
    assert records[1]["reward"] == records[32]["reward"]
    np.testing.assert_allclose(records[1]["loss"], records[32]["loss"], atol=1e-5)


def test_a_verifier_that_fails_ends_the_step_with_its_cause(tiny_model):
    class Broken:
        def grade(self, responses, answers):
            raise RuntimeError("no verifier today")

    class Words:
        def batch_decode(self, ids, **settings):
            return [" ".join(map(str, row)) for row in ids]

    out = Sampler(tiny_model, SamplingConfig(max_new_tokens=2))([[1], [2]], [0, 1], KEY)
    with overlap.Grader(Broken(), Words(), (), ["1", "2"]) as grader, pytest.raises(RuntimeError, match="no verifier"):
        grader.submit(out, np.array([1, 0]))
        grader.result()
