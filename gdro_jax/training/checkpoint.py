"""Checkpoints of everything a run needs to go on exactly: parameters, optimiser, controllers, counters.

Randomness is stateless (every key derives from seed, step and purpose) and the data order is a pure function of
(seed, position), so arrays and counters are all there is. Orbax writes each checkpoint atomically.
"""

import logging
import pathlib
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

Tree = TypeVar("Tree")


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: where they are; made if missing.
      keep: how many of the newest are kept.
    """

    def __init__(self, folder: pathlib.Path, keep: int):
        logging.getLogger("absl").setLevel(logging.ERROR)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def latest(self) -> int | None:
        """The newest step saved, or None."""
        return self._manager.latest_step()

    def save(self, step: int, arrays: Any, counters: dict[str, Any]) -> None:
        """Saves a pytree of arrays and a JSON-able dict of counters; a step saved before is left as it is."""
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(arrays=ocp.args.StandardSave(_flat(arrays)), counters=ocp.args.JsonSave(counters))
        self._manager.save(step, args=args)
        self._manager.wait_until_finished()

    def restore(self, step: int, like: Tree) -> tuple[Tree, dict[str, Any]]:
        """The arrays of a step, in the structure, dtypes and sharding of `like`, and its counters."""
        wanted = ocp.args.StandardRestore(_flat(like))
        args = ocp.args.Composite(arrays=wanted, counters=ocp.args.JsonRestore())
        saved = self._manager.restore(step, args=args)
        leaves, structure = jax.tree_util.tree_flatten_with_path(like)
        arrays = [saved["arrays"][jax.tree_util.keystr(path)] if leaf.size else leaf for path, leaf in leaves]
        return jax.tree.unflatten(structure, arrays), saved["counters"]

    def close(self) -> None:
        """Waits for Orbax to finish and lets go of the folder."""
        self._manager.close()


def restore_part(folder: pathlib.Path, paths: Sequence[str]) -> dict[str, jax.Array]:
    """Some arrays of one checkpoint, such as the policy's alone, on the default device; nothing else is read.

    Args:
      folder: `checkpoints/STEP` of a run.
      paths: of leaves, as `jax.tree_util.keystr` writes them.

    Raises:
      KeyError: a path that the checkpoint does not hold.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        held = reader.metadata(folder.resolve() / "arrays").item_metadata.tree
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = {path: jax.ShapeDtypeStruct(held[path].shape, held[path].dtype, sharding=place) for path in paths}
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(item=wanted, partial_restore=True, restore_args=restore_args)
        return reader.restore(folder.resolve() / "arrays", args=args)


def _flat(tree: Any) -> dict[str, Any]:
    """Leaves by their path, so that what is on disk does not depend on Python classes; empty arrays hold nothing."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if leaf.size}
