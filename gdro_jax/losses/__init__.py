"""Advantages, the clipped surrogate and KL, log-probs straight from hidden states, and the pmapped form."""

from gdro_jax.losses import grpo, linear_logprob, pmapped, reduction

__all__ = ["grpo", "linear_logprob", "pmapped", "reduction"]
