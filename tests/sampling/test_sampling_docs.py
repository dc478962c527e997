"""The tables of docs/sampling.md on memory and precision are the figures that were measured or compiled."""

import json
import pathlib
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "benchmarks" / "results"
DOCS = (ROOT / "docs" / "sampling.md").read_text()
USABLE = {"v5e:2x2": 15.75, "v5p:2x2x1": 95.0}  # GiB of a chip


def table(header: str) -> list[list[str]]:
    """The rows of the table under a header line."""
    lines = DOCS[DOCS.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def results(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def assert_totals(cells: list[str], line: dict[str, Any]) -> None:
    """Of both programs, and while a contiguous cache or a pool grows."""
    sizes = [line["start"]["total_gib"], line["segment"]["total_gib"], line["grow_gib"]]
    fits = line["grow_gib"] <= USABLE[line["topology"]]
    said = [float(cell) for cell in cells[: 2 + fits]]
    assert said == pytest.approx(sizes[: 2 + fits], abs=0.0051) and (fits or cells[2] == "does not")


def test_lengths_of_the_cache() -> None:
    cases = json.loads((RESULTS / "cache_length.json").read_text())["cases"]
    for row, case in zip(table("| lengths: mean, longest; slots |"), cases, strict=True):
        assert row[0].startswith(f"{case['mean']:,}, {case['longest']:,}; {case['slots']}")
        shares = [(case["ladder"], 1.0), *((case[name], case[f"{name}_at_most"]) for name in ("pages", "pool"))]
        assert row[1:] == [f"{100 * mean:.0f}; {100 * most:.0f} %" for mean, most in shares]


def test_sixteen_slots_of_the_8b_compiled() -> None:
    lines = {(x["topology"], x["cache_dtype"] or "bfloat16"): x for x in results("sampler_compile.jsonl")[:3]}
    for row in table("| chips | cache | weights |"):
        chips, dtype = row[0].split(",")[0], row[1]
        line = lines.pop((chips, dtype))
        assert (line["slots"], line["prompts"], line["rollouts"], line["cache"]) == (16, 4, 4, "contiguous")
        held = [f"{line['weights_gib']:.1f}", f"{line['prompts_gib']:.2f}", f"{line['cache_gib']:.2f}"]
        assert row[2:5] == held
        assert_totals(row[5:], line)
    assert not lines


def test_rows_of_the_8b_that_fit() -> None:
    rows = [row for row in table("| chips | lengths | cache | rows |") if row[3]]
    for row, line in zip(rows, results("sampler_compile.jsonl")[3:], strict=True):
        assert row[2].startswith(line["cache"]) and row[3] == f"{line['slots']:,}"
        assert line["slots"] == line["prompts"] * line["rollouts"]
        assert_totals(row[4:7], line)
        most = max(line[program]["total_gib"] for program in ("start", "segment"))
        most = most if line["cache"] == "paged" else line["grow_gib"]
        fit = line["slots"] * (USABLE[line["topology"]] - line["weights_gib"]) / (most - line["weights_gib"])
        assert float(row[7].removeprefix("about ").replace(",", "")) == pytest.approx(fit, rel=0.05)


def test_log_probs_by_what_the_cache_is_kept_in() -> None:
    *_, line = (x for x in results("sampling.jsonl") if x["workload"] == "cache")
    for dtype, size, mean, largest in table("| kept in | bytes of a token |"):
        gap = line["gaps"][dtype]
        assert size == f"{gap['bytes_per_token']:,}" and gap["tokens"] == 8192
        assert float(mean) == pytest.approx(gap["mean"], rel=0.05)
        assert float(largest) == pytest.approx(gap["largest"], rel=0.1)
