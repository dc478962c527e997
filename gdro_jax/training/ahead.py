"""The update compiled before anything is sampled, at a step's shapes: one that does not fit is seen at the start."""

from typing import Any

import jax
import numpy as np

from gdro_jax import host_memory, sampling
from gdro_jax.training import batching, footprint, packing, setup, step
from gdro_jax.training.config import TrainConfig


def blank(
    prompts: np.ndarray,
    prompt_mask: np.ndarray,
    rollouts: np.ndarray,
    longest: int,
    cut: batching.Pieces,
    config: TrainConfig,
) -> step.Batch:
    """A batch of a step's shapes and types, with empty responses.

    Args:
      prompts, prompt_mask: [P, L], of a step.
      rollouts: int32[P].
      longest: tokens of a response.
      cut: of `batching.cut`, into pieces or, with `length_buckets`, into minibatches' shards.
      config: of the step.
    """
    rows = int(rollouts.sum())
    out, rewards, scorable = sampling.empty(rows, longest), np.zeros(rows, np.float32), np.ones(rows, bool)
    pieces = cut if config.length_buckets is None else packing.pack_step(cut, config, out.mask, rewards, scorable)
    return step.Batch(
        prompts=prompts,
        prompt_mask=prompt_mask,
        weights=np.ones(len(prompts), np.float32),
        prompt_index=batching.flat_index(rollouts),
        tokens=out.tokens,
        mask=out.mask,
        logprobs=out.logprobs,
        rewards=rewards,
        scorable=scorable,
        pieces=pieces,
    )


def compile_update(
    update: jax.stages.Wrapped, learner: step.Learner, reference: Any, batch: step.Batch, *more: Any
) -> None:
    """Compiles `step.compiled_update` for these arguments; the call that follows finds it compiled.

    Raises:
      setup.InputError: the compiler refuses it for its memory.
    """
    compiled, _ = footprint.measured(update.lower(learner, reference, batch, *more))
    host_memory.trim()
    if compiled.refused is not None:
        raise setup.InputError(
            f"train.microbatches={more[0].microbatches}: the update does not fit a device ({compiled.refused}); "
            "`gdro plan` says what to change"
        )
