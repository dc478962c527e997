"""Sampling and grading a set of problems: counts, texts, and independence of how the work is batched."""

import dataclasses
import importlib.resources
import json
import pathlib
from types import MappingProxyType

import jax
import numpy as np
import pytest
import transformers

from gdro_jax.data import prompts as prompt_data
from gdro_jax.data.sources import Problem
from gdro_jax.evaluation import run
from gdro_jax.rewards.verifier import Grades
from gdro_jax.sampling import Rollouts, Sampler, SamplingConfig

BASE = pathlib.Path(str(importlib.resources.files("gdro_jax"))) / "embedded" / "base"
SAMPLES = 3


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def asked(tokenizer):
    problems = [Problem(i, text, str(i), "ab"[i % 2]) for i, text in enumerate(["1+1=", "2*3=", "7%4=", "12=", "9="])]
    return prompt_data.prepare(problems, tokenizer, template="plain")


class Recorder:
    """Right for an even number of characters, unscorable for an empty response; keeps what it was asked."""

    def __init__(self):
        self.asked: list[tuple[str, str]] = []

    def grade(self, responses, answers):
        self.asked += zip(responses, answers, strict=True)
        scorable = np.array([bool(r) for r in responses])
        scores = np.float32([len(r) % 2 == 0 for r in responses]) * scorable
        return Grades(scores, scorable, MappingProxyType({}))


@pytest.fixture(scope="module")
def sampled(tiny_model, asked, tokenizer):
    """Graded rows in one batch and in batches of two, of the same sampler and key."""
    free = Sampler(tiny_model, SamplingConfig(max_new_tokens=4, temperature=2.0))
    first = np.asarray(free(asked.tokens, np.repeat(np.arange(5), SAMPLES), jax.random.key(1), range(5), 8).tokens)
    stops = (1, int(first[0, 0]), int(first[4, 1]))  # a row that is empty without its stop token, one that is short
    sampler = Sampler(tiny_model, SamplingConfig(max_new_tokens=4, temperature=2.0, stop_tokens=stops))
    whole = sampler(asked.tokens, np.repeat(np.arange(5), SAMPLES), jax.random.key(1), range(5), 8)
    out = {"mask": np.asarray(whole.mask), "config": sampler.config}
    for size in (256, 2):
        verifier = Recorder()
        batches = list(
            run.responses(sampler, asked, tokenizer, verifier, jax.random.key(1), SAMPLES, 8, problems_per_call=size)
        )
        out[size] = batches, verifier
    return out


def rows_of(batches) -> list[run.Graded]:
    return [row for rows, _ in batches for row in rows]


def test_batching_changes_nothing(sampled):
    one, many = sampled[256], sampled[2]
    assert len(one[0]) == 1 and len(many[0]) == 3
    assert rows_of(one[0]) == rows_of(many[0])
    assert sum(n for _, n in one[0]) == sum(n for _, n in many[0])
    assert one[1].asked == many[1].asked  # filling rows are not graded


@pytest.mark.slow
def test_what_is_kept_is_not_graded_again_and_changes_nothing(sampled, tiny_model, asked, tokenizer):
    """Rows as they finish, without those that are there already: the others are what they were, whoever is beside."""
    whole = {(r.problem, r.rank): r for r in rows_of(sampled[256][0])}
    kept = {(0, 0), (0, 1), (0, 2), (1, 1), (3, 0), (3, 2), (4, 0)}
    sampler, verifier = Sampler(tiny_model, dataclasses.replace(sampled["config"], segment=1, slots=3)), Recorder()
    parts = list(
        run.responses(
            sampler, asked, tokenizer, verifier, jax.random.key(1), SAMPLES, 8, 3, kept=kept, as_they_finish=True
        )
    )
    found = {(r.problem, r.rank): r for r in rows_of(parts)}
    assert found == {place: row for place, row in whole.items() if place not in kept}
    assert len(verifier.asked) == len(found) and sum(bool(rows) for rows, _ in parts) > 2
    assert sum(n for _, n in parts) == sum(row.tokens for row in found.values())
    assert not list(
        run.responses(sampler, asked, tokenizer, verifier, jax.random.key(1), SAMPLES, 8, kept=whole.keys())
    )


def test_rows_are_every_problem_and_rank_in_order(sampled, asked):
    rows = rows_of(sampled[2][0])
    assert [(r.problem, r.rank) for r in rows] == [(p, r) for p in range(5) for r in range(SAMPLES)]
    assert [a for _, a in sampled[2][1].asked] == [p.answer for p in asked.problems for _ in range(SAMPLES)]
    json.dumps([row._asdict() for row in rows])  # plain numbers


def test_counts_add_up(sampled):
    batches, _ = sampled[256]
    rows = rows_of(batches)
    counts = run.count(iter(batches), 5)
    for p in range(5):
        mine = [r for r in rows if r.problem == p]
        assert counts.scorable[p] == sum(bool(r.response) for r in mine)
        assert counts.correct[p] == sum(len(r.response) % 2 == 0 and bool(r.response) for r in mine)
    assert counts.scorable.sum() < len(rows)  # the empty response is left out
    assert counts.clipped == sum(not r.finished for r in rows) / len(rows) < 1
    assert counts.responses == len(rows) == counts.scorable.sum() + len(counts.failures)
    lengths = sampled["mask"].sum(1)
    assert counts.tokens == lengths.sum() and lengths.min() == 1
    assert all(length == 4 for length, r in zip(lengths, rows, strict=True) if not r.finished)


def test_text_is_without_the_stop_token_only(tokenizer):
    rows = ["12", "3", "", "4567"]
    stop, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    tokens, mask = np.zeros((4, 4), np.int32), np.zeros((4, 4), bool)
    for row, text in enumerate(rows):
        ids = [*tokenizer.encode(text), stop][:4]
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    out = Rollouts(tokens, mask, np.zeros((4, 4)), mask.sum(1) < 4, np.zeros((4, 4)))
    assert run.texts(out, tokenizer, (stop,)) == rows
    assert run.texts(out, tokenizer, (stop, pad)) == rows
    assert run.texts(out, tokenizer, ()) == ["12<|endoftext|>", "3<|endoftext|>", "<|endoftext|>", "4567"]


def test_spaces_are_kept(tokenizer):
    ids = tokenizer.encode(" 1 , 2 .")
    out = Rollouts(np.array([ids]), np.ones((1, len(ids)), bool), None, None, None)
    assert run.texts(out, tokenizer, ()) == [" 1 , 2 ."]
