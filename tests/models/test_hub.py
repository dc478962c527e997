"""Names of the Hub: a folder is never one, what cannot be had is one clear line, weights come after the check."""

import contextlib
import http.server
import json
import pathlib
import shutil
import threading
from collections.abc import Iterator

import huggingface_hub
import pytest
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from model_cases import BASE, make_model

from gdro_jax.models import hf, hub
from gdro_jax.training import setup
from gdro_jax.training.config import ModelConfig
from gdro_jax.training.export import export


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


def test_small_files_are_checked_before_weights_are_downloaded(published: tuple, tmp_path: pathlib.Path) -> None:
    """Of a run and of an export: tokenizer, kernel, the folder to write to."""
    _, calls = published
    with pytest.raises(setup.InputError, match=r"holds no tokenizer\.json"):
        setup.outline(ModelConfig(path="Org/Model"))
    with pytest.raises(hf.CheckpointError, match=r"no tokenizer\.json"):
        export("Org/Model", str(tmp_path / "out"))
    assert calls and not any("*.safetensors" in patterns for *_, patterns in calls)


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


def test_a_folder_that_hides_a_name_is_said(published: tuple) -> None:
    with pytest.raises(hf.CheckpointNotFoundError, match="nor a name of the Hub, since there is a folder remote here"):
        hf.load("remote/typo")


def test_a_connection_that_breaks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> str:
        raise HTTPError("peer closed\nthe connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(
        hf.CheckpointNotFoundError, match=r"^Org/Model: .* failed \(peer closed the connection\); the same"
    ):
        hf.load("Org/Model")


COMMIT = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """What the Hub answers about the one model in `folder`; no other is there."""

    folder: pathlib.Path
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        place, files = self.path.split("?")[0], sorted(self.folder.iterdir())
        if place.startswith(f"/Org/Model/resolve/{COMMIT}/"):
            body = (self.folder / place.rsplit("/", 1)[1]).read_bytes()
        elif place.startswith("/api/models/Org/Model/tree/"):
            rows = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f"{n:040}"}
                for n, f in enumerate(files)
            ]
            body = json.dumps(rows).encode()
        elif place.startswith("/api/models/Org/Model"):
            names = [{"rfilename": f.name} for f in files]
            body = json.dumps({"id": "Org/Model", "sha": COMMIT, "siblings": names}).encode()
        else:
            body = b"{}"
        self.send_response(404 if body == b"{}" else 200)
        if body == b"{}":
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{place.rsplit("/", 1)[1]}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def serving(folder: pathlib.Path) -> Iterator[str]:
    """The address of a hub with a folder's model."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Hub,), {"folder": folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_the_real_client_downloads_once_and_is_enough_offline(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`huggingface_hub` itself against a hub on this machine, which is then shut down."""
    hf.save(make_model(BASE), tmp_path / "remote", max_file_bytes=20_000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    huggingface_hub.close_session()
    with serving(tmp_path / "remote") as address:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        pattern = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name in ("constants", "file_download"):
            module = getattr(huggingface_hub, name)
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", pattern, raising=False)
        small = hub.resolve("Org/Model", weights=False)
        assert (small / "config.json").is_file() and not list(small.glob("*.safetensors"))
        assert hf.load("Org/Model").config == BASE
        with pytest.raises(hf.CheckpointNotFoundError) as error:
            hf.load("Org/Other")
        assert "the Hugging Face Hub says: 404 Client Error." in str(error.value) and "\n" not in str(error.value)
        assert "Repository Not Found" in str(error.value)
    huggingface_hub.close_session()  # else connections are kept
    assert len(list((hub.resolve("Org/Model")).glob("*.safetensors"))) > 1
    assert hf.load("Org/Model").config == BASE
    with pytest.raises(hf.CheckpointNotFoundError, match="cannot be reached from here"):
        hf.load("Org/Other")
