"""Evaluation: unbiased pass@k, mean@k, strata, the worst stratum, and intervals over prompts."""

from gdro_jax.evaluation.metrics import (
    bootstrap_interval,
    cvar,
    maj_at_k,
    mean_at_k,
    paired_difference,
    pass_at_k,
)
from gdro_jax.evaluation.summary import NothingScorableError, Summary, format_summary, summarise

__all__ = [
    "NothingScorableError",
    "Summary",
    "bootstrap_interval",
    "cvar",
    "format_summary",
    "maj_at_k",
    "mean_at_k",
    "paired_difference",
    "pass_at_k",
    "summarise",
]
