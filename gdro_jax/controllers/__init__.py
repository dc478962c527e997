"""The method: difficulty bins, the prompt adversary, the rollout adversary, and rules made of them."""

from gdro_jax.controllers import allocation, diagnostics, difficulty, prompt_gdro, rollout_gdro, theory
from gdro_jax.controllers.registry import make, names, settings
from gdro_jax.controllers.rules import Outcome, Plan, Rule

__all__ = [
    "Outcome",
    "Plan",
    "Rule",
    "allocation",
    "diagnostics",
    "difficulty",
    "make",
    "names",
    "prompt_gdro",
    "rollout_gdro",
    "settings",
    "theory",
]
