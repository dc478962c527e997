"""What the README says: its Python runs, its configurations are valid, its files exist."""

import pathlib
import re
import shlex
import signal

import pytest
import yaml

from gdro_jax import cli, commands, eval_commands
from gdro_jax.training import config_io

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", _blocks("python"))
def test_python_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


def test_there_are_blocks_to_test() -> None:
    assert len(_blocks("python")) == 2
    assert len(_blocks("yaml")) == 2


@pytest.mark.parametrize("block", _blocks("yaml"))
def test_configurations_are_valid(block: str) -> None:
    config = config_io.from_dict(yaml.safe_load(block))
    if config.compare.methods:
        assert len(commands.comparison(config)) == 12  # 4 methods x 3 seeds


def test_commands_are_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    lines = [line for block in _blocks("") for line in block.splitlines() if line.startswith(".venv/bin/gdro ")]
    done: list[str] = []
    for name, value in (
        ("train", True), ("compare", True), ("evaluate", True), ("compare_evals", None), ("report", 0), ("export", 0)
    ):  # fmt: skip
        room = eval_commands if name in ("evaluate", "compare_evals") else commands
        monkeypatch.setattr(room, name, lambda *_, name=name, value=value: done.append(name) or value)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the command line's own handlers are not for this process
    monkeypatch.chdir(tmp_path)
    pathlib.Path("mine.yaml").write_text(_blocks("yaml")[0])
    for line in lines:
        assert cli.main(shlex.split(line)[1:]) == 0
    assert done == ["train", "compare", "evaluate", "evaluate", "compare_evals", "report", "export"]


def test_files_that_it_names_exist() -> None:
    linked = set(re.findall(r"\]\((?!https?:)([^)]+)\)", TEXT))
    named = set(re.findall(r"(?<![\w/])(?:experiments|tpu|gdro_jax)/[\w/.-]*\w", TEXT))
    assert linked and named
    missing = {name for name in linked | named if not (ROOT / name).exists()}
    assert not missing
