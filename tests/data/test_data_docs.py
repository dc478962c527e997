"""The tables of docs/data_and_evaluation.md are the figures that were measured and the exceptions that were found."""

import json
import pathlib
import re

import pytest

from gdro_jax.data.benchmarks import BENCHMARKS

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "benchmarks" / "results"
DOCS = (ROOT / "docs" / "data_and_evaluation.md").read_text()
TEXT = " ".join(DOCS.split())


def table(header: str) -> list[list[str]]:
    """The rows of the table under a header line."""
    lines = DOCS[DOCS.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_benchmarks_and_their_exceptions_row_by_row() -> None:
    golds = json.loads((ROOT / "tests" / "data" / "benchmark_golds.json").read_text())
    rows = {row[0].strip("`"): row for row in table("| name | file in the folder |")}
    assert list(rows) == list(BENCHMARKS)
    for name, it in golds.items():
        lines = ", ".join(f"line {int(row) + 1}" for row in it["exceptions"]) or "0"
        assert rows[name][1] == f"{name}.jsonl" and rows[name][2] == f"{it['rows']:,}" and rows[name][4] == lines
    assert set(rows) - set(golds) == {"gpqa"}


def test_the_table_of_answer_pairs() -> None:
    pairs = [json.loads(line) for line in (ROOT / "tests" / "rewards" / "answer_pairs.jsonl").read_text().splitlines()]
    kinds, odd = {pair["kind"] for pair in pairs}, sum("verdict" in pair for pair in pairs)
    words = ("none", "one", "two", "three", "four", "five", "six")
    said = (
        f"is a table of {len(pairs)} answer pairs in {len(kinds)} kinds. {words[odd].capitalize()} of them are graded"
    )
    assert said in TEXT


def ends(values: list[float], digits: int = 0) -> str:
    """The least and the largest, as the text says them."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def test_what_grading_costs() -> None:
    found, rows = json.loads((RESULTS / "verifier.json").read_text()), table("| W5, two cores")
    rate, cost, ratio = (found["grading"][name] for name in ("per_second", "processor_ms_each", "ratio"))
    agreement, direct, pool, graded, processor, waiting = [row[1] for row in rows]
    right = round(found["agreement"] * found["responses"])
    assert (
        agreement.startswith(f"{found['agreement']} ({right};")
        and found["unscorable"] == 8
        and "; eight of" in agreement
    )
    assert direct == f"{found['processor_ms_each']['direct']:.2f} ms"
    cost_of_pool, low, high = (float(number) for number in re.findall(r"[0-9.]+", pool))
    assert cost_of_pool == pytest.approx(found["processor_ms_each"]["pool"], abs=0.0051)
    assert (low, high) == (
        pytest.approx(min(found["ratios"]), abs=0.051),
        pytest.approx(max(found["ratios"]), abs=0.51),
    )
    assert f"graded once: {found['distinct_pairs']} of {found['responses']}" in rows[2][0]
    assert graded == f"{ends(rate['1'])} and {ends(rate['2'])}, {ratio} times"
    assert processor == f"{ends(cost['1'], 1)} and {ends(cost['2'], 1)} ms"
    assert [float(it) for it in waiting.split(", ")] == pytest.approx([found["waiting"][it] for it in "1248"], abs=0.51)
    assert f"were {ratio} times as fast on two cores" in TEXT
    assert f"eight workers do {found['waiting']['8'] / found['waiting']['1']:.1f} times the work of one" in TEXT


def test_what_hostile_strings_cost() -> None:
    found = json.loads((RESULTS / "hostile.json").read_text())
    often, seldom = found["together"]
    assert found["rewarded"] == 0 and all(it["right"] == it["ordinary"] for it in found["together"])
    assert f"holds {found['strings']} strings meant to hang" in TEXT
    unscorable = sum(found["unscorable"].values())
    said = (
        f"the slowest takes {found['slowest_seconds']} s, none is rewarded, {found['wrong']} are wrong and {unscorable}"
    )
    assert f"with a deadline of {found['deadline']:g} s {said} unscorable" in TEXT
    each = [it["ordinary"] // found["strings"] for it in found["together"]]
    assert (
        each == [49, 4]
        and f"with 49 after each string all take {often['seconds']} s, with four {seldom['seconds']} s" in TEXT
    )
    least = f"{often['seconds_if_nothing_is_lost']} and {seldom['seconds_if_nothing_is_lost']}"
    assert f"two workers would need {least} if nothing but deadlines and grading cost time" in TEXT
    start = found["start"]
    assert f"costs {start['processor_seconds']:.1f} s of processor time" in TEXT
    assert f"its first answer {start['seconds_after_a_killed_one']:.2f} s later" in TEXT
    bomb = found["memory_bomb"]
    assert f"may use {bomb['limit_mib']} MiB" in TEXT and f"asks for {bomb['peak_mib']} and is told no" in TEXT
