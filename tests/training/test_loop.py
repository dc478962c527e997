"""Whole runs of the tiny policy: resuming, counting, compiling once, stopping, refusing."""

import heapq
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import transformers

from gdro_jax import rewards
from gdro_jax.data import prompts as prompt_data
from gdro_jax.models import hf
from gdro_jax.training import InputError, config_io, run_folder
from gdro_jax.training.loop import Trainer

SPREAD = ("controller.settings.statistic=pass_at_k", "controller.settings.k=1")  # bins fill from the second epoch on
SAMPLED = ("controller.name=joint", "controller.settings.selection=sample", "run.checkpoint_every=2", *SPREAD)
UNTIMED = ("seconds", "compile_seconds", "eval_seconds")


def train(trainer, stop_at: int | None = None) -> list[dict]:
    """Runs and closes."""
    records = []
    try:
        trainer.run(records.append, lambda: stop_at is not None and trainer.step >= stop_at)
    finally:
        trainer.close()
    return records


def logged(folder) -> list[dict]:
    """Log lines without what a clock or a compiler says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
        line.pop("compiles", None)
        line["ledger"] = {k: v for k, v in line["ledger"].items() if k not in UNTIMED}
    return lines


def assert_equal(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def heldout(tmp_path):
    file = tmp_path / "heldout.jsonl"
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "stratum": "ab"[i % 2]} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("eval.every=2", f"eval.data={file}", "eval.samples=2", "eval.k=2")


def test_a_resumed_run_is_the_run_that_was_not_stopped(configure, launch, heldout, tmp_path):
    """Six steps; three, a stop and three; and a run that died after its checkpoint, in the middle of a line."""
    whole = launch(configure(*SAMPLED, *heldout, "run.steps=6", output="whole"))
    assert train(whole)[-1]["step"] == 6
    first = list(whole.parts.train.tokens[0])
    shown = f"{len(first)} tokens: {' '.join(map(str, first))}\n0 prompts dropped as too long\n\n"
    shown += f"{whole.parts.policy.tokenizer.decode(first)}\n"
    assert (tmp_path / "whole" / "first_prompt.txt").read_text() == shown
    lines = logged(tmp_path / "whole")
    assert [line["step"] for line in lines] == list(range(7))
    assert [line["step"] for line in lines if "eval" in line] == [0, 2, 4, 6]
    assert lines[6]["controller"]["forced_uniform_share"] is not None
    counts = {tuple(line["bins"]["rollouts"]) for line in lines[1:]}
    assert len(counts) > 1  # the budget did move between bins
    for line in lines[1:]:  # the reward is a mean over prompts: a prompt with more rollouts counts no more
        share, reward = line["strata"]["share"], line["strata"]["reward"]
        assert line["reward"] == pytest.approx(sum(share[s] * reward[s] for s in share))

    config = configure(*SAMPLED, *heldout, "run.steps=6", output="parts")
    first = launch(config)
    assert first.run(lambda record: None, lambda: first.step >= 3) is False
    assert first.checkpoints.latest() == 3
    first.close()
    second = launch(config)
    assert second.step == 3
    assert_equal(second.state, first.state)
    train(second)
    assert_equal(second.state, whole.state)
    assert logged(tmp_path / "parts") == lines

    second.close()
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "6")  # as if it had been killed in step 6, half a line written
    metrics = tmp_path / "parts" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-100])
    third = launch(config)
    assert third.step == 4
    train(third)
    assert_equal(third.state, whole.state)
    assert logged(tmp_path / "parts") == lines


def test_a_run_without_a_checkpoint_starts_over(configure, launch, heldout, tmp_path):
    config = configure(*heldout, "run.steps=1")
    dead = launch(config)
    dead.log.write({"step": 0, "eval": {}, "ledger": {}})
    dead.log.write({"step": 1, "ledger": {}})
    dead.close()
    train(launch(config))
    assert (tmp_path / "run" / "metrics.jsonl.old").read_text().count("\n") == 2  # what was logged is set aside
    lines = logged(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[0]["ledger"]["eval_rollouts"] == 12 and lines[1]["ledger"]["eval_rollouts"] == 24


@pytest.mark.slow
def test_a_resumed_run_compiles_once_too(configure, launch):
    joint = ("controller.name=joint", "train.prompts_per_step=8")
    train(launch(configure(*joint, "run.steps=1")))
    records = train(launch(configure(*joint, "run.steps=3")))
    assert [(record["step"], record["unexpected_compiles"]) for record in records] == [(2, 0), (3, 0)]


def test_a_longer_run_goes_on_and_a_shorter_one_is_done(configure, launch, tmp_path):
    train(launch(configure("run.steps=2")))
    longer = launch(configure("run.steps=3"))
    assert longer.step == 2 and longer.run(lambda record: None) is True and longer.step == 3
    longer.close()
    shorter = launch(configure("run.steps=1"))
    assert shorter.run(lambda record: None) is True and shorter.step == 3
    assert [line["step"] for line in logged(tmp_path / "run")] == [1, 2, 3]


def test_a_folder_of_another_configuration_is_refused(configure, launch, tmp_path):
    train(launch(configure("run.steps=1")))
    before = (tmp_path / "run" / "config.yaml").read_text()
    for change in ("run.seed=1", "train.learning_rate=0.02", "controller.name=joint", "data.template=boxed"):
        with pytest.raises(InputError, match="holds a run of another configuration") as caught:
            launch(configure("run.steps=1", change))
        assert "\n" not in str(caught.value) and str(tmp_path / "run") in str(caught.value)
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    launch(configure("run.steps=2", "run.log_every=3", "run.keep_checkpoints=1"))  # these may change


def test_a_folder_that_another_process_trains_in_is_refused(configure, launch, tmp_path):
    first = launch(configure("run.steps=1"))
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(InputError, match=r"run\.output=.*run': another process is training in it"):
        launch(configure("run.steps=2"))
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    train(first)
    first.close()
    assert launch(configure("run.steps=2")).step == 1


FORCED = (
    "train.microbatches=2",
    "model.remat=products",
    "sampling.slots=5",
    "sampling.segment=2",
    "eval.problems_per_call=4",
)


def test_what_other_devices_force_may_differ_on_resume(configure):
    run_folder.claim(configure()).release()
    run_folder.check(configure(*FORCED))
    with pytest.raises(InputError, match=r"another configuration \(train\.minibatches=1, now 2\)"):
        run_folder.check(configure(*FORCED, "train.minibatches=2"))


@pytest.mark.slow
def test_a_run_resumed_with_what_other_devices_force_is_the_same_up_to_rounding(configure, launch, heldout):
    settings = (*SAMPLED, *heldout, "run.steps=4", "train.minibatches=2", "train.attention_tile=null")
    whole = train(launch(configure(*settings, output="whole")))
    parts = train(launch(configure(*settings, output="parts")), stop_at=2)
    parts += train(launch(configure(*settings, *FORCED, output="parts")))
    assert [record["step"] for record in parts] == [0, 1, 2, 3, 4]
    for a, b in zip(parts, whole, strict=True):
        assert a.get("eval") == b.get("eval")
        for name in ("loss", "grad_norm", "reward", "response_length", "logprob_gap") if a["step"] else ():
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-5)
        for name in ("rollouts", "tokens", "scored", "prompts"):
            assert a["ledger"][name] == b["ledger"][name]


def test_a_folder_that_lost_its_configuration_is_refused(configure, launch, tmp_path):
    train(launch(configure("run.steps=1")))
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"holds a run without its config\.yaml"):
        launch(configure("run.steps=1", "train.learning_rate=0.02"))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_file_where_the_checkpoints_go_is_refused(configure, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    with pytest.raises(InputError, match=r"run\.output=.*checkpoints must be a folder, it is a file"):
        run_folder.check(configure())


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "first_prompt.txt", "report.html", ".lock"])
def test_a_folder_where_a_file_of_the_run_goes_is_refused(configure, tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(InputError, match=rf"run\.output=.*/{name} must be a file, it is a folder"):
        run_folder.check(configure())


def test_a_log_that_does_not_fit_the_checkpoint_is_refused(configure, launch, tmp_path):
    train(launch(configure("run.steps=3")))
    file = tmp_path / "run" / "metrics.jsonl"
    first, *rest = file.read_text().splitlines(keepends=True)
    for text, words in (
        ("".join(rest), "holds no record of step 1, but there is a checkpoint of 3"),
        (first + "[]\n" + rest[1], r"metrics\.jsonl:2: not a record"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=words):
            launch(configure("run.steps=3"))
        assert file.read_text() == text


@pytest.mark.slow
def test_a_fault_leaves_a_checkpoint_of_the_last_whole_step(configure, launch, heldout, tmp_path):
    """A fault in step 3, and one in the last evaluation: the run goes on from there and ends as one without faults."""
    config = configure(*SAMPLED, *heldout, "run.steps=4", "run.checkpoint_every=null", output="parts")
    whole = launch(configure(*SAMPLED, *heldout, "run.steps=4", "run.checkpoint_every=null", output="whole"))
    train(whole)
    first = launch(config)
    lower = first._update.lower
    first._update = boom_after(first._update, 3)  # one tried before anything is sampled
    first._update.lower = lower
    with pytest.raises(RuntimeError, match="boom"):
        train(first)
    assert first.checkpoints.latest() == first.step == 2
    first.close()
    second = launch(config)
    assert second.step == 2
    second._evaluator = boom_after(second._evaluator, 0)
    with pytest.raises(RuntimeError, match="boom"):
        train(second)
    assert second.checkpoints.latest() == 4
    second.close()
    third = launch(config)
    assert [record["step"] for record in train(third)] == [4]  # only its evaluation was missing
    assert_equal(third.state, whole.state)
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


def boom_after(function, calls: int):
    left = [calls]

    def wrapped(*args, **kwargs):
        if not left[0]:
            raise RuntimeError("boom")
        left[0] -= 1
        return function(*args, **kwargs)

    return wrapped


def test_a_stop_asked_at_once_samples_nothing(configure, launch, heldout, tmp_path):
    trainer = launch(configure(*heldout))
    assert trainer.run(lambda record: None, lambda: True) is False
    assert logged(tmp_path / "run") == [] and trainer.checkpoints.latest() == 0


@pytest.mark.slow
def test_a_stop_while_sampling_leaves_within_a_segment(configure, launch, tmp_path):
    """The step that was under way is as if it had not begun; the run goes on as if it had not been stopped."""
    settings = ("run.steps=2", "run.checkpoint_every=null", "sampling.max_new_tokens=6", "sampling.segment=2")
    train(launch(configure(*settings, output="whole")))
    trainer, heard = launch(configure(*settings, output="parts")), []

    def hear(step, progress):
        heard.append((step, progress.done, progress.total))

    try:
        assert trainer.run(lambda record: None, lambda: bool(heard) and heard[-1][0] == 2, hear) is False
        assert trainer.step == 1 and trainer.checkpoints.latest() == 1
    finally:
        trainer.close()
    assert [step for step, _, _ in heard].count(2) == 1  # not a segment more
    assert heard[-1][1] < heard[-1][2]
    train(launch(configure(*settings, output="parts")))
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


@pytest.mark.parametrize(
    ("fields", "kept"),
    [(("train.kl_coef=0",), False), (("train.kl_coef=0.1",), True), (("train.kl_coef=0", "model.lora_rank=1"), True)],
)
def test_the_policy_of_the_start_is_kept_as_the_reference_alone(fields, kept, configure, launch, heldout, tmp_path):
    for release in (True, False):
        trainer = launch(configure(*fields, *heldout, "run.steps=1", output=str(release)), release=release)
        train(trainer)
        assert all(x.is_deleted() != (kept or not release) for x in jax.tree.leaves(trainer.parts.policy.model))
    assert logged(tmp_path / "True") == logged(tmp_path / "False")


def test_an_evaluation_is_watched_as_a_whole(configure, launch, heldout):
    """A call's end is none of the evaluation's, so a stop is heeded there."""
    trainer, seen = launch(configure(*heldout, "eval.problems_per_call=4")), []
    trainer._evaluator(trainer._policy(), jax.random.key(0), True, seen.append)
    assert {look.total for look in seen} == {12}
    done = [look.done for look in seen]
    assert 8 in done and done == sorted(done) and done[-1] == 12 and done.count(12) == 1


@pytest.mark.slow
def test_a_stop_while_evaluating_leaves_within_a_segment(configure, launch, heldout, tmp_path, monkeypatch):
    """The evaluation that was under way is as if it had not begun."""
    monkeypatch.setattr(Trainer, "try_update", lambda trainer: None)
    trainer, calls, heard = launch(configure(*heldout, "sampling.segment=1")), [], []
    stopped = trainer.run(lambda _: None, lambda: calls.append(0) or len(calls) > 4, lambda *seen: heard.append(seen))
    assert stopped is False and len(calls) == 5 and logged(tmp_path / "run") == []  # the fifth is its second look
    assert [step for step, _ in heard] == [0, 0] and all(seen.done < seen.total == 12 for _, seen in heard)
    assert trainer.checkpoints.latest() == 0


@pytest.mark.slow
def test_a_stop_while_evaluating_after_a_step_keeps_the_step(configure, launch, heldout, tmp_path):
    settings = (*heldout, "run.steps=2", "eval.every=1", "sampling.segment=1")
    train(launch(configure(*settings, output="whole")))
    trainer, calls = launch(configure(*settings, output="parts")), []

    def stop():
        calls.append(trainer.step == 1 and trainer._pending is not None)
        return sum(calls) == 3  # once before the evaluation, then at its looks

    assert trainer.run(lambda record: None, stop) is False
    assert trainer.step == trainer.checkpoints.latest() == 1 and len(logged(tmp_path / "parts")) == 1
    trainer.close()
    train(launch(configure(*settings, output="parts")))
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


def test_a_run_goes_on_with_the_problems_it_was_trained_on_alone(configure, launch, tmp_path):
    config = configure("run.steps=1")
    file = tmp_path / "twelve.jsonl"
    before = file.read_text()
    trainer = launch(config)
    train(trainer)
    trainer.close()
    for changed in (before.replace('"answer": "4"', '"answer": "5"'), before.replace("3+3=", "3*3="), before[::-1]):
        file.write_text(changed if changed != before[::-1] else "\n".join(before.splitlines()[::-1]) + "\n")
        with pytest.raises(InputError, match=r"data\.train=.*is not what the run in .* was trained on") as caught:
            launch(config)
        assert "\n" not in str(caught.value)
    file.write_text(before + "\n")  # a blank line is no problem
    assert launch(config).step == 1


def test_a_checkpoint_that_does_not_say_what_it_was_trained_on_is_taken(configure, launch):
    config = configure("run.steps=1")
    trainer = launch(config)
    train(trainer)
    counters = trainer.checkpoints.restore(1, trainer.state)[1]
    assert counters.pop("data") == trainer.parts.train.fingerprint
    trainer.checkpoints.save(2, trainer.state, counters)
    trainer.close()
    assert launch(config).step == 2


def test_the_step_compiles_once(configure, launch, watch_update):
    sample = ("controller.name=rollout_gdro", "controller.settings.selection=sample", *SPREAD)
    trainer = launch(configure(*sample, "run.steps=5", "train.minibatches=2"))
    update = watch_update(trainer)
    records = train(trainer)
    assert update.compiled == [0] * 6  # it was, and tried, before anything was sampled
    compiles = [record["compiles"] for record in records]
    assert compiles[1] > 0 and compiles[1:] == [compiles[1]] * 4  # none after the second step
    uneven = [record["bins"]["rollouts"] for record in records]
    assert any(np.nanmax(r) > np.nanmin(r) for r in uneven)  # although groups were uneven
    assert trainer.compiles.count == compiles[-1]


def test_another_run_of_the_same_settings_compiles_nothing(configure, launch, heldout):
    for output in ("one", "two"):
        trainer = launch(configure(*heldout, "controller.name=joint", "run.steps=2", output=output))
        records = train(trainer)
    assert records[-1]["step"] == 2 and trainer.compiles.count == 0


MANY = pytest.param(("train.attention_tile=4", "train.minibatches=2", "train.optimiser=muon"), marks=pytest.mark.slow)


@pytest.mark.parametrize("options", [(), MANY])
def test_the_update_that_is_tried_leaves_no_trace(options, configure, launch):
    trainer = launch(configure("train.weight_decay=0.1", *options))
    before = jax.tree.map(np.array, trainer.state.learner)
    trainer.try_update()
    jax.tree.map(np.testing.assert_array_equal, trainer.state.learner, before)


@pytest.mark.parametrize("when", ["compiled", "run"])
def test_an_update_that_does_not_fit_is_seen_before_anything_is_sampled(when, configure, launch, monkeypatch):
    trainer = launch(configure())

    def refuse(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20G of 16G.\nand a page of details")

    if when == "compiled":
        trainer._update = SimpleNamespace(lower=lambda *args: SimpleNamespace(compile=refuse))
    else:
        refuse.lower = trainer._update.lower
        trainer._update = refuse
    monkeypatch.setattr(trainer._sampler, "stream", lambda *args: pytest.fail("sampled"))
    says = (
        r"^train.microbatches=1: the update does not fit a device \(RESOURCE_EXHAUSTED: Used 20G of 16G.\); `gdro plan`"
    )
    with pytest.raises(InputError, match=says) as caught:
        trainer.run(lambda record: None)
    assert "\n" not in str(caught.value)


def refilled_steps(lengths: np.ndarray, slots: int) -> int:
    """Steps until the last row ends where each row takes the slot that is free first."""
    ends = [0] * slots
    for length in lengths.tolist():
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def test_ledger_and_record(configure, launch, tmp_path):
    """Every total is what the responses of all steps add up to, and the record says the same of its own step."""
    trainer = launch(configure("sampling.slots=4", "data.max_unscorable=1.0"), None)
    trainer.verifier = type(trainer.verifier)(unscorable=5)
    masks, scorable, plans = [], [], []
    collect = trainer._collect

    def watched(clock, watch):
        out = collect(clock, watch)
        masks.append(np.asarray(out.rollouts.mask))
        scorable.append(out.grades.scorable)
        plans.append(out.plan)
        return out

    trainer._collect = watched
    records = train(trainer)
    for step, record in enumerate(records, 1):
        ledger = record["ledger"]
        assert ledger["rollouts"] == 24 * step and ledger["prompts"] == 6 * step and ledger["eval_rollouts"] == 0
        assert ledger["tokens"] == sum(int(m.sum()) for m in masks[:step])
        assert ledger["scored"] == sum(int(s.sum()) for s in scorable[:step]) <= ledger["rollouts"]
        assert ledger["slot_steps"] == sum(4 * refilled_steps(m.sum(1), 4) for m in masks[:step])
        now = masks[step - 1].sum(1)
        assert record["useful_slot_steps"] == pytest.approx(now.sum() / (4 * refilled_steps(now, 4)))
        assert record["unscorable"] == pytest.approx(1 - scorable[step - 1].mean())
        assert record["response_length"] == pytest.approx(masks[step - 1].sum(1).mean())
        assert record["bins"]["share"].sum() == pytest.approx(1)
        assert record["strata"]["share"].keys() == {trainer.strata[i] for i in plans[step - 1].prompt_ids}
        assert record["logprob_gap"] < 1e-4
        assert record["seconds"]["total"] == pytest.approx(sum(v for k, v in record["seconds"].items() if k != "total"))
    assert sum(int((~s).sum()) for s in scorable) > 0
    seen = [int(i) for plan in plans for i in plan.prompt_ids]
    assert seen == [int(i) for k in range(3) for i in prompt_data.order(0, 6 * k, len(trainer.strata), 6)]


def test_too_many_unscorable_responses_stop_the_run(configure, launch):
    trainer = launch(configure("data.max_unscorable=0.1"))
    trainer.verifier = type(trainer.verifier)(unscorable=2)
    with pytest.raises(rewards.UnscorableError, match=r"step 1: \d+% .*data\.max_unscorable=0\.1.*no mood to grade"):
        train(trainer)


def test_weights_of_the_current_batch_are_used_and_logged(configure, launch):
    """With `use_current_batch` a step's weights are those of the state after it; the log shows what was used."""
    now = ("controller.name=prompt_gdro", "controller.settings.use_current_batch=true", *SPREAD)
    trainer = launch(configure(*now, "run.steps=3"))
    update, learn = trainer._update, trainer._learn
    used, after = [], []

    def watched_update(learner, reference, batch, *more):
        used.append(np.asarray(batch.weights))
        return update(learner, reference, batch, *more)

    def watched_learn(collected, clock):
        out = learn(collected, clock)
        after.append((collected.plan, np.asarray(trainer.parts.rule.reweigh(out[2], collected.plan))))
        return out

    watched_update.lower = update.lower
    trainer._update, trainer._learn = watched_update, watched_learn
    records = train(trainer)
    assert np.isnan(used.pop(0)).all()  # of the update that is tried before anything is sampled
    for record, weights, (plan, want) in zip(records, used, after, strict=True):
        np.testing.assert_allclose(weights, want, rtol=1e-6)
        for b in set(plan.bins.tolist()):
            assert record["bins"]["weight"][b] == pytest.approx(weights[plan.bins == b].mean(), rel=1e-5)
    assert max(w.max() - w.min() for w in used) > 0.01
    assert any(np.abs(w - plan.weights).max() > 1e-3 for w, (plan, _) in zip(used, after, strict=True))


def test_saved_model_is_the_trained_policy(configure, launch, tmp_path, tiny_model):
    trainer = launch(configure("run.steps=1", "run.save_model=true"))
    train(trainer)
    model = hf.load(tmp_path / "run" / "model")
    assert_equal(model.arrays(), trainer.state.learner.model.arrays())
    assert model.config == trainer.state.learner.model.config
    assert any(
        (np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (model, tiny_model)), strict=True)
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    stops = prompt_data.stop_tokens(tmp_path / "run" / "model", tokenizer)
    assert stops == trainer.parts.policy.stop_tokens == (1,)
    assert config_io.load(tmp_path / "run" / "config.yaml") == trainer.config


@pytest.mark.slow
def test_nothing_compiles_in_two_hundred_steps(configure, launch):
    """Uneven groups, rows that enter and leave slots: all compiled in the first step."""
    sample = ("controller.name=rollout_gdro", "controller.settings.selection=sample", *SPREAD)
    sampling = ("sampling.slots=8", "sampling.max_new_tokens=40", "sampling.segment=8")
    trainer = launch(configure(*sample, *sampling, "run.steps=200", "train.minibatches=2"))
    records = train(trainer)
    assert [record["step"] for record in records] == list(range(1, 201))
    assert {record["unexpected_compiles"] for record in records} == {0}
    assert len({record["compiles"] for record in records[1:]}) == 1
    assert len({record["response_length"] for record in records}) > 10
