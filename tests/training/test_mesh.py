"""The step over a mesh: the one-device result, on eight devices of one process and of two."""

import os
import pathlib
import pickle
import socket
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdro_jax.models import qwen3
from gdro_jax.models.sharding import over_heads
from gdro_jax.training import batching, mesh, step
from gdro_jax.training.config import TrainConfig
from gdro_jax.training.optimiser import make_optimiser

STEPS = 5
CONFIG = TrainConfig(learning_rate=1e-3, warmup_steps=0, kl_coef=0.1, aggregate="token", minibatches=1)
eight = pytest.mark.skipif(jax.local_device_count() < 8, reason="needs 8 host devices")


def trained(case, layout, config=CONFIG):
    """Losses and gradient norms of five steps on the case's batch, and the parameters after them."""
    pieces = config.minibatches * config.microbatches * layout.shards
    counts = np.bincount(case.batch.prompt_index)
    batch = case.batch._replace(pieces=batching.cut(counts, pieces, np.random.default_rng(0)))
    architecture = case.model.config
    learner = step.Learner(case.model, make_optimiser(config).init(case.model))
    learner, reference = layout.put(architecture, (learner, case.reference))
    batch = layout.whole(batch)
    update = jax.jit(step.update, static_argnames=("config", "temperature", "layout"))
    seen = []
    for _ in range(STEPS):
        learner, signal, metrics, _ = update(learner, reference, batch, config, 1.0, layout)
        seen.append([float(metrics["loss"]), float(metrics["grad_norm"]), float(metrics["logprob_gap"])])
    return np.array(seen), np.asarray(layout.whole(signal)), learner


def assert_equal(got, want):
    np.testing.assert_allclose(got[0][:, 0], want[0][:, 0], rtol=1e-6, atol=1e-7)  # of their scale: losses cross 0
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-6)
    for a, b in zip(got[2], want[2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def leaves(learner):
    return [np.asarray(x) for x in jax.tree.leaves(learner.model)]


@pytest.fixture(scope="module")
def alone(case):
    seen, signal, learner = trained(case, mesh.ONE_DEVICE)
    moved = np.abs(leaves(learner)[0] - leaves(step.Learner(case.model, None))[0]).max()
    assert moved > 2e-3 and abs(seen[0, 0] - seen[-1, 0]) > 1e-3
    return seen, signal, leaves(learner)


@eight
def test_eight_devices_are_one(case, alone):
    layout = mesh.make(data=2, fsdp=2, tensor=2)
    assert layout.shards == 4
    seen, signal, learner = trained(case, layout)
    assert_equal((seen, signal, leaves(learner)), alone)
    up = learner.model.up_proj[...]
    assert up.addressable_shards[0].data.size == up.size // 4  # by fsdp and tensor
    # gate_proj has its shape: two moments of each
    moments = [x for x in jax.tree.leaves(learner.opt_state) if x.shape == up.shape]
    assert len(moments) == 4 and all(x.sharding == up.sharding for x in moments)


@eight
def test_sizes_must_be_the_devices():
    with pytest.raises(ValueError, match=r"data=3, fsdp=1, tensor=1: must multiply to the 8 devices"):
        mesh.make(data=3)


PROCESS = """
import pickle, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
sys.path.insert(0, sys.argv[3])
import test_mesh
from gdro_jax.training import mesh
with open(sys.argv[5], "rb") as file:
    case = test_mesh.unpacked(pickle.load(file))
assert jax.process_count() == 2 and len(jax.devices()) == 8
layout = mesh.make(data=2, fsdp=2, tensor=2)
seen, signal, learner = test_mesh.trained(case, layout)
whole = test_mesh.leaves(layout.whole(learner))
if jax.process_index() == 0:
    with open(sys.argv[4], "wb") as file:
        pickle.dump((seen, signal, whole), file)
"""


def packed(case):
    models = [jax.tree.map(np.asarray, model.arrays()) for model in (case.model, case.reference)]
    return case.model.config, models, jax.tree.map(np.asarray, case.batch)


def unpacked(saved):
    config, models, batch = saved
    model, reference = (qwen3.Qwen3(config, jax.tree.map(jnp.asarray, arrays)) for arrays in models)
    return types.SimpleNamespace(model=model, reference=reference, batch=batch)


@pytest.mark.slow
def test_two_processes_are_one(case, alone, tmp_path):
    (tmp_path / "case.pickle").write_bytes(pickle.dumps(packed(case)))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    here, out = pathlib.Path(__file__).parent, tmp_path / "out.pickle"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    paths = {"PYTHONPATH": str(here.parent.parent)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(number), str(here), str(out), str(tmp_path / "case.pickle")],
            env=os.environ | flags | paths,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=600)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert_equal(pickle.loads(out.read_bytes()), alone)


@eight
def test_what_a_shard_has_along_tensor_stays_so():
    """Keys and values of prompts, of which each device would else hold all heads."""
    layout = mesh.make(data=2, fsdp=2, tensor=2)
    out = jax.jit(lambda x: layout.over_shards(lambda of: over_heads(2 * of, 1), x))(np.ones((4, 3, 2)))
    assert out.sharding.shard_shape(out.shape) == (1, 3, 1)
