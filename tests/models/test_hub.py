"""Names of the Hub: a folder is never one, what cannot be had is one clear line, weights come after the check."""

import json
import pathlib
import shutil

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from model_cases import BASE, make_model

from gdro_jax.models import hf, hub


@pytest.fixture
def published(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> tuple[pathlib.Path, list[tuple]]:
    """A checkpoint that the Hub is made to hold as `Org/Model`, and the calls for it."""
    remote, cache, calls = tmp_path / "remote", tmp_path / "cache", []
    hf.save(make_model(BASE), remote)

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo, revision, allow_patterns))
        if repo != "Org/Model":
            raise LocalEntryNotFoundError("no connection\nand no cache")
        cache.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for file in remote.glob(pattern):
                shutil.copyfile(file, cache / file.name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return remote, calls


def test_a_name_is_downloaded_and_loads(published: tuple) -> None:
    _, calls = published
    assert hf.load("Org/Model@v1").config == BASE
    assert [call[:2] for call in calls] == [("Org/Model", "v1")] * 2
    assert "*.safetensors" not in calls[0][2] and "*.safetensors" in calls[1][2]


def test_another_architecture_is_refused_before_its_weights_are_downloaded(published: tuple) -> None:
    remote, calls = published
    raw = json.loads((remote / "config.json").read_text())
    (remote / "config.json").write_text(json.dumps(raw | {"model_type": "llama"}))
    with pytest.raises(hf.CheckpointError, match="model_type='llama'"):
        hf.load("Org/Model")
    assert len(calls) == 1


def test_without_weights_one_small_download_is_enough(published: tuple) -> None:
    folder = hub.resolve("Org/Model", weights=False)
    assert (folder / "config.json").is_file() and not list(folder.glob("*.safetensors"))


def test_what_cannot_be_had_is_one_line(published: tuple) -> None:
    with pytest.raises(hf.CheckpointNotFoundError) as error:
        hf.load("Org/Other")
    assert "Org/Other: no such folder, and the Hugging Face Hub cannot be reached" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["remote", "remote/typo", "./Org/Model", "a/b/c", "nowhere", "/Org/Model", "Org/"])
def test_places_on_this_machine_are_not_names(path: str, published: tuple) -> None:
    _, calls = published
    assert not hub.is_name(path)
    assert hub.resolve(path) == pathlib.Path(path) and not calls
