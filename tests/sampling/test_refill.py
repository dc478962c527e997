"""Slots that rows enter and leave: the same tokens as all at once, no program more, and the slot-steps they take."""

import heapq

import jax
import numpy as np
import pytest

from gdro_jax.sampling import Sampler, SamplingConfig, empty
from gdro_jax.sampling.programs import stages, stages_in_pages
from gdro_jax.training.compiles import CompileCounter

PROMPTS = np.array([[5, 9, 33, 0, 0, 0], [70, 0, 0, 0, 0, 0], [12, 13, 14, 15, 16, 17], [99, 3, 0, 0, 0, 0]], np.int32)
MASK = np.arange(6) < np.array([[3], [1], [6], [2]])
INDEX = np.repeat(np.arange(4), [9, 4, 12, 7])
KEY = jax.random.key(5)
LENGTH = 140  # two windows: 70 and 140
SETTINGS = {"max_new_tokens": LENGTH, "stop_tokens": (3, 17, 40), "segment": 16}


def sample(sampler: Sampler, out=None, key=KEY, limits=None):
    out = empty(len(INDEX), sampler.config.max_new_tokens) if out is None else out
    return out, list(sampler.stream(out, PROMPTS, MASK, INDEX, INDEX, key, limits))


@pytest.fixture(scope="module")
def refilled(tiny_model):
    return Sampler(tiny_model, SamplingConfig(**SETTINGS, slots=8))


@pytest.fixture(scope="module")
def reference(tiny_model):
    """All rows at once, in one segment of all steps."""
    return sample(Sampler(tiny_model, SamplingConfig(**SETTINGS | {"segment": LENGTH})))[0]


@pytest.fixture(scope="module")
def result(refilled):
    return sample(refilled)


def test_the_case_is_a_hard_one(reference):
    lengths = reference.mask.sum(1)
    assert lengths.min() < 5 and lengths.max() > 70  # a row outgrows the first window
    assert (lengths == LENGTH).any() == (~reference.finished).any()


def test_tokens_are_those_of_all_rows_at_once(result, reference):
    for got, want in zip(result[0], reference, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(result[0].tokens, reference.tokens)


def test_every_row_is_handed_over_once_and_is_final_then(refilled, result):
    rows = np.concatenate([progress.rows for progress in result[1]])
    assert sorted(rows.tolist()) == list(range(len(INDEX)))
    assert len(result[1]) > 4 and sum(len(p.rows) > 0 for p in result[1]) > 2
    out, seen = empty(len(INDEX), LENGTH), {}
    for progress in refilled.stream(out, PROMPTS, MASK, INDEX, INDEX, KEY):
        seen |= {int(row): out.tokens[row].copy() for row in progress.rows}
        assert progress.done == len(seen) and progress.total == len(INDEX)
        assert progress.tokens == out.mask.sum() <= progress.slot_steps
    for row, tokens in seen.items():
        np.testing.assert_array_equal(tokens, out.tokens[row])


def test_a_row_enters_at_the_step_a_slot_falls_free(refilled, result):
    """While rows wait no slot idles, so the steps until then are those of a list schedule; then slots are halved."""
    lengths = result[0].mask.sum(1).tolist()  # rows enter in this order: they are sorted by prompt
    slots = [0] * 8
    ends = []
    for length in lengths:
        ends.append(heapq.heappop(slots) + length)
        heapq.heappush(slots, ends[-1])
    ends = np.sort(ends)
    drained, last = int(ends[-4]), int(ends[-1])  # 4 rows left: half the slots
    assert refilled.slot_steps == 8 * int(ends[-5]) + 4 * (last - int(ends[-5])), (ends, drained)
    assert sum(lengths) / refilled.slot_steps > 0.6


def test_nothing_is_compiled_after_the_first_call(refilled, result):
    with CompileCounter() as counter:
        for number in range(3):
            sample(refilled, key=jax.random.key(number))
        sample(refilled, limits=np.full(len(INDEX), 2))
    assert counter.count == 0


def test_limits_cut_each_row_and_change_nothing_before(refilled, result):
    limits = np.random.default_rng(0).integers(1, 12, len(INDEX))
    out, _ = sample(refilled, limits=limits)
    keep = np.arange(LENGTH) < limits[:, None]
    np.testing.assert_array_equal(out.mask, result[0].mask & keep)
    np.testing.assert_array_equal(out.tokens, np.where(keep, result[0].tokens, 0))
    cut = result[0].mask.sum(1) > limits
    assert cut.any() and (~cut).any()
    np.testing.assert_array_equal(out.finished, ~cut)


def test_stopping_to_listen_leaves_the_sampler_usable(refilled, result):
    half = refilled.stream(empty(len(INDEX), LENGTH), PROMPTS, MASK, INDEX, INDEX, KEY)
    next(half)
    half.close()
    np.testing.assert_array_equal(sample(refilled)[0].tokens, result[0].tokens)


@pytest.mark.parametrize(
    ("length", "slots", "growing", "shrinking"),
    [
        (8, 100, [(100, 8)], []),
        (100, 16, [(16, 100)], [(8, 100), (4, 100)]),
        (512, 32, [(32, 128), (32, 256), (32, 512)], [(16, 512), (8, 512), (4, 512)]),
        (139, 5, [(5, 139)], []),
        (140, 5, [(5, 70), (5, 140)], []),
        (4096, 128, [(128, 1024), (128, 2048), (128, 4096)], [(64, 4096), (32, 4096), (16, 4096)]),
    ],
)
def test_stages(length, slots, growing, shrinking):
    assert stages(SamplingConfig(max_new_tokens=length, stop_tokens=(1,)), slots) == (growing, shrinking)
    assert stages(SamplingConfig(max_new_tokens=length), slots) == (growing, [])  # all rows end together


@pytest.mark.parametrize(
    ("longest", "first", "windows"),
    [
        (4096, None, [768, 1536, 4096]),
        (512, None, [96, 192, 512]),
        (140, None, [27, 54, 140]),
        (139, None, [139]),
        (4096, 1300, [1300, 2600, 4096]),
        (4096, 2048, [2048, 4096]),
        (100, 80, [80, 100]),
        (100, 400, [100]),
    ],
)
def test_stages_in_pages(longest, first, windows):
    config = SamplingConfig(max_new_tokens=longest, stop_tokens=(1,), cache="paged", cache_tokens=first)
    assert stages_in_pages(config, 7) == [(7, window) for window in windows]


def test_a_response_has_its_least_length_and_stops_after_it(tiny_model):
    stops = tuple(range(0, 128, 2))
    config = SamplingConfig(max_new_tokens=12, stop_tokens=stops, min_new_tokens=4)
    out, _ = sample(Sampler(tiny_model, config))
    lengths = out.mask.sum(1)
    assert lengths.min() == 4 and out.finished[lengths < 12].all()
    early = out.tokens[:, :3]
    assert not np.isin(early, stops).any()
    assert (out.logprobs[:, :3] > out.policy_logprobs[:, :3] + 1e-3).any()  # nothing is lost to stop tokens there
    np.testing.assert_allclose(out.logprobs[:, 3:], out.policy_logprobs[:, 3:], atol=1e-5)


def test_a_least_length_where_everything_stops(tiny_model):
    with pytest.raises(ValueError, match=r"min_new_tokens=2: must be 1 where every token is a stop token"):
        Sampler(tiny_model, SamplingConfig(max_new_tokens=4, min_new_tokens=2, stop_tokens=tuple(range(128))))
