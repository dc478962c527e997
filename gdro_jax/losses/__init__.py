"""Advantages, the clipped surrogate and KL, log-probs and losses straight from hidden states, and the pmapped form."""

from gdro_jax.losses import grpo, linear_grpo, linear_logprob, linear_loss, pmapped, reduction

__all__ = ["grpo", "linear_grpo", "linear_logprob", "linear_loss", "pmapped", "reduction"]
