"""Updates that are left out: counted in a row and in all, and past the limit a clear end with the batch kept."""

import numpy as np
import pytest

from gdro_jax.training import batching, guard, packing, step
from gdro_jax.training.config import TrainConfig


def test_in_row_and_in_all():
    once = guard.LeftOut().after(np.array([True, False, False]))
    assert once == (2, 2, 2)
    assert once.after(np.array([False])) == (3, 3, 3) and once.after(np.array([False, True])) == (0, 3, 3)
    assert guard.LeftOut(5, 7, 5).after(np.array([True, False])) == (1, 8, 1)


def test_too_many_in_a_row_are_seen_where_the_last_of_the_step_was_applied(tmp_path):
    step = guard.LeftOut().after(np.array([True, False, False, True]))
    guard.check(step, 2, tmp_path, 7)
    with pytest.raises(guard.NotFiniteError, match="step 7: 2 updates in a row"):
        guard.check(step, 1, tmp_path, 7)
    guard.check(step.after(np.array([True])), 1, tmp_path, 8)  # a step ago


def test_a_batch_in_streams_is_kept_whole(tmp_path):
    counts, config = np.array([2, 3]), TrainConfig(microbatches=2, attention_tile=2)
    ones = {"prompt_mask": np.ones((2, 4), bool), "mask": np.ones((5, 3), bool), "scorable": np.ones(5, bool)}
    rewards = np.arange(5, dtype=np.float32)
    rows = batching.cut(counts, 1, np.random.default_rng(0))
    pieces = packing.pack_step(rows, config, ones["prompt_mask"], ones["mask"], rewards, ones["scorable"])
    batch = step.Batch(
        prompts=np.ones((2, 4), np.int32),
        weights=np.ones(2, np.float32),
        prompt_index=batching.flat_index(counts),
        tokens=np.ones((5, 3), np.int32),
        logprobs=np.full((5, 3), np.nan, np.float32),
        rewards=rewards,
        pieces=pieces,
        **ones,
    )
    guard.keep(tmp_path, 7, batch)
    with np.load(guard.batch_file(tmp_path, 7)) as kept:
        assert set(batch._fields) - {"pieces"} < set(kept)
        np.testing.assert_array_equal(kept["rewards"], rewards)
        np.testing.assert_array_equal(kept["pieces.rows"], pieces.rows)
        np.testing.assert_array_equal(kept["pieces.of_rows.steps"], pieces.of_rows.steps)
        np.testing.assert_array_equal(kept["pieces.of_prompts.ends"], pieces.of_prompts.ends)


def test_too_many_in_a_row_end_the_run_with_the_batch_kept(configure, launch):
    config = configure("train.max_skipped=1")
    trainer = launch(config)
    update = trainer._update

    def spoiled(learner, reference, batch, *rest):
        return update(learner, reference, batch._replace(logprobs=batch.logprobs * np.nan), *rest)

    spoiled.lower = update.lower
    trainer._update = spoiled
    before = np.asarray(trainer.state.learner.model.embed[...])
    records = []
    with pytest.raises(guard.NotFiniteError, match=r"step 2: 2 updates in a row .* train.max_skipped=1; .*step_2.npz"):
        trainer.run(records.append)
    assert [r["skipped"] for r in records] == [1.0]
    with np.load(guard.batch_file(trainer.folder, 2)) as kept:
        assert kept["tokens"].shape == kept["logprobs"].shape == (len(kept["rewards"]), 3)
        assert sorted(kept["pieces.rows"].reshape(-1).tolist()) == list(range(len(kept["rewards"])))
    np.testing.assert_array_equal(trainer.state.learner.model.embed[...], before)
    trainer.close()
    again = launch(config)
    assert again.step == 2 and again._left_out == (2, 2, 2)  # a run that goes on remembers
    assert again.run(records.append)
    assert [r["skipped"] for r in records] == [1.0, 1.0, 0.0] and again._left_out == (0, 2, 0)
    again._left_out = guard.LeftOut(2, 4, 2)  # as after a last step that ended it
    with pytest.raises(guard.NotFiniteError, match="step 3: 2 updates in a row"):
        again.run(records.append)
