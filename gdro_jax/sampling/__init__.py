"""The sampling loop."""

from gdro_jax.sampling.config import SamplingConfig
from gdro_jax.sampling.rollouts import Progress, Rollouts, empty
from gdro_jax.sampling.sampler import Sampler
from gdro_jax.sampling.segment import row_keys

__all__ = ["Progress", "Rollouts", "Sampler", "SamplingConfig", "empty", "row_keys"]
