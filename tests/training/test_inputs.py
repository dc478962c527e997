"""What is done to the data before step 0: gold answers checked, overlaps found, sets mixed; shaping of rewards."""

import json

import numpy as np
import pytest

from gdro_jax.data.sources import DataError
from gdro_jax.training import inputs, overlap, setup
from gdro_jax.training.ledger import Clock

NO_BENCHMARKS = "data.benchmarks is null: overlaps with benchmarks are not looked for"


@pytest.fixture
def write(tmp_path):
    def make(name: str, *rows: tuple[str, str]) -> str:
        file = tmp_path / name
        file.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in rows))
        return str(file)

    return make


def test_gold_answers_are_checked_and_named_by_line(configure, write):
    file = write("golds.jsonl", ("1+1=", "2"), ("one?", "one"), ("2+1=", "3"), ("many?", "many"))
    at = (f"data.train={file}", "data.verifier=numeric")
    with pytest.raises(DataError, match=r"golds\.jsonl, line 2: its answer cannot be graded, the gold answer is not a "
                                        r"number; other such lines: 4; data\.gold_check=drop"):  # fmt: skip
        inputs.load(configure(*at))
    found = inputs.load(configure(*at, "data.gold_check=drop"))
    assert [(p.id, p.prompt, p.line) for p in found.train] == [(0, "1+1=", 1), (1, "2+1=", 3)]
    assert [note.partition(":")[0].rpartition("/")[2] for note in found.notes] == [
        "golds.jsonl, line 2", "golds.jsonl, line 4", "data.benchmarks is null",
    ]  # fmt: skip
    assert len(inputs.load(configure(*at, "data.gold_check=null")).train) == 4


def test_an_error_names_the_lines_of_many_gold_answers(configure, write):
    file = write("golds.jsonl", ("1+1=", "2"), *((f"{n}?", "one") for n in range(50)))
    with pytest.raises(DataError, match=r"line 2: its .* other such lines: 3, 4, .*, 42 and 9 more; data\.gold_check"):
        inputs.load(configure(f"data.train={file}", "data.verifier=numeric"))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("data.train", ["data.train={file}"]),
        ("eval.data", ["eval.data={file}"]),
        ("data.mixture", ["data.loader=grain", "data.mixture={{{file}: 1}}"]),
    ],
)
def test_an_error_names_the_field_of_its_file(configure, write, tmp_path, field, changes):
    for file, words in (
        (tmp_path / "absent.jsonl", "does not exist"),
        (tmp_path, "is a folder"),
        (write("golds.jsonl", ("1+1=", "")), "line 1: column 'answer'"),
    ):
        with pytest.raises(DataError, match=f"^{field}: {file}.* {words}"):
            inputs.load(configure(*(change.format(file=file) for change in changes)))


def test_duplicates_and_overlaps_are_reported_dropped_or_refused(configure, write, tmp_path):
    train = write("train.jsonl", ("1+1=", "2"), ("3 + 4 =", "7"), ("1 + 1 =", "2"), ("5+5=", "10"), ("9+9=", "18"))
    heldout = write(
        "heldout.jsonl",
        ("3+4=", "7"),
    )
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "amc23.jsonl").write_text(json.dumps({"problem": "$5+5=$", "answer": 10.0}) + "\n")
    at = (f"data.train={train}", f"eval.data={heldout}", f"data.benchmarks={tmp_path / 'bench'}")
    found = inputs.load(configure(*at))
    assert len(found.train) == 5 and len(found.notes) == 3
    one, two, three = sorted(found.notes, key=lambda note: note.rpartition("line")[0])
    everything = one + two + three
    assert "train.jsonl, line 3 is" in everything and "same as a problem of the training set" in everything
    assert "line 2 is" in everything and "heldout.jsonl, line 1" in everything and "amc23, line 1" in everything
    dropped = inputs.load(configure(*at, "data.contamination=drop"))
    assert [(p.id, p.prompt) for p in dropped.train] == [(0, "1+1="), (1, "9+9=")]
    with pytest.raises(DataError, match=r"1 training problems kept: 1 the same .*data\.contamination=drop"):
        inputs.load(configure(*at, "data.contamination=refuse"))
    assert inputs.load(configure(*at, "data.contamination=null")).notes == ()
    with pytest.raises(DataError, match=r"data\.benchmarks=.*holds no benchmark"):
        inputs.load(configure(f"data.train={train}", "data.benchmarks=nowhere"))


def test_training_and_evaluation_on_one_file_is_no_news(configure, write):
    file = write("both.jsonl", ("1+1=", "2"), ("1+2=", "3"))
    assert inputs.load(configure(f"data.train={file}", f"eval.data={file}")).notes == (NO_BENCHMARKS,)


def test_a_run_says_that_it_looks_at_no_benchmark(configure, write):
    file = write("train.jsonl", ("1+1=", "2"))
    assert inputs.load(configure(f"data.train={file}", "eval.data=null")).notes == (NO_BENCHMARKS,)
    assert inputs.load(configure(f"data.train={file}", "eval.data=null", "data.contamination=null")).notes == ()
    assert inputs.load(configure("data.train=tasks:add@1*5", "eval.data=null")).notes == ()


def test_copies_of_a_row_of_dapo_are_counted(configure, tmp_path):
    rows = [{"data_source": "math_dapo", "prompt": f"{n}+1=", "answer": f"{n + 1}"} for n in (1, 2, 1, 2, 2)]
    (tmp_path / "dapo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = inputs.load(configure(f"data.train={tmp_path / 'dapo.jsonl'}", "eval.data=null"))
    assert [p.prompt for p in found.train] == ["1+1=", "2+1="]
    assert found.notes[0].endswith("dapo.jsonl: 3 rows that repeat an earlier one left out")


def test_a_verifier_of_ones_own_is_tried_before_the_run(configure, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def never(response, answer):\n    return None\n")
    file = write("one.jsonl", ("1+1=", "2"))
    notes = inputs.load(configure(f"data.train={file}", "eval.data=null", "data.verifier=mine:never")).notes
    assert notes[1:] == (NO_BENCHMARKS,) and "no verdict on the first gold answer" in notes[0]
    with pytest.raises(DataError, match=r"data\.verifier='mine:absent': .*AttributeError"):
        inputs.load(configure(f"data.train={file}", "eval.data=null", "data.verifier=mine:absent"))


def test_a_mixture_of_files_and_tasks(configure, write):
    file = write("a.jsonl", *((f"{n}+1=", str(n + 1)) for n in range(8)))
    mixture = json.dumps({file: 1, "tasks:add@1*10": 2})
    parts = setup.assemble(configure(f"data.mixture={mixture}", "data.loader=grain"))
    assert len(parts.train.problems) == 18 and [p.id for p in parts.train.problems] == list(range(18))
    assert {p.stratum for p in parts.train.problems if p.part == 1} == {"add-1"}
    assert f"each step's 6 prompts: 2 of {file}, 4 of tasks:add@1*10" in parts.notes
    for step in range(4):
        ids = parts.order(6 * step)
        assert [parts.train.problems[i].part for i in ids].count(0) == 2 and len(set(ids.tolist())) == 6
    np.testing.assert_array_equal(parts.order(6), setup.assemble(
        configure(f"data.mixture={mixture}", "data.loader=grain")).order(6))  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.mixture={a.jsonl: 1}"], "data.loader='builtin': must be grain with data.mixture"),
        (["data.mixture={a.jsonl: 0}", "data.loader=grain"], "data.mixture"),
        (["data.mixture={}", "data.loader=grain"], "data.mixture"),
        (["data.loader=torch"], "data.loader='torch'"),
        (["data.gold_check=maybe"], "data.gold_check='maybe'"),
        (["data.contamination=maybe"], "data.contamination='maybe'"),
        (["reward.overlong_buffer=0"], "reward.overlong_buffer=0"),
        (["reward.overlong_buffer=4"], "reward.overlong_buffer=4: must be at most sampling.max_new_tokens=3"),
        (["reward.format_reward=-1"], "reward.format_reward=-1"),
        (["reward.overlong_penalty=0"], "reward.overlong_penalty=0"),
        (["eval.max_new_tokens=0"], "eval.max_new_tokens=0"),
        (["eval.problems_per_call=0"], "eval.problems_per_call=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words, configure):
    with pytest.raises(ValueError) as caught:
        configure(*settings)
    assert words in str(caught.value)


def test_rewards_are_shaped_and_grades_are_not(configure, launch):
    """Responses that fill the length limit lose the penalty; what controllers learn from stays right or wrong."""
    trainer = launch(configure("run.steps=1", "reward.overlong_buffer=1", "reward.overlong_penalty=0.5"))
    step = trainer._collect(Clock())
    full = step.rollouts.mask.sum(axis=1) == 3
    assert full.any() and set(step.grades.scores.tolist()) <= {0.0, 1.0}
    np.testing.assert_allclose(step.shaped, step.grades.scores - 0.5 * full)


def test_a_box_is_rewarded_if_asked(configure, launch, monkeypatch):
    """Responses whose first token is odd have a box: 0.25 more each, whatever its grade."""

    def texts(part, *others):
        return [f"\\boxed{{{row[0]}}}" if row[0] % 2 else f"{row[0]}" for row in part.tokens.tolist()]

    monkeypatch.setattr(overlap, "texts", texts)
    step = launch(configure("run.steps=1", "reward.format_reward=0.25"))._collect(Clock())
    odd = step.rollouts.tokens[:, 0] % 2
    assert 0 < odd.sum() < len(odd)
    np.testing.assert_allclose(step.shaped - step.grades.scores, 0.25 * odd)
