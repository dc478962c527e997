"""The laws of the cut: every row once, its prompt beside it, and a bounded number of prompts in a piece."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdro_jax.training import batching


@st.composite
def steps(draw) -> tuple[np.ndarray, int, int]:
    """Rollouts per prompt, a number of pieces that divides them, and a seed."""
    pieces = draw(st.integers(1, 8))
    counts = draw(st.lists(st.integers(0, 12), min_size=1, max_size=40))
    counts.append((-sum(counts)) % pieces or pieces)
    return np.array(counts, np.int32), pieces, draw(st.integers(0, 10))


@given(steps())
@settings(deadline=None, max_examples=300)
def test_laws(case):
    rollouts, pieces, seed = case
    cut = batching.cut(rollouts, pieces, np.random.default_rng(seed))
    index = batching.flat_index(rollouts)
    assert cut.rows.shape == cut.local_index.shape == (pieces, rollouts.sum() // pieces)
    assert sorted(cut.rows.reshape(-1).tolist()) == list(range(rollouts.sum()))  # a partition
    owners = np.take_along_axis(cut.prompts, cut.local_index, axis=1)
    np.testing.assert_array_equal(owners, index[cut.rows])  # local_index is right
    assert cut.prompts.shape[0] == pieces and cut.prompts.shape[1] <= len(rollouts)
    for rows, prompts in zip(cut.rows, cut.prompts, strict=True):
        needed = np.unique(index[rows])
        assert set(needed) <= set(prompts.tolist())
        rest = prompts[len(needed) :]
        assert pieces == 1 or (rest == 0).all()  # nothing but filling
    places = {}
    for place, owner in enumerate(index[cut.rows].reshape(-1).tolist()):
        places.setdefault(owner, []).append(place)
    assert all(p == list(range(p[0], p[0] + len(p))) for p in places.values())  # a prompt's rows stay together


@given(st.integers(1, 6), st.integers(1, 60), st.integers(1, 8), st.integers(0, 2**31))
@settings(deadline=None, max_examples=200)
def test_prompts_of_a_piece_are_bounded(mean, prompts, pieces, seed):
    """Counts up to three times their mean, as every shipped rule gives, meet the bound: one compiled shape."""
    rng = np.random.default_rng(seed)
    counts = np.full(prompts, mean)
    for a, b in rng.integers(0, prompts, (4 * prompts, 2)):  # move single rollouts
        if a != b and counts[a] > 1 and counts[b] < 3 * mean:
            counts[a], counts[b] = counts[a] - 1, counts[b] + 1
    total = mean * prompts
    pieces = pieces if total % pieces == 0 else 1
    cut = batching.cut(counts, pieces, rng)
    assert cut.prompts.shape[1] == batching.prompts_per_piece(prompts, total, pieces)


def test_one_piece_is_the_step_itself():
    rollouts = np.array([2, 0, 3], np.int32)
    cut = batching.cut(rollouts, 1, np.random.default_rng(0))
    assert cut.rows.tolist() == [[0, 1, 2, 3, 4]]
    assert cut.prompts.tolist() == [[0, 1, 2]]
    assert cut.local_index.tolist() == [[0, 0, 2, 2, 2]]


def test_a_split_prompt_is_in_both_pieces():
    cut = batching.cut(np.array([4]), 2, np.random.default_rng(0))
    assert cut.prompts.tolist() == [[0], [0]] and cut.local_index.tolist() == [[0, 0], [0, 0]]
    assert cut.rows.tolist() == [[0, 1], [2, 3]]
    three = batching.cut(np.array([3, 3]), 2, np.random.default_rng(0))
    assert sorted(three.rows[0].tolist()) in ([0, 1, 2], [3, 4, 5])  # nothing is split without need


def test_counts_far_above_their_mean_still_work():
    rollouts = np.array([1] * 99 + [301])
    cut = batching.cut(rollouts, 4, np.random.default_rng(3))
    owners = np.take_along_axis(cut.prompts, cut.local_index, axis=1)
    np.testing.assert_array_equal(owners, batching.flat_index(rollouts)[cut.rows])


def test_the_shuffle_is_the_generators():
    rollouts = np.full(32, 4)
    one, again, other = (batching.cut(rollouts, 4, np.random.default_rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(one.rows, again.rows)
    assert (one.rows != other.rows).any()


def test_pieces_must_divide_the_rows():
    with pytest.raises(ValueError, match=r"pieces=4: must divide the step's 10 rows"):
        batching.cut(np.array([4, 6]), 4, np.random.default_rng(0))


@pytest.mark.parametrize(("each", "pieces"), [(4, 4), (4, 2), (6, 4), (5, 3)])
def test_equal_counts_take_no_more_prompts_than_a_piece_touches(each, pieces):
    counts = np.full(6, each)
    cut = batching.cut(counts, pieces, np.random.default_rng(0), most=each)
    touched = max(len(np.unique(batching.flat_index(counts)[rows])) for rows in cut.rows)
    assert touched <= cut.prompts.shape[1] <= touched + 1 and cut.prompts.shape[1] < 6
