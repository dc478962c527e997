"""The sampling loop."""

from gdro_jax.sampling.config import SamplingConfig
from gdro_jax.sampling.engine import Engine
from gdro_jax.sampling.rollouts import Progress, Rollouts, empty
from gdro_jax.sampling.sampler import Sampler
from gdro_jax.sampling.segment import row_keys
from gdro_jax.sampling.served import ServedModel, ServerError

__all__ = [
    "Engine", "Progress", "Rollouts", "Sampler", "SamplingConfig", "ServedModel", "ServerError", "empty", "row_keys",
]  # fmt: skip
