"""A table of answers and gold answers, and whether the maths verifier takes one for the other.

A row of `answer_pairs.jsonl` with `verdict` is one where the verifier's grade is not what a mathematician would say
(`equal`): math-verify's ways, kept in view. They are few, and the table fails as soon as one changes.
"""

import collections
import json
import pathlib

import pytest

from gdro_jax.rewards.math_verifier import MathVerifier

ROWS = [
    json.loads(line)
    for line in pathlib.Path(__file__).with_name("answer_pairs.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.fixture(scope="module")
def grades():
    said = [row["given"] if row["kind"] == "boxes" else f"\\boxed{{{row['given']}}}" for row in ROWS]
    with MathVerifier(workers=1, timeout=60.0) as verifier:
        return verifier.grade(said, [row["gold"] for row in ROWS])


def test_the_table_covers_what_it_should():
    kinds = collections.Counter(row["kind"] for row in ROWS)
    assert len(ROWS) >= 200 and len({(row["given"], row["gold"], row["kind"]) for row in ROWS}) == len(ROWS)
    for kind in ("fractions", "surds", "intervals", "sets", "tuples", "matrices", "units", "percentages",
                 "mixed numbers", "thousands separators", "boxes", "text"):  # fmt: skip
        assert kinds[kind] >= 10, kind
        assert {row["equal"] for row in ROWS if row["kind"] == kind} == {True, False}, kind


def test_every_pair(grades):
    wrong = []
    for number, row in enumerate(ROWS):
        verdict = bool(grades.scores[number]) if grades.scorable[number] else grades.reasons[number]
        if verdict != row.get("verdict", row["equal"]):
            wrong.append((row["kind"], row["given"], row["gold"], row["equal"], verdict))
    assert not wrong, "\n".join(map(str, wrong))


def test_few_rows_are_graded_otherwise_than_they_should_be():
    odd = [row for row in ROWS if "verdict" in row]
    assert all(row["verdict"] != row["equal"] for row in odd)
    assert len(odd) <= 0.1 * len(ROWS)
