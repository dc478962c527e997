"""The trainer: configuration, setup, the GRPO step, the loop, checkpoints."""

from gdro_jax.training.config import Config
from gdro_jax.training.config_io import ConfigError
from gdro_jax.training.loop import Trainer
from gdro_jax.training.setup import InputError, assemble

__all__ = ["Config", "ConfigError", "InputError", "Trainer", "assemble"]
