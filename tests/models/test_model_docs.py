"""The tables of docs/models.md are the figures that were measured."""

import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "benchmarks" / "results"
DOCS = (ROOT / "docs" / "models.md").read_text()


def table(header: str) -> dict[str, list[str]]:
    """The rows of the table under a header line, by their first cell."""
    lines = DOCS[DOCS.index(header) :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_errors() -> None:
    errors = json.loads((RESULTS / "model_fidelity.json").read_text())["errors"]
    columns = ("float32", "bfloat16", "bfloat16_of_transformers")
    wanted = {name: [f"{row[column]:.1e}" for column in columns] for name, row in errors.items()}
    assert table("| configuration | float32 | bfloat16 |") == wanted
    ratios = [row["bfloat16"] / row["bfloat16_of_transformers"] for row in errors.values()]
    closer = f"In bfloat16 ours is the closer one in {sum(r < 1 for r in ratios)} of these {len(ratios)} rows, at worst"
    assert f"{closer} {max(ratios):.2f} times theirs" in " ".join(DOCS.split())


@pytest.mark.parametrize("program", ["logits", "gradient", "decode"])
def test_programs_by_depth(program: str) -> None:
    depths = json.loads((RESULTS / "model_compile.json").read_text())["programs"][program]
    lines = [str(depths[depth]["lines"]) for depth in ("4", "12", "36")]
    seconds = [sum(depths[depth]["cpu_seconds"]) / len(depths[depth]["cpu_seconds"]) for depth in ("4", "12", "36")]
    row = table("| | lines, 4 layers |")[program]
    assert row[:3] == lines
    assert [float(cell) for cell in row[3:]] == pytest.approx(seconds, abs=0.051)


def test_loading() -> None:
    found, rows = json.loads((RESULTS / "model_loading.json").read_text()), table("| | seconds | model | peak above")
    for row, it in zip(rows.values(), found["loads"].values(), strict=True):
        each = it["bytes_on_each_device"]
        model = f"{len(each)} x " * (len(each) > 1) + f"{each[0] / 1e9:.2f} GB"
        peak = f"{it['peak_anonymous_bytes'] / 1e9:.2f} GB ({it['peak_anonymous_over_model']:.2f} x)"
        assert row == [str(it["seconds"]), model, peak] and len(set(each)) == 1
        assert it["peak_anonymous_bytes"] < it["model_bytes"] + found["largest_tensor_bytes"]


def test_attention_compiled_for_a_tpu() -> None:
    cases = json.loads((RESULTS / "attention_compile.json").read_text())["cases"]
    found = {(c["prompt"], c["response"], c["tensor"], c["kernel"]): c for c in cases}
    assert len(found) == 8
    lines = DOCS[DOCS.index("| prompt + response | chips |") :].split("\n\n")[0].splitlines()[2:]
    for line, (prompt, response, chips, _) in zip(lines, dict.fromkeys((*k[:3], "") for k in found), strict=True):
        both = [found[prompt, response, chips, kernel] for kernel in ("xla", "splash")]
        sizes = [f"{it[way]['temporary_bytes'] / 1e6:,.0f} MB" for way in ("forward", "backward") for it in both]
        assert [cell.strip() for cell in line.strip("|").split("|")] == [f"{prompt} + {response}", str(chips), *sizes]
