"""The shipped problems: right, distinct, disjoint, and exactly what the script that makes them makes."""

import collections
import importlib.resources
import importlib.util
import json
import pathlib
import random
import re

import pytest

from gdro_jax.data import procedural

PACKAGE = pathlib.Path(str(importlib.resources.files("gdro_jax")))
SCRIPT = PACKAGE.parent / "experiments" / "make_base.py"
SETS = ("train", "heldout")


def solve(prompt: str) -> int:
    """The answer by means that share nothing with the generators."""
    if match := re.fullmatch(r"sort([1-9]+)=", prompt):
        counts = [match[1].count(digit) for digit in "123456789"]
        return int("".join(digit * n for digit, n in zip("123456789", counts, strict=True)))
    if match := re.fullmatch(r"(\d+)x\+(\d+)=(\d+)\?", prompt):
        a, b, c = map(int, match.groups())
        roots = [x for x in range(1000) if a * x + b == c]
        assert len(roots) == 1
        return roots[0]
    assert re.fullmatch(r"\d+([+\-*%]\d+)+=", prompt), prompt
    return eval(prompt.removesuffix("="))


@pytest.mark.parametrize("stratum", procedural.strata())
def test_every_generated_answer_is_right(stratum):
    rng = random.Random(stratum)
    problems = [procedural.generate(stratum, rng) for _ in range(400)]
    assert all(str(solve(prompt)) == answer for prompt, answer in problems)
    assert len(set(problems)) > 100


@pytest.mark.parametrize("name", SETS)
def test_every_shipped_answer_is_right(name):
    problems = procedural.embedded(name)
    assert all(str(solve(p.prompt)) == p.answer for p in problems)


def test_levels_are_graded():
    """Each level is what the docstring of its family says."""
    rng = random.Random(0)

    def drawn(stratum: str) -> list[tuple[list[int], int]]:
        problems = [procedural.generate(stratum, rng) for _ in range(400)]
        return [([int(n) for n in re.findall(r"\d+", prompt)], int(answer)) for prompt, answer in problems]

    def digits(stratum: str) -> set[tuple[int, ...]]:
        return {tuple(len(str(n)) for n in numbers) for numbers, _ in drawn(stratum)}

    assert digits("add-1") == {(2, 1)} and digits("add-2") == {(2, 2)} and digits("add-3") == {(3, 3)}
    assert {n[1] for n, _ in drawn("mod-1")} == {2, 5} and {n[1] for n, _ in drawn("mod-2")} == {3, 4, 9}
    assert digits("mod-1") == digits("mod-2") == {(3, 1)}
    assert digits("sort-1") == {(3,)} and digits("sort-2") == {(5,)}
    assert {x for _, x in drawn("linear-1")} == set(range(1, 10))
    assert {x for _, x in drawn("linear-2")} == set(range(10, 30))
    for level in (1, 2, 3):
        assert digits(f"chain-{level}") == {(1,) * (level + 2)}
        assert min(answer for _, answer in drawn(f"chain-{level}")) < 0  # a sign is part of the answer


def test_answers_are_not_guessed_by_a_constant():
    rng = random.Random(1)
    for stratum in procedural.strata():
        answers = collections.Counter(procedural.generate(stratum, rng)[1] for _ in range(500))
        assert answers.most_common(1)[0][1] < (350 if stratum.startswith("mod") else 100)


def test_unknown_strata_are_refused():
    for stratum in ("add-4", "add", "sub-1", "mod-3", "add-0"):
        with pytest.raises(ValueError, match=f"stratum='{stratum}': must be one of add-1, "):
            procedural.generate(stratum, random.Random(0))
    with pytest.raises(ValueError, match="'test': must be 'train' or 'heldout'"):
        procedural.embedded("test")


def test_shipped_sets_are_distinct_and_disjoint():
    train, heldout = ([p.prompt for p in procedural.embedded(name)] for name in SETS)
    assert len(set(train)) == len(train) and len(set(heldout)) == len(heldout)
    assert not set(train) & set(heldout)


@pytest.mark.parametrize("name", SETS)
def test_ids_are_dense_and_strata_known(name):
    problems = procedural.embedded(name)
    assert [p.id for p in problems] == list(range(len(problems)))
    assert {p.stratum for p in problems} <= set(procedural.strata())
    by_place = [p.stratum for p in problems[: len(problems) // 4]]
    assert len(set(by_place)) > len(procedural.strata()) / 2  # shuffled, not sorted by stratum


def test_the_training_set_is_heavy_tailed():
    problems = procedural.embedded("train")
    assert 1000 <= len(problems) <= 2000
    easy = sum(p.stratum.endswith("-1") for p in problems)
    assert easy > len(problems) / 2
    assert len({p.stratum.split("-")[0] for p in problems}) >= 5


def test_split_is_deterministic_and_disjoint():
    sizes = {"a": {"add-1": 30, "sort-1": 5}, "b": {"add-1": 40, "chain-2": 3}}
    one, again, other = procedural.split(sizes, 1), procedural.split(sizes, 1), procedural.split(sizes, 2)
    assert one == again and one != other
    assert {name: collections.Counter(p.stratum for p in problems) for name, problems in one.items()} == sizes
    prompts = [p.prompt for problems in one.values() for p in problems]
    assert len(set(prompts)) == len(prompts)


def test_a_stratum_that_is_too_small():
    with pytest.raises(ValueError, match=r"stratum mod-1: only .* distinct problems exist"):
        procedural.split({"a": {"mod-1": 10_000}}, 0)


@pytest.fixture(scope="module")
def script():
    if not SCRIPT.is_file():
        pytest.skip("experiments/make_base.py is not beside the package: not a source checkout")
    spec = importlib.util.spec_from_file_location("make_base", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shipped_files_are_what_the_script_makes(script):
    made = procedural.split({"train": script.TRAIN, "heldout": script.HELDOUT}, script.SEED)
    for name in SETS:
        lines = (PACKAGE / "embedded" / f"{name}.jsonl").read_text().splitlines()
        rows = [{"id": p.id, "prompt": p.prompt, "answer": p.answer, "stratum": p.stratum} for p in made[name]]
        assert [json.loads(line) for line in lines] == rows


def test_strata_have_the_sizes_of_the_script(script):
    for name, sizes in (("train", script.TRAIN), ("heldout", script.HELDOUT)):
        assert collections.Counter(p.stratum for p in procedural.embedded(name)) == sizes


def test_every_problem_and_answer_fits_the_tokenizer(script):
    """One token a character, and the longest problem with its answer and stop token fits the warm-up's rows."""
    tokenizer = script.make_tokenizer()
    for name in SETS:
        for p in procedural.embedded(name):
            ids = tokenizer.encode(p.prompt + p.answer)
            assert len(ids) == len(p.prompt + p.answer) < script.LENGTH
            assert tokenizer.unk_token_id not in ids
