"""The sampling loop against full-sequence logits, and what a row may and may not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdro_jax.models import qwen3
from gdro_jax.sampling import Sampler, SamplingConfig
from gdro_jax.sampling.distribution import warp
from gdro_jax.training import step
from gdro_jax.training.compiles import CompileCounter

LENGTH = 8
PROMPTS = [[5, 9, 33], [70], [12, 13, 14, 15, 16, 17], [99, 3]]
INDEX = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])
KEY = jax.random.key(11)


def sampler(model, **settings) -> Sampler:
    return Sampler(model, SamplingConfig(**({"max_new_tokens": LENGTH} | settings)))


def arrays(out) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(x) for x in out)


def sequence(prompt: list[int], out, row: int) -> list[int]:
    return prompt + np.asarray(out.tokens)[row][np.asarray(out.mask)[row]].tolist()


@pytest.fixture(scope="module")
def free(tiny_model):
    """Samples without stop tokens: every row runs to the limit."""
    return sampler(tiny_model)


@pytest.fixture(scope="module")
def out(free):
    return jax.device_get(free(PROMPTS, INDEX, KEY))


@pytest.fixture(scope="module")
def full_logits(tiny_model):
    """Logits of one padded sequence [32]: what every other way of computing them has to agree with."""
    compiled = jax.jit(qwen3.logits)

    def of(tokens: list[int]) -> np.ndarray:
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(compiled(tiny_model, padded, np.arange(32)[None] < len(tokens)))[0, : len(tokens)]

    return of


def test_shapes_and_padding(out):
    assert out.tokens.shape == out.mask.shape == out.logprobs.shape == (len(INDEX), LENGTH)
    assert out.tokens.dtype == np.int32 and out.mask.dtype == bool and out.logprobs.dtype == np.float32
    assert out.mask.all() and not out.finished.any()
    assert (out.logprobs < 0).all() and (out.tokens >= 0).all() and (out.tokens < 128).all()
    assert len({tuple(row) for row in out.tokens}) > len(INDEX) // 2  # rows of one prompt are not one sample


def test_greedy_is_argmax_of_the_full_logits(tiny_model, full_logits):
    got = arrays(sampler(tiny_model, temperature=0.0)(PROMPTS, INDEX, KEY))
    for row, prompt in zip((0, 3, 5, 9), PROMPTS, strict=True):
        tokens = list(prompt)
        for _ in range(LENGTH):
            tokens.append(int(full_logits(tokens)[-1].argmax()))
        assert got[0][row].tolist() == tokens[len(prompt) :]
    assert (got[2] == 0).all()


def test_greedy_does_not_depend_on_the_key(tiny_model):
    greedy = sampler(tiny_model, temperature=0.0)
    one, two = greedy(PROMPTS, INDEX, KEY), greedy(PROMPTS, INDEX, jax.random.key(0))
    np.testing.assert_array_equal(one.tokens, two.tokens)


@pytest.mark.slow  # in the gate test_agreement compares the two
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_the_full_logits_and_the_trainers(tiny_model, full_logits, temperature):
    out = jax.device_get(sampler(tiny_model, temperature=temperature)(PROMPTS, INDEX, KEY))
    for row, owner in enumerate(INDEX):
        prompt = PROMPTS[owner]
        logits = full_logits(sequence(prompt, out, row)) / temperature
        logprobs = np.asarray(jax.nn.log_softmax(logits, -1))[len(prompt) - 1 : -1]
        want = logprobs[np.arange(LENGTH), out.tokens[row]]
        np.testing.assert_allclose(out.logprobs[row], want, atol=1e-5)
    padded = np.zeros((len(PROMPTS), 6), np.int32)
    for row, prompt in zip(padded, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    mask = np.arange(6) < np.array([[len(p)] for p in PROMPTS])
    trainer, entropy = step.response_logprobs(tiny_model, padded, mask, INDEX, out.tokens, out.mask, temperature)
    np.testing.assert_allclose(out.logprobs, trainer, atol=1e-5)
    assert (np.asarray(entropy) > 0).all() and (np.asarray(entropy) <= np.log(128) + 1e-5).all()


def test_log_probs_under_truncation_are_of_the_distribution_sampled_from_and_of_the_policy(tiny_model, full_logits):
    config = SamplingConfig(max_new_tokens=LENGTH, temperature=0.9, top_p=0.8, top_k=7)
    out = jax.device_get(Sampler(tiny_model, config)(PROMPTS, INDEX, KEY))
    for row, owner in enumerate(INDEX):
        prompt = PROMPTS[owner]
        logits = full_logits(sequence(prompt, out, row))[len(prompt) - 1 : -1]
        want = np.asarray(warp(jnp.asarray(logits), config))[np.arange(LENGTH), out.tokens[row]]
        np.testing.assert_allclose(out.logprobs[row], want, atol=1e-4)
        policy = np.asarray(jax.nn.log_softmax(logits / config.temperature, -1))[np.arange(LENGTH), out.tokens[row]]
        np.testing.assert_allclose(out.policy_logprobs[row], policy, atol=1e-4)
    assert (out.logprobs >= out.policy_logprobs - 1e-5).all() and (out.logprobs > out.policy_logprobs + 0.05).any()


def test_first_token_frequencies_are_the_models(tiny_model, full_logits):
    rows = 2000
    out = sampler(tiny_model, max_new_tokens=1)([PROMPTS[0]], np.zeros(rows, int), KEY)
    probs = np.asarray(jax.nn.softmax(full_logits(PROMPTS[0])[-1]))
    counts = np.bincount(np.asarray(out.tokens)[:, 0], minlength=128)
    likely = probs > 0.01
    assert likely.sum() >= 3
    error = np.abs(counts - rows * probs)[likely] / np.sqrt(rows * probs * (1 - probs))[likely]
    assert error.max() < 4.5  # standard errors


@pytest.mark.parametrize("slots", [3, 64])
def test_slots_change_nothing(tiny_model, out, slots):
    got = jax.device_get(sampler(tiny_model, slots=slots)(PROMPTS, INDEX, KEY))
    np.testing.assert_array_equal(got.tokens, out.tokens)
    np.testing.assert_array_equal(got.mask, out.mask)
    np.testing.assert_allclose(got.logprobs, out.logprobs, atol=1e-5)


def test_row_order_changes_nothing(free, out):
    """A row is known by its prompt and its rank among that prompt's rows, whatever stands between them."""
    order = np.array([3, 9, 0, 5, 4, 1, 6, 2, 7, 8])  # ranks within each prompt keep their order
    got = free(PROMPTS, INDEX[order], KEY)
    np.testing.assert_array_equal(got.tokens, out.tokens[order])


def test_prompt_order_and_other_prompts_change_nothing(free, out):
    order = [2, 0, 3, 1]
    place = np.argsort(order)
    got = free([PROMPTS[i] for i in order], place[INDEX], KEY)
    np.testing.assert_array_equal(got.tokens, out.tokens)
    others = free([[1, 2], PROMPTS[2], [64] * 5, [8]], [1, 0, 1, 2, 1, 1, 3, 3, 0, 0], KEY)
    np.testing.assert_array_equal(np.asarray(others.tokens)[[0, 2, 4, 5]], out.tokens[INDEX == 2])
    alone = free([PROMPTS[2]], np.zeros(4, int), KEY)
    np.testing.assert_array_equal(alone.tokens, out.tokens[INDEX == 2])


def test_padding_changes_nothing(free, out):
    got = free(PROMPTS, INDEX, KEY, prompt_length=29)
    np.testing.assert_array_equal(got.tokens, out.tokens)


def test_keys_ranks_and_identities_change_the_sample(free, out):
    assert (np.asarray(free(PROMPTS, INDEX, jax.random.key(12)).tokens) != out.tokens).any(1).all()
    named = free(PROMPTS, INDEX, KEY, prompt_ids=[4, 5, 6, 7])
    assert (np.asarray(named.tokens) != out.tokens).any(1).all()
    moved = free(PROMPTS[::-1], 3 - INDEX, KEY, prompt_ids=[7, 6, 5, 4])
    np.testing.assert_array_equal(moved.tokens, named.tokens)


def test_fewer_rows_of_a_prompt_are_the_first_ones(free, out):
    got = free(PROMPTS, [2, 2, *[1] * 8], KEY)
    np.testing.assert_array_equal(np.asarray(got.tokens)[:2], out.tokens[INDEX == 2][:2])
    np.testing.assert_array_equal(np.asarray(got.tokens)[2:4], out.tokens[INDEX == 1])


def test_a_prompt_may_have_no_rows(free, out):
    got = free(PROMPTS, [2] * len(INDEX), KEY)
    np.testing.assert_array_equal(got.tokens[:4], out.tokens[INDEX == 2])


@pytest.mark.slow
def test_programs_are_compiled_ahead_if_asked(tiny_model):
    ahead = sampler(tiny_model, stop_tokens=(3, 17, 40), segment=4, slots=8)  # which are halved
    ahead.compile(len(PROMPTS), 8, len(INDEX))
    with CompileCounter() as counter:
        got = ahead(PROMPTS, INDEX, KEY)
    assert counter.count == 0 and got.mask[:, 0].all()
    with pytest.raises(ValueError, match="4, 8, 0; must be at least 1"):
        ahead.compile(4, 8, 0)


def test_stop_tokens_cut_and_change_nothing_before(tiny_model, out):
    """With stops, every row is the free-running one up to its first stop token, which is kept."""
    stops = tuple({int(out.tokens[0, 2]), int(out.tokens[5, 0]), int(out.tokens[9, LENGTH - 1])})
    got = jax.device_get(sampler(tiny_model, stop_tokens=stops)(PROMPTS, INDEX, KEY))
    lengths = []
    for row, tokens in enumerate(out.tokens):
        hits = np.flatnonzero(np.isin(tokens, stops))
        length = hits[0] + 1 if hits.size else LENGTH
        assert got.mask[row].tolist() == [t < length for t in range(LENGTH)]
        np.testing.assert_array_equal(got.tokens[row, :length], tokens[:length])
        np.testing.assert_allclose(got.logprobs[row, :length], out.logprobs[row, :length], atol=1e-5)
        assert (got.tokens[row, length:] == 0).all() and (got.logprobs[row, length:] == 0).all()
        assert got.finished[row] == (hits.size > 0)
        lengths.append(int(length))
    assert lengths[5] == 1 and got.finished[9]  # a stop as the first token, and one as the very last
    assert len(set(lengths)) >= 3


def test_every_row_stops_at_once(tiny_model):
    got = jax.device_get(sampler(tiny_model, stop_tokens=tuple(range(128)))(PROMPTS, INDEX, KEY))
    assert got.mask.sum(1).tolist() == [1] * len(INDEX) and got.finished.all()


def test_one_new_token(tiny_model, out):
    got = jax.device_get(sampler(tiny_model, max_new_tokens=1)(PROMPTS, INDEX, KEY))
    np.testing.assert_array_equal(got.tokens, out.tokens[:, :1])
    np.testing.assert_allclose(got.logprobs, out.logprobs[:, :1], atol=1e-5)
    assert got.mask.all() and not got.finished.any()


def test_update_replaces_the_policy(tiny_model):
    other = jax.tree.map(lambda x: -x if x.ndim > 2 else x, tiny_model)
    greedy = sampler(tiny_model, temperature=0.0)
    before = np.asarray(greedy(PROMPTS, INDEX, KEY).tokens)
    greedy.update(other)
    after = np.asarray(greedy(PROMPTS, INDEX, KEY).tokens)
    np.testing.assert_array_equal(after, sampler(other, temperature=0.0)(PROMPTS, INDEX, KEY).tokens)
    assert (before != after).any()


@pytest.mark.parametrize(
    ("prompts", "index", "length", "message"),
    [
        ([[1], []], [0], None, "prompt 1: empty"),
        ([], [0], None, "prompt 0: empty"),
        ([[1], [1, 2, 3]], [0], 2, "prompt 1: 3 tokens; at most 2"),
        ([[1, 128]], [0], None, r"token ids must be in 0\.\.127, found 0\.\.128"),
        ([[1, -2]], [0], None, r"token ids must be in 0\.\.127, found -2"),
        ([[1]], [], None, "prompt_index: needs at least one row"),
        ([[1]], [0, 1], None, r"values in 0\.\.0"),
        ([[1]], [-1], None, r"values in 0\.\.0"),
        ([[1], [2]], [0.9, 1.0], None, r"values in 0\.\.1, whole numbers"),
        ([[1], [2]], [[0, 1], [1, 0]], None, r"values in 0\.\.1, whole numbers"),
    ],
)
def test_bad_calls(free, prompts, index, length, message):
    with pytest.raises(ValueError, match=message):
        free(prompts, index, KEY, prompt_length=length)


@pytest.mark.parametrize("limits", [[0] + [2] * 9, [LENGTH + 1] + [2] * 9, [2] * 9, [[2] * 10], [1.5] * 10])
def test_bad_limits(free, limits):
    with pytest.raises(ValueError, match=rf"limits: needs 10 of them, in 1\.\.max_new_tokens={LENGTH}"):
        free(PROMPTS, INDEX, KEY, limits=limits)


@pytest.mark.parametrize("ids", [[1, 2, 3], [1, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4]])
def test_identities_are_one_for_each_prompt(free, ids):
    with pytest.raises(ValueError, match="prompt_ids: needs 4 of them, one for each prompt"):
        free(PROMPTS, INDEX, KEY, prompt_ids=ids)


def test_a_stop_token_outside_the_vocabulary(tiny_model):
    with pytest.raises(ValueError, match=r"stop_tokens=\[128\]: outside the vocabulary of 128"):
        sampler(tiny_model, stop_tokens=(3, 128))
