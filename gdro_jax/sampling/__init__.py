"""The sampling loop."""

from gdro_jax.sampling.config import SamplingConfig
from gdro_jax.sampling.generate import Rollouts, generate, row_keys
from gdro_jax.sampling.sampler import Sampler

__all__ = ["Rollouts", "Sampler", "SamplingConfig", "generate", "row_keys"]
