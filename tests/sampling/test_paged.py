"""A cache in pages: the tokens of a contiguous one, whoever else is in the slots, and every page given back."""

import dataclasses

import jax
import numpy as np
import pytest

from gdro_jax.models.qwen3 import Qwen3, init
from gdro_jax.sampling import Sampler, SamplingConfig
from gdro_jax.sampling.programs import Decoding
from gdro_jax.training.compiles import CompileCounter
from tests.conftest import TINY
from tests.sampling.test_mesh import on_mesh
from tests.sampling.test_refill import INDEX, KEY, LENGTH, MASK, PROMPTS, sample

SETTINGS = {"max_new_tokens": LENGTH, "stop_tokens": (3, 100), "segment": 16}  # rows outgrow the first pool together
PAGE = 3  # two of the prompts end with a page, two within one
TWO_HEADS = dataclasses.replace(TINY, num_heads=4, num_kv_heads=2)


@pytest.fixture(scope="module")
def model():
    arrays = init(TWO_HEADS, jax.random.key(7)).arrays()
    return Qwen3(TWO_HEADS, {name: x if "norm" in name else x * 12.0 for name, x in arrays.items()})


@pytest.fixture(scope="module")
def in_pages(model):
    return Sampler(model, SamplingConfig(**SETTINGS, slots=8, cache="paged", page_tokens=PAGE, cache_tokens=60))


@pytest.fixture(scope="module")
def contiguous(model):
    return sample(Sampler(model, SamplingConfig(**SETTINGS, slots=8, cache="contiguous")))[0]


@pytest.fixture(scope="module")
def call(in_pages):
    """What a call gave, and the slots before each of its segments and after the last."""
    kept, advance = [], Decoding.advance

    def seen(state):
        kept.append(jax.device_get((state.row, state.position, state.cache._replace(pools=()))))
        assert {pool.shape[1] for pool in state.cache.pools} == {len(state.cache.free)}

    def recorded(self, context):
        seen(self.state)
        look = advance(self, context)
        if not look.live:
            seen(self.state)
        return look

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoding, "advance", recorded)
        return sample(in_pages)[0], kept


def test_tokens_are_those_of_a_contiguous_cache(call, contiguous):
    for got, want in zip(call[0], contiguous, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(call[0].tokens, contiguous.tokens)


def test_pages_are_conserved_and_all_come_back(call):
    """A page is free, or of one prompt, or of one row; more are made when rows hold all; at the end rows hold none."""
    lengths, owner, sizes = MASK.sum(1), np.sort(INDEX), []
    for row, position, cache in call[1]:
        sizes.append(len(cache.free))
        ids = cache.free[: cache.left[0]].tolist() + cache.prompts[cache.prompts < sizes[-1]].tolist()
        for slot in np.flatnonzero((row >= 0) & (position > 0)):
            begins = lengths[owner[row[slot]]]
            ids += cache.table[slot, begins // PAGE : -(-(begins + position[slot]) // PAGE)].tolist()
        assert sorted(ids) == list(range(sizes[-1]))
    assert sizes == sorted(sizes) and len(set(sizes)) == 2
    last = call[1][-1][2]
    assert last.left[0] + (last.prompts < sizes[-1]).sum() == sizes[-1]


def test_limits_and_nothing_compiled_after_the_first_call(in_pages, call, contiguous):
    limits = np.random.default_rng(0).integers(1, 12, len(INDEX))
    with CompileCounter() as counter:
        out, _ = sample(in_pages, limits=limits)
        assert len(sample(in_pages, key=jax.random.key(1))[1]) > 4
    assert counter.count == 0
    keep = np.arange(LENGTH) < limits[:, None]
    np.testing.assert_array_equal(out.tokens, np.where(keep, contiguous.tokens, 0))
    np.testing.assert_array_equal(out.mask, contiguous.mask & keep)


def test_slots_are_not_halved(in_pages, call):
    assert {len(row) for row, *_ in call[1]} == {8} and in_pages.slot_steps % 8 == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"data": 2, "tensor": 4}, marks=pytest.mark.slow),  # which the heads cannot be split over
        pytest.param({"data": 8}, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_sample_what_one_does(model, contiguous, shape):
    split, mesh = on_mesh(model, shape)
    config = SamplingConfig(**SETTINGS | {"max_new_tokens": 10, "segment": 4}, slots=8, cache="paged", page_tokens=2)
    prompts = [row[seen].tolist() for row, seen in zip(PROMPTS, MASK, strict=True)]
    got = Sampler(split, config, mesh)(prompts, INDEX, KEY, prompt_ids=range(len(prompts)), prompt_length=6)
    assert got.finished.any() and not got.finished.all()
    np.testing.assert_array_equal(got.tokens, contiguous.tokens[:, :10])
    np.testing.assert_array_equal(got.mask, contiguous.mask[:, :10])
    np.testing.assert_allclose(got.logprobs, contiguous.logprobs[:, :10], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_pages_of_bfloat16(tiny_model):
    """Rounded as a contiguous cache of bfloat16 is, so greedy rows differ from it in nothing but the order of sums."""
    outs = []
    for cache in ("paged", "contiguous"):
        config = SamplingConfig(max_new_tokens=6, cache_dtype="bfloat16", cache=cache, temperature=0.0)
        outs.append(Sampler(tiny_model, config)(PROMPTS[:1, :3].tolist(), [0, 0], KEY))
    np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)
    np.testing.assert_allclose(outs[0].policy_logprobs, outs[1].policy_logprobs, atol=1e-3)


def test_what_reads_the_cache_is_known_before_the_first_call(tiny_model):
    def reader(**settings):
        return Sampler(tiny_model, SamplingConfig(max_new_tokens=4, **settings)).reader

    assert reader() is None and reader(cache="contiguous") is None  # this is no TPU
    assert reader(cache="paged") == "gather"
    with pytest.raises(ValueError, match=r"cache='paged': must be auto or contiguous with cache_dtype=int8"):
        reader(cache="paged", cache_dtype="int8")
    with pytest.raises(ValueError, match=r"cache_tokens=9: must be None with cache=contiguous"):
        reader(cache="contiguous", cache_tokens=9)
