"""Parameters on a mesh of 8 devices: the table is obeyed, each device holds its part, results do not change."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from model_cases import BASE, MASKS, config, make_model, make_tokens

from gdro_jax.models import hf, qwen3

pytestmark = pytest.mark.skipif(
    jax.local_device_count() < 8, reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8"
)
EVEN = config(vocab_size=56, attention_bias=True, tie_embeddings=False)
MESHES = {
    "fsdp and tensor": ((4, 2), ("fsdp", "tensor")),
    "tensor alone": ((2, 4), ("data", "tensor")),
    "fsdp alone": ((8,), ("fsdp",)),
    "neither": ((8,), ("data",)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("model") / "even"
    hf.save(make_model(EVEN), path)
    return path


def test_the_table_is_obeyed(folder: pathlib.Path) -> None:
    model = hf.load(folder, mesh=jax.make_mesh((4, 2), ("fsdp", "tensor")))
    wanted = {
        "embed": (P("tensor", "fsdp"), (28, 8)),
        "lm_head": (P("tensor", "fsdp"), (28, 8)),
        "q_proj": (P(None, "fsdp", "tensor"), (2, 8, 24)),
        "k_proj": (P(None, "fsdp", "tensor"), (2, 8, 12)),
        "o_proj": (P(None, "tensor", "fsdp"), (2, 24, 8)),
        "down_proj": (P(None, "tensor", "fsdp"), (2, 20, 8)),
        "q_bias": (P(None, "tensor"), (2, 24)),
        "q_norm": (P(None, None), (2, 12)),
        "final_norm": (P("fsdp"), (8,)),
    }
    for name, (spec, shape) in wanted.items():
        array = getattr(model, name)[...]
        assert array.sharding.spec == spec, name
        assert len(array.addressable_shards) == 8
        assert {shard.data.shape for shard in array.addressable_shards} == {shape}, name


@pytest.mark.parametrize("mesh", MESHES)
def test_values_logits_and_saving_do_not_depend_on_the_mesh(
    mesh: str, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    one, many = hf.load(folder), hf.load(folder, mesh=jax.make_mesh(*MESHES[mesh]))
    for name, array in one.arrays().items():
        np.testing.assert_array_equal(np.asarray(many.arrays()[name]), np.asarray(array), err_msg=name)
    tokens, mask = jnp.asarray(make_tokens(EVEN, MASKS.shape)), jnp.asarray(MASKS)
    want, got = (np.asarray(jax.jit(qwen3.logits)(model, tokens, mask)) for model in (one, many))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)
    hf.save(many, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_each_device_reads_its_part_only(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part is cut before it is read: none is larger than a device's share."""
    sizes: list[int] = []
    read = hf._read

    def spy(*args: object) -> np.ndarray:
        sizes.append(read(*args).size)  # type: ignore[arg-type]
        return read(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(hf, "_read", spy)
    hf.load(folder, mesh=jax.make_mesh((8,), ("fsdp",)))
    assert max(sizes) == max(EVEN.num_layers * 32 * 48, 56 * 32) // 8
    assert sum(sizes) == qwen3.num_params(EVEN)


def test_a_dimension_that_does_not_divide_is_replicated(tmp_path: pathlib.Path) -> None:
    hf.save(make_model(BASE), tmp_path / "model")  # vocabulary 53
    model = hf.load(tmp_path / "model", mesh=jax.make_mesh((4, 2), ("fsdp", "tensor")))
    assert model.embed[...].sharding.spec == P(None, "fsdp")
