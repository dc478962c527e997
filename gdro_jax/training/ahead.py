"""The update compiled and run before anything is sampled, at a step's shapes: one that does not fit is seen then."""

from typing import Any

import jax
import numpy as np

from gdro_jax import host_memory, sampling
from gdro_jax.training import batching, footprint, packing, processes, setup, step
from gdro_jax.training.config import TrainConfig


def blank(
    prompts: np.ndarray,
    prompt_mask: np.ndarray,
    rollouts: np.ndarray,
    longest: int,
    cut: batching.Pieces,
    config: TrainConfig,
) -> step.Batch:
    """A batch of a step's shapes and types, with responses of one token, that leaves no trace.

    Its weights are NaN: an update with it is left out, and gives back the learner that it was given.

    Args:
      prompts, prompt_mask: [P, L], of a step.
      rollouts: int32[P].
      longest: tokens of a response.
      cut: of `batching.cut`, into pieces or, with `attention_tile`, into minibatches' shards.
      config: of the step.
    """
    rows = int(rollouts.sum())
    out, rewards, scorable = sampling.empty(rows, longest), np.zeros(rows, np.float32), np.ones(rows, bool)
    out.mask[:, 0] = True
    pieces: batching.Pieces | packing.Packed = cut
    if config.attention_tile is not None:
        pieces = packing.pack_step(cut, config, prompt_mask, out.mask, rewards, scorable)
    return step.Batch(
        prompts=prompts,
        prompt_mask=prompt_mask,
        weights=np.full(len(prompts), np.nan, np.float32),
        prompt_index=batching.flat_index(rollouts),
        tokens=out.tokens,
        mask=out.mask,
        logprobs=out.logprobs,
        rewards=rewards,
        scorable=scorable,
        pieces=pieces,
    )


def try_update(update: jax.stages.Wrapped, learner: step.Learner, reference: Any, batch: step.Batch, *more: Any) -> Any:
    """Compiles `step.compiled_update` for these arguments and runs it once; the calls that follow find it compiled.

    Args:
      update: which takes over the learner's memory.
      batch: of `blank`.
      more: what it is compiled for besides shapes.

    Returns:
      The learner, unchanged.

    Raises:
      setup.InputError: the compiler refuses it for its memory, or a device has too little left to run it.
    """
    compiled, _ = footprint.measured(update.lower(learner, reference, batch, *more))
    host_memory.trim()
    if compiled.refused is not None:
        raise _does_not_fit(more[0], compiled.refused)
    if jax.config.jax_debug_nans:  # type: ignore[attr-defined]  # the run would end here
        return learner
    processes.gathered(None)  # one that compiles for longer is waited for: the first collective of a program may not be
    try:
        return jax.block_until_ready(update(learner, reference, batch, *more).learner)
    except jax.errors.JaxRuntimeError as error:
        refused = footprint.too_large(error)
        if refused is None or processes.count() > 1:  # others, with more memory left, wait for this one
            raise
        raise _does_not_fit(more[0], refused) from None


def _does_not_fit(config: TrainConfig, why: str) -> setup.InputError:
    return setup.InputError(
        f"train.microbatches={config.microbatches}: the update does not fit a device ({why}); "
        "`gdro plan` says what to change"
    )
