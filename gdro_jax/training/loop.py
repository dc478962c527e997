"""The training loop: plan, collect, score, update, record; nothing on the host but text, grades, logs and checkpoints.

Randomness is stateless: a key is folded from (seed, purpose, step), a row's from its prompt and rank besides. So a run
that is stopped and resumed goes on exactly as if it had not been.
"""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdro_jax import controllers, evaluation, rewards, sampling
from gdro_jax.data import prompts as prompt_data
from gdro_jax.models import qwen3
from gdro_jax.models.config import work
from gdro_jax.rewards import shaping
from gdro_jax.sampling.engine import Heard
from gdro_jax.training import (
    agreement,
    ahead,
    batching,
    engines,
    guard,
    overlap,
    packing,
    processes,
    records,
    run_folder,
    setup,
    step,
)
from gdro_jax.training.checkpoint import Checkpoints
from gdro_jax.training.collected import Collected
from gdro_jax.training.compiles import CompileCounter
from gdro_jax.training.config import Config
from gdro_jax.training.evaluator import Evaluator
from gdro_jax.training.export import save_policy
from gdro_jax.training.grading import SharedVerifier
from gdro_jax.training.ledger import Clock, Ledger
from gdro_jax.training.optimiser import learning_rate
from gdro_jax.training.run_log import RunLog

_PLAN, _SAMPLE, _CUT, _EVAL, _INIT, _GATE, _ADAPT = range(7)  # purposes of random keys

FAULTS_OF_ALL = (rewards.UnscorableError, evaluation.NothingScorableError, guard.NotFiniteError)
"""What every process of a job finds alike, from the same grades and losses, and ends with by itself."""

Watch = Callable[[int, sampling.Progress], None]  # of a step's number and how far its sampling is


def _nothing(step: int, progress: sampling.Progress) -> None:
    """Nobody watches."""


class _LeftError(Exception):
    """A stop was asked for while a step, an evaluation or the gate sampled: it counts as not begun."""


class State(NamedTuple):
    """Everything a checkpoint holds in arrays."""

    learner: step.Learner
    rule: Any


class Trainer:
    """One run: its compiled functions, its state and its folder.

    Args:
      config: the run's configuration.
      parts: what `setup.assemble` built from it.
      verifier: grades responses; the caller closes it.
      compiles: counts compilations.
      release: whether the policy of `parts` is for this run alone, so that its memory is given back at once unless it
        is the reference.

    Raises:
      setup.InputError: the run's folder holds a run of another configuration, or of other problems.
    """

    def __init__(
        self,
        config: Config,
        parts: setup.Setup,
        verifier: rewards.Verifier,
        compiles: CompileCounter,
        release: bool = False,
    ):
        self.config, self.parts, self.verifier, self.compiles = config, parts, verifier, compiles
        self.key = jax.random.key(config.run.seed)
        self.folder = pathlib.Path(config.run.output)
        base, low_rank = parts.policy.model, config.model.lora_rank is not None
        self.reference = qwen3.working(base) if config.train.kl_coef > 0 or low_rank else None
        self._reference_weights = None if self.reference is None else setup.weights_of(config.model)
        self.tokens, self.mask = prompt_data.pad(parts.train.tokens, parts.train.longest)
        self.strata = np.array([p.stratum for p in parts.train.problems], dtype=object)
        self._plan, self._update_rule = jax.jit(parts.rule.plan), jax.jit(parts.rule.update)
        self._metrics, self._reweigh = jax.jit(parts.rule.metrics), jax.jit(parts.rule.reweigh)
        self._sampler = engines.make(config, parts.policy, parts.layout.mesh)
        self._update = step.compiled_update()
        self._signal = jax.jit(step.surrogate_signal, static_argnames=("config", "temperature", "layout"))
        self._evaluator = Evaluator(config, parts, SharedVerifier(verifier)) if parts.heldout is not None else None
        self.ledger, self.step = Ledger(), 0
        self._most = setup.most_rollouts(config.controller)
        self._warm = False  # whether every program of a step has been compiled
        # Updates take the memory of what is trained, never of the policy that may be the reference or another run's.
        trained = setup.adapters(config.model, base.config, self._fold(_ADAPT)) if low_rank else base
        learner = step.begin(jax.tree.map(jnp.copy, trained), base.config, config.train, parts.layout)
        if release and self.reference is not base:
            jax.tree.map(lambda x: x.delete(), base)
        self.state = State(learner, parts.rule.init(self._fold(_INIT)))
        self._left_out = guard.LeftOut()
        self._pending: records.Record | None = None  # a step's record that is not in the log yet
        with contextlib.ExitStack() as on_error:
            self._lock = run_folder.claim(config)
            on_error.callback(self._release)
            first = list(parts.train.tokens[0])
            shown = str(parts.policy.tokenizer.decode(first))
            run_folder.keep_first_prompt(self.folder, first, shown, len(parts.train.dropped))
            self._open()
            on_error.pop_all()

    def run(
        self,
        on_record: Callable[[records.Record], None],
        stop: Callable[[], bool] = lambda: False,
        on_sampled: Watch = _nothing,
    ) -> bool:
        """Trains to the last step; True when done, False when `stop` asked for an end.

        `on_sampled` hears how far the sampling of a step or an evaluation is, a segment at a time. A stop is heeded
        there too: what has been sampled is dropped, and sampled again on resuming.
        However it ends, by a fault too, everything up to the last whole step is in a checkpoint; only a fault in the
        update itself, which works in the state's own memory, leaves the checkpoint before, as any but `FAULTS_OF_ALL`
        does where there are several processes: the others, who must save with this one, may not know of it.

        Raises:
          agreement.Disagreement: sampler and trainer are too far apart; nothing is trained on such samples.
          guard.NotFiniteError: too many updates in a row were left out.
        """
        stop = processes.agreed(stop)
        whole = processes.count() == 1  # whether all can save together

        def heed(progress: sampling.Progress) -> None:
            if progress.done < progress.total and stop():
                raise _LeftError

        def watch(number: int, progress: sampling.Progress) -> None:
            on_sampled(number, progress)
            heed(progress)

        if self.step < self.config.run.steps and not stop():
            self.try_update()
            if not stop():
                with contextlib.suppress(_LeftError):  # the loop below sees the stop, too
                    self.check_agreement(heed)
        limit = self.config.train.max_skipped
        if self.step >= self.config.run.steps:  # a run that ended so at its last step is not done now
            guard.check(self._left_out, limit, self.folder, self.step)
        try:
            if self.step == 0 and self._evaluator is not None and 0 not in self.log.steps and not stop():
                on_record(self._write({"step": 0} | self._evaluate(True, watch)))
            while True:
                if self._pending is not None:
                    if self._evaluation_due() and stop():
                        break
                    on_record(self._finish(self._pending, watch))
                if stop() or self.step >= self.config.run.steps:
                    break
                self._pending = self.one_step(watch)
                if self._due(self.config.run.checkpoint_every):
                    self.save()
                guard.check(self._left_out, limit, self.folder, self.step)
            whole = True
        except _LeftError:  # of all processes, after the same segment
            whole = True
        except FAULTS_OF_ALL:
            whole = True
            raise
        finally:
            if whole:
                self.save()
        done = self.step >= self.config.run.steps and self._pending is None
        if done and self.config.run.save_model:
            save_policy(
                self._policy(), self.folder / run_folder.MODEL, self.config.model, self.parts.policy.stop_tokens
            )
        return done

    def try_update(self) -> None:
        """Compiles the update at a step's shapes and runs it, so that one which does not fit is seen before sampling.

        Raises:
          setup.InputError: it needs more memory than a device has left.
        """
        counts = np.full(self.config.train.prompts_per_step, self.config.controller.mean_rollouts)
        some = np.arange(len(counts)) % len(self.tokens)
        longest, before = self.config.sampling.max_new_tokens, self.compiles.seconds
        batch = ahead.blank(
            self.tokens[some], self.mask[some], counts, longest, self._cut(counts, 0), self.config.train
        )
        given = (self.state.learner, self.reference, self.parts.layout.whole(batch), *self._static)
        learner = ahead.try_update(self._update, *given)
        self.state = self.state._replace(learner=learner)
        self.ledger.compile_seconds += self.compiles.seconds - before

    def check_agreement(self, heard: Heard | None = None) -> agreement.Gap | None:
        """Compares sampler and trainer on the first prompts of the data, at a step's shapes; None if not asked to.

        `heard` is told how far the sampling is.

        Raises:
          agreement.Disagreement: over `sampling.gap_tolerance`.
        """
        settings, model = self.config.sampling, self._policy()
        if settings.gap_tolerance is None:
            return None
        ids = np.arange(self.config.train.prompts_per_step)
        index = batching.flat_index(np.full(len(ids), self.config.controller.mean_rollouts))
        asked = (self.tokens[ids], self.mask[ids], index, ids[index], self._fold(_GATE, self.step))
        self._sampler.update(model)
        limits = (settings.temperature, settings.max_new_tokens)
        gap = agreement.measure(self._sampler, model, *asked, *limits, self.parts.layout, heard=heard)
        agreement.check(gap, settings.gap_tolerance)
        return gap

    def _check_served(self, out: sampling.Rollouts, ids: np.ndarray, index: np.ndarray) -> None:
        """A served model may stop reading new weights at any time: some of a step's responses are compared."""
        settings = self.config.sampling
        if settings.server is None or settings.gap_tolerance is None:
            return
        asked = (self._policy(), self.tokens[ids], self.mask[ids], index, settings.temperature)
        gap = agreement.compare(out, *asked, self.parts.layout, some=True)
        agreement.check(gap, settings.gap_tolerance, f"step {self.step + 1}: ")

    def one_step(self, watch: Watch = _nothing) -> records.Record:
        """Plans, samples, grades, updates policy and controllers; returns the step's log record."""
        clock = Clock()
        compiled, programs = self.compiles.seconds, self.compiles.count
        collected, result, rule_state, outcome = self._learn(self._collect(clock, watch), clock)
        record = self._record(collected, result, rule_state, outcome)
        self.state, self.step = State(result.learner, rule_state), self.step + 1
        self._count(collected, clock, self.compiles.seconds - compiled)
        record |= {"seconds": clock.spent | {"total": clock.total}, "compiles": self.compiles.count}
        record["unexpected_compiles"] = self.compiles.count - programs if self._warm else 0
        self._warm = True
        return record

    def save(self) -> None:
        """Checkpoints everything under the present step, with the record that is not in the log yet."""
        if any(array.is_deleted() for array in jax.tree.leaves(self.state.learner)):
            return  # an update took them and gave none back
        counters = {"ledger": dataclasses.asdict(self.ledger), "pending": records.plain(self._pending)}
        counters |= {"data": self.parts.train.fingerprint, "left_out": list(self._left_out)}
        counters["reference"] = self._reference_weights
        self.checkpoints.save(self.step, self.state._replace(rule=jax.device_get(self.state.rule)), counters)

    def _open(self) -> None:
        """Goes on from the latest checkpoint, if there is one, with a log that fits it."""
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.config.run.keep_checkpoints)
        resumed = self._resume()
        self.log = RunLog(self.folder / "metrics.jsonl", self.step if resumed else None)
        if self.log.last is not None:  # it knows of the evaluation that followed the checkpoint
            self.ledger, self._pending = Ledger(**self.log.last["ledger"]), None

    def _policy(self) -> qwen3.Qwen3:
        return step.policy(self.state.learner.model, self.reference)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _last(self) -> bool:
        return self.step == self.config.run.steps

    def _evaluation_due(self) -> bool:
        return self._evaluator is not None and (self._last() or self._due(self.config.eval.every))

    def _finish(self, record: records.Record, watch: Watch) -> records.Record:
        """The step's evaluation, if it is due, and its line in the log."""
        if self._evaluation_due():
            if self._last():
                self.save()  # evaluating everything takes a while
            record = record | self._evaluate(self._last(), watch)
        written, self._pending = self._write(record), None
        return written

    def close(self) -> None:
        """Closes files; safe after an error."""
        self.log.close()
        self.checkpoints.close()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _fold(self, purpose: int, number: int = 0) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(self.key, purpose), number)

    @property
    def _static(self) -> tuple[Any, ...]:
        """What the update and the signal are compiled for besides shapes."""
        return self.config.train, self.config.sampling.temperature, self.parts.layout

    def _cut(self, rollouts: np.ndarray, number: int) -> batching.Pieces:
        """The step's rows in pieces, or, for streams, in minibatches' shards."""
        train, rng = self.config.train, np.random.default_rng((self.config.run.seed, _CUT, number))
        pieces = train.minibatches * (train.microbatches if train.attention_tile is None else 1)
        return batching.cut(rollouts, pieces * self.parts.layout.shards, rng, self._most)

    def _collect(self, clock: Clock, watch: Watch = _nothing) -> Collected:
        number = self.step + 1
        ids = self.parts.order(self.ledger.prompts)
        plan, rule_state = self._plan(self.state.rule, ids, self._fold(_PLAN, number))
        plan = jax.device_get(plan)
        index = batching.flat_index(plan.rollouts)
        train = self.config.train
        cut: batching.Pieces | packing.Packed = self._cut(plan.rollouts, number)
        clock.lap("plan")
        ids = plan.prompt_ids
        self._sampler.update(self._policy())
        key = self._fold(_SAMPLE, number)
        out = sampling.empty(len(index), self.config.sampling.max_new_tokens)
        answers, policy = [self.parts.train.problems[ids[i]].answer for i in index], self.parts.policy
        with overlap.Grader(self.verifier, policy.tokenizer, policy.stop_tokens, answers) as grader:
            for progress in self._sampler.stream(out, self.tokens[ids], self.mask[ids], index, ids[index], key):
                grader.submit(out, progress.rows)
                watch(number, progress)
            clock.lap("sample")
            grades, said = grader.result()
        clock.lap("verify")  # what is left of grading once the last row has ended
        self._check_served(out, ids, index)
        rewards.check_failures(grades.failures, len(said), self.config.data.max_unscorable, f"step {number}")
        reward = self.config.reward
        shaped = shaping.shaped(
            grades.scores,
            out.mask.sum(axis=1),
            said,
            max_length=self.config.sampling.max_new_tokens,
            overlong_buffer=reward.overlong_buffer,
            overlong_penalty=reward.overlong_penalty,
            format_reward=reward.format_reward,
        )
        if train.attention_tile is not None:
            assert isinstance(cut, batching.Pieces)
            cut = packing.pack_step(cut, train, self.mask[ids], out.mask, shaped, grades.scorable)
        return Collected(plan, rule_state, index, out, grades, shaped, cut)

    def _learn(self, collected: Collected, clock: Clock) -> tuple[Collected, step.StepResult, Any, controllers.Outcome]:
        """Updates policy and controllers; the plan returned holds the weights that were used."""
        plan, outcome = collected.plan, collected.outcome()
        batch = collected.batch(self.tokens, self.mask)
        more, whole = self._static, self.parts.layout.whole
        if self.config.controller.settings.get("use_current_batch"):
            signal = whole(self._signal(self.state.learner.model, self.reference, whole(batch), *more))
            seen = outcome._replace(signal=np.asarray(signal))
            weights = jax.device_get(self._reweigh(self._update_rule(collected.rule_state, plan, seen), plan))
            batch = batch._replace(weights=weights)
            collected = collected._replace(plan=plan._replace(weights=weights))
        result = self._update(self.state.learner, self.reference, whole(batch), *more)
        result = step.StepResult(result.learner, *map(whole, result[1:]))
        self._left_out = self._left_out.after(np.asarray(result.applied))
        if self._left_out.most > self.config.train.max_skipped:
            guard.keep(self.folder, self.step + 1, batch)
        outcome = outcome._replace(signal=np.asarray(result.signal))
        rule_state = jax.block_until_ready(self._update_rule(collected.rule_state, plan, outcome))
        clock.lap("update")
        return collected, result, rule_state, outcome

    def _record(
        self, collected: Collected, result: step.StepResult, rule_state: Any, outcome: controllers.Outcome
    ) -> records.Record:
        controller = {name: np.asarray(value) for name, value in self._metrics(rule_state, collected.plan).items()}
        number = self.step + 1
        updates = number * self.config.train.minibatches - self._left_out.total
        return {
            "step": number,
            "learning_rate": float(learning_rate(self.config.train)(max(updates - 1, 0))),
            "useful_slot_steps": float(collected.rollouts.mask.sum()) / self._sampler.slot_steps,
            "train_padding": self._padding(collected),
            **{name: float(value) for name, value in result.metrics.items()},
            **collected.record(outcome, controller, self.strata, self.config.controller.mean_rollouts),
        }

    def _padding(self, collected: Collected) -> float:
        """The share of the update's work on prompts and responses that was done for padding, the head not counted."""
        used = packing.lengths(collected.rollouts.mask, collected.grades.scorable)
        before = self.mask[collected.plan.prompt_ids].sum(axis=1)
        sizes = (collected.rollouts.mask.shape[1], self.mask.shape[1])
        return packing.share(
            collected.pieces, self.config.train, used, before, *sizes, work(self.parts.policy.model.config)
        )

    def _count(self, collected: Collected, clock: Clock, compiling: float) -> None:
        mask = np.asarray(collected.rollouts.mask)
        self.ledger.rollouts += mask.shape[0]
        self.ledger.tokens += int(mask.sum())
        self.ledger.scored += int(collected.grades.scorable.sum())
        self.ledger.slot_steps += self._sampler.slot_steps
        self.ledger.prompts += len(collected.plan.prompt_ids)
        clock.lap("record")
        self.ledger.seconds += clock.total - compiling
        self.ledger.compile_seconds += compiling

    def _evaluate(self, final: bool, watch: Watch) -> records.Record:
        assert self._evaluator is not None
        begun = time.perf_counter()
        hear = functools.partial(watch, self.step)
        summaries, rollouts = self._evaluator(self._policy(), self._fold(_EVAL), final, hear)
        self.ledger.eval_rollouts += rollouts
        self.ledger.eval_seconds += time.perf_counter() - begun
        return summaries

    def _write(self, record: records.Record) -> records.Record:
        record["ledger"] = dataclasses.asdict(self.ledger)
        self.log.write(record)
        return record

    def _resume(self) -> bool:
        latest = self.checkpoints.latest()
        processes.agree({f"the last checkpoint in run.output={self.config.run.output}": latest})
        if latest is None:
            return False
        like = self.state._replace(rule=jax.device_get(self.state.rule))
        state, counters = self.checkpoints.restore(latest, like)
        # The rule's arrays bound to no device, as `init` makes them: bound ones would compile its programs once more.
        self.state = state._replace(rule=jax.tree.map(jnp.asarray, state.rule))
        trained_on = counters.get("data")  # a checkpoint of before this was kept does not say
        if trained_on not in (None, self.parts.train.fingerprint):
            raise setup.InputError(
                f"data.train={self.config.data.train!r}: is not what the run in run.output={self.config.run.output!r} "
                "was trained on (other problems, or others of them usable); give it back, or choose another folder"
            )
        if counters.get("reference") not in (None, self._reference_weights):
            raise setup.InputError(
                f"model.path={self.config.model.path!r}: are not the weights that the run in "
                f"run.output={self.config.run.output!r} began with, which it still needs; give them back, or choose "
                "another folder"
            )
        self.ledger, self._pending, self.step = Ledger(**counters["ledger"]), counters["pending"], latest
        self._left_out = guard.LeftOut(*counters.get("left_out", ()))  # a checkpoint of before has none
        return True
