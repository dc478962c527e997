"""Loading and saving Hugging Face folders: config.json with one or more *.safetensors, as transformers keeps them.

Both directions read `param_specs`, the one description of the parameters. Besides the model, loading stages at most
`_STAGED_BYTES` on the host at a time, or one layer of one parameter where that is more; saving holds the file that is
being written and a parameter.
"""

import ctypes
import errno
import functools
import glob
import json
import math
import os
import pathlib
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from gdro_jax.models import hub
from gdro_jax.models.checkpoint import (
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
    "check",
    "check_target",
    "load",
    "read_object",
    "read_params",
    "refuse_not_finite",
    "save",
    "stored_dtype",
    "write",
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
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


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


def check(path: str | os.PathLike[str]) -> None:
    """Refuses what `load` would: nothing but config.json and the headers of the tensors is read.

    Raises:
      CheckpointError: as `load` does.
    """
    folder = hub.resolve(path)
    with ExitStack() as files:
        check_tensors(folder, read_config(folder), open_tensors(folder, files))


def stored_dtype(path: str | os.PathLike[str]) -> str:
    """The dtype of a folder's tensors, as `load` names it; float32 for float64, which it has no name for.

    Raises:
      CheckpointError: not a usable checkpoint, or of several dtypes.
    """
    with ExitStack() as files:
        tensors = open_tensors(pathlib.Path(path), files)
        examples = {tensor.get_dtype(): name for name, tensor in tensors.items()}
    if len(examples) > 1:
        listed = ", ".join(f"{name} of {kind}" for kind, name in sorted(examples.items()))
        raise CheckpointError(f"{path}: holds tensors of several dtypes ({listed}); give one with --dtype")
    return {"BF16": "bfloat16", "F16": "float16"}.get("".join(examples), "float32")


def save(
    model: Qwen3,
    path: str | os.PathLike[str],
    *,
    tokenizer_from: str | os.PathLike[str] | None = None,
    generation_from: str | os.PathLike[str] | None = None,
    stops: Sequence[int] | None = None,
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that `load` and transformers open with every tensor equal, in the parameters' own dtype.

    Args:
      model: of any sharding; adapters are merged. In a job of several processes all call this with the same, the
        first one writes, and a model that lies over their devices is gathered a parameter at a time.
      path, tokenizer_from, generation_from, stops, max_file_bytes: as `write` takes them.

    Raises:
      CheckpointError, ValueError, OSError: as `write`.
    """
    model = model if model.adapters() is None else working(model)
    params = _gathered(model)
    try:
        if jax.process_index() == 0:
            write(
                model.config, str(model.embed.dtype), params, path,
                tokenizer_from=tokenizer_from, generation_from=generation_from, stops=stops,
                max_file_bytes=max_file_bytes,
            )  # fmt: skip
    finally:
        if jax.process_count() > 1:
            for _ in params:  # a process cannot gather them alone, whatever became of the others' files
                pass


def write(
    config: Qwen3Config,
    dtype: str,
    params: Iterable[tuple[str, np.ndarray]],
    path: str | os.PathLike[str],
    *,
    tokenizer_from: str | os.PathLike[str] | None = None,
    generation_from: str | os.PathLike[str] | None = None,
    stops: Sequence[int] | None = None,
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder from parameters that come one at a time, stored and of `dtype`.

    The folder is written beside `path`, brought to the disk, and put in place whole. One that is there already is
    replaced as a whole, but only if it holds nothing that this function does not write: where the system can exchange
    two names (Linux on most file systems) `path` is at every moment the old folder or the new one; elsewhere it is
    missing between two renames, and a process that dies there leaves the old one as `.NAME.HOST.PID.old`. What dead
    processes of this machine left is removed by the next call.

    Args:
      config: the architecture.
      dtype: as config.json names it.
      params: names of `param_specs(config)` with arrays of their stored shapes, in any order.
      path: the folder to make; its parents are made too.
      tokenizer_from: a folder whose tokenizer files are copied.
      generation_from: a folder whose generation_config.json is copied; None for `tokenizer_from`.
      stops: ids that end a text, for `eos_token_id` in generation_config.json; None leaves it as it is.
      max_file_bytes: above it the weights are split over several files with an index.

    Raises:
      CheckpointError: `path` holds other files, or `tokenizer_from` no tokenizer or a malformed file; one line.
      ValueError: `max_file_bytes` below 1.
      OSError: the disk is full, say; what was at `path` is still there.
    """
    if max_file_bytes < 1:
        raise ValueError(f"max_file_bytes={max_file_bytes}: must be at least 1")
    target = pathlib.Path(path).resolve()
    extras = check_target(target, tokenizer_from, generation_from)
    _sweep(target, "partial")
    partial, old = (target.with_name(f".{target.name}.{_host()}.{os.getpid()}.{kind}") for kind in ("partial", "old"))
    partial.mkdir(parents=True)
    try:
        (partial / "config.json").write_text(json.dumps(config.to_hf() | {"torch_dtype": dtype}, indent=2) + "\n")
        _save_tensors(_tensors(config, params), partial, max_file_bytes)
        for file in extras:
            shutil.copyfile(file, partial / file.name)
        if stops is not None:
            _declare_stops(partial / GENERATION_FILE, stops)
        for entry in (*partial.iterdir(), partial):
            _to_disk(entry)
        if not target.exists():
            partial.rename(target)
        elif not _exchange(partial, target):
            target.rename(old)
            partial.rename(target)
        _to_disk(target.parent)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
    _sweep(target, "old")  # no sooner: it may have been the only copy


def check_target(
    path: str | os.PathLike[str],
    tokenizer_from: str | os.PathLike[str] | None = None,
    generation_from: str | os.PathLike[str] | None = None,
) -> list[pathlib.Path]:
    """The files that `write` will copy, once it is sure that it may write to `path`.

    Raises:
      CheckpointError: as `write`.
    """
    check_replaceable(pathlib.Path(path).resolve())
    if tokenizer_from is None:
        return []
    found = _tokenizer_files(pathlib.Path(tokenizer_from))
    generation = pathlib.Path(tokenizer_from if generation_from is None else generation_from) / GENERATION_FILE
    if generation.is_file():
        read_object(generation)
        found.append(generation)
    return found


def read_params(path: str | os.PathLike[str], dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters of a folder in `dtype`, as they are stored, one at a time and on the host alone.

    Raises:
      CheckpointError: as `load`.
    """
    folder = pathlib.Path(path)
    config = read_config(folder)
    with ExitStack() as files:
        tensors = open_tensors(folder, files)
        check_tensors(folder, config, tensors)
        for name, spec in param_specs(config).items():
            whole = tuple(slice(0, n) for n in stored_shape(config, spec))
            yield name, _read(config, spec, tensors, jnp.dtype(dtype), whole)


def refuse_not_finite(
    config: Qwen3Config, params: Iterable[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """The same parameters.

    Raises:
      CheckpointError: at the first tensor with an infinite or undefined number, naming it.
    """
    for name, array in params:
        for tensor, part in _layers(config, name, array):
            if bad := int(part.size - np.isfinite(part).sum()):
                raise CheckpointError(f"{tensor}: {bad} of {part.size} numbers are not finite in {part.dtype}")
        yield name, array


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
        part = tensor[own[::-1]].T if spec.transpose else tensor[own]
        with np.errstate(over="ignore"):  # infinite then
            out[row] = part
    return out if spec.stacked else out[0]


def _save_tensors(tensors: Iterator[tuple[str, np.ndarray]], folder: pathlib.Path, max_file_bytes: int) -> None:
    written: list[list[str]] = []
    total = 0
    for batch in _batches(tensors, max_file_bytes):
        file = folder / f"part-{len(written)}"
        try:
            save_file(batch, file, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # which is no OSError, whatever the system said
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder.parent)) from error
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


def _gathered(model: Qwen3) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter by name, one on the host at a time."""
    for name in param_specs(model.config):
        array = getattr(model, name)[...]
        if not array.is_fully_addressable:
            array = multihost_utils.process_allgather(array, tiled=True)
        yield name, np.asarray(array)


def _tensors(config: Qwen3Config, params: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the checkpoint by its name there."""
    for name, array in params:
        for tensor, own in _layers(config, name, array):
            yield tensor, np.ascontiguousarray(own.T if param_specs(config)[name].transpose else own)


def _layers(config: Qwen3Config, name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The parts of a stored parameter that are tensors of their own, not yet transposed."""
    spec = param_specs(config)[name]
    for layer in range(config.num_layers if spec.stacked else 1):
        yield spec.hf_name.format(layer=layer), array[layer] if spec.stacked else array


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


def _declare_stops(file: pathlib.Path, stops: Sequence[int]) -> None:
    """Makes `stops` the ids of a generation_config.json; one that has them already is left as it is."""
    content = read_object(file) if file.is_file() else {}
    held = content.get("eos_token_id")
    if held is None or set(held if isinstance(held, list) else [held]) != set(stops):
        file.write_text(json.dumps(content | {"eos_token_id": list(stops)}, indent=2) + "\n")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())


def _sweep(target: pathlib.Path, kind: str) -> None:
    """Removes what processes of this machine that are gone left beside `target`."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.{_host()}.*.{kind}"):
        pid = left.name.split(".")[-2]
        if pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _to_disk(path: pathlib.Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _exchange(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Exchanges two names at once; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    if done == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(b))


def _tokenizer_files(folder: pathlib.Path) -> list[pathlib.Path]:
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
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
    """Refuses to replace anything that a saved checkpoint would not hold, or that cannot be replaced.

    Raises:
      CheckpointError: naming what is in the way.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: is a file; expected a folder or nothing")
    if os.path.ismount(target):
        raise CheckpointError(f"{target}: is a mount point, which nothing can take the place of; give a folder in it")
    ours = {"config.json", INDEX_FILE, GENERATION_FILE, *TOKENIZER_FILES}
    for entry in sorted(target.iterdir()):
        if entry.name not in ours and entry.suffix != ".safetensors":
            raise CheckpointError(f"{target}: holds {entry.name}, which is no checkpoint file; refusing to replace it")
