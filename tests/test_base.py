"""The shipped base against what it was made to be."""

import jax
import pytest

from gdro_jax import evaluation
from gdro_jax.evaluation import run
from gdro_jax.sampling import Sampler, SamplingConfig
from gdro_jax.training import Config, inputs, setup


@pytest.mark.slow
def test_the_base_solves_some_strata_others_partly_and_one_hardly():
    """pass@8 of 6,480 problems: three strata or more above 0.9, two in 0.2 to 0.8, one in 0.02 to 0.1."""
    config = Config()
    parts = setup.assemble(config)
    policy, asked = parts.policy, parts.heldout
    sampler = Sampler(policy.model, SamplingConfig(max_new_tokens=6, stop_tokens=policy.stop_tokens))
    with inputs.verifier(config) as verifier:
        batches = run.responses(sampler, asked, policy.tokenizer, verifier, jax.random.key(3), 8, asked.longest)
        counts = run.count(batches, len(asked.problems))
    strata = [problem.stratum for problem in asked.problems]
    summary = evaluation.summarise(counts.correct, counts.scorable, strata, 8)
    passed = [stratum["pass"] for stratum in summary["strata"].values()]
    assert sum(p > 0.9 for p in passed) >= 3
    assert sum(0.2 < p < 0.8 for p in passed) >= 2
    assert sum(0.02 < p < 0.1 for p in passed) >= 1
    assert counts.scorable.sum() == 8 * len(asked.problems)
