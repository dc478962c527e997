"""What can stand in for the sampler: the narrow interface that training sees."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import jax
import numpy as np

from gdro_jax.models import qwen3
from gdro_jax.sampling.config import SamplingConfig
from gdro_jax.sampling.rollouts import Progress, Rollouts, empty

Heard = Callable[[Progress], None]


class Engine(ABC):
    """Samples responses of a policy: `Sampler`, or `ServedModel`.

    Attributes:
      config: what is drawn and when a row stops.
      slot_steps: of the last call, what it decoded, idle slots included.
    """

    config: SamplingConfig
    slot_steps: int

    @abstractmethod
    def update(self, model: qwen3.Qwen3) -> None:
        """Samples from `model` from now on."""

    def rows(
        self,
        prompts: np.ndarray,
        prompt_mask: np.ndarray,
        index: np.ndarray,
        identity: np.ndarray,
        key: jax.Array,
        limits: np.ndarray | None = None,
        heard: Heard | None = None,
    ) -> Rollouts:
        """Samples one response per row of padded prompts, without any check; `heard` gets what `stream` says."""
        out = empty(len(index), self.config.max_new_tokens)
        for progress in self.stream(out, prompts, prompt_mask, index, identity, key, limits):
            if heard is not None:
                heard(progress)
        return out

    @abstractmethod
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
        """Samples into `out` and says, now and then, which rows ended.

        Args:
          out: `rollouts.empty(R, max_new_tokens)`; a row of it is final once it is in some `Progress.rows`.
          prompts: int32[P, L], padded on the right, with bool[P, L] `prompt_mask`.
          index: int32[R], the prompt of each row; identity: int[R], what its random stream is keyed on.
          key: a random key.
          limits: int32[R], most tokens of each row; None for `max_new_tokens`.
        """
