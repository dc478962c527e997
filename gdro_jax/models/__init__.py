"""The policy: Qwen3 in Flax, and Hugging Face folders in and out."""

from gdro_jax.models import hf, qwen3

__all__ = ["hf", "qwen3"]
