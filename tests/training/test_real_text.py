"""`gdro train` on real text: token ids, template, stop tokens, answers and the log are what they should be."""

import json
import os
import pathlib

import pytest
import small_tokenizer
import transformers

from gdro_jax import cli, rewards
from gdro_jax.data import prompts
from gdro_jax.models import qwen3
from gdro_jax.training import config_io, setup
from gdro_jax.training.ledger import Clock

DATA = os.environ.get("GDRO_SHARED_DATA")
ASKED = "\nLet's think step by step and output the final answer within \\boxed{}."
ROWS = [
    {"problem": r"What is $\frac{1}{2} + \frac{1}{3}$?", "answer": r"\frac{5}{6}", "level": 1},
    {"problem": r"Find {x} if $x^2 = 49$ and x > 0.", "answer": "7", "level": 2},
    {"problem": "Two lines:\n  how many of them are parallel?", "answer": r"\text{both}", "level": 2},
    {"problem": r"Give $(r,\theta)$ of (0,3).", "answer": r"\left( 3, \frac{\pi}{2} \right)", "level": 5},
]


def command(tmp_path: pathlib.Path, vocab: int, stops: int | list[int], tokenizer: pathlib.Path, problems: list[dict]):
    """Arguments of a two-step run of a random policy of this vocabulary."""
    small = qwen3.Qwen3Config(
        vocab_size=vocab, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(small.to_hf() | {"eos_token_id": stops}))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    settings = {
        "model.path": tmp_path / "model",
        "model.tokenizer": tokenizer,
        "model.random_init": 0,
        "data.train": tmp_path / "data.jsonl",
        "data.template": "boxed",
        "data.verifier": "math",
        "data.verifier_workers": 1,
        "train.prompts_per_step": 4,
        "controller.mean_rollouts": 2,
        "sampling.max_new_tokens": 4,
        "eval.data": "null",
        "mesh.data": 1,
        "run.steps": 2,
        "run.output": tmp_path / "run",
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def check_tokens(parts, tokenizer, problems):
    for row, problem, ids in zip(problems, parts.train.problems, parts.train.tokens, strict=True):
        text = row["problem"] + ASKED
        assert problem.prompt == row["problem"] and problem.answer == row["answer"]
        assert list(ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(list(ids), clean_up_tokenization_spaces=False) == text
        assert not set(ids) & set(tokenizer.all_special_ids)  # no chat template, no marks


def check(tmp_path, arguments, problems, strata):
    """Runs the command; then everything that text has gone through on its way to the policy and back."""
    assert cli.main(["train", *arguments]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["unscorable"] == 0 and line["ledger"]["scored"] == 8 * line["step"]
        assert 0 <= line["reward"] <= 1 and line["logprob_gap"] < 1e-4 and 0 < line["response_length"] <= 4
        assert set(line["strata"]["share"]) <= strata
    parts = setup.assemble(config_io.load(tmp_path / "run" / "config.yaml"))
    check_tokens(parts, parts.policy.tokenizer, problems)
    said = [f"So it is \\boxed{{{row['answer']}}}." for row in problems]
    with rewards.make("math", workers=1, timeout=20.0) as verifier:
        answers = [p.answer for p in parts.train.problems]
        grades = verifier.grade([*said, *["no box"] * len(said)], answers * 2)
    assert grades.scores.tolist() == [1.0] * len(said) + [0.0] * len(said) and grades.scorable.all()
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert prompts.stop_tokens(tmp_path / "run" / "model", saved) == parts.policy.stop_tokens
    return parts


def test_a_run_on_text_is_given_its_tokens_and_all_ends_of_a_response(tmp_path, qwen_tokenizer):
    tokenizer = transformers.AutoTokenizer.from_pretrained(qwen_tokenizer)
    vocab, end = len(tokenizer), tokenizer.convert_tokens_to_ids("<|endoftext|>")
    given = [
        tuple(word.removeprefix("--").split("=", 1)) for word in command(tmp_path, vocab, end, qwen_tokenizer, ROWS)
    ]
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 3]}))
    parts = setup.check(config_io.load(None, [*given, ("data.verifier", "exact")]))
    check_tokens(parts, parts.outline.tokenizer, ROWS)
    assert (
        parts.outline.stop_tokens == tuple(sorted({3, end, tokenizer.eos_token_id})) and tokenizer.eos_token_id != end
    )
    assert parts.notes[-1] == f"first prompt, {len(parts.train.tokens[0])} tokens: {ROWS[0]['problem'] + ASKED!r}"


def test_what_was_sampled_is_never_tokenised_again(configure, launch, monkeypatch):
    """From the prompts' tokens on, texts are made for the verifier alone."""
    trainer = launch(configure("run.steps=1"))
    tokenizer = type(trainer.parts.policy.tokenizer)
    for name in ("__call__", "encode", "_encode_plus", "tokenize", "apply_chat_template"):
        monkeypatch.setattr(tokenizer, name, lambda *_, **__: pytest.fail("a text was tokenised"))
    step = trainer._collect(Clock())
    batch = step.batch(trainer.tokens, trainer.mask)
    assert batch.tokens is step.rollouts.tokens and batch.mask is step.rollouts.mask
    for row, ids in enumerate(trainer.parts.train.tokens):
        assert trainer.tokens[row][trainer.mask[row]].tolist() == list(ids)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["embedded", "of Qwen's kind"])
def test_a_run_on_text_with_braces_and_newlines(kind, tmp_path, tiny_folder, capsys):
    folder = tiny_folder if kind == "embedded" else small_tokenizer.make(tmp_path / "tokenizer")
    vocab = 128 if kind == "embedded" else 512
    parts = check(tmp_path, command(tmp_path, vocab, [2, 5], folder, ROWS), ROWS, {"Level 1", "Level 2", "Level 5"})
    # config.json's and the tokenizer's own
    assert parts.policy.stop_tokens == tuple(sorted({2, 5, parts.policy.tokenizer.eos_token_id}))
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.skipif(DATA is None, reason="GDRO_SHARED_DATA names no folder with a real tokenizer and benchmarks")
def test_the_qwen3_tokenizer_on_a_real_benchmark(tmp_path, capsys):
    data = pathlib.Path(str(DATA))
    lines = (data / "benchmarks" / "math500.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:12]]
    parts = check(
        tmp_path,
        command(tmp_path, 151_936, 151_643, data / "qwen3_tokenizer", rows),
        rows,
        {f"Level {level}" for level in range(1, 6)},
    )
    tokenizer = parts.policy.tokenizer
    assert 151_643 in parts.policy.stop_tokens and tokenizer.eos_token_id in parts.policy.stop_tokens
    chat = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    assert chat == [151_644, 151_645, 151_643]
    assert not set(chat) & {token for ids in parts.train.tokens for token in ids}
