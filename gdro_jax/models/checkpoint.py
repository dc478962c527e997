"""What a Hugging Face folder holds, opened and checked on the host before any device memory is taken."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
import safetensors

from gdro_jax.models.config import Qwen3Config, param_specs

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
READABLE_DTYPES = ("BF16", "F16", "F32", "F64")
EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS_AT_ONCE = 8192
_SAMPLE_BLOCKS, _BLOCK = 64, 1 << 16


class CheckpointError(ValueError):
    """A folder that is not a usable Qwen3 checkpoint; its text is one line that says where, what and what is needed."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A checkpoint of which the folder or a file is missing."""


class TensorSlice(Protocol):
    """A tensor in an open file; indexing reads that part alone."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray: ...


def no_folder(path: pathlib.Path) -> str:
    """What is there where a folder should be."""
    if path.exists():
        return "is a file, not a folder"
    shadowed = len(path.parts) == 2 and not path.is_absolute() and pathlib.Path(path.parts[0]).is_dir()
    return "no such folder" + f" (nor a name of the Hub, since there is a folder {path.parts[0]} here)" * shadowed


def read_config(folder: pathlib.Path) -> Qwen3Config:
    """The configuration of a checkpoint folder.

    Raises:
      CheckpointError: no such folder, no config.json, or not a dense Qwen3.
    """
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"{folder}: {no_folder(folder)}; expected one with config.json and *.safetensors")
    try:
        return Qwen3Config.from_hf(folder)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(str(error)) from error
    except ValueError as error:
        where = folder / "config.json"
        raise CheckpointError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error


def open_tensors(folder: pathlib.Path, files: contextlib.ExitStack) -> dict[str, TensorSlice]:
    """Every tensor of a folder by its checkpoint name; nothing but the headers is read.

    Args:
      folder: with `model.safetensors`, or an index and its shards, or any other *.safetensors.
      files: closes the files when it is closed; the tensors live no longer.

    Raises:
      CheckpointError: no weights, a shard of the index is missing, or a file is truncated or not a safetensors file.
    """
    tensors: dict[str, TensorSlice] = {}
    for path in _weight_files(folder):
        try:
            file = files.enter_context(safetensors.safe_open(path, framework="numpy"))
            names = list(file.keys())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened ({error.strerror or error})") from error
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error
        twice = sorted(tensors.keys() & set(names))
        if twice:
            raise CheckpointError(f"{path}: holds tensors that another file of the folder holds too: {_some(twice)}")
        tensors |= {name: file.get_slice(name) for name in names}
    return tensors


def check_tensors(folder: pathlib.Path, config: Qwen3Config, tensors: Mapping[str, TensorSlice]) -> None:
    """Compares the tensors of a folder with what its configuration needs.

    Raises:
      CheckpointError: naming the missing, unexpected and mis-shaped tensors, a dtype that cannot be read, or a
        separate head that differs from the embedding although the configuration ties them.
    """
    needed = expected_shapes(config)
    spare_head = config.tie_embeddings and _HEAD in tensors
    extra = set(tensors) - set(needed) - ({_HEAD} if spare_head else set())
    wanted = needed | {_HEAD: needed[EMBED]} if spare_head else needed
    problems = []
    if missing := [name for name in needed if name not in tensors]:
        problems.append(f"missing {_some(missing)}")
    if extra:
        problems.append(f"unexpected {_some(sorted(extra))}")
    held = {name: tensors[name] for name in wanted if name in tensors}
    shapes = {name: tuple(tensor.get_shape()) for name, tensor in held.items()}
    if wrong := [f"{n} is {shapes[n]} but config.json needs {wanted[n]}" for n in held if shapes[n] != wanted[n]]:
        problems.append(_some(wrong))
    if odd := [f"{n} has dtype {t.get_dtype()}" for n, t in held.items() if t.get_dtype() not in READABLE_DTYPES]:
        problems.append(f"{_some(odd)}, not one of {', '.join(READABLE_DTYPES)}")
    if problems:
        raise CheckpointError(f"{folder}: tensors do not fit config.json: {'; '.join(problems)}")
    if spare_head and not _equal(tensors[_HEAD], tensors[EMBED], config.vocab_size):
        raise CheckpointError(
            f"{folder}: {_HEAD} differs from {EMBED}, but config.json says tie_word_embeddings=true; "
            "set it to false or remove the tensor"
        )


def digest(folder: pathlib.Path, salt: str, weights: bool = True) -> str:
    """Tells checkpoints apart without reading all of them: names, sizes and blocks spread over each file.

    Args:
      folder: the checkpoint.
      salt: whatever else makes its use another.
      weights: whether its tensors count, and not config.json alone.
    """
    told = hashlib.sha256(salt.encode())
    held = [*folder.glob("*.safetensors"), *folder.glob(INDEX_FILE)] if weights else []
    for file in sorted([*held, *folder.glob("config.json")]):
        size = file.stat().st_size
        told.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            for block in range(_SAMPLE_BLOCKS):
                content.seek(block * max(size - _BLOCK, 0) // (_SAMPLE_BLOCKS - 1))
                told.update(content.read(_BLOCK))
    return told.hexdigest()[:16]


def expected_shapes(config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the checkpoint of a configuration."""
    shapes = {}
    for spec in param_specs(config).values():
        shape = spec.shape[::-1] if spec.transpose else spec.shape
        for layer in range(config.num_layers if spec.stacked else 1):
            shapes[spec.hf_name.format(layer=layer)] = shape
    return shapes


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise CheckpointNotFoundError(f"{folder}: no *.safetensors; other weight formats are not read")
        return found
    try:
        names = sorted({os.fspath(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index with a weight_map ({error!r})") from error
    if outside := [name for name in names if pathlib.Path(name).name != name]:
        raise CheckpointError(f"{index}: names files outside the folder: {_some(outside)}")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointNotFoundError(f"{folder}: {INDEX_FILE} names files that are missing: {_some(absent)}")
    return [folder / name for name in names]


def _equal(a: TensorSlice, b: TensorSlice, rows: int) -> bool:
    cuts = (slice(start, min(start + _ROWS_AT_ONCE, rows)) for start in range(0, rows, _ROWS_AT_ONCE))
    return all(np.array_equal(a[cut, :], b[cut, :]) for cut in cuts)


def _some(names: Iterable[str], most: int = 3) -> str:
    """The first few of the names, and how many more there are, on one line."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
