"""A cache in pages: the tokens of a contiguous one, whoever else is in the slots, and every page given back."""

import dataclasses

import jax
import numpy as np
import pytest

from gdro_jax.models.qwen3 import init
from gdro_jax.sampling import Sampler, SamplingConfig
from gdro_jax.sampling.programs import Decoding
from gdro_jax.training.compiles import CompileCounter
from tests.conftest import TINY
from tests.sampling.test_mesh import INDEX as FEW
from tests.sampling.test_mesh import PROMPTS as SHORT
from tests.sampling.test_mesh import on_mesh
from tests.sampling.test_refill import INDEX, KEY, LENGTH, MASK, PROMPTS, SETTINGS, sample

PAGE = 3  # two of the prompts end with a page, two within one


@pytest.fixture(scope="module")
def in_pages(tiny_model):
    return Sampler(tiny_model, SamplingConfig(**SETTINGS, slots=8, cache="paged", page_tokens=PAGE))


@pytest.fixture(scope="module")
def contiguous(tiny_model):
    return sample(Sampler(tiny_model, SamplingConfig(**SETTINGS, slots=8, cache="contiguous")))[0]


@pytest.fixture(scope="module")
def states(in_pages):
    """One call, and the slots after each of its segments."""
    kept, patch = [], pytest.MonkeyPatch()
    advance = Decoding.advance

    def recorded(self, context):
        look = advance(self, context)
        kept.append(jax.device_get((self.state.row, self.state.position, self.state.cache._replace(pools=()))))
        kept[-1] += ([pool.shape for pool in self.state.cache.pools],)
        return look

    patch.setattr(Decoding, "advance", recorded)
    out = sample(in_pages)
    patch.undo()
    return out, kept


def test_tokens_are_those_of_a_contiguous_cache(states, contiguous):
    for got, want in zip(states[0][0], contiguous, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(states[0][0].tokens, contiguous.tokens)


def test_pages_are_conserved_and_all_come_back(states):
    """After each segment a page is free, or of one prompt, or of one row; at the end rows hold none."""
    lengths, owner, sizes = MASK.sum(1), np.sort(INDEX), set()
    most = 0
    for row, position, cache, shapes in states[1]:
        total = len(cache.free)
        ids = cache.free[: cache.left[0]].tolist() + cache.prompts[cache.prompts < total].tolist()
        for slot in np.flatnonzero((row >= 0) & (position > 0)):
            begins = lengths[owner[row[slot]]]
            ids += cache.table[slot, begins // PAGE : -(-(begins + position[slot]) // PAGE)].tolist()
        assert sorted(ids) == list(range(total))
        assert {shape[1] for shape in shapes} == {total}
        sizes.add(total)
        most = max(most, total - int(cache.left[0]))
    _, _, cache, _ = states[1][-1]
    assert cache.left[0] + (cache.prompts < len(cache.free)).sum() == len(cache.free)
    worst = 4 * 2 + 8 * -(-(LENGTH + PAGE - 1) // PAGE)
    assert max(sizes) <= worst and most < worst  # rows of different lengths do not all hold the longest


def test_the_pool_grows_when_rows_hold_all_of_it(tiny_model):
    """Rows that nothing stops hold more than the first pool; the tokens are those of one that was large enough."""
    settings = SETTINGS | {"stop_tokens": ()}
    sampler = Sampler(tiny_model, SamplingConfig(**settings, cache="paged", page_tokens=PAGE))
    sizes, advance = [], Decoding.advance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoding, "advance", lambda self, x: sizes.append(len(self.state.cache.free)) or advance(self, x))
        got, _ = sample(sampler)
    assert len(set(sizes)) == 2 and sizes == sorted(sizes)
    want, _ = sample(Sampler(tiny_model, SamplingConfig(**settings, cache="contiguous")))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert got.mask.all()


def test_limits_and_nothing_compiled_after_the_first_call(in_pages, states, contiguous):
    limits = np.random.default_rng(0).integers(1, 12, len(INDEX))
    with CompileCounter() as counter:
        out, _ = sample(in_pages, limits=limits)
        assert len(sample(in_pages, key=jax.random.key(1))[1]) > 4
    assert counter.count == 0
    keep = np.arange(LENGTH) < limits[:, None]
    np.testing.assert_array_equal(out.tokens, np.where(keep, contiguous.tokens, 0))
    np.testing.assert_array_equal(out.mask, contiguous.mask & keep)


def test_slots_are_not_halved_but_rows_enter_as_ever(in_pages, states):
    sample(in_pages)
    assert in_pages.slot_steps % 8 == 0
    assert {len(row) for row, *_ in states[1]} == {8}


@pytest.mark.parametrize(
    ("shape", "heads"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
        pytest.param({"data": 4, "tensor": 2}, 1, marks=pytest.mark.slow),  # heads that the mesh does not divide
        pytest.param({"data": 8}, 1, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_sample_what_one_does(shape, heads):
    arrays = init(dataclasses.replace(TINY, num_heads=2 * heads, num_kv_heads=heads), jax.random.key(7))
    one = jax.tree.map(lambda x: x * 12.0 if x.ndim > 1 else x, arrays)
    settings = {"max_new_tokens": 10, "stop_tokens": (3, 17, 40), "segment": 4}
    model, mesh = on_mesh(one, shape)
    got = Sampler(model, SamplingConfig(**settings, slots=8, cache="paged", page_tokens=2), mesh)(SHORT, FEW, KEY)
    alone = Sampler(one, SamplingConfig(**settings, cache="contiguous"))(SHORT, FEW, KEY)
    assert got.finished.any() and not got.finished.all()
    np.testing.assert_array_equal(got.tokens, alone.tokens)
    np.testing.assert_array_equal(got.mask, alone.mask)
    np.testing.assert_allclose(got.logprobs, alone.logprobs, atol=1e-5)


def test_pages_of_bfloat16(tiny_model):
    """Rounded as a contiguous cache of bfloat16 is, so greedy rows differ from it in nothing but the order of sums."""
    outs = []
    for cache in ("paged", "contiguous"):
        config = SamplingConfig(max_new_tokens=6, cache_dtype="bfloat16", cache=cache, temperature=0.0)
        outs.append(Sampler(tiny_model, config)(PROMPTS[:1, :3].tolist(), [0, 0], KEY))
    np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)
    np.testing.assert_allclose(outs[0].policy_logprobs, outs[1].policy_logprobs, atol=1e-3)


def test_what_is_read_from_is_known_before_the_first_call(tiny_model):
    def reader(**settings):
        return Sampler(tiny_model, SamplingConfig(max_new_tokens=4, **settings)).reader

    assert reader() is None and reader(cache="contiguous") is None  # this is no TPU
    assert reader(cache="paged") == "gather"
    with pytest.raises(ValueError, match=r"cache='paged': must be auto or contiguous with cache_dtype=int8"):
        reader(cache="paged", cache_dtype="int8")
