import json
import os
from pathlib import Path

import pytest

from gdro_jax.data import sources
from gdro_jax.data.sources import DataError, Problem

GOOD = {"problem": "1+1?", "answer": "2"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def answer_of(value: object, column: str = "answer") -> str:
    return sources.load([{"problem": "p", column: value}]).problems[0].answer


def test_rows_get_dense_ids_in_file_order(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl", {"question": "q0", "answer": "a", "level": 3}, "", {"question": "q1", "answer": 7}
    )
    loaded = sources.load(file)
    assert loaded.problems == (Problem(0, "q0", "a", "Level 3", "Level 3"), Problem(1, "q1", "7", "unknown"))
    assert loaded.dropped == ()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (" 12 ", "12"),
        (12, "12"),
        (70.0, "70"),
        (-0.5, "-0.5"),
        (2.0**60, "1152921504606846976"),
        (["2"], "2"),
        (["$69$", "$84$"], "69, 84"),
        (["$69$,$84$"], "69,84"),
        ([3.0, 4], "3, 4"),
        ("so \\boxed{1} no, \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("a <<1+1=2>> b\n#### 1,450,000", "1450000"),
        ("it is #### 1, 2", "1, 2"),
        ("\\$18.90", "\\$18.90"),
        ("$18", "$18"),
        ("$x$", "x"),
    ],
)
def test_answer_forms(value: object, expected: str) -> None:
    assert answer_of(value) == expected


def test_a_solution_column_is_a_worked_solution_or_a_short_bare_answer() -> None:
    assert answer_of("34", "solution") == "34"
    assert answer_of("Thus $\\boxed{5}$.", "solution") == "5"
    with pytest.raises(DataError, match=r"line 1: column 'solution' .*no \\boxed"):
        answer_of("A long solution that never comes to a boxed point, however far one reads on in it.", "solution")


@pytest.mark.parametrize(
    "value", [None, "", "  ", [], [[]], {}, True, float("nan"), float("inf"), "\\boxed{}", "####", "$$", "\ud800"]
)
def test_a_row_without_an_answer_is_refused_with_line_column_and_value(value: object) -> None:
    rows = [GOOD, {"problem": "p", "answer": value}]
    with pytest.raises(DataError, match=r"^rows, line 2: column 'answer' ") as caught:
        sources.load(rows)
    assert "\n" not in str(caught.value)
    loaded = sources.load(rows, on_bad_row="drop")
    assert [problem.id for problem in loaded.problems] == [0]
    assert [bad.line for bad in loaded.dropped] == [2]


@pytest.mark.parametrize("value", [None, "", " \n", 5, ["a", "b"], "\udfff"])
def test_a_row_without_a_prompt_is_refused(value: object) -> None:
    with pytest.raises(DataError, match=r"line 2: column 'problem' "):
        sources.load([GOOD, {"problem": value, "answer": "1"}])


@pytest.mark.parametrize("line", ["{", '{"problem": "p", "answer": "1"', "[1]", "3", "nope", "[" * 100_000])
def test_bad_json_names_the_file_and_the_physical_line(tmp_path: Path, line: str) -> None:
    file = write(tmp_path / "bad.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(DataError, match=r"bad\.jsonl, line 3: is "):
        sources.load(file)
    loaded = sources.load(file, on_bad_row="drop")
    assert [problem.id for problem in loaded.problems] == [0, 1]
    assert [bad.line for bad in loaded.dropped] == [3]


def test_bytes_that_are_not_utf8_are_a_bad_row_and_a_byte_order_mark_is_not(tmp_path: Path) -> None:
    file = tmp_path / "bytes.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"problem": "p", "answer": "1"}\r\n{"problem": "\xff", "answer": "1"}\r\n')
    loaded = sources.load(file, on_bad_row="drop")
    assert [(problem.prompt, problem.answer) for problem in loaded.problems] == [("p", "1")]
    assert [bad.line for bad in loaded.dropped] == [2]


def test_columns_can_be_named_nested_ones_too() -> None:
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "reward_model": {"ground_truth": "4"},
        "source": "s",
        "answer": "x",
    }
    by_name = sources.load([row], answer_column="reward_model.ground_truth", stratum_column="source")
    assert by_name.problems == (Problem(0, "hi", "4", "s"),)
    del row["answer"]
    assert sources.load([row]).problems == (Problem(0, "hi", "4", "all"),)


def test_a_column_that_is_nowhere_is_named_with_a_suggestion() -> None:
    with pytest.raises(DataError, match=r"answer_column: there is no column 'anwser'.*did you mean 'answer'"):
        sources.load([GOOD], answer_column="anwser")
    with pytest.raises(DataError, match=r"none of problem, question, prompt is a column.*answer, text"):
        sources.load([{"text": "p", "answer": "1"}])
    with pytest.raises(DataError, match="stratum_column"):
        sources.load([GOOD], stratum_column="level")


def test_a_named_stratum_column_must_be_filled_everywhere() -> None:
    rows = [{**GOOD, "level": "Level 2"}, GOOD]
    assert [problem.stratum for problem in sources.load(rows).problems] == ["Level 2", "unknown"]
    with pytest.raises(DataError, match="line 2: column 'level' is null"):
        sources.load(rows, stratum_column="level")


def test_conversations_and_solutions_beside_a_ground_truth() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    row = {"prompt": turns, "solution": "One and\none make two.", "reward_model": {"ground_truth": "2"}}
    (problem,) = sources.load([row]).problems
    assert (problem.prompt, problem.answer) == ("Be brief.\n\n1+1?", "2")
    for odd in (turns[::-1], [*turns, turns[1]], [{"role": "user"}], []):
        with pytest.raises(DataError, match="column 'prompt' is"):
            sources.load([row | {"prompt": odd}])


def test_files_that_hold_nothing_usable(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        sources.load(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        sources.load(tmp_path)
    with pytest.raises(DataError, match="holds no rows"):
        sources.load(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(DataError, match="none of its 2 rows is usable; line 1"):
        sources.load([{"problem": "", "answer": "1"}] * 2, on_bad_row="drop")
    with pytest.raises(ValueError, match="on_bad_row: 'skip'"):
        sources.load([GOOD], on_bad_row="skip")
    assert issubclass(DataError, ValueError)


BENCHMARKS = {
    "aime24": (30, "204"),
    "aime25": (30, "70"),
    "amc23": (40, "27"),
    "gsm8k_test": (1319, "18"),
    "math500": (500, "\\left( 3, \\frac{\\pi}{2} \\right)"),
    "math_test": (5000, "2"),
    "minerva_math": (272, "1.6"),
    "olympiadbench": (675, "2"),
}


@pytest.mark.skipif(
    "GDRO_SHARED_DATA" not in os.environ, reason="GDRO_SHARED_DATA (the folder of real data) is not set"
)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_real_benchmarks_load_whole(name: str) -> None:
    rows, first = BENCHMARKS[name]
    loaded = sources.load(Path(os.environ["GDRO_SHARED_DATA"]) / "benchmarks" / f"{name}.jsonl")
    assert len(loaded.problems) == rows
    assert loaded.problems[0].answer == first
    assert not any("\\boxed" in problem.answer or "####" in problem.answer for problem in loaded.problems)
    assert max(len(problem.answer) for problem in loaded.problems) < 500
