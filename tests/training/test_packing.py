"""Streams instead of padded rows: the laws of the cut, its padding, and the same step whatever the cut."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdro_jax.models import attention, qwen3
from gdro_jax.training import batching, config_io, dealing, mesh, packing, plan, setup, step
from gdro_jax.training.config import TrainConfig
from gdro_jax.training.optimiser import make_optimiser

CONFIG = TrainConfig(
    learning_rate=1.0, warmup_steps=0, adam_b1=0.0, adam_b2=0.0, adam_eps=1e3, max_grad_norm=1e9, kl_coef=0.0
)

update = step.compiled_update()


def packed(case, config, shards=1):
    """The case's batch in streams, its rows cut into minibatches as without."""
    batch = case.batch
    rows = batching.cut(np.bincount(batch.prompt_index), config.minibatches * shards, np.random.default_rng(0))
    return batch._replace(
        pieces=packing.pack_step(rows, config, batch.prompt_mask, batch.mask, batch.rewards, batch.scorable)
    )


def trained(case, config, batch, layout=mesh.ONE_DEVICE):
    learner = step.Learner(case.model, make_optimiser(config).init(case.model))
    reference = case.reference if config.kl_coef > 0 else None
    learner, reference = layout.put(case.model.config, (learner, reference))
    return update(jax.tree.map(jax.numpy.copy, learner), reference, layout.whole(batch), config, 1.0, layout)


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got.learner.model), jax.tree.leaves(want.learner.model), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=1e-7)
    np.testing.assert_allclose(np.asarray(got.signal), want.signal, rtol=1e-5, atol=1e-6)
    for name, value in want.metrics.items():
        np.testing.assert_allclose(got.metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


BUCKETS = dataclasses.replace(CONFIG, microbatches=3, length_buckets=3)


@pytest.mark.slow
def test_the_step_does_not_depend_on_the_cut(case):
    """Uneven groups, an unscorable row, a group of equal rewards (no backward pass), several pieces."""
    with jax.disable_jit():
        learner = step.Learner(case.model, make_optimiser(CONFIG).init(case.model))
        want = step.update(learner, None, case.cut(CONFIG), CONFIG, 1.0)
    got = trained(case, BUCKETS, packed(case, BUCKETS))
    assert float(got.metrics["grad_norm"]) > 0.05
    assert_same(got, want)


VARIANTS = [
    {"kl_coef": 0.1, "microbatches": 2},
    {"minibatches": 2, "microbatches": 3, "importance_cap": 0.9},
    {"microbatches": 12, "ratio_level": "sequence"},
    {"microbatches": 4, "aggregate": "token", "importance_cap": 0.9},
]


@pytest.mark.slow
@pytest.mark.parametrize("fields", VARIANTS)
def test_no_option_depends_on_the_cut(case, fields):
    config = dataclasses.replace(CONFIG, **fields)
    want = trained(case, config, case.cut(config))
    config = dataclasses.replace(config, length_buckets=3)
    assert_same(trained(case, config, packed(case, config)), want)


@pytest.mark.slow
def test_the_signal_alone_is_the_steps(case):
    config = dataclasses.replace(CONFIG, length_buckets=2, microbatches=3)
    alone = step.surrogate_signal(case.model, None, packed(case, config), config, 1.0)
    padded = step.surrogate_signal(case.model, None, case.cut(CONFIG), CONFIG, 1.0)
    np.testing.assert_allclose(alone, padded, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(jax.local_device_count() < 8, reason="needs 8 host devices")
def test_eight_devices_are_one(case):
    config = dataclasses.replace(CONFIG, kl_coef=0.1)
    layout = mesh.make(data=2, fsdp=2, tensor=2)
    want = trained(case, config, case.cut(config))
    config = dataclasses.replace(config, length_buckets=3)
    assert_same(trained(case, config, packed(case, config, layout.shards), layout), want)


def shorter(case, length):
    mask = case.batch.mask & (np.arange(case.batch.mask.shape[1]) < length)
    return dataclasses.replace(case, batch=case.batch._replace(mask=mask))


def test_lengths_compile_nothing(case):
    """Other pieces and other groups are arrays of the same shapes, which is all that a program is compiled for."""
    cuts = [packed(shorter(case, length), BUCKETS).pieces for length in (5, 3, 1)]
    assert len({tuple(cut.of_rows.size[0]) for cut in cuts}) > 1
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), cut) for cut in cuts]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.slow
def test_a_stream_that_is_too_small_is_not_finite(case):
    """The lengths that the cut was made for are not those of the batch: nothing is dropped unseen."""
    short = packed(shorter(case, 1), BUCKETS)
    out = trained(case, BUCKETS, short._replace(mask=np.ones_like(short.mask)))
    assert float(out.metrics["skipped"]) > 0
    batch = packed(case, BUCKETS)
    of, shape = batch.pieces.of_rows, packing.sizes(3, 12, 3, 5, 6)
    assert len(shape.groups) % 2 == 0 and float(trained(case, BUCKETS, batch).metrics["skipped"]) == 0
    for size in (
        of.size // 2 * 2,
        np.minimum(of.size, 1),
    ):  # groups for short prompts alone, for the shortest rows alone
        cut = batch.pieces._replace(of_rows=of._replace(size=size))
        assert float(trained(case, BUCKETS, batch._replace(pieces=cut)).metrics["skipped"]) > 0


@st.composite
def steps(draw):
    minibatches, shards, microbatches = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    each = microbatches * draw(st.integers(1, 12))
    longest = draw(st.integers(1, 70))
    total = minibatches * shards * each
    lengths = np.array(draw(st.lists(st.integers(0, longest), min_size=total, max_size=total)))
    idle = np.array(draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    starts = draw(st.lists(st.booleans(), min_size=total, max_size=total))  # of prompts' rows
    counts = np.unique(np.cumsum(starts), return_counts=True)[1]
    return counts, minibatches, shards, microbatches, longest, lengths, idle, draw(st.integers(1, 8))


def assert_holds_all(of, m, tokens, before, shape):
    """A minibatch's pieces hold its rows, of so many tokens and keys before int[S, n], each in one group that fits."""
    number, groups, each = of.number[m], of.groups[m], tokens.shape[1]
    assert (groups[number:] == groups[number]).all()
    for s, inputs in enumerate(tokens):
        ends = of.pieces[m, s]
        assert ends[0] == 0 and (ends[number:] == each).all() and (np.diff(ends) >= 0).all()
        for k in range(number):
            held = inputs[ends[k] : ends[k + 1]]
            keys = np.where(held > 0, before[s, ends[k] : ends[k + 1]], 0)
            assert len(held) <= shape.rows and held.sum() <= shape.tokens
            seen = np.zeros(shape.rows, int)
            for g in range(groups[k], groups[k + 1]):
                first, last = of.first[m, g], of.last[m, g]
                size, length, most = shape.groups[of.size[m, g]]
                assert 0 <= first < last <= shape.rows and last - first <= size
                assert held[first:last].max(initial=0) <= length
                assert keys[first:last].max(initial=0) <= most
                seen[first:last] += 1
            assert seen.max() <= 1 and (seen[: len(held)][held > 0] == 1).all()


@given(steps(), st.integers(1, 700), st.integers(0, 9))
@settings(deadline=None, max_examples=150)
def test_laws(drawn, most, seed):
    counts, minibatches, shards, microbatches, longest, lengths, idle, buckets = drawn
    before = np.random.default_rng(seed).integers(1, most + 1, len(counts))
    index = batching.flat_index(counts)
    rows = batching.cut(counts, minibatches * shards, np.random.default_rng(0))
    each = rows.rows.shape[1]
    shape = packing.sizes(buckets, each, microbatches, longest, most)
    cut = packing.pack(rows, lengths, before, idle, shape, minibatches, most)
    assert len(shape.groups) <= 2 * buckets and shape.groups[-1][1:] == (max(longest - 1, 1), most)
    owners = np.take_along_axis(cut.prompts, cut.local_index, axis=2)
    np.testing.assert_array_equal(owners, index[cut.rows])
    assert np.take_along_axis(cut.prompt_used, cut.local_index, axis=2).all()
    of_prompts = packing.prompt_sizes(cut.prompts.shape[2], most)
    for m in range(minibatches):  # minibatches are what they were
        assert sorted(cut.rows[m].reshape(-1)) == sorted(rows.rows.reshape(minibatches, -1)[m])
        held = np.where(cut.prompt_used[m], before[cut.prompts[m]], 0)
        assert_holds_all(cut.of_prompts, m, held, np.zeros_like(held), of_prompts)
        seen = np.take_along_axis(held, cut.local_index[m], axis=1)
        assert_holds_all(cut.of_rows, m, np.maximum(lengths[cut.rows[m]] - 1, 0), seen, shape)


def test_prompts_change_places_until_shards_have_like_work():
    index = batching.flat_index(np.array([2, 2, 3, 2, 2, 3]))
    prompts = np.array([[0, 1, 2, 0], [3, 4, 5, 0]])
    rows = batching.Pieces(np.arange(14).reshape(2, 7), prompts, np.array([[0, 0, 1, 1, 2, 2, 2]] * 2))
    work = np.array([8, 8, 1, 2, 2, 1])[index]
    dealt = dealing.deal(rows, work[:, None], 1)
    assert work[dealt.rows].sum(axis=1).tolist() == [23, 23] and work[rows.rows].sum(axis=1).tolist() == [35, 11]
    np.testing.assert_array_equal(np.take_along_axis(dealt.prompts, dealt.local_index, 1), index[dealt.rows])
    assert sorted(dealt.rows.reshape(-1)) == list(range(14))
    np.testing.assert_array_equal(dealing.deal(rows, 0 * work[:, None], 1).rows, rows.rows)


def test_rows_without_a_gradient_share_pieces():
    rows = batching.cut(np.full(8, 1), 1, np.random.default_rng(0))
    idle = np.arange(8) % 2 == 0
    cut = packing.pack(rows, np.full(8, 9), np.full(8, 3), idle, packing.sizes(2, 8, 4, 10, 3), 1, 3)
    pieces = [idle[cut.rows[0, 0, a:b]] for a, b in itertools.pairwise(cut.of_rows.pieces[0, 0, :5])]
    assert cut.of_rows.number[0] == 4 and all(piece.all() or not piece.any() for piece in pieces)
    graded = np.ones((8, 3), bool), np.ones((8, 9), bool), np.ones(8), np.ones(8, bool)
    kl = packing.pack_step(rows, TrainConfig(length_buckets=2), *graded)
    none = packing.pack_step(rows, TrainConfig(length_buckets=2, kl_coef=0.0), *graded)
    assert (kl.of_rows.number == none.of_rows.number).all()  # all rows are alike in both


def test_padding_by_hand():
    rows = batching.cut(np.full(4, 1), 1, np.random.default_rng(0))
    lengths, before = np.array([9, 1, 0, 5]), np.full(4, 3)
    real = 8 + 4, 8 * 3 + 36 + 4 * 3 + 10
    found, prompts = packing.padding(rows, TrainConfig(), lengths, before, 9, 4)
    assert found == (4 * 8, real[0], 4 * 8 * 12, real[1])  # every query meets 4 prompt keys and 8 of its own
    assert prompts == (4 * 4, 4 * 3, 4 * 4 * 4, 4 * 6)
    assert found.share(1.0, 0.0) == 1 - 12 / 32
    of = lengths, before, 9, 4, (1.0, 0.0)
    assert packing.share(rows, TrainConfig(), *of) == 1 - (12 + 12) / (32 + 16)
    train = TrainConfig(length_buckets=2, microbatches=2)  # 2 rows of 9: pieces of 18 tokens, groups of 4 x 1 and 1 x 8
    shape = packing.sizes(2, 4, 2, 9, 4)
    cut = packing.pack(rows, lengths, before, np.zeros(4, bool), shape, 1, 4)
    assert shape == (18, 4, ((4, 1, 1), (4, 1, 4), (1, 8, 1), (1, 8, 4)))  # after prompts of at most 1 or 4 tokens
    assert packing.prompt_sizes(4, 4) == (16, 4, ((4, 1, 0), (1, 4, 0)))  # lengths 0.25 and 1 are one
    found, prompts = packing.padding(cut, train, lengths, before, 9, 4)
    assert found == (18, real[0], 2 * 8 * 12, real[1])  # one piece, two groups
    cut = packing.pack(rows, lengths, np.array([3, 3, 1, 1]), np.zeros(4, bool), shape, 1, 4)
    shorter, _ = packing.padding(cut, train, lengths, before, 9, 4)
    assert shorter.pairs == 8 * 12 + 8 * 9  # the last row's prompt is short
    assert prompts == (16, 4 * 3, 4 * 4 * 4, 4 * 6)  # one piece, a group a prompt
    assert 0 < found.share(1.0, 1.0) < 1
    np.testing.assert_allclose(packing.share(cut, train, *of), 1 - (12 + 4 / 3 * 12) / (18 + 4 / 3 * 16))


def test_prompts_go_in_several_pieces(case, monkeypatch):
    """Streams of one longest prompt's tokens, a prompt without a gradient in a piece of its own; responses in groups
    behind short prompts and in such behind any."""
    monkeypatch.setattr(packing, "PROMPT_TOKENS", 1)
    config, plain = (dataclasses.replace(x, minibatches=2) for x in (BUCKETS, CONFIG))
    batch = packed(case, config)
    assert not batch.pieces.prompt_used.all()  # places of prompts that are filled up with another
    of = batch.pieces.of_rows
    each, longest, prompt = batch.pieces.rows.shape[2], batch.tokens.shape[1], batch.prompts.shape[1]
    shape = packing.sizes(3, each, 3, longest, prompt)
    assert batch.pieces.of_prompts.number.max() > 1
    sizes = [size for m in range(2) for size in of.size[m, : of.groups[m, of.number[m]]]]
    assert {shape.groups[size][2] for size in sizes} == {2, 6}
    learner = step.Learner(case.model, make_optimiser(config).init(case.model))
    got = step.compiled_update()(jax.tree.map(jax.numpy.copy, learner), None, batch, config, 1.0)
    assert_same(got, trained(case, plain, case.cut(plain)))


@pytest.mark.parametrize(
    ("shards", "rows", "microbatches", "buckets"), [(1, 128, 64, 6), (1, 512, 64, 6), (8, 1024, 128, 12)]
)
def test_heavy_tails_leave_little_padding(shards, rows, microbatches, buckets):
    """Geometric lengths with a mean of an eighth of the longest; work of the benchmarks' model."""
    drawn = np.minimum(np.random.default_rng(0).geometric(1 / 64, rows), 512)
    train = TrainConfig(length_buckets=buckets, microbatches=microbatches)
    pieces = batching.cut(np.full(rows // 8, 8), shards, np.random.default_rng(0), 8)
    prompt = np.ones((rows // 8, 64), bool)
    mask = np.arange(512) < drawn[:, None]
    cut = packing.pack_step(pieces, train, prompt, mask, np.zeros(rows), np.ones(rows, bool))
    of, work = (drawn, np.full(rows // 8, 64), 512, 64), (6.3e6, 4096.0)
    share, padded = (packing.padding(x, train, *of)[0].share(*work) for x in (cut, pieces))  # of responses alone
    assert share <= 0.15 and padded > 0.8
    assert packing.share(cut, train, *of, work) <= 0.15  # with their prompts


def test_heavy_tailed_prompts_leave_little_padding():
    """Of 3,200 tokens at most and 100 in the mean, as mathematical problems have."""
    rng = np.random.default_rng(0)
    before, rows = np.minimum(rng.geometric(1 / 100, 64), 3200), 64 * 8
    before[0] = 3200
    train = TrainConfig(length_buckets=6, microbatches=64)
    pieces = batching.cut(np.full(64, 8), 1, rng, 8)
    mask = np.arange(3200) < before[:, None]
    cut = packing.pack_step(pieces, train, mask, np.ones((rows, 9), bool), np.zeros(rows), np.ones(rows, bool))
    streams, padded = (packing.padding(x, train, np.full(rows, 9), before, 9, 3200)[1] for x in (cut, pieces))
    assert streams.share(1.0, 0.0) < 0.25 and padded.share(1.0, 0.0) > 0.9


def test_a_run_takes_buckets(configure, launch, watch_update):
    trainer = launch(configure("run.steps=1", "train.length_buckets=2"))
    records, update = [], watch_update(trainer)
    assert trainer.run(records.append) and len(records) == 1
    assert np.isfinite(records[0]["loss"]) and records[0]["grad_norm"] > 0 and 0 <= records[0]["train_padding"] < 1
    assert update.compiled == [0, 0]  # it was, and tried, before anything was sampled


@pytest.mark.slow
def test_a_run_with_buckets_is_the_run_without(configure, launch):
    runs = {}
    for buckets in ("null", "2"):
        config = configure("run.steps=2", f"train.length_buckets={buckets}", output=buckets)
        trainer = launch(config)
        records = []
        assert trainer.run(records.append)
        runs[buckets] = records, jax.tree.leaves(trainer.state.learner.model)
    for a, b in zip(runs["2"][0], runs["null"][0], strict=True):
        assert a["response_length"] == b["response_length"] and a["unexpected_compiles"] == 0
        np.testing.assert_allclose([a["loss"], a["grad_norm"]], [b["loss"], b["grad_norm"]], rtol=1e-4, atol=1e-6)
        assert 0 <= a["train_padding"] < 1 and a["train_padding"] != b["train_padding"]
    for a, b in zip(runs["2"][1], runs["null"][1], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(jax.local_device_count() < 8, reason="needs 8 host devices")
def test_streams_on_a_mesh_take_the_kernel_of_tpus():
    """Traced alone: the kernel's gradient is taken a group at a time, inside the map over shards."""
    fields = {"train.prompts_per_step": "8", "controller.mean_rollouts": "2", "sampling.max_new_tokens": "17"}
    fields |= {"train.length_buckets": "2", "mesh.fsdp": "4", "mesh.tensor": "2", "model.remat": "block"}
    config = config_io.load(None, list(fields.items()))
    layout = setup.layout(config)
    architecture = qwen3.Qwen3Config(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=128
    )
    shape = plan.shapes(config, 8, layout)

    def traced():
        learner, batch, reference = plan._arguments(config, architecture, shape, attention.INTERPRETED)
        return step.update(learner, reference, batch, config.train, 1.0, layout)

    assert shape.shards == 4 and config.train.kl_coef > 0
    assert jax.eval_shape(traced).signal.shape == (8,)
