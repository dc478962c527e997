"""The notebook runs from top to bottom, and is committed with the outputs of a real run."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = pathlib.Path(__file__).parent.parent / "notebooks" / "gdro_demo.ipynb"


def _code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _figures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for cell in _code(notebook) for output in cell.outputs)


def _printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in _code(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("GDRO_NOTEBOOK_STEPS", "3")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # one device, as most who open it have
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    printed = _printed(notebook)
    assert _figures(notebook) == 3
    assert "rollouts spent per step: [384.] of 384" in printed  # the budget, exactly, at every step
    assert "rollouts: 768  compilations after step 1: 0" in printed  # 3 steps of 64 prompts x 4


def test_it_is_committed_with_its_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(cell.execution_count for cell in _code(notebook))
    assert not any(output.output_type == "error" for cell in _code(notebook) for output in cell.outputs)
    assert _figures(notebook) == 3
    assert "step  40 " in _printed(notebook)
