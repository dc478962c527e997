"""Tiles of slots that share a prompt, and slots at different positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import CASES, make_model, make_tokens

from gdro_jax.models import decode, qwen3


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize(("slots", "prompts"), [(1, 1), (7, 3), (12, 1), (12, 30), (16, 4)])
def test_every_slot_has_a_lane_of_a_tile_of_its_prompt(slots: int, prompts: int, size: int) -> None:
    for seed in range(5):
        prompt = np.random.default_rng(seed).integers(0, prompts, slots).astype(np.int32)
        tiles = jax.device_get(decode.tiles_of(jnp.asarray(prompt), prompts, size))
        assert tiles.slots.shape[1] == size and tiles.slots.shape[0] <= slots
        places = list(zip(tiles.tile.tolist(), tiles.lane.tolist(), strict=True))
        assert len(set(places)) == slots  # nobody shares a lane
        assert max(tile for tile, _ in places) < tiles.slots.shape[0] and max(lane for _, lane in places) < size
        np.testing.assert_array_equal(tiles.prompt[tiles.tile], prompt)
        np.testing.assert_array_equal(tiles.slots[tiles.tile, tiles.lane], np.arange(slots))


def test_there_are_no_more_tiles_than_the_worst_case_needs() -> None:
    assert decode.tiles_of(jnp.zeros(128, jnp.int32), 16, 8).slots.shape == ((128 + 16 * 7) // 8, 8)
    assert decode.tiles_of(jnp.zeros(128, jnp.int32), 500, 1).slots.shape == (128, 1)


def test_slots_at_different_positions_read_their_own_context_only() -> None:
    """One decode of four slots, each with another prompt and another number of tokens behind it, by whole sequences."""
    model = make_model(CASES["attention_bias"])
    prompts, lengths = jnp.asarray(make_tokens(model.config, (3, 6), 3)), np.array([6, 1, 4])
    mask = np.arange(6) < lengths[:, None]
    prompt, position = np.array([2, 0, 1, 0]), np.array([3, 0, 4, 1])
    said = make_tokens(model.config, (4, 5), 4)

    @jax.jit
    def run() -> tuple[jax.Array, decode.Cache]:
        kv, _ = qwen3.prefill(model, prompts, jnp.asarray(mask))
        shared, tiles = decode.lay_out(kv), decode.tiles_of(jnp.asarray(prompt), 3, 2)
        cache = jax.tree.map(lambda x: x + 1e3, decode.empty_cache(shared, 4, 6))
        for at in range(5):
            held = jnp.minimum(at, position)  # a slot that has arrived repeats its last token
            token = jnp.asarray(said)[jnp.arange(4), held]
            hidden, cache = decode.decode(model, token, held, jnp.asarray(prompt), shared, tiles, cache)
        return qwen3.unembed(model, hidden), cache

    got, cache = jax.device_get(run())
    for slot in range(4):
        owner, last = prompt[slot], position[slot]
        tokens = np.concatenate([np.asarray(prompts)[owner, : lengths[owner]], said[slot, : last + 1]])[None]
        want = np.asarray(qwen3.logits(model, jnp.asarray(tokens), jnp.ones(tokens.shape, bool)))[0, -1]
        np.testing.assert_allclose(got[slot], want, atol=1e-5 * np.abs(want).max(), rtol=0)
        for layer in cache:
            assert (layer.k[slot, ..., last + 1 :] == 1e3).all() and (
                np.abs(layer.k[slot, ..., : last + 1]) < 1e2
            ).all()
            assert (layer.v[slot, :, last + 1 :] == 1e3).all() and (np.abs(layer.v[slot, :, : last + 1]) < 1e2).all()


def test_a_full_cache_drops_what_comes_after_and_resizing_keeps_what_is_there() -> None:
    model = make_model(CASES["attention_bias"])
    kv, _ = qwen3.prefill(model, jnp.ones((1, 2), jnp.int32), jnp.ones((1, 2), bool))
    shared, zero = decode.lay_out(kv), jnp.zeros(3, jnp.int32)
    tiles = decode.tiles_of(zero, 1, 2)
    cache = decode.empty_cache(shared, 3, 2)
    for at in range(3):
        before = cache
        _, cache = decode.decode(model, zero + 5, zero + at, zero, shared, tiles, cache)
    jax.tree.map(np.testing.assert_array_equal, cache, before)
    smaller = decode.resize(cache, jnp.array([2, 0]), 5)
    assert decode.window_of(smaller) == 5
    for small, layer in zip(smaller, cache, strict=True):
        assert small.k.shape == (2, *layer.k.shape[1:3], 5)
        np.testing.assert_array_equal(small.k[..., :2], layer.k[jnp.array([2, 0])])
        np.testing.assert_array_equal(small.v[:, :, :2], layer.v[jnp.array([2, 0])])
        assert (np.asarray(small.v[:, :, 2:]) == 0).all()


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 2**-8), ("int8", 0.5 / 127)])
def test_caches_of_fewer_bits_keep_every_vector_to_their_precision(dtype, error):
    """Prompts and responses alike, zero vectors too; a slot's new token leaves the others' entries as they are."""
    rng = np.random.default_rng(0)
    k, v = (
        jnp.asarray(rng.normal(size=(1, 3, 4, 2, 8)) * [[[[[9.0]]], [[[0.0]]], [[[0.1]]]]], jnp.float32) for _ in "kv"
    )
    kv = qwen3.PromptKV(k, v, jnp.ones((3, 4), bool), jnp.full(3, 4))
    (layer,) = decode.lay_out(kv, dtype).layers
    assert layer.k.dtype == layer.v.dtype == dtype and (layer.k_scale is None) == (dtype != "int8")

    def restored(x, scale, turn):
        return np.asarray(x, np.float32).transpose(turn) * (1.0 if scale is None else np.asarray(scale)[..., None])

    for got, want in (
        (restored(layer.k, layer.k_scale, (0, 1, 3, 2)), k[0].swapaxes(1, 2)),
        (restored(layer.v, layer.v_scale, (0, 1, 2, 3)), v[0].swapaxes(1, 2)),
    ):
        assert (np.abs(got - want) <= error * np.abs(want).max(-1, keepdims=True)).all()
    (empty,) = decode.empty_cache(decode.lay_out(kv, dtype), 3, 2)
    new = k[0, :, 0]
    filled = decode._with(empty, jnp.array([0, 1, 2]), new, new)
    got = restored(filled.v, filled.v_scale, (0, 1, 2, 3))
    for slot, position in ((0, 0), (1, 1)):
        want = np.zeros((2, 2, 8))
        want[:, position] = new[slot]
        np.testing.assert_allclose(got[slot], want, atol=error * np.abs(want).max())
    assert (got[2] == 0).all()
