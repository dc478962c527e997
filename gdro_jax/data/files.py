"""Rows of files: JSON lines and parquet, on disk or on the Hugging Face hub, with the line of each."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

HUB = "hub:"
"""What the name of a file on the Hugging Face hub begins with."""


class DataError(ValueError):
    """Data that cannot be used, in one line: where, which column, what it holds, what is allowed."""


class Bad(Exception):
    """What is wrong with one row; becomes a DataError or a row left out and listed."""


def usable(source: str | Path) -> Iterator[tuple[int, Mapping[str, object] | None]]:
    """Line (or place) and row of everything in a file that ``rows`` reads; None for what is no JSON object.

    Raises:
        DataError: as ``rows``.
    """
    for line, row in rows(str(source)):
        yield line, None if isinstance(row, Bad) else row


def rows(name: str) -> Iterator[tuple[int, Mapping[str, object] | Bad]]:
    """Line (1-based; place in a parquet file) and row of everything in a file, or what is wrong with it.

    Args:
        name: a JSON-lines or parquet (``.parquet``) file, or ``hub:OWNER/DATASET/FILE``.

    Raises:
        DataError: no such file, or one that cannot be read.
    """
    path = _download(name) if name.startswith(HUB) else Path(name)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{name}: {what}; a JSON-lines or parquet file is needed")
    return _read_parquet(path) if path.suffix == ".parquet" else _read_lines(path)


def _download(name: str) -> Path:
    """The local copy of ``hub:OWNER/DATASET/PATH/IN/IT``, fetched once and kept in the hub's own cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    owner, _, rest = name.removeprefix(HUB).partition("/")
    dataset, _, file = rest.partition("/")
    if not (owner and dataset and file):
        raise DataError(f"{name}: {HUB}OWNER/DATASET/FILE is needed, with the file's path inside the dataset")
    try:
        return Path(hf_hub_download(f"{owner}/{dataset}", file, repo_type="dataset"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(f"{name}: cannot be fetched ({str(error).splitlines()[0]})") from None


def _read_parquet(path: Path) -> Iterator[tuple[int, Mapping[str, object] | Bad]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"{path}: parquet needs pyarrow, which is not installed") from None
    try:
        yield from enumerate(parquet.read_table(path).to_pylist(), start=1)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: is no readable parquet file ({str(error).splitlines()[0]})") from None


def _read_lines(path: Path) -> Iterator[tuple[int, Mapping[str, object] | Bad]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                yield number, _parse(text)


def _parse(line: bytes) -> Mapping[str, object] | Bad:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Bad(f"is not JSON ({error}); one object a line is needed")
    return row if isinstance(row, dict) else Bad(f"is {show(row)}; a JSON object is needed")


def show(value: object) -> str:
    """A value, short enough for a line."""
    if value is None:
        return "null"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
