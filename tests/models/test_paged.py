"""Pages have one holder, go where they are needed and come back; what is read from them is what was written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel
from model_cases import config, make_model, make_tokens

from gdro_jax.models import decode, paged, pages, qwen3
from gdro_jax.models.pages import Writing

PAGE = 4


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU's kernel on any platform; its interpreter cannot read a buffer in another shape, so that is loaded."""

    def wait(self) -> jax.Array:
        for copy in self._async_copies:
            copy.wait()
        return self._vmem_buf[...]

    monkeypatch.setattr(kernel.MultiPageAsyncCopyDescriptor, "wait", wait)
    with pltpu.force_tpu_interpret_mode():
        yield


LENGTHS = np.array([7, 1, 4])  # a page and a part, a part, a whole page


def held(state: pages.Pages, length: np.ndarray, writing: Writing) -> list[int]:
    """Pages of prompts and of rows of so many tokens, one after the other."""
    total, page = len(state.free), pages.page_of(state)
    ids = [int(z) for z in np.asarray(state.prompts).reshape(-1) if z < total]
    for slot in np.flatnonzero(writing.going):
        begins, written = length[writing.prompt[slot]], writing.position[slot]
        if written:
            ids += np.asarray(state.table)[slot, begins // page : -(-(begins + written) // page)].tolist()
    return ids


def check_conserved(state: pages.Pages, length: np.ndarray, writing: Writing) -> None:
    """Every page is free or held by one, and by one only."""
    free = np.asarray(state.free)[: int(state.left[0])].tolist()
    assert sorted(free + held(state, length, writing)) == list(range(len(state.free)))


@pytest.mark.slow
@pytest.mark.parametrize(("unrolled", "reader"), [(decode.UNROLLED, "gather"), (0, "gather"), (0, "kernel")])
def test_slots_at_different_positions_read_their_own_context_only(monkeypatch, interpreted, unrolled, reader) -> None:
    """Decode steps of four slots that come and go, by whole sequences; pages hold rubbish wherever nothing was put."""
    monkeypatch.setattr(decode, "UNROLLED", unrolled)
    model = make_model(config(attention_bias=True, head_dim=128 if reader == "kernel" else 12))
    tokens = make_tokens(model.config, (3, 7), 3)
    mask = np.arange(7) < LENGTHS[:, None]
    prompt, last = np.array([2, 0, 1, 0]), np.array([5, 0, 4, 2])
    said = make_tokens(model.config, (4, 6), 4)

    @jax.jit
    def start() -> pages.Pages:
        kv, _ = qwen3.prefill(model, jnp.asarray(tokens), jnp.asarray(mask))
        state = pages.empty(kv, jnp.asarray(LENGTHS), 4, 6, 6, PAGE, None)
        state = state._replace(pools=tuple(pool + 1e3 for pool in state.pools))
        return pages.put(state, kv, 0)

    @jax.jit
    def step(state: pages.Pages, token: jax.Array, writing: Writing) -> tuple[jax.Array, pages.Pages]:
        state = pages.take(state, jnp.asarray(LENGTHS), writing)
        hidden, state = paged.step(model, token, writing, jnp.asarray(LENGTHS), state, reader)
        return qwen3.unembed(model, hidden), state

    @jax.jit
    def full(tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return qwen3.logits(model, tokens, mask)

    state = start()
    for at in range(6):
        writing = Writing(at <= last, np.minimum(at, last), prompt)
        logits, state = step(state, said[:, at], writing)
        check_conserved(state, LENGTHS, Writing(np.ones(4, bool), np.minimum(at, last) + 1, prompt))
        whole = np.concatenate([tokens[prompt], said[:, : at + 1], np.zeros((4, 5 - at), np.int32)], axis=1)
        shown = np.concatenate([mask[prompt], np.arange(6) <= np.full((4, 1), at)], axis=1)
        want = np.asarray(full(whole, shown))[:, 7 + at]
        for slot in np.flatnonzero(writing.going):
            np.testing.assert_allclose(logits[slot], want[slot], atol=1e-5 * np.abs(want).max(), rtol=0)
    ended = Writing(np.array([True, False, True, True]), last + 1, prompt)
    state = pages.give_back(state, jnp.asarray(LENGTHS), ended)
    check_conserved(state, LENGTHS, Writing(~ended.going, last + 1, prompt))


@pytest.mark.parametrize("page", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(16, marks=pytest.mark.slow)])
def test_pages_come_and_go_for_as_long_as_there_are_any(page: int) -> None:
    """Rows of random lengths in eight slots over a pool too small for them: told before it is short, then grown."""
    rng = np.random.default_rng(page)
    length = rng.integers(1, 20, 5).astype(np.int32)
    kv = qwen3.PromptKV(*[jnp.zeros((1, 1, 20, 1, 2))] * 2, jnp.ones((1, 20), bool), jnp.ones(1, jnp.int32))
    state = pages.empty(kv, jnp.asarray(length), 8, 10, 40, page, "bfloat16")
    assert state.pools[0].dtype == jnp.bfloat16 and state.pools[0].shape[1:3] == (len(state.free), page)
    short, take, back = jax.jit(pages.short), jax.jit(pages.take), jax.jit(pages.give_back)
    going, grown = np.ones(8, bool), 0
    position, prompt, limit = np.zeros(8, np.int32), rng.integers(0, 5, 8), rng.integers(1, 41, 8)
    for _ in range(120):
        writing = Writing(going, position, prompt)
        if bool(short(state, length, writing)):
            state, grown = pages.resize(state, jnp.arange(8), 40), grown + 1
            check_conserved(state, length, writing)
        state = take(state, length, writing)
        check_conserved(state, length, Writing(going, position + 1, prompt))
        position, ended = position + going, going & (position + 1 >= limit)
        state = back(state, length, Writing(ended, position, prompt))
        limit[ended], prompt[ended] = rng.integers(20, 41, ended.sum()), rng.integers(0, 5, ended.sum())
        position, going = np.where(ended, 0, position), rng.random(8) < 0.9
        going |= position > 0  # an idle slot holds nothing
        check_conserved(state, length, Writing(going, position, prompt))
    assert grown == 1


@pytest.mark.parametrize("rows_at_once", [5, pytest.param(2, marks=pytest.mark.slow)])
def test_the_kernel_reads_what_plain_jax_reads(monkeypatch, interpreted, rows_at_once) -> None:
    monkeypatch.setattr(paged, "_TABLE_BYTES", rows_at_once * 128 * 4)
    rng = np.random.default_rng(0)
    pool, q = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((11, 16, 4, 128), (5, 8, 128)))
    table, seen = jnp.asarray(rng.integers(0, 11, (5, 20)), jnp.int32), jnp.array([1, 16, 17, 320, 300], jnp.int32)
    want = paged._gather(q, pool, table, seen)
    np.testing.assert_allclose(jax.jit(paged._kernel)(q, pool, table, seen), want, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "platform", "head_dim", "heads", "dtype", "page", "reader"),
    [
        ("auto", "tpu", 128, 2, "bfloat16", 64, "kernel"),
        ("auto", "tpu", 128, 1, "float32", 16, "kernel"),
        ("auto", "tpu", 64, 2, "bfloat16", 64, None),
        ("auto", "tpu", 128, 2, "int8", 64, None),
        ("auto", "tpu", 128, 2, "bfloat16", 8, None),
        ("auto", "tpu", 128, 3, "bfloat16", 64, None),
        ("auto", "cpu", 128, 2, "bfloat16", 64, None),
        ("auto", "gpu", 128, 2, "bfloat16", 64, None),
        ("contiguous", "tpu", 128, 2, "bfloat16", 64, None),
        ("paged", "tpu", 128, 16, "bfloat16", 64, "kernel"),
        ("paged", "cpu", 12, 3, "float32", 5, "gather"),
        ("paged", "gpu", 64, 2, "bfloat16", 64, "gather"),
    ],
)
def test_choice(asked, platform, head_dim, heads, dtype, page, reader) -> None:
    assert paged.choose(asked, platform, head_dim, heads, dtype, page) == reader


@pytest.mark.parametrize(
    ("asked", "platform", "head_dim", "heads", "dtype", "page", "message"),
    [
        ("pages", "cpu", 128, 2, "bfloat16", 64, "cache='pages': must be one of auto, contiguous, paged"),
        ("paged", "cpu", 128, 2, "int8", 64, "cache='paged': needs cache_dtype=bfloat16 or the model's own"),
        ("paged", "tpu", 64, 2, "bfloat16", 64, "needs heads of a multiple of 128 on a TPU, the model's are of 64"),
        ("paged", "tpu", 128, 2, "bfloat16", 24, "needs page_tokens of a multiple of 16 on a TPU, not 24"),
        ("paged", "tpu", 128, 3, "bfloat16", 64, "needs 1, 2, 4 or a multiple of 8 KV heads on a chip of a TPU, not 3"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(asked, platform, head_dim, heads, dtype, page, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        paged.choose(asked, platform, head_dim, heads, dtype, page)
    assert "\n" not in str(caught.value)
