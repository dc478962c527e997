"""Log records and checkpoints: what is written is what comes back, whatever cut the run off."""

import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdro_jax import sampling
from gdro_jax.training import records
from gdro_jax.training.checkpoint import Checkpoints, SaveError
from gdro_jax.training.progress import Progress, sparkline


def test_bins_and_strata_by_hand():
    bins = np.array([0, 2, 2, 2])
    record = records.bin_record(
        bins,
        weights=np.array([2.0, 1.0, 0.5, 0.0]),
        rollouts=np.array([6.0, 2.0, 4.0, 4.0]),
        reward=np.array([0.0, 1.0, np.nan, 0.5]),
        variance=np.array([np.nan, 0.0, np.nan, 0.5]),
        num_bins=3,
    )
    np.testing.assert_allclose(record["share"], [0.25, 0, 0.75])
    np.testing.assert_allclose(record["weight"], [2, np.nan, 0.5])
    np.testing.assert_allclose(record["rollouts"], [6, np.nan, 10 / 3])
    np.testing.assert_allclose(record["reward"], [0, np.nan, 0.75])
    np.testing.assert_allclose(record["reward_std"], [np.nan, np.nan, 0.5])
    means = records.by_stratum(np.array([1.0, np.nan, 3.0, np.nan]), ["a", "a", "a", "b"])
    assert means["a"] == 2.0 and np.isnan(means["b"])


def test_diagnostics_by_hand():
    record = {
        "share": np.array([0.5, 0.5]),
        "weight": np.array([1.5, 0.5]),
        "rollouts": np.array([9.0, 1.0]),
        "reward_std": np.array([0.6, 0.2]),
    }
    out = records.diagnostic_record(record, mean_rollouts=4)
    assert out["lead_lag"] == pytest.approx(0.25 - 0.5)  # sum of bin times weighted share, minus the same of shares
    assert out["wse"] == pytest.approx(0.5 * 0.6 / 3 + 0.5 * 0.2 / 1)
    assert out["wse_uniform"] == pytest.approx(0.5 * 0.6 / 2 + 0.5 * 0.2 / 2)
    assert out["wse_reduction"] == pytest.approx(1 - out["wse"] / out["wse_uniform"])
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert out["effective_bins"] == pytest.approx(np.exp(entropy), rel=1e-5)
    unknown = records.diagnostic_record(record | {"reward_std": np.array([0.6, np.nan])}, mean_rollouts=4)
    assert (unknown["wse"], unknown["wse_uniform"]) == pytest.approx((0.6 / 3, 0.6 / 2))  # not half of it
    nothing = records.diagnostic_record(record | {"reward_std": np.full(2, np.nan)}, mean_rollouts=1)
    assert all(np.isnan(nothing[name]) for name in ("wse", "wse_uniform", "wse_reduction"))
    certain = records.diagnostic_record(record | {"reward_std": np.zeros(2)}, mean_rollouts=4)
    assert (certain["wse"], certain["wse_reduction"]) == (0.0, 0.0)


def test_plain_values():
    value = {"a": np.float32(0.5), "b": np.array([1.0, np.nan]), "c": jnp.int32(3), "d": [np.inf, None, "x", True]}
    assert records.plain(value) == {"a": 0.5, "b": [1.0, None], "c": 3, "d": [None, None, "x", True]}


@pytest.mark.parametrize("torn", ['{"step": 4, "rew', '{"step": 4, "bins": {"share": [1.0]}', "}", '{"step"', ""])
def test_lines_past_the_checkpoint_and_a_torn_line_are_removed(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "bins": {"share": [1.0]}}) for step in range(4)]
    path.write_text("\n".join(lines) + "\n" + torn)
    file = records.MetricsFile(path, keep_until=2)
    assert file.steps == {0, 1, 2}
    file.write({"step": 3, "loss": float("nan"), "ok": np.float32(1)})
    file.close()
    assert path.read_text().splitlines() == [*lines[:3], '{"step": 3, "loss": null, "ok": 1.0}']
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_file_starts_empty(tmp_path):
    file = records.MetricsFile(tmp_path / "metrics.jsonl", keep_until=0)
    file.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "" and file.steps == set()


def test_checkpoints_are_exact(tmp_path):
    state = {
        "f": jnp.array([1e-30, np.pi, -np.inf, np.nan], jnp.float32),
        "h": jnp.array([1.5, 3.140625], jnp.bfloat16),
        "i": (jnp.int32(7), jnp.zeros((0,), jnp.float32)),
        "flag": jnp.array([True, False]),
        "none": None,
    }
    store = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert store.latest() is None
    for number in (1, 2, 3):
        store.save(
            number, jax.tree.map(lambda x, n=number: x + n if x.dtype == jnp.int32 else x, state), {"seen": number}
        )
    store.save(3, state, {"seen": 99})  # saved before: left as it is
    store.close()
    again = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert again.latest() == 3
    blank = jax.tree.map(jnp.zeros_like, state)
    got, counters = again.restore(3, blank)
    assert counters == {"seen": 3}
    want = state | {"i": (jnp.int32(10), state["i"][1])}
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert again.restore(2, blank)[1] == {"seen": 2}
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]  # the oldest is gone
    again.close()


@pytest.mark.parametrize("room", [0, 4_000])
def test_a_checkpoint_that_cannot_be_written_is_one_line_and_those_before_are_whole(tmp_path, room, capfd):
    """The process may write no file of more bytes, as on a disk that is full."""
    state = {"f": jnp.arange(100_000.0)}
    store = Checkpoints(tmp_path / "checkpoints", keep=2)
    store.save(1, state, {"seen": 1})
    other = jax.tree.map(jnp.cos, state)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(
            SaveError, match=r"checkpoints/2: cannot be written \(.{0,12}File too large\); the"
        ) as caught:
            store.save(2, other, {"seen": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")
    assert store.latest() == 1 and store.restore(1, state)[1] == {"seen": 1}
    store.save(2, state, {"seen": 2})  # once there is room
    assert store.latest() == 2
    store.close()


class Stream:
    """Text that was written, and whether it goes to a terminal."""

    def __init__(self, terminal: bool):
        self.text, self.terminal = "", terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        """Nothing is held back."""


def record(step: int, **more) -> dict:
    bins = {"share": [0.5, 0.5], "weight": [1.0, np.nan], "rollouts": [4.0, np.nan]}
    return {"step": step, "reward": 0.25, "bins": bins, "ledger": {"tokens": 1234}} | more


def test_progress_off_a_terminal_is_a_line_every_few_steps():
    stream = Stream(terminal=False)
    progress = Progress("joint", 10, 0, 4, stream)
    for step in range(1, 11):
        progress(record(step))
    lines = stream.text.splitlines()
    assert [line.split("step")[1].split("/")[0].strip() for line in lines] == ["4", "8", "10"]
    assert "joint" in lines[0] and "reward 0.250" in lines[0] and "1,234 tokens" in lines[0] and "left" in lines[0]


def test_progress_on_a_terminal_redraws_one_line():
    stream = Stream(terminal=True)
    progress = Progress("run", 3, 0, 10, stream)
    for step in (1, 2, 3):
        progress(record(step, reward=None if step == 2 else 0.5))
    assert stream.text.count("\r") == 3 and stream.text.count("\n") == 1


@pytest.mark.parametrize(("terminal", "shown"), [(True, [2, 3, 4]), (False, [4])])
def test_progress_within_a_long_step(monkeypatch, terminal, shown):
    """A second apart on a terminal, a minute elsewhere; the rate is of what was drawn since the first look."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    stream = Stream(terminal)
    progress = Progress("run", 3, 0, 10, stream)
    for row, seconds in enumerate((10.0, 10.5, 20.0, 50.0, 80.0)):
        now[0] = seconds
        progress.sampled(1, sampling.Progress(np.array([row]), row, 8, 100 * row, 100 * row))
    now[0] = 81.0
    for step, tokens in ((2, 900), (2, 7)):  # another step, and another call in it: a first look shows nothing
        progress.sampled(step, sampling.Progress(np.array([0]), 0, 8, tokens, tokens))
        now[0] += 2.0
    lines = [line for line in stream.text.replace("\r\x1b[2K", "\n").splitlines() if line]
    assert [int(line.split("sampling: ")[1].split()[0]) for line in lines] == shown
    assert lines[-1].endswith("sampling: 4 of 8 rows  400 tokens  6 tokens/s")


def test_progress_shows_evaluations():
    stream = Stream(terminal=False)
    summary = {"k": 8, "overall": {"mean": 0.5, "pass": None, "n": 1200}}
    summary |= {"worst": {"stratum": "hard", "mean": 0.125}}
    Progress("run", 3, 0, 10, stream)({"step": 0, "eval": summary})
    assert "held out, 1,200 problems: mean@1 0.500" in stream.text and "worst stratum hard 0.125" in stream.text


def test_sparklines():
    assert sparkline([0.0, 0.5, 1.0, float("nan")]) == " ▄█·"
    assert sparkline([0.0, 0.0]) == "  " and sparkline([]) == ""
