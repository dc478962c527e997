"""Files of rows: parquet as the DAPO set is published in, the hub's cache, what is wrong with a file in one line."""

import pathlib

import huggingface_hub
import pyarrow
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from pyarrow import parquet

from gdro_jax.data import files, sources
from gdro_jax.data.files import DataError

# The columns of the processed DAPO set and of the set it was made from; the rows are made up.
PROCESSED = [
    {
        "prompt": f"What is {n} + {n}?",
        "solution": str(2 * n),
        "data_source": "math_dapo",
        "source_prompt": [{"content": f"Solve step by step. What is {n} + {n}?", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(2 * n), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"id-{n}"},
    }
    for n in range(3)
]
WRAPPER = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n%s\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
ORIGINAL = [
    {
        "data_source": "math_dapo",
        "prompt": [{"content": WRAPPER % f"What is {n} + {n}?", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(2 * n), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"id-{n}-{copy}"},
    }
    for copy in range(100)
    for n in range(3)
]


@pytest.mark.parametrize(("rows", "repeated"), [(PROCESSED, 0), (ORIGINAL, 297)])
def test_dapo_as_its_publishers_wrote_it(rows, repeated, tmp_path):
    """The original set's own instructions, which ask for another form of answer, and its copies are left out."""
    file = tmp_path / "train-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    found = sources.load(file)
    assert [p.id for p in found.problems] == [0, 1, 2] and [p.answer for p in found.problems] == ["0", "2", "4"]
    assert [p.prompt for p in found.problems] == [f"What is {n} + {n}?" for n in range(3)]
    assert found.problems[2].line == 3 and found.repeated == repeated and found.dropped == ()


def test_only_the_publishers_own_words_are_taken_off():
    rows = [row | {"data_source": "mine"} for row in ORIGINAL[:3]] + [ORIGINAL[0] | {"prompt": "Solve this. Answer: x"}]
    found = sources.load(rows)
    assert (
        found.problems[0].prompt == WRAPPER % "What is 0 + 0?" and found.problems[3].prompt == "Solve this. Answer: x"
    )
    assert found.repeated == 0


def test_a_file_on_the_hub_is_read_from_its_cache(tmp_path, monkeypatch):
    file = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(PROCESSED), file)
    asked = []

    def download(repository: str, name: str, *, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(sources.load("hub:open-r1/DAPO-Math-17k-Processed/en/train.parquet").problems) == 3
    assert asked == [("open-r1/DAPO-Math-17k-Processed", "en/train.parquet", "dataset")]

    def offline(*name: object, **kind: object) -> str:
        raise LocalEntryNotFoundError("no network\nand no copy")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(DataError, match=r"^hub:a/b/c\.jsonl: cannot be fetched \(no network\)$"):
        sources.load("hub:a/b/c.jsonl")
    with pytest.raises(DataError, match="hub:OWNER/DATASET/FILE is needed"):
        sources.load("hub:a/b")


def test_what_is_no_parquet_or_not_there_is_said(tmp_path):
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"x\.parquet: is no readable parquet file"):
        sources.load(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="does not exist; a JSON-lines or parquet file is needed"):
        sources.load(tmp_path / "y.parquet")


def test_usable_rows_and_the_places_of_others(tmp_path: pathlib.Path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n\n[2]\nno\n')
    assert list(files.usable(tmp_path / "rows.jsonl")) == [(1, {"a": 1}), (3, None), (4, None)]
