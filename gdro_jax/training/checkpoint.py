"""Checkpoints of everything a run needs to go on exactly: parameters, optimiser, controllers, counters.

Randomness is stateless (every key derives from seed, step and purpose) and the data order is a pure function of
(seed, position), so arrays and counters are all there is. Orbax writes each checkpoint atomically.
"""

import contextlib
import logging
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from gdro_jax.models.checkpoint import CheckpointError

Tree = TypeVar("Tree")


class SaveError(RuntimeError):
    """A checkpoint could not be written; its text is one line."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: where they are; made if missing.
      keep: how many of the newest are kept.
    """

    def __init__(self, folder: pathlib.Path, keep: int):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # what fails is raised, and said once
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def latest(self) -> int | None:
        """The newest step saved, or None."""
        return self._manager.latest_step()

    def save(self, step: int, arrays: Any, counters: dict[str, Any]) -> None:
        """Saves a pytree of arrays and a JSON-able dict of counters; a step saved before is left as it is.

        Raises:
          SaveError: the disk is full, say; the checkpoints before are whole.
        """
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(arrays=ocp.args.StandardSave(_flat(arrays)), counters=ocp.args.JsonSave(counters))
        try:
            self._manager.save(step, args=args)
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            where = self._manager.directory / str(step)
            raise SaveError(
                f"{where}: cannot be written ({_reason(error)}); the checkpoints before are whole"
            ) from error

    def restore(self, step: int, like: Tree) -> tuple[Tree, dict[str, Any]]:
        """The arrays of a step, in the structure, dtypes and sharding of `like`, and its counters.

        Raises:
          CheckpointError: files that are missing or damaged, or of other shapes.
        """
        wanted = ocp.args.StandardRestore(_flat(like))
        args = ocp.args.Composite(arrays=wanted, counters=ocp.args.JsonRestore())
        with _readable(self._manager.directory / str(step)):
            saved = self._manager.restore(step, args=args)
        leaves, structure = jax.tree_util.tree_flatten_with_path(like)
        arrays = [saved["arrays"][jax.tree_util.keystr(path)] if leaf.size else leaf for path, leaf in leaves]
        return jax.tree.unflatten(structure, arrays), saved["counters"]

    def close(self) -> None:
        """Waits for Orbax to finish and lets go of the folder."""
        self._manager.close()


def saved_part(folder: pathlib.Path, shapes: Mapping[str, tuple[int, ...]]) -> Callable[[str], np.ndarray]:
    """Some arrays of one checkpoint, such as the policy's alone; nothing else is read.

    Args:
      folder: `checkpoints/STEP` of a run.
      shapes: of leaves by their paths, as `jax.tree_util.keystr` writes them.

    Returns:
      A function that reads the leaf of a path onto the host.

    Raises:
      CheckpointError: a leaf that the checkpoint does not hold, or in another shape; reading: files that are missing.
    """
    for name in ("absl", "asyncio"):  # which say again, at length, what is raised
        logging.getLogger(name).setLevel(logging.CRITICAL)
    place = folder.resolve() / "arrays"
    found = None
    if place.is_dir():
        with _readable(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = reader.metadata(place).item_metadata
    if found is None:
        raise CheckpointError(f"{folder}: holds no arrays; expected what Orbax writes in {place}")
    held = {path: tuple(leaf.shape) for path, leaf in found.tree.items()}
    unlike = [
        f"{path} is {held.get(path, 'missing')}, not {shape}"
        for path, shape in shapes.items()
        if held.get(path) != shape
    ]
    if unlike:
        more = f" and {len(unlike) - 1} more" if len(unlike) > 1 else ""
        raise CheckpointError(f"{folder}: does not fit the config.json of the run's model: {unlike[0]}{more}")

    def read(path: str) -> np.ndarray:
        args = ocp.args.PyTreeRestore(
            item={path: 0}, partial_restore=True, restore_args={path: ocp.RestoreArgs(restore_type=np.ndarray)}
        )
        with _readable(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return np.asarray(reader.restore(place, args=args)[path])

    return read


def saved_counters(folder: pathlib.Path) -> dict[str, Any]:
    """The counters of one checkpoint, `checkpoints/STEP` of a run; none where they are missing.

    Raises:
      CheckpointError: a file of them is missing or damaged.
    """
    place = folder.resolve() / "counters"
    if not place.is_dir():
        return {}
    with _readable(folder), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(place)


@contextlib.contextmanager
def _readable(folder: pathlib.Path) -> Iterator[None]:
    """Says in one line what Orbax raises of files that are missing or damaged."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError | ValueError | KeyError) and type(error) is not Exception:
            raise  # Orbax raises these, plain, for arrays whose files are not there
        raise CheckpointError(f"{folder}: cannot be read ({_first_line(error.__cause__ or error)})") from error


def _reason(error: Exception) -> str:
    """What the system said, which Orbax puts behind a chain of paths, before brackets."""
    said = re.findall(r": ([^:\[]+) \[", str(error))
    return said[0] if said else _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _flat(tree: Any) -> dict[str, Any]:
    """Leaves by their path, so that what is on disk does not depend on Python classes; empty arrays hold nothing."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if leaf.size}
