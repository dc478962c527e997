"""The same tokens on one device and on eight."""

import dataclasses

import jax
import numpy as np
import pytest

from gdro_jax.models.qwen3 import Qwen3, init, param_specs
from gdro_jax.models.sharding import param_sharding
from gdro_jax.sampling import Sampler, SamplingConfig
from gdro_jax.sampling.placement import place
from gdro_jax.sampling.programs import Asked, Programs
from tests.conftest import TINY

PROMPTS = [[5, 9, 33], [70], [12, 13, 14, 15, 16, 17], [99, 3], [7, 7, 7], [1, 2]]
INDEX = np.repeat(np.arange(6), [5, 3, 1, 7, 2, 3])  # 21 rows: no number of shards divides them
KEY = jax.random.key(11)
SETTINGS = {"max_new_tokens": 10, "stop_tokens": (3, 17, 40), "segment": 4}


@pytest.fixture(scope="module")
def alone(tiny_model):
    return Sampler(tiny_model, SamplingConfig(**SETTINGS))(PROMPTS, INDEX, KEY)


def on_mesh(model: Qwen3, shape: dict[str, int]) -> tuple[Qwen3, jax.sharding.Mesh]:
    types = (jax.sharding.AxisType.Auto,) * len(shape)
    mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=types)
    arrays = {
        name: jax.device_put(array, param_sharding(model.config, param_specs(model.config)[name], mesh))
        for name, array in model.arrays().items()
    }
    return Qwen3(model.config, arrays), mesh


@pytest.mark.parametrize(
    ("shape", "slots"),
    [({"data": 8}, None), ({"data": 2, "fsdp": 2, "tensor": 2}, 8)],
)
@pytest.mark.slow
def test_eight_devices_sample_what_one_does(tiny_model, alone, shape, slots):
    model, mesh = on_mesh(tiny_model, shape)
    got = Sampler(model, SamplingConfig(**SETTINGS, slots=slots), mesh)(PROMPTS, INDEX, KEY)
    np.testing.assert_array_equal(got.tokens, alone.tokens)
    np.testing.assert_array_equal(got.mask, alone.mask)
    np.testing.assert_array_equal(got.finished, alone.finished)
    np.testing.assert_allclose(got.logprobs, alone.logprobs, atol=1e-5)


@pytest.mark.slow
def test_heads_of_prompts_and_cache_lie_along_tensor():
    """A device keeps its own heads of every prompt and slot, from the first program on and through decoding."""
    config = dataclasses.replace(TINY, num_heads=4, num_kv_heads=2)
    model, mesh = on_mesh(init(config, jax.random.key(0)), {"data": 4, "tensor": 2})
    programs = Programs(SamplingConfig(**SETTINGS), mesh)
    ints = np.zeros(8, np.int32)
    asked = Asked(np.ones((8, 4), np.int32), np.ones((8, 4), bool), ints, ints, ints, ints + 4, ints[:4] + 2)
    settings = {"slots": 2, "window": 10, "impl": "threefry2x32"}
    key = jax.random.key_data(KEY)
    context, state = programs.starting(model, asked, key, **settings)
    after, _ = programs.decoding(model, context, state, np.int32(0), tile=1)
    for stack in (*context.prompts.stacks, *after.cache):
        for array in (stack.k, stack.v):
            _, rows, heads, *_ = array.sharding.shard_shape(array.shape)
            assert (rows, heads) == (2, 1)


def test_placement_keeps_rows_whole_and_prompts_together():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, (6, 4)).astype(np.int32)
    index = rng.permutation(INDEX).astype(np.int32)
    ranks, limits = rng.integers(0, 9, 21), rng.integers(1, 9, 21)
    for shards in (1, 2, 4, 8):
        asked, row_of = place(tokens, tokens > 0, index, index + 100, ranks, limits, shards)
        assert asked.number.sum() == 21 and asked.number.max() == -(-21 // shards) and len(asked.tokens) % shards == 0
        seen, owners = [], []
        for shard, rows in enumerate(row_of):
            for at, row in enumerate(rows[: asked.number[shard]]):
                flat = shard * row_of.shape[1] + at
                prompt = asked.prompt[flat] + shard * (len(asked.tokens) // shards)
                np.testing.assert_array_equal(asked.tokens[prompt], tokens[index[row]])
                given = asked.identity[flat], asked.rank[flat], asked.limit[flat]
                assert given == (index[row] + 100, ranks[row], limits[row])
                seen.append(row)
                owners.append((int(index[row]), shard))
        assert sorted(seen) == list(range(21))
        assert len(set(owners)) <= 6 + shards - 1  # a prompt is on two shards only where the cut goes through its rows


@pytest.mark.parametrize(
    ("prompts", "each", "shards", "room"), [(8, 4, 4, 2), (6, 4, 4, 3), (8, 2, 16, 1), (3, 8, 2, 3)]
)
def test_a_shard_has_room_for_its_share_where_all_prompts_get_equally_many_rows(prompts, each, shards, room):
    """One prompt more where a shard's rows are no whole prompts; twice the share, or all it can need, elsewhere."""
    tokens, index = np.ones((prompts, 4), np.int32), np.repeat(np.arange(prompts, dtype=np.int32), each)
    given = (tokens, tokens > 0, index, index, index * 0, index * 0 + 1, shards)
    even, rows = place(*given, even=True)
    uneven, same_rows = place(*given)
    assert len(even.tokens) == shards * room
    assert len(uneven.tokens) == shards * min(prompts, len(index) // shards, 2 * -(-prompts // shards))
    np.testing.assert_array_equal(rows, same_rows)
    np.testing.assert_array_equal(even.prompt, uneven.prompt)  # the room alone is another
