"""Tiles of slots that share a prompt, and slots at different positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import CASES, make_model, make_tokens

from gdro_jax.models import decode, qwen3

SLOW_SIZES = [pytest.param(size, marks=pytest.mark.slow) for size in (2, 3)]


@pytest.mark.parametrize("size", [1, 8, *SLOW_SIZES])
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


@pytest.mark.slow
@pytest.mark.parametrize("unrolled", [decode.UNROLLED, 0])
def test_slots_at_different_positions_read_their_own_context_only(monkeypatch, unrolled) -> None:
    """One decode of four slots, each with another prompt and another number of tokens behind it, by whole sequences."""
    monkeypatch.setattr(decode, "UNROLLED", unrolled)
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
        for layer in (stack.layer(at) for stack in cache for at in range(len(stack.v))):
            for held in (layer.k[slot], layer.v[slot]):
                assert (held[:, last + 1 :] == 1e3).all() and (np.abs(held[:, : last + 1]) < 1e2).all()


@pytest.mark.slow
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
    keep = jnp.array([2, 0])
    for small, stack in zip(jax.tree.leaves(smaller), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(small[:, :, :, :2], stack[:, keep])
        assert (np.asarray(small[:, :, :, 2:]) == 0).all()


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 2**-8), ("int8", 0.5 / 127)])
def test_caches_of_fewer_bits_keep_every_vector_to_their_precision(dtype, error):
    """Prompts and responses alike, zero vectors too; a slot's new token leaves the others' entries as they are."""
    rng = np.random.default_rng(0)
    k, v = (
        jnp.asarray(rng.normal(size=(1, 3, 4, 2, 8)) * [[[[[9.0]]], [[[0.0]]], [[[0.1]]]]], jnp.float32) for _ in "kv"
    )
    kv = qwen3.PromptKV(k, v, jnp.ones((3, 4), bool), jnp.full(3, 4))
    (stack,) = decode.lay_out(kv, dtype).stacks
    layer = stack.layer(0)
    assert layer.k.dtype == layer.v.dtype == dtype and (layer.k_scale is None) == (dtype != "int8")

    def restored(x, scale):
        return np.asarray(x, np.float32) * (1.0 if scale is None else np.asarray(scale)[..., None])

    for got, want in (
        (restored(layer.k, layer.k_scale), k[0].swapaxes(1, 2)),
        (restored(layer.v, layer.v_scale), v[0].swapaxes(1, 2)),
    ):
        assert (np.abs(got - want) <= error * np.abs(want).max(-1, keepdims=True)).all()
    (empty,) = decode.empty_cache(decode.lay_out(kv, dtype), 3, 2)
    new = k[0, :, 0]
    filled = decode._with(empty, 0, jnp.array([0, 1, 2]), new, new).layer(0)
    got = restored(filled.v, filled.v_scale)
    for slot, position in ((0, 0), (1, 1)):
        want = np.zeros((2, 2, 8))
        want[:, position] = new[slot]
        np.testing.assert_allclose(got[slot], want, atol=error * np.abs(want).max())
    assert (got[2] == 0).all()


def test_the_program_of_a_deep_model_is_that_of_a_deeper_one() -> None:
    """Lines of the program before optimisation, and of a stack's arrays there is one of each."""

    def lines(depth: int) -> int:
        config = dataclasses.replace(CASES["attention_bias"], num_layers=depth)
        model = jax.eval_shape(lambda: qwen3.init(config, jax.random.key(0)))
        tokens, zero = jnp.ones((1, 2), jnp.int32), jnp.zeros(3, jnp.int32)
        shared = jax.eval_shape(lambda m: decode.lay_out(qwen3.prefill(m, tokens, tokens > 0)[0]), model)
        cache = jax.eval_shape(lambda p: decode.empty_cache(p, 3, 2), shared)
        assert [len(stack.v) for stack in cache] == [depth]
        tiles = decode.tiles_of(zero, 1, 2)
        return len(jax.jit(decode.decode).lower(model, zero, zero, zero, shared, tiles, cache).as_text().splitlines())

    assert lines(decode.UNROLLED + 1) == lines(4 * decode.UNROLLED)
