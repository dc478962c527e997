"""Loading and saving Hugging Face folders: config.json with one or more *.safetensors, as transformers keeps them.

Both directions read `param_specs`, the one description of the parameters. Besides the model, loading stages at most
`_STAGED_BYTES` on the host at a time, saving holds the file that is being written.
"""

import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from gdro_jax.models import hub
from gdro_jax.models.checkpoint import (
    EMBED,
    INDEX_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    CheckpointNotFoundError,
    TensorSlice,
    check_tensors,
    open_tensors,
    read_config,
)
from gdro_jax.models.config import ParamSpec, Qwen3Config, param_specs, stored_shape
from gdro_jax.models.qwen3 import Qwen3, working
from gdro_jax.models.sharding import param_sharding

__all__ = [
    "CheckpointError",
    "CheckpointNotFoundError",
    "check_replaceable",
    "load",
    "read_object",
    "save",
    "stored_dtype",
]

DTYPES = ("float32", "bfloat16", "float16")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
GENERATION_FILE = "generation_config.json"
_STAGED_BYTES = 1 << 26


def load(path: str | os.PathLike[str], dtype: str = "float32", mesh: jax.sharding.Mesh | None = None) -> Qwen3:
    """The model of a Hugging Face folder, its parameters cast to `dtype`.

    Everything is checked before device memory is taken; then tensors are read one at a time, by slice, and with a
    mesh each device gets its own part only.

    Args:
      path: a folder with config.json and *.safetensors (one file, or shards with an index), of bfloat16, float16,
        float32 or float64 tensors; or a Hugging Face name (`hub.resolve`).
      dtype: of the parameters and so of the computation: "float32", "bfloat16" or "float16".
      mesh: shards the parameters by `sharding.MESH_AXES`; None puts them on the default device.

    Raises:
      CheckpointError: (a ValueError; also a FileNotFoundError where something is missing) one line that names what
        is missing, unexpected, mis-shaped, truncated or of another architecture.
      ValueError: an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    folder = hub.resolve(path)
    config = read_config(folder)
    with ExitStack() as files:
        tensors = open_tensors(folder, files)
        check_tensors(folder, config, tensors)
        arrays = {}
        for name, spec in param_specs(config).items():
            arrays[name] = _load_param(config, spec, tensors, jnp.dtype(dtype), mesh)
    return Qwen3(config, arrays)


def stored_dtype(path: str | os.PathLike[str]) -> str:
    """The dtype of a folder's embedding, as `load` names it; float32 for what it has no name for.

    Raises:
      CheckpointError: not a usable checkpoint.
    """
    with ExitStack() as files:
        tensors = open_tensors(pathlib.Path(path), files)
        name = tensors[EMBED].get_dtype() if EMBED in tensors else ""
    return {"BF16": "bfloat16", "F16": "float16"}.get(name, "float32")


def save(
    model: Qwen3,
    path: str | os.PathLike[str],
    *,
    tokenizer_from: str | os.PathLike[str] | None = None,
    generation: Mapping[str, object] | None = None,
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that `load` and transformers open with every tensor equal, in the parameters' own dtype.

    The folder appears whole or not at all: it is written beside `path` and renamed. One that is there already is
    replaced as a whole, but only if it holds nothing that this function does not write.

    Args:
      model: of any sharding; adapters are merged. In a job of several processes all call this with the same, the
        first one writes, and a model that lies over their devices is gathered a parameter at a time.
      path: the folder to make; its parents are made too.
      tokenizer_from: a folder whose tokenizer files and generation_config.json are copied.
      generation: entries of generation_config.json that replace the copied ones, such as `eos_token_id`.
      max_file_bytes: above it the weights are split over several files with an index.

    Raises:
      CheckpointError: `path` holds other files, or `tokenizer_from` no tokenizer or a malformed file; one line.
      ValueError: `max_file_bytes` below 1.
    """
    if max_file_bytes < 1:
        raise ValueError(f"max_file_bytes={max_file_bytes}: must be at least 1")
    model = model if model.adapters() is None else working(model)
    tensors = _tensors(model)
    try:
        if jax.process_index() == 0:
            _write(model, tensors, pathlib.Path(path).resolve(), tokenizer_from, generation, max_file_bytes)
    finally:
        if jax.process_count() > 1:
            for _ in tensors:  # a process cannot gather them alone, whatever became of the others' files
                pass


def _write(
    model: Qwen3,
    tensors: Iterator[tuple[str, np.ndarray]],
    target: pathlib.Path,
    tokenizer_from: str | os.PathLike[str] | None,
    generation: Mapping[str, object] | None,
    max_file_bytes: int,
) -> None:
    check_replaceable(target)
    extras = [] if tokenizer_from is None else _tokenizer_files(pathlib.Path(tokenizer_from))
    partial, old = (target.with_name(f".{target.name}.{os.getpid()}.{kind}") for kind in ("partial", "old"))
    partial.mkdir(parents=True)
    try:
        content = model.config.to_hf() | {"torch_dtype": str(model.embed.dtype)}
        (partial / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        _save_tensors(tensors, partial, max_file_bytes)
        for file in extras:
            shutil.copyfile(file, partial / file.name)
        if generation is not None:
            _update_json(partial / GENERATION_FILE, generation)
        if target.exists():
            target.rename(old)
        partial.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)


def _load_param(
    config: Qwen3Config,
    spec: ParamSpec,
    tensors: Mapping[str, TensorSlice],
    dtype: np.dtype,
    mesh: jax.sharding.Mesh | None,
) -> jax.Array:
    """A stored parameter on its devices; what several devices hold alike is read once."""
    shape = stored_shape(config, spec)
    if mesh is None:
        whole = tuple(slice(0, n) for n in shape)
        return _place(config, spec, tensors, dtype, whole, [None])[0]
    sharding = param_sharding(config, spec, mesh)
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        cuts = (slice(None),) * len(shape) if index is None else index
        holders.setdefault(tuple(cut.indices(n)[:2] for cut, n in zip(cuts, shape, strict=True)), []).append(device)
    parts = [
        part
        for ends, devices in holders.items()
        for part in _place(config, spec, tensors, dtype, tuple(slice(*cut) for cut in ends), devices)
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _place(
    config: Qwen3Config,
    spec: ParamSpec,
    tensors: Mapping[str, TensorSlice],
    dtype: np.dtype,
    index: tuple[slice, ...],
    devices: Sequence[jax.Device | None],
) -> list[jax.Array]:
    """The part `index` of a parameter on each of the devices, staged a few rows of its first axis at a time."""
    shape = tuple(cut.stop - cut.start for cut in index)
    rows = max(1, _STAGED_BYTES // (math.prod(shape[1:]) * dtype.itemsize))
    if rows >= shape[0]:
        whole = _read(config, spec, tensors, dtype, index)
        return [jax.device_put(whole, device) for device in devices]
    out = [jnp.zeros(shape, dtype, device=device) for device in devices]
    for start in range(index[0].start, index[0].stop, rows):
        some = slice(start, min(start + rows, index[0].stop))
        staged = _read(config, spec, tensors, dtype, (some, *index[1:]))
        out = jax.block_until_ready([_fill(part, staged, start - index[0].start) for part in out])
        del staged  # before the next rows are
    return out


@functools.partial(jax.jit, donate_argnums=0)
def _fill(whole: jax.Array, rows: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, rows, start, axis=0)


def _read(
    config: Qwen3Config, spec: ParamSpec, tensors: Mapping[str, TensorSlice], dtype: np.dtype, index: tuple[slice, ...]
) -> np.ndarray:
    """The part `index` (start and stop given) of a stored parameter, read from the tensors that hold it."""
    layers = range(config.num_layers)[index[0]] if spec.stacked else range(1)
    own = index[1:] if spec.stacked else index
    out = np.empty((len(layers), *(cut.stop - cut.start for cut in own)), dtype)
    for row, layer in enumerate(layers):
        tensor = tensors[spec.hf_name.format(layer=layer)]
        out[row] = tensor[own[::-1]].T if spec.transpose else tensor[own]
    return out if spec.stacked else out[0]


def _save_tensors(tensors: Iterator[tuple[str, np.ndarray]], folder: pathlib.Path, max_file_bytes: int) -> None:
    written: list[list[str]] = []
    total = 0
    for batch in _batches(tensors, max_file_bytes):
        file = folder / f"part-{len(written)}"
        save_file(batch, file, metadata={"format": "pt"})
        file.chmod((folder / "config.json").stat().st_mode)  # as readable as the rest
        written.append(list(batch))
        total += sum(array.nbytes for array in batch.values())
    if len(written) == 1:
        (folder / "part-0").rename(folder / WEIGHTS_FILE)
        return
    places: dict[str, str] = {}
    for part, names in enumerate(written):
        name = f"model-{part + 1:05}-of-{len(written):05}.safetensors"
        (folder / f"part-{part}").rename(folder / name)
        places |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _tensors(model: Qwen3) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the checkpoint by name, one stacked parameter on the host at a time."""
    for name, spec in param_specs(model.config).items():
        array = getattr(model, name)[...]
        if not array.is_fully_addressable:
            array = multihost_utils.process_allgather(array, tiled=True)
        array = np.asarray(array)
        for layer in range(model.config.num_layers if spec.stacked else 1):
            own = array[layer] if spec.stacked else array
            yield spec.hf_name.format(layer=layer), np.ascontiguousarray(own.T if spec.transpose else own)


def _batches(tensors: Iterator[tuple[str, np.ndarray]], most: int) -> Iterator[dict[str, np.ndarray]]:
    """Groups tensors in order, none of more than `most` bytes unless it is a single tensor."""
    batch: dict[str, np.ndarray] = {}
    size = 0
    for name, array in tensors:
        if batch and size + array.nbytes > most:
            yield batch
            batch, size = {}, 0
        batch[name] = array
        size += array.nbytes
    yield batch


def _update_json(file: pathlib.Path, changes: Mapping[str, object]) -> None:
    content = read_object(file) if file.is_file() else {}
    file.write_text(json.dumps(content | dict(changes), indent=2) + "\n")


def _tokenizer_files(folder: pathlib.Path) -> list[pathlib.Path]:
    found = [folder / name for name in (*TOKENIZER_FILES, GENERATION_FILE) if (folder / name).is_file()]
    if not any(file.name in ("tokenizer.json", "vocab.json") for file in found):
        raise CheckpointNotFoundError(f"tokenizer_from={str(folder)!r}: no tokenizer.json or vocab.json there")
    for file in found:
        if file.suffix == ".json":
            read_object(file)
    return found


def read_object(file: pathlib.Path) -> dict[str, object]:
    """A file's JSON object.

    Raises:
      CheckpointError: it is something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def check_replaceable(target: pathlib.Path) -> None:
    """Refuses to replace anything that a saved checkpoint would not hold.

    Raises:
      CheckpointError: naming what is in the way.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: is a file; expected a folder or nothing")
    ours = {"config.json", INDEX_FILE, GENERATION_FILE, *TOKENIZER_FILES}
    for entry in sorted(target.iterdir()):
        if entry.name not in ours and entry.suffix != ".safetensors":
            raise CheckpointError(f"{target}: holds {entry.name}, which is no checkpoint file; refusing to replace it")
