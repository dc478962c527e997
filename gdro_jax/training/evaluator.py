"""Held-out evaluation of the policy along a run and at its end."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from gdro_jax import rewards
from gdro_jax.data import prompts as prompt_data
from gdro_jax.evaluation import run as evaluation
from gdro_jax.evaluation import summarise
from gdro_jax.sampling import Progress
from gdro_jax.training import engines, setup
from gdro_jax.training.config import Config
from gdro_jax.training.records import Record


class Evaluator:
    """Evaluates a policy on the held-out problems, every time with the same keys: differences are paired."""

    def __init__(self, config: Config, parts: setup.Setup, verifier: rewards.Grading):
        assert parts.heldout is not None
        self._config, self._parts, self._verifier = config, parts, verifier
        self._all = parts.heldout
        self._some = prompt_data.first_per_stratum(parts.heldout, config.eval.problems_per_stratum)
        settings = config.eval_sampling(parts.policy.stop_tokens)
        slots = settings.slots or config.rows_per_step  # no larger a cache than a step's, tokens do not depend on it
        settings = dataclasses.replace(settings, slots=slots)
        self._sampler = engines.sampler(parts.policy.model, settings, parts.layout.mesh)

    def __call__(
        self, model: Any, key: jax.Array, final: bool, watch: Callable[[Progress], None]
    ) -> tuple[Record, int]:
        """Summaries and the number of responses they took.

        `eval` covers all problems for the base and at the end, and the first of each stratum along the way; there
        `eval_part` is the summary of the latter too (of the same responses), so that curves compare like with like.
        `watch` is told at every look at the sampler how far the evaluation is; what it raises ends it.

        Raises:
          UnscorableError: more than `data.max_unscorable` of the responses could not be graded.
        """
        prompts, samples = (self._all if final else self._some), self._config.eval.samples
        self._sampler.update(model)
        total = len(prompts.problems) * samples
        done = tokens = steps = 0  # of the calls before

        def hear(look: Progress) -> None:
            nonlocal done, tokens, steps
            more = look.done < look.total  # of this call; the last one is filled up
            drawn, stepped = tokens + look.tokens, steps + look.slot_steps
            watch(Progress(look.rows, min(done + look.done, total - more), total, drawn, stepped))
            if not more:
                done, tokens, steps = done + look.total, drawn, stepped

        parts = evaluation.responses(
            self._sampler,
            prompts,
            self._parts.policy.tokenizer,
            self._verifier,
            key,
            samples,
            self._all.longest,
            self._config.eval.problems_per_call,
            as_they_finish=True,
            watch=hear,
        )
        counts = evaluation.count(parts, len(self._all.problems))
        rewards.check_failures(counts.failures, counts.responses, self._config.data.max_unscorable, "evaluation")
        more = {"tokens": counts.tokens, "clipped": counts.clipped}
        more["unscorable"] = len(counts.failures) / counts.responses
        summaries = {"eval": self._summary(counts, prompts, final) | more}
        if final and self._some is not self._all:
            summaries["eval_part"] = self._summary(counts, self._some, intervals=False)
        return summaries, total

    def _summary(self, counts: evaluation.Counts, prompts: prompt_data.Prompts, intervals: bool) -> Record:
        ids = [p.id for p in prompts.problems]
        strata = [p.stratum for p in prompts.problems]
        k = self._config.eval.k
        return dict(summarise(counts.correct[ids], counts.scorable[ids], strata, k, intervals=intervals))
