"""Which shard of a mesh decodes which row: equally many each, rows of a prompt together as far as they can be."""

import numpy as np

from gdro_jax.sampling.programs import Asked


def place(
    prompts: np.ndarray,
    mask: np.ndarray,
    index: np.ndarray,
    identity: np.ndarray,
    ranks: np.ndarray,
    limits: np.ndarray,
    shards: int,
    even: bool = False,
) -> tuple[Asked, np.ndarray]:
    """A call cut into shards of equal shapes; a prompt whose rows two shards share is run by both.

    Rows go by prompt, so that those of one prompt are decoded together. A shard has room for twice its share of the
    prompts, or for as many as it could need if that is not enough (one more compiled shape, the same tokens).

    Args:
      prompts: int32[P, L] with mask bool[P, L].
      index, identity, ranks, limits: int32[R] each.
      shards: D.
      even: every prompt has as many rows as every other, in every call; a shard then has room for its share alone.

    Returns:
      The call, and int[D, R'] which row each of a shard's rows is.
    """
    rows = -(-len(index) // shards)
    order = np.argsort(index, kind="stable")
    parts = [order[start : start + rows] for start in range(0, rows * shards, rows)]
    needed = [np.unique(index[part]) for part in parts]
    widest, most = max(map(len, needed)), min(len(prompts), rows)
    share = -(-len(prompts) // shards)
    spare = int(rows % max(1, len(index) // len(prompts)) > 0) if even else share
    room = len(prompts) if shards == 1 else min(most, share + spare)
    room = room if room >= widest else most
    local = [np.searchsorted(ids, index[part]) for ids, part in zip(needed, parts, strict=True)]
    used = np.stack([_filled(ids, room) for ids in needed]).reshape(-1)
    row_of = np.stack([_filled(part, rows) for part in parts])

    def flat(values: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([_filled(part, rows) for part in values]).astype(np.int32)

    return (
        Asked(
            tokens=prompts[used],
            mask=mask[used],
            prompt=flat(local),
            identity=flat([identity[part] for part in parts]),
            rank=flat([ranks[part] for part in parts]),
            limit=flat([limits[part] for part in parts]),
            number=np.array([len(part) for part in parts], np.int32),
        ),
        row_of,
    )


def _filled(values: np.ndarray, size: int) -> np.ndarray:
    """The values behind each other, then zeros."""
    return np.concatenate([values, np.zeros(size - len(values), values.dtype)])
