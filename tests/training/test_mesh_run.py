"""Whole runs on a mesh: the tokens and metrics of one device, checkpoints that go from one mesh to another."""

import json

import jax
import numpy as np
import pytest

from gdro_jax.models import hf
from gdro_jax.training import InputError, setup
from gdro_jax.training.export import export

eight = pytest.mark.skipif(jax.local_device_count() < 8, reason="needs 8 host devices")
MESH = ("mesh.data=null", "mesh.fsdp=2", "mesh.tensor=2")
JOINT = (
    *("controller.name=joint", "controller.settings.use_current_batch=true", "controller.settings.selection=sample"),
    *("train.prompts_per_step=8", "train.kl_coef=0.1", "sampling.gap_tolerance=0.05", "run.checkpoint_every=1"),
)


def run(trainer, steps=None):
    """Tokens of every step and of the gate, and the records."""
    tokens, records, collect = [], [], trainer._collect

    def watched(clock, watch):
        out = collect(clock, watch)
        tokens.append(out.rollouts.tokens)
        return out

    trainer._collect = watched
    try:
        trainer.run(records.append, lambda: steps is not None and len(tokens) >= steps)
    finally:
        trainer.close()
    return np.array(tokens), records


def assert_alike(got, want):
    """Records up to rounding; without clocks, what a compiler counts, the slots of shards and the padding of pieces."""
    own = {"seconds", "compiles", "unexpected_compiles", "useful_slot_steps", "train_padding", "ledger"}
    for a, b in zip(got, want, strict=True):
        keys = set(b) - own
        assert set(a) - own == keys
        flat_a, flat_b = (jax.tree.flatten({k: x[k] for k in sorted(keys)}) for x in (a, b))
        assert flat_a[1] == flat_b[1]
        for x, y in zip(flat_a[0], flat_b[0], strict=True):
            assert x == y if isinstance(y, str) else np.allclose(x, y, rtol=2e-4, atol=1e-5, equal_nan=True), (x, y)
        for name in ("rollouts", "tokens", "scored", "prompts"):
            assert a["ledger"][name] == b["ledger"][name]


@eight
@pytest.mark.slow
def test_a_step_on_eight_devices_is_the_step_on_one(configure, launch):
    """Two steps of the plainest run; the rest of what a run does is below."""
    few = ("train.prompts_per_step=4", "controller.mean_rollouts=2", "sampling.max_new_tokens=2", "run.steps=2")
    alone = launch(configure(*few, "train.kl_coef=0", output="alone"))
    spread = launch(configure(*few, "train.kl_coef=0", *MESH, output="spread"))
    assert spread.parts.layout.shards == 4
    up = spread.state.learner.model.up_proj[...]
    assert up.addressable_shards[0].data.size == up.size // 4  # by fsdp and tensor, from the file on
    (tokens, records), (got, said) = run(alone), run(spread)
    np.testing.assert_array_equal(got, tokens)
    assert_alike(said, records)
    assert said[1]["unexpected_compiles"] == 0  # the second step finds everything laid as the first did


@eight
@pytest.mark.slow
def test_a_run_on_eight_devices_is_the_run_on_one(configure, launch, tmp_path):
    """With everything that looks at the mesh: gate, weights of the current batch, two pieces a shard, evaluation."""
    file = tmp_path / "heldout.jsonl"
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "stratum": "ab"[i % 2]} for i in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = (*JOINT, "train.microbatches=2", f"eval.data={file}", "eval.samples=2", "eval.k=2", "run.steps=2")
    more += ("train.adam_eps=0.001",)  # else a gradient of rounding's own size moves a parameter as far as any
    alone = launch(configure(*more, output="alone"))
    tokens, records = run(alone)
    spread = launch(configure(*more, *MESH, "run.save_model=true", output="spread"))
    got, said = run(spread)
    np.testing.assert_array_equal(got, tokens)
    assert_alike(said, records)
    assert said[-1]["unexpected_compiles"] == 0 and "eval" in said[-1]
    trained = alone.state.learner.model.arrays()
    for folder in ("model", "exported"):
        if folder == "exported":
            export(str(tmp_path / "spread"), str(tmp_path / "exported"))
        saved = hf.load(tmp_path / folder if folder == "exported" else tmp_path / "spread" / folder).arrays()
        for name, array in trained.items():
            np.testing.assert_allclose(saved[name], array, rtol=1e-4, atol=1e-5)


@eight
@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [(), ("model.lora_rank=2",), ("train.optimiser=adafactor",), ("train.optimiser=muon",)]
)
def test_a_checkpoint_goes_on_on_another_mesh(configure, launch, options):
    """One step on eight devices, one on two by four, one on one: as three on one."""
    whole = launch(configure(*JOINT, *options, "run.steps=3", output="whole"))
    tokens, records = run(whole)
    parts, said = [], []
    for step, mesh in enumerate((MESH, ("mesh.data=4", "mesh.fsdp=2"), ()), 1):
        trainer = launch(configure(*JOINT, *options, *mesh, "run.steps=3", output="parts"))
        assert trainer.step == step - 1
        got, more = run(trainer, steps=1)
        parts.append(got)
        said += more
    np.testing.assert_array_equal(np.concatenate(parts), tokens)
    assert_alike(said, records)


@eight
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (("mesh.data=3",), r"^mesh: data=3, fsdp=1, tensor=1: must multiply to the 8 devices$"),
        (("mesh.data=null", "mesh.fsdp=3"), r"^mesh: fsdp=3, tensor=1: their product must divide the 8 devices$"),
        (
            ("mesh.data=null",),
            r"^mesh: the step's 12 rows must divide into 8 equal pieces, .* 8 of mesh.data x mesh.fs",
        ),
        (
            (*MESH, "train.microbatches=4", "train.attention_tile=4"),
            r"^train.microbatches=4: must be at most 3, .* of the mesh's 4 shards gets, with train.attention_tile$",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line_before_anything_is_read(configure, fields, says, monkeypatch):
    monkeypatch.setattr(setup.hf, "load", lambda *args, **kwargs: pytest.fail("read weights"))
    config = configure(*fields, "train.prompts_per_step=6", "controller.mean_rollouts=2")
    with pytest.raises(InputError, match=says) as caught:
        setup.assemble(config)
    assert "\n" not in str(caught.value)


@eight
def test_by_default_all_devices_are_taken(configure):
    config = configure("mesh.data=null", "train.prompts_per_step=8")
    assert setup.layout(config).mesh.shape == {"data": 8, "fsdp": 1, "tensor": 1}
    assert setup.layout(configure("mesh.data=1")).mesh is None
