"""Every option does something: a table of all, each with the test that shows it, and the tests not found elsewhere."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from gdro_jax.data import prompts
from gdro_jax.data.sources import DataError
from gdro_jax.evaluation.run import Graded
from gdro_jax.rewards import UnscorableError
from gdro_jax.training import Config, InputError, evaluator, inputs, setup

TESTS = pathlib.Path(__file__).parent.parent
LOSS, ADAM = (
    "training/test_step.py::test_every_option_of_the_loss_acts",
    "training/test_optimiser.py::test_adam_by_hand",
)
RATE = "training/test_optimiser.py::test_the_rate_falls_by_line_or_cosine_to_its_floor"
LONGER = "training/test_loop.py::test_a_longer_run_goes_on_and_a_shorter_one_is_done"
WHOLE = "training/test_loop.py::test_a_resumed_run_is_the_run_that_was_not_stopped"
HERE = "training/test_options.py::test_"
SHOWN = {
    "run.output": LONGER,
    "run.seed": HERE + "seed",
    "run.steps": LONGER,
    "run.checkpoint_every": WHOLE,
    "run.keep_checkpoints": "training/test_records.py::test_checkpoints_are_exact",
    "run.log_every": "training/test_records.py::test_progress_off_a_terminal_is_a_line_every_few_steps",
    "run.save_model": "training/test_loop.py::test_saved_model_is_the_trained_policy",
    "model.path": HERE + "model_options",
    "model.dtype": HERE + "precision",
    "model.param_dtype": HERE + "precision",
    "model.remat": "models/test_remat.py::test_the_configuration_reaches_the_model",
    "model.attention": "models/test_attention.py::test_the_configuration_reaches_the_model",
    "model.lora_rank": "training/test_lora.py::test_adapters_alone_are_trained_and_checkpointed",
    "model.lora_alpha": "training/test_lora.py::test_options_reach_the_adapters",
    "model.lora_targets": "training/test_lora.py::test_options_reach_the_adapters",
    "model.tokenizer": HERE + "model_options",
    "model.random_init": HERE + "model_options",
    "data.train": HERE + "data_options",
    "data.prompt_column": HERE + "data_options",
    "data.answer_column": HERE + "data_options",
    "data.stratum_column": HERE + "data_options",
    "data.on_bad_row": HERE + "bad_rows",
    "data.template": HERE + "data_options",
    "data.chat": HERE + "chat",
    "data.max_prompt_tokens": HERE + "overlong_prompts",
    "data.overlong": HERE + "overlong_prompts",
    "data.gold_check": "training/test_inputs.py::test_gold_answers_are_checked_and_named_by_line",
    "data.contamination": "training/test_inputs.py::test_duplicates_and_overlaps_are_reported_dropped_or_refused",
    "data.benchmarks": "training/test_inputs.py::test_duplicates_and_overlaps_are_reported_dropped_or_refused",
    "data.mixture": "training/test_inputs.py::test_a_mixture_of_files_and_tasks",
    "data.loader": "training/test_inputs.py::test_a_mixture_of_files_and_tasks",
    "reward.overlong_buffer": "training/test_inputs.py::test_rewards_are_shaped_and_grades_are_not",
    "reward.overlong_penalty": "training/test_inputs.py::test_rewards_are_shaped_and_grades_are_not",
    "reward.format_reward": "training/test_inputs.py::test_a_box_is_rewarded_if_asked",
    "eval.max_new_tokens": HERE + "evaluation_options",
    "eval.template": HERE + "evaluation_options",
    "eval.problems_per_call": HERE + "evaluation_options",
    "data.verifier": HERE + "verifier_options",
    "data.verifier_workers": HERE + "verifier_options",
    "data.verifier_timeout": HERE + "verifier_options",
    "data.max_unscorable": "training/test_loop.py::test_too_many_unscorable_responses_stop_the_run",
    "controller.name": HERE + "controller_options",
    "controller.mean_rollouts": HERE + "controller_options",
    "controller.settings": HERE + "controller_options",
    "train.attention_tile": "training/test_packing.py::test_prompts_go_in_several_pieces",
    "mesh.data": "training/test_mesh_run.py::test_by_default_all_devices_are_taken",
    "mesh.fsdp": "training/test_mesh_run.py::test_a_step_on_eight_devices_is_the_step_on_one",
    "mesh.tensor": "training/test_mesh_run.py::test_a_step_on_eight_devices_is_the_step_on_one",
    "sampling.max_new_tokens": "sampling/test_sampler.py::test_one_new_token",
    "sampling.temperature": "sampling/test_sampler.py::test_log_probs_are_the_full_logits_and_the_trainers",
    "sampling.top_p": "training/test_config.py::test_ranges",  # training refuses to truncate; evaluation may
    "sampling.top_k": "training/test_config.py::test_ranges",
    "sampling.min_p": "training/test_config.py::test_ranges",
    "sampling.min_new_tokens": "training/test_config.py::test_ranges",
    "sampling.cache_dtype": "training/test_agreement.py::test_a_cache_of_fewer_bits_moves_the_sampler_a_little",
    "sampling.cache": "training/test_agreement.py::test_a_run_may_keep_its_cache_in_pages",
    "sampling.page_tokens": "training/test_agreement.py::test_a_run_may_keep_its_cache_in_pages",
    "sampling.cache_tokens": "sampling/test_refill.py::test_stages_in_pages",
    "sampling.segment": "training/test_agreement.py::test_segments_are_handed_to_the_grader_as_they_end",
    "sampling.gap_tolerance": "training/test_agreement.py::test_a_run_whose_sampler_disagrees_does_not_start",
    "sampling.server": "training/test_served.py::test_a_run_by_a_served_model_brings_it_every_policy",
    "sampling.server_folder": "training/test_served.py::test_a_run_by_a_served_model_brings_it_every_policy",
    "sampling.server_model": "training/test_served.py::test_a_run_by_a_served_model_brings_it_every_policy",
    "sampling.server_timeout": "training/test_served.py::test_what_goes_wrong_is_one_line",
    "sampling.slots": "training/test_loop.py::test_ledger_and_record",
    "train.prompts_per_step": HERE + "controller_options",
    "train.minibatches": "training/test_step.py::test_minibatches_are_updates_in_turn",
    "train.microbatches": "training/test_step.py::test_microbatches_change_nothing",
    "train.learning_rate": ADAM,
    "train.warmup_steps": "training/test_optimiser.py::test_warm_up_is_linear_then_constant",
    "train.optimiser": "training/test_optimiser.py::test_muon_takes_the_blocks_matrices_and_adam_the_rest",
    "train.moment_dtype": "training/test_optimiser.py::test_the_first_moment_may_be_bfloat16",
    "train.decay": RATE,
    "train.decay_steps": RATE,
    "train.final_rate": RATE,
    "train.max_skipped": "training/test_guard.py::test_too_many_in_a_row_end_the_run_with_the_batch_kept",
    "train.ratio_level": LOSS,
    "train.importance_cap": "training/test_step.py::test_importance_weights_make_up_for_another_sampler",
    "train.adam_b1": ADAM,
    "train.adam_b2": ADAM,
    "train.adam_eps": ADAM,
    "train.weight_decay": ADAM,
    "train.max_grad_norm": ADAM,
    "train.kl_coef": LOSS,
    "train.kl_estimator": LOSS,
    "train.clip_low": LOSS,
    "train.clip_high": LOSS,
    "train.dual_clip": LOSS,
    "train.aggregate": LOSS,
    "train.row_weighting": LOSS,
    "train.advantage_scale": LOSS,
    "train.advantage_baseline": LOSS,
    "train.advantage_clip": LOSS,
    "eval.data": WHOLE,
    "eval.every": WHOLE,
    "eval.samples": HERE + "evaluation_options",
    "eval.k": HERE + "evaluation_options",
    "eval.temperature": HERE + "evaluation_options",
    "eval.top_p": HERE + "evaluation_options",
    "eval.top_k": HERE + "evaluation_options",
    "eval.min_p": HERE + "evaluation_options",
    "eval.min_new_tokens": HERE + "evaluation_options",
    "eval.problems_per_stratum": HERE + "evaluation_options",
    "compare.output": "test_cli.py::test_compare",
    "compare.seeds": "test_cli.py::test_compare",
    "compare.methods": "test_cli.py::test_compare",
}


def test_the_table_is_complete():
    config = Config()
    fields = {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(config)
        for field in dataclasses.fields(getattr(config, section.name))
    }
    assert set(SHOWN) == fields
    for field, test in SHOWN.items():
        file, name = test.split("::")
        assert f"def {name}(" in (TESTS / file).read_text(), field


def problems_file(tmp_path, rows) -> str:
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_seed(configure, launch):
    one, two = (launch(configure(f"run.seed={seed}", output=f"run{seed}")) for seed in (1, 2))
    keys = [jax.random.key_data(t._fold(purpose, 1)).tolist() for t in (one, two) for purpose in range(5)]
    assert len({tuple(k) for k in keys}) == 10  # every purpose and seed has its own stream
    again = launch(configure("run.seed=1", output="again"))
    assert jax.random.key_data(again._fold(0, 1)).tolist() == keys[0]


@pytest.mark.slow
def test_precision(configure, launch):
    """A learning rate of 1e-6 moves float32 parameters of a policy that computes in bfloat16, but not bfloat16 ones."""
    moved, at = {}, ("model.dtype=bfloat16", "train.learning_rate=1e-6", "eval.data=null")
    for dtype in ("float32", "bfloat16"):
        trainer = launch(configure(*at, f"model.param_dtype={dtype}", output=dtype))
        before = jax.tree.map(np.asarray, trainer.state.learner.model.arrays())
        assert {str(x.dtype) for x in before.values()} == {dtype}
        assert trainer.reference.embed.dtype == jax.numpy.bfloat16
        trainer.one_step()
        after = trainer.state.learner.model.arrays()
        assert after["up_proj"].dtype == before["up_proj"].dtype
        large = np.abs(before["up_proj"].astype(np.float32)) > 1e-3
        change = np.abs(np.asarray(after["up_proj"], np.float32) - before["up_proj"].astype(np.float32))[large]
        moved[dtype] = float((change > 0).mean())
        assert change.max() < 2e-6
    assert moved["float32"] > 0.9 and moved["bfloat16"] == 0


def test_model_options(configure, tiny_folder, tmp_path):
    policy = setup.load_policy(configure().model)
    assert policy.model.config.hidden_size == 32 and policy.stop_tokens == (1,)
    assert setup.load_policy(configure("model.path=embedded").model).model.config.hidden_size > 32
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"holds no tokenizer\.json"):
        setup.load_policy(configure(f"model.path={bare}", "model.random_init=3").model)
    at = (f"model.path={bare}", f"model.tokenizer={tiny_folder}")
    three, four = (setup.load_policy(configure(*at, f"model.random_init={seed}").model).model for seed in (3, 4))
    again = setup.load_policy(configure(*at, "model.random_init=3").model).model
    np.testing.assert_array_equal(three.embed[...], again.embed[...])
    assert (np.asarray(three.embed[...]) != np.asarray(four.embed[...])).any()


def test_data_options(configure, tmp_path):
    rows = [
        {"q": "1+1=", "a": "2", "s": "x", "problem": "no", "answer": "9"},
        {"q": "2*2=", "a": 4, "s": "y", "problem": "n", "answer": "8"},
    ]
    file = problems_file(tmp_path, rows)
    columns = ("data.prompt_column=q", "data.answer_column=a", "data.stratum_column=s")
    parts = setup.assemble(
        configure(f"data.train={file}", "train.prompts_per_step=2", *columns, "data.template=Q {problem} A")
    )
    assert [(p.prompt, p.answer, p.stratum) for p in parts.train.problems] == [("1+1=", "2", "x"), ("2*2=", "4", "y")]
    assert [parts.policy.tokenizer.decode(list(ids)) for ids in parts.train.tokens] == ["Q 1+1= A", "Q 2*2= A"]
    plain = setup.assemble(configure(f"data.train={file}", "train.prompts_per_step=2"))
    assert [p.prompt for p in plain.train.problems] == ["no", "n"]


CHAT = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}{% if brief %}!{% endif %}"
)


def test_chat(configure, tiny_folder, tmp_path):
    """The prompt is the user's turn of the tokenizer's own template, and what was made of it is said."""
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    at = f"model.tokenizer={tmp_path}"
    with pytest.raises(prompts.DataError, match="chat: the tokenizer has no chat template"):
        setup.assemble(configure(at, "data.chat={}"))
    (tmp_path / "chat_template.jinja").write_text(CHAT)
    for chat, wanted in (("{}", "u:0+0=;a:"), ("{system: 1, brief: true}", "s:1;u:0+0=;a:!"), ("null", "0+0=")):
        parts = setup.assemble(configure(at, f"data.chat={chat}"))
        assert parts.policy.tokenizer.decode(parts.train.tokens[0]) == wanted
        assert parts.notes[-1] == f"first prompt, {len(parts.train.tokens[0])} tokens: {wanted!r}"


def test_bad_rows(configure, tmp_path):
    rows = [{"prompt": "1", "answer": "1"}, {"prompt": "2"}, {"prompt": "3", "answer": "3"}]
    at = (f"data.train={problems_file(tmp_path, rows)}", "train.prompts_per_step=2")
    with pytest.raises(DataError, match=r"problems\.jsonl, line 2: column 'answer' is missing"):
        setup.assemble(configure(*at))
    parts = setup.assemble(configure(*at, "data.on_bad_row=drop"))
    assert [(p.id, p.prompt) for p in parts.train.problems] == [(0, "1"), (1, "3")]
    assert len(parts.notes) == 3 and "line 2: dropped, column 'answer' is missing" in parts.notes[0]


def test_overlong_prompts(configure, tmp_path, launch):
    rows = [{"prompt": "1" * n, "answer": "1"} for n in (2, 9, 4)]
    at = (f"data.train={problems_file(tmp_path, rows)}", "train.prompts_per_step=2")
    assert launch(configure(*at, output="free")).tokens.shape == (3, 9)
    with pytest.raises(DataError, match="problem 1: its prompt has 9 tokens, more than the 6 allowed; raise"):
        setup.assemble(configure(*at, "data.max_prompt_tokens=6"))
    with pytest.raises(DataError, match="9 tokens, more than the 3 allowed; so have 1 more; raise"):
        setup.assemble(configure(*at, "data.max_prompt_tokens=3"))
    trainer = launch(configure(*at, "data.max_prompt_tokens=6", "data.overlong=drop"))
    assert trainer.tokens.shape == (2, 4)  # of the longest that is left
    assert any("1 of 3 prompts dropped as too long, above 6 tokens" in note for note in trainer.parts.notes)
    shown = (trainer.folder / "first_prompt.txt").read_text().splitlines()
    assert shown[1] == "1 prompts dropped as too long"


def test_without_a_limit_the_model_s_positions_are_it(configure, tmp_path):
    """128 positions: what the response leaves is dropped above, with no limit given; refused otherwise."""
    rows = [{"prompt": "1" * n, "answer": "1"} for n in (2, 29, 28)]
    at = (f"data.train={problems_file(tmp_path, rows)}", "train.prompts_per_step=2", "sampling.max_new_tokens=100")
    parts = setup.assemble(configure(*at, "data.overlong=drop"))
    assert [len(ids) for ids in parts.train.tokens] == [2, 28] and len(parts.train.dropped) == 1
    assert setup.longest_prompt(configure(*at, "data.overlong=drop")) == 28
    with pytest.raises(InputError, match="with prompts of up to 29 tokens that is 129 positions, the model has 128"):
        setup.assemble(configure(*at))
    with pytest.raises(InputError, match="with prompts of up to 1 tokens that is 129 positions"):
        setup.assemble(configure(*at, "data.overlong=drop", "sampling.max_new_tokens=128"))


def test_verifier_options(configure, monkeypatch):
    asked = []
    monkeypatch.setattr(inputs.rewards, "make", lambda name, **settings: asked.append((name, settings)))
    inputs.verifier(configure())
    inputs.verifier(configure("data.verifier=math", "data.verifier_workers=3", "data.verifier_timeout=0.5"))
    assert asked == [("exact", {"workers": 2, "timeout": 5.0}), ("math", {"workers": 3, "timeout": 0.5})]


def test_controller_options(configure):
    def plan(*changes: str):
        config = configure(*changes)
        parts, ids = setup.assemble(config), np.arange(config.train.prompts_per_step)
        return parts.rule.plan(parts.rule.init(jax.random.key(0)), ids, jax.random.key(0))[0]

    assert plan().allocation is None and plan().rollouts.tolist() == [4] * 6
    assert plan("controller.mean_rollouts=3", "train.prompts_per_step=5").rollouts.tolist() == [3] * 5
    assert plan("controller.name=rollout_gdro").allocation is not None
    middle = int(plan().bins[0])
    assert int(plan("controller.settings.edges=[0.5]").bins[0]) < middle
    with pytest.raises(InputError, match=r"controller: .*'hysteresi'.*did you mean 'hysteresis'"):
        plan("controller.settings.hysteresi=0.1")


def test_evaluation_options(configure, launch, tmp_path, monkeypatch):
    """What the evaluator asks of the sampler and of the summary; the sampling itself is tested in its own room."""
    rows = [{"prompt": f"{i}=", "answer": str(i), "stratum": "ab"[i % 2]} for i in range(6)]
    asked = {}

    def responses(sampler, prompts, tokenizer, verifier, key, samples, length, per_call, *, as_they_finish, watch):
        asked.update(sampler=sampler.config, ids=[p.id for p in prompts.problems], samples=samples, key=key)
        asked.update(per_call=per_call, prompt=tokenizer.decode(prompts.tokens[0]))
        yield (
            [Graded(p.id, rank, "", float(rank == 0), True, True) for p in prompts.problems for rank in range(samples)],
            7,
        )

    monkeypatch.setattr(evaluator.evaluation, "responses", responses)
    settings = {"temperature": 0.6, "top_p": 0.8, "top_k": 20, "samples": 4, "k": 2, "problems_per_stratum": 1}
    settings |= {"max_new_tokens": 4, "template": "Q {problem}", "problems_per_call": 3}
    settings |= {"min_p": 0.05, "min_new_tokens": 2}
    eval_settings = [f"eval.{name}={value}" for name, value in settings.items()]
    trainer = launch(configure(*eval_settings, f"eval.data={problems_file(tmp_path, rows)}", "sampling.slots=5"))
    summaries, count = trainer._evaluator("model", "key", final=False, watch=print)
    some = summaries["eval"]
    assert asked["ids"] == [0, 1] and asked["samples"] == 4 and count == 8
    sampler = asked["sampler"]
    assert (sampler.temperature, sampler.top_p, sampler.top_k) == (0.6, 0.8, 20)
    assert (sampler.min_p, sampler.min_new_tokens) == (0.05, 2)
    assert (sampler.max_new_tokens, sampler.slots, sampler.stop_tokens) == (4, 5, (1,))
    assert asked["per_call"] == 3 and asked["prompt"] == "Q 0="
    assert some["k"] == 2 and some["overall"]["mean"] == 0.25 and some["overall"]["pass"] == pytest.approx(0.5)
    assert "mean_interval" not in some["overall"] and some["tokens"] == 7 and set(summaries) == {"eval"}
    final, count = trainer._evaluator("model", "key", final=True, watch=print)
    assert asked["ids"] == list(range(6)) and count == 24
    plain = launch(configure(f"eval.data={problems_file(tmp_path, rows)}", output="plain"))
    assert plain._evaluator._sampler.config.slots == plain.config.rows_per_step  # no larger a cache than training's
    assert final["eval"]["overall"]["n"] == 6 and "mean_interval" in final["eval"]["overall"]
    assert final["eval_part"]["overall"] == some["overall"]  # of the same problems as along the way


def test_an_evaluation_of_a_run_is_held_to_the_limit_too(configure, launch, monkeypatch, tmp_path):
    def responses(sampler, prompts, *_, as_they_finish, watch):
        yield [Graded(p.id, 0, "", 0.0, n > 0, True, 1, "no mood to grade") for n, p in enumerate(prompts.problems)], 7

    monkeypatch.setattr(evaluator.evaluation, "responses", responses)
    at = (f"eval.data={problems_file(tmp_path, [{'prompt': f'{i}=', 'answer': '1'} for i in range(4)])}", "eval.k=1")
    trainer = launch(configure(*at, "eval.samples=1"), None)
    with pytest.raises(UnscorableError, match=r"evaluation: 25% of .* data\.max_unscorable=0\.2; .* no mood to grade"):
        trainer._evaluator("model", "key", True, lambda look: None)
    trainer = launch(configure(*at, "eval.samples=1", "data.max_unscorable=0.25", output="other"), None)
    found = trainer._evaluator("model", "key", True, lambda look: None)[0]["eval"]
    assert found["unscorable"] == 0.25 and found["left_out"] == 1
