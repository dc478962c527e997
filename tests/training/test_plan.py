"""The plan of a step: its shapes and counts by hand, what it says where it does not fit, and the command."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from gdro_jax import cli
from gdro_jax.cli import main
from gdro_jax.models import qwen3
from gdro_jax.sampling.programs import Stage
from gdro_jax.training import chips, config_io, plan, plan_sampler, setup

SMALL = ("train.prompts_per_step=4", "controller.mean_rollouts=2", "train.microbatches=2", "train.kl_coef=0",
         "sampling.max_new_tokens=3", "data.max_prompt_tokens=8", "mesh.data=1")  # fmt: skip


def configured(*fields):
    return config_io.load(None, [tuple(pair.split("=", 1)) for pair in (*SMALL, *fields)])


def test_shapes_and_flops_by_hand():
    shape = plan.shapes(configured(), 8)
    assert shape == (4, 8, 8, 3, 2, 4, 2, None, 1)  # pieces of 4 rows touch 2 prompts of 2 rollouts each
    assert plan.shapes(configured("controller.name=joint"), 8).piece_prompts == 4
    tiny = qwen3.Qwen3Config(
        vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4
    )
    matrices = 2 * (4 * 8 + 2 * 4 * 4 + 8 * 4 + 3 * 4 * 6)  # q, k and v, o, MLP
    prompt, response = 2 * 8, 4 * 3
    attention = 2 * 4 * 8 * (prompt * 8 + response * 11)
    blocks, head = 2 * matrices * (prompt + response) + attention, 2 * response * 4 * 10
    assert plan.flops(configured(), tiny, shape) == 2 * (3 * blocks + 3 * head)
    assert plan.flops(configured("model.remat=block"), tiny, shape) == 2 * (4 * blocks + 3 * head)
    assert plan.flops(configured("train.kl_coef=0.1"), tiny, shape) == 2 * (4 * blocks + 4 * head)
    assert plan.flops(configured("train.ratio_level=sequence"), tiny, shape) == 2 * (3 * blocks + 4 * head)
    assert plan.flops(configured("model.lora_rank=1"), tiny, shape) == 2 * (3 * blocks + 2 * head)
    capped = configured("train.importance_cap=2", "train.minibatches=2", "train.microbatches=1")
    assert plan.flops(capped, tiny, shape) == 2 * (4 * blocks + 4 * head)
    factors = 2 * ((4 + 8) + 2 * (4 + 4) + (8 + 4) + 2 * (4 + 6) + (6 + 4))  # layers, sides of each matrix, rank 1
    parameters = qwen3.num_params(tiny)
    for fields, trained in (((), parameters), (("model.lora_rank=1",), factors)):
        moved = 2 * (2 * 4 * parameters + 8 * trained) + 28 * trained
        assert plan.traffic(configured(*fields), tiny, shape) == moved


def test_shapes_and_flops_with_attention_tile():
    config = configured("train.attention_tile=4", "sampling.max_new_tokens=33")
    shape = plan.shapes(config, 8)
    assert shape.packed == ((132, 8, (4, 8)), (33, 8, (4, 2)))
    assert shape.piece_prompts == 4 and shape.pieces == 2
    tiny = qwen3.Qwen3Config(
        vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4
    )
    per_token, per_pair = 2 * 2 * (4 * 8 + 2 * 4 * 4 + 8 * 4 + 3 * 4 * 6), 2 * 4 * 8
    prompts = 4 * 4 * 8 * (per_token + 8 * per_pair)  # forward, once more, and backward
    responses = 4 * 33 * (3 * (per_token + 41 * per_pair) + 3 * 2 * 4 * 10)
    assert plan.flops(config, tiny, shape) == prompts + 2 * responses
    uneven = shape._replace(pieces=3)  # as on shards whose rows microbatches do not divide: no row is left out
    assert plan.flops(config, tiny, uneven) == pytest.approx(prompts + 2 * responses)
    said = plan.text(config, tiny, shape, plan.Compiled(1.0), chips.CHIPS["TPU v5 lite"])
    assert "132 tokens of at most 8 rows or 33 tokens of at most 8 rows; 1 updates" in said
    assert "4 an update, before its pieces, in pieces of 32 or 8 tokens" in said
    assert "tiles of 4 queries by as many keys" in said


def test_what_does_not_fit_says_what_to_turn():
    config = configured("train.kl_coef=0.1")
    architecture = qwen3.Qwen3Config(
        vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4
    )
    shape, chip = plan.shapes(config, 8), chips.CHIPS["TPU v5 lite"]
    small, large = plan.Compiled(1.0, 100, 0, 50), plan.Compiled(1.0, 2**34, 0, 1)
    assert plan.fits(small, chip) and "fits        yes" in plan.text(config, architecture, shape, small, chip)
    said = plan.text(config, architecture, shape, large, chip)
    assert not plan.fits(large, chip) and "train.microbatches=4" in said and "train.kl_coef=0" in said
    refused = plan.Compiled(1.0, refused="RESOURCE_EXHAUSTED: 20G of 16G")
    assert not plan.fits(refused, chip) and "no: update (RESOURCE_EXHAUSTED" in plan.text(
        config, architecture, shape, refused, chip
    )
    held = configured("train.kl_coef=0.1", "model.lora_rank=1")  # the reference is what adapters are trained on
    assert not any("kl_coef" in knob for knob in plan.knobs(held, plan.shapes(held, 8)))
    least = dataclasses.replace(config.train, kl_coef=0.0, optimiser="adafactor", microbatches=8)
    model = dataclasses.replace(config.model, remat="block", lora_rank=1)
    rest = dataclasses.replace(config, train=least, model=model)
    last = "sampling.max_new_tokens: shorter responses; or more devices"
    assert plan.knobs(rest, plan.shapes(rest, 8)) == ["model.dtype=bfloat16: half the activations", last]
    over = configured("mesh.data=4", "mesh.fsdp=2")
    turned = [knob for knob in plan.knobs(over, plan.shapes(over, 8)._replace(shards=8)) if knob.startswith("mesh")]
    assert turned == ["mesh.fsdp=4 mesh.data=2: parameters and optimiser states in twice as many parts"]


def test_memory_of_a_gpu_that_is_here_is_what_programs_get():
    def device(limit):
        return SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", memory_stats=lambda: {"bytes_limit": limit})

    table = chips.CHIPS["NVIDIA H200"]
    assert chips.chip(device(100 * chips.GIB)) == table._replace(memory=100 * chips.GIB)
    assert chips.chip(device(999 * chips.GIB)) == table


def test_a_sampler_that_does_not_fit_says_what_to_turn():
    config = configured("sampling.slots=4")
    architecture = qwen3.Qwen3Config(
        vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4
    )
    shape, chip, update = plan.shapes(config, 8), chips.CHIPS["TPU v5 lite"], plan.Compiled(1.0, 100)
    stages = (Stage(4, 2), Stage(4, 3), Stage(2, 3))
    sampler = plan_sampler.Sampling(stages, 4, 8, plan.Compiled(1.0, 100), plan.Compiled(1.0, 100, beside=2**34))
    said = plan.text(config, architecture, shape, update, chip, sampler=sampler)
    assert "a shard has 8 rows, room for 4 prompts, 4 slots of 2, 3 tokens, then 2 slots" in said
    assert "fits        no: segment;" in said and "sampling.slots=2" in said and "train.microbatches" not in said
    assert "16.00 GiB of 15.75" in said and "beside 16.00" in said
    for mesh, turned in (("mesh.data=2", "mesh.tensor=2 mesh.data=1"), ("mesh.data=1", "mesh.tensor=2 mesh.fsdp=2")):
        split = sampler._replace(rows=2 if turned.endswith("fsdp=2") else 1)  # on 4 shards, or on 8
        found = plan_sampler.knobs(configured(mesh, "mesh.fsdp=4"), architecture, split)
        assert [knob.split(":")[0] for knob in found if knob.startswith("mesh")] == [turned]
    fine = sampler._replace(segment=plan.Compiled(1.0, 100))
    assert "fits        yes, update and sampler" in plan.text(config, architecture, shape, update, chip, sampler=fine)


@pytest.mark.slow
@pytest.mark.skipif(jax.local_device_count() < 8, reason="needs 8 host devices")
def test_the_sampler_on_a_mesh():
    """Where all prompts get as many rollouts, a shard's room is its share; policy and learner lie in parts."""
    mesh = ("mesh.data=null", "mesh.fsdp=4", "mesh.tensor=2", "train.prompts_per_step=8", "train.kl_coef=0.1")
    config = configured(*mesh, "model.dtype=bfloat16", "train.microbatches=1")
    architecture = qwen3.Qwen3Config(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4
    )
    layout = setup.layout(config)
    found = plan.compile_sampler(config, architecture, plan.shapes(config, 8, layout), jax.devices()[0], layout)
    assert (found.prompts, found.rows, found.stages, found.growing) == (2, 4, (Stage(4, 3),), None)
    names = qwen3.init(architecture, jax.random.key(0)).arrays()
    norms = sum(x.size for name, x in names.items() if "norm" in name)
    split = sum(x.size for name, x in names.items() if "norm" not in name) // 8
    assert split < found.start.beside // (3 * 4 + 2) < split + norms + 8  # three of float32, reference
    assert found.segment.refused is None and found.segment.total > found.segment.beside


NUMBERS = {  # that the command refuses, each with another value than its default
    "model.random_init": 1,
    "model.lora_alpha": 3,
    "sampling.temperature": 2,
    "sampling.gap_tolerance": 1,
    "train.learning_rate": 1,
    "train.warmup_steps": 0,
    "train.decay": "cosine",
    "train.decay_steps": 3,
    "train.final_rate": 0.5,
    "train.adam_b1": 0.5,
    "train.adam_b2": 0.5,
    "train.adam_eps": 1,
    "train.weight_decay": 1,
    "train.max_grad_norm": 2,
    "train.max_skipped": 0,
    "train.clip_low": 0.1,
    "train.clip_high": 0.1,
}


def test_the_command_refuses_these_numbers_and_choices_that_training_has_not():
    refused = {name for name in cli._UNUSED["plan"] if name.split(".")[0] in ("model", "sampling", "train")}
    assert refused - set(NUMBERS) == {
        *(f"sampling.{name}" for name in ("top_p", "top_k", "min_p", "min_new_tokens")),
        *(f"sampling.server_{name}" for name in ("model", "timeout")),
    }


@pytest.mark.slow
def test_numbers_that_the_command_refuses_change_no_size():
    """But for scalars, such as those of another schedule."""
    architecture = qwen3.Qwen3Config(
        vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4
    )

    def sizes(*fields: str):
        config, device = configured("model.lora_rank=1", *fields), jax.devices()[0]
        given = (config, architecture, plan.shapes(config, 8), device, setup.layout(config))
        programs = [plan.compile_step(*given), *plan.compile_sampler(*given).programs.values()]
        return [program.total for program in programs]

    assert sizes() == pytest.approx(sizes(*(f"{name}={value}" for name, value in NUMBERS.items())), rel=0.01)


def test_the_command_compiles_the_step_for_this_device(tiny_folder, capsys):
    fields = [word for pair in (*SMALL, f"model.path={tiny_folder}") for word in [f"--{pair}"]]
    assert main(["plan", *fields]) == 0
    out = capsys.readouterr().out
    assert "4 prompts of at most 8 tokens, 8 rows of 3 tokens" in out
    assert "4 rows, 2 prompts; 1 updates of 2 pieces" in out
    assert (
        jax.devices()[0].device_kind in out
        and "measured just now" in out
        and "fits        yes, update and sampler" in out
    )
    assert "a shard has 8 rows, room for 4 prompts, 8 slots of 3 tokens" in out and "  segment   " in out
    memory = next(line for line in out.splitlines() if line.startswith("memory"))
    assert "GiB" in memory and "compile" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "v5e:0x9"], "--topology=v5e:0x9"),
        (["--model.path=missing-folder"], "missing-folder"),
        (["--sampling.slots=8", "--topology", "v5e:0x9"], "--topology=v5e:0x9"),  # it plans with the slots
        (["--run.steps=5"], "--run.steps does nothing in gdro plan"),
        (["--train.learning_rate=1"], "--train.learning_rate does nothing in gdro plan"),
        (["--sampling.server_timeout=5"], "--sampling.server_timeout does nothing in gdro plan"),
        (["--data.train=absent.jsonl"], "--data.train does nothing in gdro plan with data.max_prompt_tokens"),
        (["--model.lora_rank=99999"], "model.lora_rank=99999: must be at most"),
        (["--data.max_prompt_tokens=99999"], "with prompts of up to 99999 tokens that is"),
        (["--controller.name=best"], "controller.name='best': unknown rule 'best'"),
        (["absent.yaml"], "absent.yaml: no such configuration file"),
        (["--config", "absent.yaml"], "absent.yaml: no such configuration file"),
        (["--config=absent.yaml"], "absent.yaml: no such configuration file"),
        (["a.yaml", "--config", "b.yaml"], "--config: not allowed with argument CONFIG"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    try:
        code = main(["plan", *[f"--{pair}" for pair in SMALL], *words])
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and message in error
