"""Verifiers: right, wrong or unscorable, and never a hang."""

from gdro_jax.rewards.verifier import Grades, Verifier, make, names

__all__ = ["Grades", "Verifier", "make", "names"]
