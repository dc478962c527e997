"""From the name of a model to a local folder: a folder as it is, a Hugging Face name through `huggingface_hub`."""

import os
import pathlib
import re

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

from gdro_jax.models.checkpoint import CheckpointNotFoundError, read_config

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_CONFIG, _TOKENS = ["*.json"], ["merges.txt", "*.jinja"]


def is_name(path: str | os.PathLike[str]) -> bool:
    """Whether this is a Hub name, `OWNER/NAME` or `OWNER/NAME@REVISION`, and not a place on this machine."""
    place = pathlib.Path(path)
    local = place.exists() or (len(place.parts) > 1 and pathlib.Path(place.parts[0]).exists())
    return not local and _NAME.fullmatch(os.fspath(path)) is not None


def resolve(path: str | os.PathLike[str], weights: bool = True) -> pathlib.Path:
    """The local folder of a model.

    Args:
      path: a folder, or a Hub name. What the Hub's cache already holds is not downloaded again, and is enough offline.
      weights: whether the *.safetensors are needed too; the configuration is checked before they are downloaded.

    Raises:
      CheckpointNotFoundError: neither a folder nor a name that can be had; one line that says why.
      CheckpointError: the name is not that of a dense Qwen3.
    """
    if not is_name(path):
        return pathlib.Path(path)
    match = _NAME.fullmatch(os.fspath(path))
    assert match is not None
    folder = _download(match["repo"], match["revision"], _CONFIG + _TOKENS)
    if not weights:
        return folder
    read_config(folder)
    return _download(match["repo"], match["revision"], [*_CONFIG, *_TOKENS, "*.safetensors"])


def _download(repo: str, revision: str | None, patterns: list[str]) -> pathlib.Path:
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        reason = "and the Hugging Face Hub cannot be reached from here, nor does its cache hold that model"
        raise CheckpointNotFoundError(f"{repo}: no such folder, {reason}") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        lines = [line for line in map(str.strip, str(error).splitlines()) if line] or [type(error).__name__]
        said = " ".join(lines[:2])  # of a status, and of what it is about
        raise CheckpointNotFoundError(f"{repo}: no such folder, and the Hugging Face Hub says: {said}") from error
    except HTTPError as error:  # of the connection
        reason = (
            f"the connection to the Hugging Face Hub failed ({' '.join(str(error).split())}); the same again goes on"
        )
        raise CheckpointNotFoundError(f"{repo}: no such folder, and {reason}") from error
