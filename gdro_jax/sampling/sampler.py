"""`Sampler`: token lists in, token arrays out, with fixed shapes and stateless keys."""

import collections
import zlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gdro_jax.models import paged, qwen3
from gdro_jax.models.sharding import TENSOR_AXIS
from gdro_jax.sampling import placement, programs
from gdro_jax.sampling.config import SamplingConfig
from gdro_jax.sampling.engine import Engine
from gdro_jax.sampling.rollouts import Progress, Rollouts, book


class Sampler(Engine):
    """Samples responses of a model.

    A row's tokens depend on the key, its prompt and its rank among that prompt's rollouts alone: not on slots, the
    order of prompts or rows, padding, or the mesh.

    Args:
      model: the policy; `update` replaces it without compiling anew.
      config: what is drawn and when a row stops.
      mesh: rows lie along all its axes but `tensor`, heads along that one; None for one device.
      even: every prompt gets as many rows as every other: less room for prompts on a mesh.

    Raises:
      ValueError: a stop token outside the vocabulary, nothing but stop tokens where a response has a least length, or
        pages asked for where they cannot be.

    Attributes:
      reader: what reads the pages of the cache (`paged.choose`), None where it is contiguous.
    """

    def __init__(
        self, model: qwen3.Qwen3, config: SamplingConfig, mesh: jax.sharding.Mesh | None = None, even: bool = False
    ):
        vocab = model.config.vocab_size
        outside = [t for t in config.stop_tokens if t >= vocab]
        if outside:
            raise ValueError(f"stop_tokens={outside}: outside the vocabulary of {vocab}")
        if config.min_new_tokens > 1 and len(set(config.stop_tokens)) == vocab:
            raise ValueError(f"min_new_tokens={config.min_new_tokens}: must be 1 where every token is a stop token")
        self.config = config
        self._model, self._even = model, even
        self.reader = reader(model, config, mesh)
        self._programs = programs.shared(config, mesh, self.reader)
        self.slot_steps = 0

    def update(self, model: qwen3.Qwen3) -> None:
        """Samples from `model` from now on."""
        self._model = model

    def compile(self, prompts: int, prompt_length: int, rows: int) -> None:
        """Compiles all programs ahead of the first call: P prompts, padded to L tokens, with about equally many rows.

        A first call compiles them otherwise. On a mesh a call whose rows lie very unevenly over its prompts may need
        other shapes.

        Raises:
          ValueError: a number below 1.
        """
        if min(prompts, prompt_length, rows) < 1:
            raise ValueError(f"prompts, prompt_length, rows: {prompts}, {prompt_length}, {rows}; must be at least 1")
        index = (np.arange(rows) * prompts // rows).astype(np.int32)
        tokens, limits = np.zeros((prompts, prompt_length), np.int32), np.ones(rows, np.int32)
        asked, _ = self._placed(tokens, tokens == 0, index, index, limits)
        self._programs.compile(qwen3.working(self._model), asked, jax.random.key(0), self._slots(rows))

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_index: Sequence[int] | np.ndarray,
        key: jax.Array,
        prompt_ids: Sequence[int] | np.ndarray | None = None,
        prompt_length: int | None = None,
        limits: Sequence[int] | np.ndarray | None = None,
    ) -> Rollouts:
        """Samples one response per row.

        Args:
          prompts: P token lists, none empty.
          prompt_index: int32[R], the prompt of each row, in any order.
          key: a random key.
          prompt_ids: an identity per prompt for its random stream; by default a checksum of its tokens.
          prompt_length: pad prompts to this length instead of the next power of two, to keep one compiled shape.
          limits: int32[R], most tokens of each row; `max_new_tokens` by default.

        Raises:
          ValueError: an empty prompt, a prompt longer than `prompt_length`, a token outside the vocabulary, no rows,
            an index outside the prompts, identities that are not one for each prompt, limits that are not one in
            1..max_new_tokens for each row, or any of these that is no whole number.
        """
        index = np.asarray(prompt_index)
        tokens, mask = self._pad(prompts, prompt_length)
        if not _whole(index) or not index.size or index.min() < 0 or index.max() >= len(prompts):
            raise ValueError(f"prompt_index: needs at least one row and values in 0..{len(prompts) - 1}, whole numbers")
        index = index.astype(np.int32)
        if limits is not None:
            limits, longest = np.asarray(limits), self.config.max_new_tokens
            if limits.shape != index.shape or not _whole(limits) or limits.min() < 1 or limits.max() > longest:
                raise ValueError(f"limits: needs {len(index)} of them, in 1..max_new_tokens={longest}, whole numbers")
            limits = limits.astype(np.int32)
        ids = np.array([zlib.crc32(np.asarray(p, np.int32).tobytes()) for p in prompts], np.uint32)
        if prompt_ids is not None:
            ids = np.asarray(prompt_ids)
            if ids.shape != (len(prompts),) or not _whole(ids):
                raise ValueError(f"prompt_ids: needs {len(prompts)} of them, one for each prompt, whole numbers")
            ids = ids.astype(np.uint32)
        return self.rows(tokens, mask, index, ids[index], key, limits)

    def stream(
        self,
        out: Rollouts,
        prompts: np.ndarray,
        prompt_mask: np.ndarray,
        index: np.ndarray,
        identity: np.ndarray,
        key: jax.Array,
        limits: np.ndarray | None = None,
    ) -> Iterator[Progress]:
        """As `Engine.stream`, a segment at a time; the next segment runs meanwhile."""
        model = qwen3.working(self._model)  # a copy only while it is used, and only where the dtypes differ
        if limits is None:
            limits = np.full(len(index), self.config.max_new_tokens, np.int32)
        asked, row_of = self._placed(prompts, prompt_mask, index, identity, limits)
        decoding, context = self._programs.start(model, asked, key, self._slots(len(index)))
        self.slot_steps = done = tokens = 0
        look = decoding.advance(context)
        while True:
            seen = jax.device_get(look)
            self.slot_steps += int(seen.slot_steps)
            if seen.live:
                decoding.move(int(seen.live), int(seen.waiting), bool(seen.full))
                look = decoding.advance(context)
            ended = book(out, seen.drawn, row_of)
            done, tokens = done + len(ended), tokens + int((seen.drawn.row >= 0).sum())
            yield Progress(ended, done, len(index), tokens, self.slot_steps)
            if not seen.live:
                return

    def _placed(
        self, prompts: np.ndarray, mask: np.ndarray, index: np.ndarray, identity: np.ndarray, limits: np.ndarray
    ) -> tuple[programs.Asked, np.ndarray]:
        order = ranks(identity)
        return placement.place(prompts, mask, index, identity, order, limits, self._programs.shards, self._even)

    def _slots(self, rows: int) -> int:
        """Of a shard."""
        return -(-min(self.config.slots or rows, rows) // self._programs.shards)

    def _pad(self, prompts: Sequence[Sequence[int]], length: int | None) -> tuple[np.ndarray, np.ndarray]:
        sizes = [len(p) for p in prompts]
        if not sizes or min(sizes) == 0:
            raise ValueError(f"prompt {sizes.index(0) if sizes else 0}: empty; every prompt needs at least one token")
        width = length if length is not None else max(8, 1 << (max(sizes) - 1).bit_length())
        if max(sizes) > width:
            raise ValueError(f"prompt {int(np.argmax(sizes))}: {max(sizes)} tokens; at most {width} are allowed")
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        vocab = self._model.config.vocab_size
        if tokens.min() < 0 or tokens.max() >= vocab:
            raise ValueError(f"prompts: token ids must be in 0..{vocab - 1}, found {tokens.min()}..{tokens.max()}")
        return tokens, np.arange(width) < np.asarray(sizes)[:, None]


def reader(
    model: qwen3.Qwen3, config: SamplingConfig, mesh: jax.sharding.Mesh | None, device: jax.Device | None = None
) -> str | None:
    """What `config.cache` comes to for a model on a mesh, or on a device, the default one: see `paged.choose`."""
    device = device if mesh is None else mesh.devices.flat[0]
    platform = jax.default_backend() if device is None else device.platform
    heads, over = model.config.num_kv_heads, 1 if mesh is None else mesh.shape.get(TENSOR_AXIS, 1)
    dtype = config.cache_dtype or str(jnp.dtype(model.compute_dtype or model.embed.dtype))
    heads = heads // over if heads % over == 0 else heads
    return paged.choose(config.cache, platform, model.config.head_dim, heads, dtype, config.page_tokens)


def _whole(values: np.ndarray) -> bool:
    """Whether these are integers in one dimension; of none no dtype tells."""
    return values.ndim == 1 and (values.dtype.kind in "iu" or not values.size)


def ranks(identity: np.ndarray) -> np.ndarray:
    """Rank of each row among the rows of the same prompt, in row order: int32[R]."""
    seen: collections.Counter[int] = collections.Counter()
    ranks = np.empty(len(identity), np.int32)
    for row, i in enumerate(identity.tolist()):
        ranks[row] = seen[i]
        seen[i] += 1
    return ranks
