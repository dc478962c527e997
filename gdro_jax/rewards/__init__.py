"""Verifiers: right, wrong or unscorable, and never a hang."""

from gdro_jax.rewards.verifier import Grades, Grading, UnscorableError, Verifier, check_failures, make, names
from gdro_jax.rewards.worker_pool import VerifierError

__all__ = ["Grades", "Grading", "UnscorableError", "Verifier", "VerifierError", "check_failures", "make", "names"]
