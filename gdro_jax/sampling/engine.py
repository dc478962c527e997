"""What can stand in for the sampler: the narrow interface that training sees."""

from collections.abc import Iterator
from typing import Protocol

import jax
import numpy as np

from gdro_jax.models import qwen3
from gdro_jax.sampling.rollouts import Progress, Rollouts


class Engine(Protocol):
    """Samples responses of a policy: `Sampler`, or `ServedModel`.

    Attributes:
      slot_steps: of the last call, what it decoded, idle slots included.
    """

    slot_steps: int

    def update(self, model: qwen3.Qwen3) -> None:
        """Samples from `model` from now on."""
        ...

    def rows(
        self,
        prompts: np.ndarray,
        prompt_mask: np.ndarray,
        index: np.ndarray,
        identity: np.ndarray,
        key: jax.Array,
        limits: np.ndarray | None = None,
    ) -> Rollouts:
        """Samples one response per row; see `Sampler.stream`."""
        ...

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
        """The same, handed over as rows end; see `Sampler.stream`."""
        ...
