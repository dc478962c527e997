"""Streams instead of padded rows: the laws of the cut, its padding, and the same step whatever the cut."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdro_jax.models import lora
from gdro_jax.training import batching, dealing, mesh, packing, step
from gdro_jax.training import packed as packed_step
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


TILES = dataclasses.replace(CONFIG, microbatches=3, attention_tile=2)


@pytest.mark.slow
def test_the_step_does_not_depend_on_the_cut(case):
    """Uneven groups, an unscorable row, a group of equal rewards (no backward pass), several pieces."""
    with jax.disable_jit():
        learner = step.Learner(case.model, make_optimiser(CONFIG).init(case.model))
        want = step.update(learner, None, case.cut(CONFIG), CONFIG, 1.0)
    got = trained(case, TILES, packed(case, TILES))
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
    config = dataclasses.replace(config, attention_tile=2)
    assert_same(trained(case, config, packed(case, config)), want)


@pytest.mark.slow
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_adapters_do_not_depend_on_the_cut(case, kl_coef):
    config, base = dataclasses.replace(CONFIG, kl_coef=kl_coef), case.reference
    adapters = lora.init(base.config, jax.random.key(3), rank=2, alpha=4.0, names=lora.targets("all"), dtype="float32")
    adapters = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(5), x.shape), adapters)

    def adapted(config, batch):
        learner = step.begin(jax.tree.map(jax.numpy.copy, adapters), base.config, config, mesh.ONE_DEVICE)
        return update(learner, base, batch, config, 1.0, mesh.ONE_DEVICE)

    want = adapted(config, case.cut(config))
    config = dataclasses.replace(config, attention_tile=2, microbatches=3)
    assert float(want.metrics["grad_norm"]) > 0.05
    assert_same(adapted(config, packed(case, config)), want)


@pytest.mark.slow
def test_the_signal_alone_is_the_steps(case):
    config = dataclasses.replace(CONFIG, attention_tile=2, microbatches=3)
    alone = step.surrogate_signal(case.model, None, packed(case, config), config, 1.0)
    padded = step.surrogate_signal(case.model, None, case.cut(CONFIG), CONFIG, 1.0)
    np.testing.assert_allclose(alone, padded, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(jax.local_device_count() < 8, reason="needs 8 host devices")
def test_eight_devices_are_one(case):
    config = dataclasses.replace(CONFIG, kl_coef=0.1)
    layout = mesh.make(data=2, fsdp=2, tensor=2)
    want = trained(case, config, case.cut(config))
    config = dataclasses.replace(config, attention_tile=2)
    assert_same(trained(case, config, packed(case, config, layout.shards), layout), want)


def shorter(case, length):
    mask = case.batch.mask & (np.arange(case.batch.mask.shape[1]) < length)
    return dataclasses.replace(case, batch=case.batch._replace(mask=mask))


def test_lengths_compile_nothing(case):
    """Other pieces and other tiles are arrays of the same shapes, which is all that a program is compiled for."""
    cuts = [packed(shorter(case, length), TILES).pieces for length in (5, 3, 1)]
    assert len({cut.of_rows.steps.sum() for cut in cuts}) == 3
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), cut) for cut in cuts]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.slow
def test_a_stream_that_is_too_small_is_not_finite(case):
    """The lengths that the cut was made for are not those of the batch: nothing is dropped unseen."""
    short = packed(shorter(case, 1), TILES)
    out = trained(case, TILES, short._replace(mask=np.ones_like(short.mask)))
    assert float(out.metrics["skipped"]) > 0
    batch = packed(case, TILES)
    assert float(trained(case, TILES, batch).metrics["skipped"]) == 0
    of = short.pieces.of_rows  # with tiles enough
    cut = short.pieces._replace(of_rows=of._replace(steps=np.full_like(of.steps, 3)))
    crowded = short._replace(mask=np.ones_like(short.mask), pieces=cut)
    assert float(trained(case, TILES, crowded).metrics["skipped"]) > 0
    for name in ("of_rows", "of_prompts"):
        of = getattr(batch.pieces, name)
        cut = batch.pieces._replace(**{name: of._replace(steps=np.maximum(of.steps - 1, 0))})  # of keys
        assert float(trained(case, TILES, batch._replace(pieces=cut)).metrics["skipped"]) > 0


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


def assert_holds_all(of, m, tokens, before, shapes):
    """A minibatch's pieces hold its rows, of so many tokens and keys before int[S, n], and blocks meet all keys."""
    (full, number), each = of.ends[m], tokens.shape[1]
    assert 0 <= full <= number and (full == number or len(shapes) == 2)
    assert not of.steps[m, number:].any()
    for s, inputs in enumerate(tokens):
        ends = of.pieces[m, s]
        assert ends[0] == 0 and (ends[number:] == each).all() and (np.diff(ends) >= 0).all()
        for k, shape in enumerate(shapes[int(k >= full)] for k in range(number)):
            held, tiling = inputs[ends[k] : ends[k + 1]], shape.tiling
            assert len(held) <= shape.rows and held.sum() <= shape.tokens
            tiles = [
                (-(-prompt // tiling.tokens), step + 1)
                for row, prompt in zip(held, before[s, ends[k] : ends[k + 1]], strict=True)
                for step in range(-(-row // tiling.tokens))
            ]
            assert len(tiles) <= shape.blocks * tiling.together
            for i, needed in enumerate(sorted(tiles, reverse=True)):
                assert (of.steps[m, k, i // tiling.together] >= needed).all()


@given(steps(), st.integers(1, 700), st.integers(0, 9))
@settings(deadline=None, max_examples=150)
def test_laws(drawn, most, seed):
    counts, minibatches, shards, microbatches, longest, lengths, idle, tile = drawn
    before = np.random.default_rng(seed).integers(1, most + 1, len(counts))
    index = batching.flat_index(counts)
    rows = batching.cut(counts, minibatches * shards, np.random.default_rng(0))
    each = rows.rows.shape[1]
    shape = packing.sizes(tile, each, microbatches, longest)
    of_prompts = packing.prompt_sizes(tile, rows.prompts.shape[1], most)
    cut = packing.pack(rows, lengths, before, idle, shape, of_prompts, minibatches, longest)
    owners = np.take_along_axis(cut.prompts, cut.local_index, axis=2)
    np.testing.assert_array_equal(owners, index[cut.rows])
    assert np.take_along_axis(cut.prompt_used, cut.local_index, axis=2).all()
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
    shapes = packing.sizes(4, 8, 4, 10), packing.prompt_sizes(4, rows.prompts.shape[1], 3)
    cut = packing.pack(rows, np.full(8, 9), np.full(8, 3), idle, *shapes, 1, 10)
    pieces = [idle[cut.rows[0, 0, a:b]] for a, b in itertools.pairwise(cut.of_rows.pieces[0, 0, :5])]
    assert cut.of_rows.ends[0].tolist() == [4, 4] and all(piece.all() or not piece.any() for piece in pieces)
    graded = np.ones((8, 3), bool), np.ones((8, 9), bool), np.ones(8), np.ones(8, bool)
    kl = packing.pack_step(rows, TrainConfig(attention_tile=2), *graded)
    none = packing.pack_step(rows, TrainConfig(attention_tile=2, kl_coef=0.0), *graded)
    assert (kl.of_rows.ends == none.of_rows.ends).all()  # all rows are alike in both


def test_no_more_pieces_than_rows_need():
    """Also where a quarter of a stream is no whole number of tokens; rows without a gradient fill room that is left."""
    none = np.zeros((1, 8), bool)
    kinds, held = packing._streams(np.full((1, 8), 6), none, packing.sizes(4, 8, 8, 7))
    assert kinds == [0] * 8 and [len(piece) for piece in held[0]] == [1] * 8
    shapes = packing.sizes(4, 8, 4, 10)  # 20 tokens, or 5
    for lengths, idle, want in (
        ([9, 9, 5, 0], [0, 0, 0, 0], [0, 1]),
        ([9, 9, 2, 0], [0, 0, 1, 1], [0]),
        ([9, 5, 5, 9], [0, 0, 1, 1], [0, 0]),
        ([9, 1, 5, 4], [0, 0, 1, 1], [0]),
        ([4, 1, 9, 9], [0, 0, 1, 1], [0, 1]),
    ):
        kinds, held = packing._streams(np.array([lengths]), np.array([idle], bool), shapes)
        assert kinds == want and sorted(np.concatenate(held[0])) == [0, 1, 2, 3], (lengths, kinds)


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
    train = TrainConfig(attention_tile=4, microbatches=2)  # 2 rows of 9: pieces of 18 tokens, a tile at a time
    shapes = packing.step_sizes(train, 4, 4, 9, 4)
    cut = packing.pack(rows, lengths, before, np.zeros(4, bool), *shapes, 1, 9)
    assert shapes == (((18, 4, (4, 1)), (4, 4, (4, 1))), ((16, 4, (4, 1)), (4, 4, (4, 1))))
    assert [shape.blocks for of_rows in shapes for shape in of_rows] == [8, 5, 8, 5]
    assert cut.of_rows.steps[0, 0].tolist() == [[1, 2], [1, 1], [1, 1], *[[0, 0]] * 5]  # tiles of 8 tokens, and of 4
    found, prompts = packing.padding(cut, train, lengths, before, 9, 4)
    assert found == (18, real[0], 7 * 16, real[1])  # one piece
    assert prompts == (16, 4 * 3, 4 * 16, 4 * 6)  # one piece, a tile a prompt
    assert 0 < found.share(1.0, 1.0) < 1
    np.testing.assert_allclose(packing.share(cut, train, *of), 1 - (12 + 4 / 3 * 12) / (18 + 4 / 3 * 16))


def test_prompts_go_in_several_pieces(case, monkeypatch):
    """Streams of one longest prompt's tokens; a piece without a gradient is not run backward."""
    monkeypatch.setattr(packing, "PROMPT_TOKENS", 1)
    rewards = np.where(case.batch.prompt_index == 1, 1.0, case.batch.rewards).astype(np.float32)
    case = dataclasses.replace(case, batch=case.batch._replace(rewards=rewards))
    config, plain = (dataclasses.replace(x, minibatches=2) for x in (TILES, CONFIG))
    batch = packed(case, config)
    assert not batch.pieces.prompt_used.all()  # places of prompts that are filled up with another
    assert batch.pieces.of_prompts.ends.max() > 1
    assert batch.pieces.of_rows.steps[..., 0].max() > 1 < batch.pieces.of_rows.steps[..., 1].max()
    learner = step.Learner(case.model, make_optimiser(config).init(case.model))
    passes = {name: watch_passes(monkeypatch, name) for name in ("_prefill", "_hidden")}
    got = step.compiled_update()(jax.tree.map(jax.numpy.copy, learner), None, batch, config, 1.0)
    jax.effects_barrier()
    assert_same(got, trained(case, plain, case.cut(plain)))
    for name, (number, moving) in pieces_of(batch).items():
        assert 0 < moving < number
        twice = moving if name == "_prefill" else 0  # prompts are run a second time for their gradient
        assert passes[name] == {"forward": number + twice, "backward": moving}, name


def watch_passes(monkeypatch, name):
    """Counts of how often a function of `packed` is run, and run backward, on the device."""
    counts, function = {"forward": 0, "backward": 0}, getattr(packed_step, name)

    def count(direction):
        jax.debug.callback(lambda: counts.__setitem__(direction, counts[direction] + 1))

    def forward(x):
        count("forward")
        return x, None

    def backward(_, bar):
        count("backward")
        return (bar,)

    watched = jax.custom_vjp(lambda x: forward(x)[0])
    watched.defvjp(forward, backward)
    monkeypatch.setattr(packed_step, name, lambda *args: watched(function(*args)))
    return counts


def pieces_of(batch):
    """By function: how many pieces of prompts, and of rows, there are, and in how many of them is a gradient."""
    rewards, index = np.asarray(batch.rewards), np.asarray(batch.prompt_index)
    good = np.asarray(batch.scorable)
    lively = np.array([len(set(rewards[good & (index == p)])) > 1 for p in range(index.max() + 1)])
    moving = lively[index] & good
    number, found = np.zeros(2, int), np.zeros(2, int)
    cut = batch.pieces
    for minibatch in range(len(cut.rows)):
        rows, prompts, used = cut.rows[minibatch, 0], cut.prompts[minibatch, 0], cut.prompt_used[minibatch, 0]
        with_gradient = np.isin(np.arange(len(prompts)), cut.local_index[minibatch, 0][moving[rows]]) & used
        for kind, (of, yes) in enumerate(((cut.of_prompts, with_gradient), (cut.of_rows, moving[rows]))):
            ends = of.pieces[minibatch, 0, : of.ends[minibatch, -1] + 1]
            number[kind] += len(ends) - 1
            found[kind] += sum(yes[a:b].any() for a, b in itertools.pairwise(ends))
    return {"_prefill": (number[0], found[0]), "_hidden": (number[1], found[1])}


@pytest.mark.parametrize(("shards", "rows", "microbatches"), [(1, 128, 64), (1, 512, 64), (8, 1024, 128)])
def test_heavy_tails_leave_little_padding(shards, rows, microbatches):
    """Geometric lengths with a mean of an eighth of the longest; work of the benchmarks' model."""
    drawn = np.minimum(np.random.default_rng(0).geometric(1 / 64, rows), 512)
    train = TrainConfig(attention_tile=32, microbatches=microbatches)
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
    train = TrainConfig(attention_tile=64, microbatches=64)
    pieces = batching.cut(np.full(64, 8), 1, rng, 8)
    mask = np.arange(3200) < before[:, None]
    cut = packing.pack_step(pieces, train, mask, np.ones((rows, 9), bool), np.zeros(rows), np.ones(rows, bool))
    streams, padded = (packing.padding(x, train, np.full(rows, 9), before, 9, 3200)[1] for x in (cut, pieces))
    assert streams.share(1.0, 0.0) < 0.25 and padded.share(1.0, 0.0) > 0.9


@pytest.mark.slow
def test_a_run_takes_streams(configure, launch, watch_update):
    trainer = launch(configure("run.steps=1", "train.attention_tile=4"))
    records, update = [], watch_update(trainer)
    assert trainer.run(records.append) and len(records) == 1
    assert np.isfinite(records[0]["loss"]) and records[0]["grad_norm"] > 0 and 0 <= records[0]["train_padding"] < 1
    assert update.compiled == [0, 0]  # it was, and tried, before anything was sampled


@pytest.mark.slow
def test_a_run_in_streams_is_the_padded_run(configure, launch):
    runs = {}
    for tile in ("null", "4"):
        config = configure("run.steps=2", f"train.attention_tile={tile}", output=tile)
        trainer = launch(config)
        records = []
        assert trainer.run(records.append)
        runs[tile] = records, jax.tree.leaves(trainer.state.learner.model)
    for a, b in zip(runs["4"][0], runs["null"][0], strict=True):
        assert a["response_length"] == b["response_length"] and a["unexpected_compiles"] == 0
        np.testing.assert_allclose([a["loss"], a["grad_norm"]], [b["loss"], b["grad_norm"]], rtol=1e-4, atol=1e-6)
        assert 0 <= a["train_padding"] < 1 and a["train_padding"] != b["train_padding"]
    for a, b in zip(runs["4"][1], runs["null"][1], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
