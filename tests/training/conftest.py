"""A small off-policy step for the tests of the update, and what the tests of the loop start runs with."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from types import MappingProxyType

import jax
import numpy as np
import pytest

from gdro_jax.models import qwen3
from gdro_jax.rewards.verifier import Grades
from gdro_jax.training import Config, Trainer, assemble, batching, config_io, step
from gdro_jax.training.compiles import CompileCounter
from gdro_jax.training.config import TrainConfig

SMALL = qwen3.Qwen3Config(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    rope_theta=10_000.0, max_positions=64,
)  # fmt: skip
COUNTS = np.array([2, 5, 3, 2])
PROMPT_LENGTH, LENGTH = 6, 5


def small_model(seed: int) -> qwen3.Qwen3:
    arrays = qwen3.init(SMALL, jax.random.key(seed)).arrays()
    return qwen3.Qwen3(SMALL, {name: x if "norm" in name else x * 12.0 for name, x in arrays.items()})


@dataclasses.dataclass(frozen=True)
class Case:
    """A policy, a reference unlike it, and rollouts of a third policy: ratios and KL are away from 1 and 0."""

    model: qwen3.Qwen3
    reference: qwen3.Qwen3
    batch: step.Batch

    def cut(self, config: TrainConfig, seed: int = 0) -> step.Batch:
        """The batch cut as the configuration asks."""
        pieces = config.minibatches * config.microbatches
        return self.batch._replace(pieces=batching.cut(COUNTS, pieces, np.random.default_rng(seed)))


@pytest.fixture(scope="session")
def case() -> Case:
    rng = np.random.default_rng(5)
    prompts, rows = len(COUNTS), int(COUNTS.sum())
    index = batching.flat_index(COUNTS)
    prompt_mask = np.arange(PROMPT_LENGTH) < np.array([[3], [6], [1], [4]])
    mask = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (rows, 1))
    tokens = np.where(mask, rng.integers(0, 40, (rows, LENGTH)), 0).astype(np.int32)
    batch = step.Batch(
        prompts=np.where(prompt_mask, rng.integers(0, 40, (prompts, PROMPT_LENGTH)), 0).astype(np.int32),
        prompt_mask=prompt_mask,
        weights=np.float32([1.5, 0.5, 1.2, 0.8]),
        prompt_index=index,
        tokens=tokens,
        mask=mask,
        logprobs=np.zeros((rows, LENGTH), np.float32),
        rewards=np.float32([1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0]),
        scorable=np.arange(rows) != 4,
        pieces=batching.cut(COUNTS, 1, rng),
    )
    model = small_model(0)
    now, _ = step.response_logprobs(model, *batch[:2], index, tokens, mask, 1.0)
    noise = rng.normal(0, 0.3, mask.shape).astype(np.float32)
    batch = batch._replace(logprobs=np.where(mask, np.asarray(now) + noise, 0))
    near = jax.tree.map(lambda x, y: 0.9 * x + 0.1 * y, model, small_model(1))
    return Case(model, near, batch)


class Parity:
    """Right where the sum of the response's characters is even; a share of responses cannot be graded."""

    def __init__(self, unscorable: int | None = None):
        self.unscorable = unscorable

    def grade(self, responses: Sequence[str], answers: Sequence[str]) -> Grades:
        sums = np.array([sum(map(ord, response)) for response in responses])
        failed = np.zeros(len(sums), bool) if self.unscorable is None else sums % self.unscorable == 0
        scores = np.where(failed, 0.0, sums % 2 == 0).astype(np.float32)
        reasons = MappingProxyType({int(row): "no mood to grade" for row in np.flatnonzero(failed)})
        return Grades(scores, ~failed, reasons)

    def close(self) -> None:
        """Nothing to end."""


Configure = Callable[..., Config]


@pytest.fixture
def configure(tmp_path: pathlib.Path, tiny_folder: pathlib.Path) -> Configure:
    """configure("train.kl_coef=0", ...) -> a configuration of a short run of the tiny policy on twelve problems."""
    file = tmp_path / "twelve.jsonl"
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i), "stratum": "xyz"[i % 3]} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(*overrides: str, output: str = "run") -> Config:
        base = [
            f"run.output={tmp_path / output}",
            "run.steps=3",
            "run.checkpoint_every=null",
            "run.save_model=false",
            f"model.path={tiny_folder}",
            "train.prompts_per_step=6",
            "train.learning_rate=0.01",
            "train.warmup_steps=0",
            "sampling.max_new_tokens=3",
            "sampling.gap_tolerance=null",  # one program less to compile; the gate has tests of its own
            f"data.train={file}",
            "eval.data=null",
            "mesh.data=1",  # of the eight devices
        ]
        return config_io.load(None, [tuple(pair.split("=", 1)) for pair in (*base, *overrides)])

    return make


@pytest.fixture
def launch() -> Callable[..., Trainer]:
    """launch(config, verifier, release) -> a trainer whose compilations are counted; closed at the end of the test."""
    open_now: list[tuple[Trainer, CompileCounter]] = []

    def start(config: Config, verifier: Parity | None = None, release: bool = False) -> Trainer:
        counter = CompileCounter()
        counter.__enter__()
        trainer = Trainer(config, assemble(config), verifier or Parity(), counter, release)
        open_now.append((trainer, counter))
        return trainer

    yield start
    for trainer, counter in open_now:
        trainer.close()
        counter.__exit__(None, None, None)


class WatchedUpdate:
    """A trainer's update that notes how many programs each call compiled."""

    def __init__(self, trainer: Trainer):
        self._update, self._compiles, self.compiled = trainer._update, trainer.compiles, []
        trainer._update = self

    def lower(self, *args):
        return self._update.lower(*args)

    def __call__(self, *args):
        before = self._compiles.count
        out = jax.block_until_ready(self._update(*args))
        self.compiled.append(self._compiles.count - before)
        return out


@pytest.fixture
def watch_update() -> Callable[[Trainer], WatchedUpdate]:
    return WatchedUpdate
