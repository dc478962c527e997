"""A step's rollouts on the host, and what they come to: the outcome for the rule, the record for the log."""

from typing import Any, NamedTuple

import numpy as np

from gdro_jax import controllers, rewards
from gdro_jax.sampling import Rollouts
from gdro_jax.training import batching, packing, records, step


class Collected(NamedTuple):
    """A step's plan and rollouts on the host, with the pieces the update will go through."""

    plan: controllers.Plan
    rule_state: Any
    prompt_index: np.ndarray
    rollouts: Rollouts
    grades: rewards.Grades
    shaped: np.ndarray
    pieces: batching.Pieces | packing.Packed

    def batch(self, prompts: np.ndarray, prompt_mask: np.ndarray) -> step.Batch:
        """What the update takes; `prompts` int32[N, L] and their mask are of all the data."""
        return step.Batch(
            prompts=prompts[self.plan.prompt_ids],
            prompt_mask=prompt_mask[self.plan.prompt_ids],
            weights=self.plan.weights,
            prompt_index=self.prompt_index,
            tokens=self.rollouts.tokens,
            mask=self.rollouts.mask,
            logprobs=self.rollouts.logprobs,
            rewards=self.shaped,
            scorable=self.grades.scorable,
            pieces=self.pieces,
        )

    def outcome(self) -> controllers.Outcome:
        """Counts per prompt; the variance is the unbiased one of 0/1 rewards, NaN below two scored rollouts."""
        index, scorable, prompts = self.prompt_index, self.grades.scorable, len(self.plan.prompt_ids)
        scored = np.bincount(index[scorable], minlength=prompts)
        failed = np.bincount(index[~scorable], minlength=prompts)
        right = np.bincount(index[scorable], weights=self.grades.scores[scorable], minlength=prompts)
        rate = right / np.maximum(scored, 1)
        variance = np.where(scored > 1, rate * (1 - rate) * scored / np.maximum(scored - 1, 1), np.nan)
        return controllers.Outcome(
            num_correct=right.astype(np.int32),
            num_rollouts=scored.astype(np.int32),
            num_unscorable=failed.astype(np.int32),
            signal=np.zeros(prompts, np.float32),
            reward_variance=variance.astype(np.float32),
        )

    def record(
        self,
        outcome: controllers.Outcome,
        controller: dict[str, np.ndarray],
        all_strata: np.ndarray,
        mean_rollouts: int,
    ) -> records.Record:
        """The log's record of the rollouts.

        Args:
          outcome: of this step.
          controller: what the rule says of its state after the step.
          all_strata: of all the data, by prompt id.
          mean_rollouts: rollouts per prompt.
        """
        scored = np.asarray(outcome.num_rollouts)
        reward = np.where(scored > 0, np.asarray(outcome.num_correct) / np.maximum(scored, 1), np.nan)
        index, scorable = self.prompt_index, self.grades.scorable
        total = np.bincount(index[scorable], weights=self.shaped[scorable], minlength=len(scored))
        shaped = np.where(scored > 0, total / np.maximum(scored, 1), np.nan)
        weights, rollouts = np.asarray(self.plan.weights), np.asarray(self.plan.rollouts, float)
        variance, num_bins = np.asarray(outcome.reward_variance), len(controller["share"])
        bins = records.bin_record(np.asarray(self.plan.bins), weights, rollouts, reward, variance, num_bins)
        strata = all_strata[self.plan.prompt_ids].tolist()
        return {
            "reward": records.mean(reward),  # over prompts: rows would count the prompts with more rollouts more
            "shaped_reward": records.mean(shaped),
            "response_length": float(self.rollouts.mask.sum(1).mean()),
            "unscorable": float(1.0 - scorable.mean()),
            "clipped_length": float(1.0 - self.rollouts.finished.mean()),
            "bins": bins,
            "controller": controller,
            "strata": {
                "share": {name: strata.count(name) / len(strata) for name in sorted(set(strata))},
                "reward": records.by_stratum(reward, strata),
                "rollouts": records.by_stratum(rollouts, strata),
            },
            **records.diagnostic_record(bins, mean_rollouts),
        }
