"""`Sampler`: token lists in, token arrays out, with fixed shapes and stateless keys."""

import collections
import zlib
from collections.abc import Sequence

import jax
import numpy as np

from gdro_jax.models import qwen3
from gdro_jax.sampling.config import SamplingConfig
from gdro_jax.sampling.generate import Rollouts, generate, row_keys


class Sampler:
    """Samples responses of a model.

    A row's tokens depend on the key, its prompt and its rank among that prompt's rollouts alone: not on slots, the
    order of prompts or rows, or padding.

    Args:
      model: the policy; `update` replaces it without compiling anew.
      config: what is drawn and when a row stops.

    Raises:
      ValueError: a stop token outside the vocabulary.
    """

    def __init__(self, model: qwen3.Qwen3, config: SamplingConfig):
        vocab = model.config.vocab_size
        outside = [t for t in config.stop_tokens if t >= vocab]
        if outside:
            raise ValueError(f"stop_tokens={outside}: outside the vocabulary of {vocab}")
        self.config = config
        self._model = model
        self._generate = jax.jit(_generate, static_argnames="config")

    def update(self, model: qwen3.Qwen3) -> None:
        """Samples from `model` from now on."""
        self._model = model

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_index: Sequence[int] | np.ndarray,
        key: jax.Array,
        prompt_ids: Sequence[int] | np.ndarray | None = None,
        prompt_length: int | None = None,
    ) -> Rollouts:
        """Samples one response per row.

        Args:
          prompts: P token lists, none empty.
          prompt_index: int32[R], the prompt of each row, in any order.
          key: a random key.
          prompt_ids: an identity per prompt for its random stream; by default a checksum of its tokens.
          prompt_length: pad prompts to this length instead of the next power of two, to keep one compiled shape.

        Raises:
          ValueError: an empty prompt, a prompt longer than `prompt_length`, a token outside the vocabulary, no rows,
            or an index outside the prompts.
        """
        index = np.asarray(prompt_index, np.int32)
        tokens, mask = self._pad(prompts, prompt_length)
        if not index.size or index.min() < 0 or index.max() >= len(prompts):
            raise ValueError(f"prompt_index: needs at least one row and values in 0..{len(prompts) - 1}")
        ids = np.array([zlib.crc32(np.asarray(p, np.int32).tobytes()) for p in prompts], np.uint32)
        if prompt_ids is not None:
            ids = np.asarray(prompt_ids).astype(np.uint32)
        return self.rows(tokens, mask, index, ids[index], key)

    def rows(
        self, prompts: np.ndarray, prompt_mask: np.ndarray, index: np.ndarray, identity: np.ndarray, key: jax.Array
    ) -> Rollouts:
        """Samples one response per row of padded prompts, without any check.

        Args:
          prompts: int32[P, L], padded on the right, with bool[P, L] `prompt_mask`.
          index: int32[R], the prompt of each row; identity: int[R], what its random stream is keyed on.
          key: a random key.
        """
        model = qwen3.working(self._model)  # a copy only while it is used, and only where the dtypes differ
        parts = (index, identity, _ranks(identity))
        slots = min(self.config.slots or len(index), len(index))
        waves = [
            self._generate(model, prompts, prompt_mask, *(_slice(x, start, slots) for x in parts), key, self.config)
            for start in range(0, len(index), slots)
        ]
        if len(waves) == 1:
            return waves[0]
        return jax.tree.map(lambda *wave: np.concatenate(wave)[: len(index)], *waves)

    def slot_steps(self, mask: np.ndarray) -> int:
        """Row positions decoded, useful or idle, for responses of this mask bool[R, T]."""
        lengths, slots = mask.sum(1), min(self.config.slots or len(mask), len(mask))
        return sum(slots * int(lengths[start : start + slots].max()) for start in range(0, len(mask), slots))

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


def _generate(
    model: qwen3.Qwen3,
    tokens: jax.Array,
    mask: jax.Array,
    index: jax.Array,
    identity: jax.Array,
    ranks: jax.Array,
    key: jax.Array,
    config: SamplingConfig,
) -> Rollouts:
    return generate(model, tokens, mask, index, row_keys(key, identity, ranks), config)


def _ranks(identity: np.ndarray) -> np.ndarray:
    """Rank of each row among the rows of the same prompt, in row order: int32[R]."""
    seen: collections.Counter[int] = collections.Counter()
    ranks = np.empty(len(identity), np.int32)
    for row, i in enumerate(identity.tolist()):
        ranks[row] = seen[i]
        seen[i] += 1
    return ranks


def _slice(rows: np.ndarray, start: int, size: int) -> np.ndarray:
    """`size` rows from `start`, the last wave filled up by repeating its final row."""
    part = rows[start : start + size]
    return np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
