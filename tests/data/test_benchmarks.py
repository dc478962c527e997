"""Benchmarks: every publisher's columns and answer forms, GPQA from a copy of the user's, and nothing of it printed."""

import csv
import json
import os
import pathlib

import pyarrow
import pytest
from pyarrow import parquet

from gdro_jax.data import benchmarks, sources
from gdro_jax.data.sources import DataError
from gdro_jax.rewards.math_verifier import MathVerifier

DATA = os.environ.get("GDRO_SHARED_DATA")
TABLE = pathlib.Path(__file__).with_name("benchmark_golds.json")
real = pytest.mark.skipif(DATA is None, reason="GDRO_SHARED_DATA (the folder of real data) is not set")

# One row as its publisher would write it, and what it becomes: (answer, stratum, level, subject).
ROWS = {
    "math500": (
        {"problem": "p", "solution": "s", "answer": "\\frac{1}{2}", "subject": "Algebra", "level": 3, "unique_id": "x"},
        ("\\frac{1}{2}", "Level 3", "Level 3", "Algebra"),
    ),
    "math_test": (
        {"problem": "p", "level": "Level 4", "type": "Geometry", "solution": "so \\boxed{7}.", "idx": 0},
        ("7", "Level 4", "Level 4", "Geometry"),
    ),
    "aime24": (
        {"id": 1, "problem": "p", "solution": "not \\boxed{9}", "answer": "033", "url": "", "question": "p"},
        ("033", "all", "", ""),
    ),
    "aime25": ({"id": "0", "question": "p", "answer": 70.0}, ("70", "all", "", "")),
    "amc23": ({"id": 0, "problem": "p", "answer": 27.0, "url": "", "question": "p"}, ("27", "all", "", "")),
    "minerva_math": (
        {"problem": "p", "solution": "\\boxed{1} and \\boxed{1.6e-19}", "type": "Astronomy", "idx": 0},
        ("1.6e-19", "Astronomy", "", "Astronomy"),
    ),
    "olympiadbench": (
        {"id": 1, "subfield": "Algebra", "question": "p", "solution": ["s"], "final_answer": ["$1$,$2$"],
         "is_multiple_answer": True, "unit": None, "error": None},
        ("1,2", "Algebra", "", "Algebra"),
    ),
    "gsm8k_test": ({"question": "p", "answer": "2*<<2*3=6>>\n#### 1,600", "idx": 0}, ("1600", "all", "", "")),
}  # fmt: skip


def write(folder: pathlib.Path, name: str, *rows: object) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", ROWS)
def test_a_publishers_row(name, tmp_path):
    row, expected = ROWS[name]
    write(tmp_path, name, row, row)
    problems = benchmarks.load(name, tmp_path).problems
    assert [p.id for p in problems] == [0, 1] and problems[1].prompt == "p"
    assert (problems[1].answer, problems[1].stratum, problems[1].level, problems[1].subject) == expected
    assert benchmarks.present(tmp_path) == (name,)


@pytest.mark.parametrize("name", ["math500", "gpqa"])
def test_benchmarks_may_be_parquet(name, tmp_path):
    row = gpqa_row(0) if name == "gpqa" else ROWS[name][0]
    parquet.write_table(pyarrow.Table.from_pylist([row, row]), tmp_path / f"{name}.parquet")
    assert benchmarks.present(tmp_path) == (name,) and len(benchmarks.load(name, tmp_path).problems) == 2


def test_a_published_error_becomes_a_tolerance(tmp_path):
    row = ROWS["olympiadbench"][0] | {"final_answer": ["4.2"], "unit": "%", "error": "1e-1"}
    write(tmp_path, "olympiadbench", row)
    assert benchmarks.load("olympiadbench", tmp_path).problems[0].answer == "4.2 within 0.1"
    write(tmp_path, "olympiadbench", row | {"error": "small"})
    with pytest.raises(DataError, match="line 1: column 'error' is 'small'; a number of 0 or above"):
        benchmarks.load("olympiadbench", tmp_path)


@pytest.mark.parametrize(
    ("answers", "unit", "becomes"),
    [
        (["45"], "minute", "45\\text{ minute}"),
        (["$166$"], "$cm^2$", "166\\text{ cm^2}"),
        (["$\\frac{600}{7}$"], "km/h", "\\frac{600}{7}\\text{ km/h}"),
        (["$\\angle A=90$,$\\angle B=90$"], "^{\\circ}", "\\angle A=90,\\angle B=90"),
        (["4.2"], "%", "4.2"),  # passed over in any answer
        (["x+1"], "km", "x+1"),
    ],
)
def test_a_published_unit_is_told_from_others(answers, unit, becomes, tmp_path):
    write(tmp_path, "olympiadbench", ROWS["olympiadbench"][0] | {"final_answer": answers, "unit": unit})
    assert benchmarks.load("olympiadbench", tmp_path).problems[0].answer == becomes


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"'math50' is unknown.*did you mean 'math500'"):
        benchmarks.load("math50", tmp_path)
    with pytest.raises(DataError, match=r"holds no math500\.jsonl"):
        benchmarks.load("math500", tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        benchmarks.load("math500", tmp_path / "nowhere")


# GPQA: made-up rows in the published columns ------------------------------------------------------------------------
def gpqa_row(number: int, **changes: object) -> dict[str, object]:
    row: dict[str, object] = {
        "Question": f"secret question {number}",
        "Correct Answer": f"right {number}",
        "Incorrect Answer 1": f"wrong {number}a",
        "Incorrect Answer 2": f"wrong {number}b\n",
        "Incorrect Answer 3": f"wrong {number}c",
        "High-level domain": "Physics",
        "Subdomain": "Optics",
    }
    return row | changes


def test_gpqa_from_a_csv_or_jsonl_of_the_users(tmp_path):
    rows = [gpqa_row(i) for i in range(40)]
    with (tmp_path / "gpqa_diamond.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    problems = benchmarks.load("gpqa", tmp_path).problems
    assert len(problems) == 40 and {p.subject for p in problems} == {"Physics"}
    for number, problem in enumerate(problems):
        assert problem.id == number and f"\n{problem.answer}. right {number}\n" in problem.prompt
    assert [p.bare for p in problems] == [f"secret question {i}" for i in range(40)]
    letters = [p.answer for p in problems]
    assert {letters.count(letter) for letter in "ABCD"} <= set(range(3, 20))  # no letter is favoured
    (tmp_path / "gpqa_diamond.csv").unlink()
    write(tmp_path, "gpqa", *rows[::-1])
    again = benchmarks.load("gpqa", tmp_path).problems[::-1]
    assert [(p.prompt, p.answer) for p in again] == [(p.prompt, p.answer) for p in problems]  # whatever the row order


@pytest.mark.parametrize("bad", [gpqa_row(1, **{"Incorrect Answer 2": " "}), gpqa_row(1, Question=None), ["secret"]])
def test_errors_about_gpqa_hold_nothing_of_it(bad, tmp_path):
    write(tmp_path, "gpqa", gpqa_row(0), bad)
    with pytest.raises(DataError, match="row 2: needs text in 'Question'") as caught:
        benchmarks.load("gpqa", tmp_path)
    assert "secret" not in str(caught.value) and "right" not in str(caught.value)
    loaded = benchmarks.load("gpqa", tmp_path, on_bad_row="drop")
    assert len(loaded.problems) == 1 and [row.line for row in loaded.dropped] == [2]


def test_fingerprints_tell_other_problems_apart():
    one = sources.load([{"problem": "p", "answer": "1"}]).problems
    other = sources.load([{"problem": "p", "answer": "2"}]).problems
    assert benchmarks.fingerprint(one) == benchmarks.fingerprint(one) != benchmarks.fingerprint(other)


# The real files -----------------------------------------------------------------------------------------------------
@real
@pytest.mark.parametrize("name", ROWS)
def test_every_gold_answer_of_the_real_files_verifies_against_itself(name):
    """The committed table says how many rows there are and names every exception, row by row; it holds no texts."""
    expected = json.loads(TABLE.read_text())[name]
    problems = benchmarks.load(name, pathlib.Path(DATA) / "benchmarks").problems
    with MathVerifier(workers=1, timeout=60.0) as verifier:
        verdicts = verifier.check(problem.answer for problem in problems)
    assert benchmarks.fingerprint(problems) == expected["fingerprint"]
    assert {"rows": len(problems), "exceptions": {str(row): why for row, why in verdicts.items()}} == {
        "rows": expected["rows"], "exceptions": expected["exceptions"]
    }  # fmt: skip
