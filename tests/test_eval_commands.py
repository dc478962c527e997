"""`gdro eval` on benchmarks: kept responses, resuming, grading again, comparing; GPQA is written nowhere."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gdro_jax import cli, eval_commands
from gdro_jax.data.sources import Problem
from gdro_jax.evaluation import metrics, store
from gdro_jax.evaluation.run import Graded

SETTINGS = (
    "--eval.samples=4",
    "--eval.max_new_tokens=4",
    "--eval.temperature=1.0",
    "--eval.template=plain",
    "--eval.problems_per_call=3",
    "--data.verifier_timeout=60",
)
BOXED = "\\boxed{%s}"


def invoke(*arguments: object) -> int:
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight problems as MATH-500 publishes them, and two made up ones in GPQA's columns."""
    place = tmp_path_factory.mktemp("benchmarks")
    rows = [
        {"problem": f"1{i}+{i}=", "answer": str(10 + 2 * i), "subject": "ab"[i % 2], "level": 1 + i // 4}
        for i in range(8)
    ]
    (place / "math500.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wrong = {f"Incorrect Answer {i}": f"{i}" for i in (1, 2, 3)}
    secret = [
        {"Question": f"99999{i}", "Correct Answer": "4", **wrong, "High-level domain": "Physics"} for i in range(2)
    ]
    (place / "gpqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in secret))
    return place


@pytest.fixture(scope="module")
def evaluated(folder, tmp_path_factory):
    """Two evaluations of both sets with unlike seeds, whatever the base says put in a box."""
    place = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        original = eval_commands.run.texts

        def texts(rollouts, tokenizer, stop_tokens):
            said = original(rollouts, tokenizer, stop_tokens)
            return [BOXED % text.strip().replace("{", "").replace("}", "") for text in said]

        patch.setattr(eval_commands.run, "texts", texts)
        asked = ("--benchmarks", "math500,gpqa", "--benchmark-folder", folder, *SETTINGS)
        assert invoke("eval", "embedded", *asked, "--out", place / "one") == 0
        assert invoke("eval", "embedded", *asked, "--out", place / "two", "--run.seed=1") == 0
    return place, asked, texts


def read(place, name="math500"):
    return [json.loads(line) for line in (place / f"{name}.responses.jsonl").read_text().splitlines()]


def test_every_number_follows_from_the_responses_kept(evaluated):
    place = evaluated[0] / "one"
    rows = read(place)
    assert [(r["problem"], r["rank"]) for r in rows] == [(p, r) for p in range(8) for r in range(4)]
    for row in rows:
        assert row["scorable"] and row["score"] == (row["response"] == BOXED % (10 + 2 * row["problem"]))
    correct = np.bincount([r["problem"] for r in rows], weights=[r["score"] for r in rows]).astype(int)
    assert 0 < correct.sum() < 32
    score = json.loads((place / "summary.json").read_text())["sets"]["math500"]
    for k in range(1, 5):
        found = score["passes"][str(k)]
        assert found["value"] == pytest.approx(metrics.pass_at_k(correct, [4] * 8, k).mean())
        assert found["low"] <= found["value"] <= found["high"]
    levels = score["strata"]["level"]
    assert list(levels) == ["Level 1", "Level 2"] and set(score["strata"]["subject"]) == {"a", "b"}
    assert levels["Level 1"]["mean"]["value"] == pytest.approx(correct[:4].mean() / 4)
    everything = [group["mean"]["value"] for groups in score["strata"].values() for group in groups.values()]
    assert score["worst"]["mean"]["value"] == min(everything)
    assert score["cvar"]["0.25"]["value"] == pytest.approx(np.sort(correct / 4)[:2].mean())
    assert score["clipped"] == np.mean([not r["finished"] for r in rows])
    assert score["tokens_per_response"] == np.mean([r["tokens"] for r in rows])
    text = (place / "table.txt").read_text()
    assert "math500 by level" in text and "Level 2" in text and (place / "scores.png").stat().st_size > 5000


@pytest.mark.slow
def test_an_interrupt_costs_only_what_is_not_graded(evaluated, tmp_path, monkeypatch, capsys):
    """Stopped within a batch, then killed within a line: what was graded is kept, and not a token of it drawn anew."""
    place, asked, texts = evaluated
    decoded = []

    def counted(rollouts, tokenizer, stop_tokens):
        decoded.extend(texts(rollouts, tokenizer, stop_tokens))
        return decoded[-len(rollouts.tokens) :]

    monkeypatch.setattr(eval_commands.run, "texts", counted)
    monkeypatch.setattr(cli, "_Stop", lambda _: lambda: len(decoded) > 12)
    whole, file = read(place / "one"), tmp_path / "math500.responses.jsonl"
    look_often = (*asked, "--sampling.segment=1", "--sampling.slots=4", "--out", tmp_path)
    assert invoke("eval", "embedded", *look_often) == 75
    kept = read(tmp_path)
    assert 12 < len(kept) == len(decoded) < 24 and all(row in whole for row in kept)
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]) + '{"problem": 5, "ra')
    monkeypatch.setattr(cli, "_Stop", lambda _: lambda: False)
    assert invoke("eval", "embedded", *look_often) == 0
    assert len(decoded) == len(kept) + 32 - (len(kept) - 1) + 8  # and GPQA's
    assert read(tmp_path) == whole
    assert (tmp_path / "summary.json").read_text() == (place / "one" / "summary.json").read_text()
    capsys.readouterr()
    assert invoke("eval", "embedded", *asked, "--out", tmp_path, "--eval.top_k=3", "--eval.temperature=0.5") == 2
    assert "was begun with another temperature, top_k (temperature: 1.0, now 0.5)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_kill_costs_only_what_is_not_graded(folder, tmp_path):
    """As an interrupt within a batch, by SIGKILL and whenever it comes."""
    asked = ("--benchmarks", "math500", "--benchmark-folder", folder, *SETTINGS, "--eval.samples=64")
    slowly = [*map(str, asked), "--sampling.segment=1", "--sampling.slots=4", "--out", str(tmp_path / "killed")]
    file = tmp_path / "killed" / "math500.responses.jsonl"
    command = [sys.executable, "-c", "from gdro_jax import cli; cli.main()", "eval", "embedded", *slowly]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (file.is_file() and file.stat().st_size > 4000):
            time.sleep(0.01)
        process.kill()
    kept = file.read_bytes().count(b"\n")
    assert process.returncode == -signal.SIGKILL and 0 < kept < 512
    assert invoke("eval", "embedded", *slowly) == 0
    assert invoke("eval", "embedded", *asked, "--out", tmp_path / "whole") == 0
    assert read(tmp_path / "killed") == read(tmp_path / "whole")


def test_an_evaluation_that_could_not_be_graded_is_none_the_second_time_either(folder, tmp_path, monkeypatch, capsys):
    def responses(sampler, asked, *_, kept, as_they_finish):
        yield [Graded(p.id, n, "", 0.0, n > 0, True, 1, "no mood") for p in asked.problems for n in range(4)], 32

    monkeypatch.setattr(eval_commands.run, "responses", responses)
    asked = ("--benchmarks", "math500", "--benchmark-folder", folder, *SETTINGS, "--out", tmp_path)
    for _ in range(2):
        assert invoke("eval", "embedded", *asked) == 1
        assert "math500: 25% of the responses could not be graded" in capsys.readouterr().err
    assert len(read(tmp_path)) == 32
    assert invoke("eval", "embedded", *asked, "--data.max_unscorable=0.25") == 0


def test_responses_can_be_graded_again(evaluated, tmp_path, capsys):
    for file in (evaluated[0] / "one").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rows = read(tmp_path)
    for row in rows[:4]:
        row["score"] = 1.0 - row["score"]
    store.write_rows(tmp_path / "math500.responses.jsonl", rows)
    assert invoke("regrade", tmp_path, "--data.verifier_timeout=60") == 0
    assert "math500: 4 of 32 grades changed" in capsys.readouterr().err
    assert read(tmp_path) == read(evaluated[0] / "one")
    assert (tmp_path / "summary.json").read_text() == (evaluated[0] / "one" / "summary.json").read_text()


def test_compare_evals(evaluated, tmp_path, capsys):
    one, two = evaluated[0] / "one", evaluated[0] / "two"
    assert invoke("compare-evals", one, two, "--out", tmp_path / "made" / "found.json") == 0
    found = json.loads((tmp_path / "made" / "found.json").read_text())["against_it"][str(two)]["math500"]
    rates = [
        np.bincount([r["problem"] for r in read(x)], weights=[r["score"] for r in read(x)]) / 4 for x in (one, two)
    ]
    want = metrics.paired_difference(rates[1], rates[0])
    assert found["mean"]["difference"] == pytest.approx(want.mean)
    assert (found["mean"]["low"], found["mean"]["high"]) == (want.low, want.high)
    assert set(found) == {"mean", "pass@2", "pass@4", "maj"} and found["pass@4"]["prompts"] == 8
    assert f"against {one}" in capsys.readouterr().out
    assert invoke("compare-evals", one, two, "--out", tmp_path) == 2
    assert "not a file that can be written" in capsys.readouterr().err


@pytest.fixture
def unsampled(monkeypatch):
    """Every response is wrong, and none is sampled."""

    def sample(name, asked, policy, verifier, config, place, stop):
        samples = range(config.eval.samples)
        rows = [Graded(p.id, rank, "x", 0.0, True, True, 1) for p in asked.prompts.problems for rank in samples]
        if place is not None:
            store.write_rows(place / f"{name}.responses.jsonl", [row._asdict() for row in rows])
        return rows

    monkeypatch.setattr(eval_commands, "_sample", sample)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--eval.min_p=0.1", "--eval.min_new_tokens=2"], "min_new_tokens, min_p"),
        (["--sampling.cache_dtype=int8", "--model.dtype=bfloat16"], "cache_dtype, dtype"),
    ],
)
def test_whatever_changes_what_is_drawn_is_kept_and_compared(options, named, folder, unsampled, tmp_path, capsys):
    asked = ("--benchmarks", "math500", "--benchmark-folder", folder, *SETTINGS)
    assert invoke("eval", "embedded", *asked, "--out", tmp_path / "first") == 0
    begun = json.loads((tmp_path / "first" / "settings.json").read_text())
    assert begun["stop_tokens"] and len(begun["tokenizer"]) == 16 and not {"slots", "segment"} & set(begun)
    assert invoke("eval", "embedded", *asked, "--sampling.segment=3", "--out", tmp_path / "first") == 0
    capsys.readouterr()
    assert invoke("eval", "embedded", *asked, *options, "--out", tmp_path / "first") == 2
    assert f"was begun with another {named}" in capsys.readouterr().err
    assert invoke("eval", "embedded", *asked, *options, "--out", tmp_path / "second") == 0
    assert invoke("compare-evals", tmp_path / "first", tmp_path / "second") == 2
    assert f"its {named} differ from those of" in capsys.readouterr().err


def test_gold_answers_are_checked_before_anything_is_sampled_and_what_is_not_kept_is_said(unsampled, tmp_path, capsys):
    rows = [{"problem": f"{n}+{n}=", "answer": "\\frac{1}{" if n == 1 else str(2 * n)} for n in range(3)]
    (tmp_path / "math500.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("--benchmarks", "math500", "--benchmark-folder", tmp_path, *SETTINGS)
    assert invoke("eval", "embedded", *asked) == 0
    said = capsys.readouterr().err
    assert "math500, line 2: its answer cannot be graded, the gold answer does not parse; dropped" in said
    assert "nothing is kept; --out FOLDER keeps" in said


@pytest.mark.parametrize("name", ["data.verifier", "data.gold_check", "data.template", "data.answer_column", "eval.k"])
def test_what_does_nothing_with_benchmarks_is_refused(name, folder, capsys):
    asked = ("--benchmarks", "math500", "--benchmark-folder", folder)
    assert invoke("eval", "embedded", *asked, f"--{name}=2" if name == "eval.k" else f"--{name}=math") == 2
    assert f"--{name} does nothing in gdro eval --benchmarks" in capsys.readouterr().err


def test_a_response_that_is_too_long_names_its_field_and_the_set(folder, capsys):
    asked = ("--benchmarks", "math500", "--benchmark-folder", folder)
    assert invoke("eval", "embedded", *asked, "--eval.max_new_tokens=100000") == 2
    assert "eval.max_new_tokens=100000: with math500's prompts of up to" in capsys.readouterr().err
    assert invoke("eval", "embedded", *asked, "--sampling.max_new_tokens=100000") == 2
    assert "sampling.max_new_tokens=100000: with math500's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "named"),
    [({"samples": 8}, "samples"), ({"temperature": 0.6}, "temperature"), ({"sets": {}}, "sets.gpqa, sets.math500")],
)
def test_unlike_settings_are_not_compared(change, named, evaluated, tmp_path, capsys):
    for file in (evaluated[0] / "two").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "settings.json").read_text()) | change
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    if "samples" in change:  # complete under the other setting
        for name in ("math500", "gpqa"):
            rows = read(tmp_path, name)
            more = [row | {"rank": row["rank"] + 4} for row in rows]
            store.write_rows(tmp_path / f"{name}.responses.jsonl", rows + more)
    assert invoke("compare-evals", evaluated[0] / "one", tmp_path) == 2
    assert f"its {named} differ from those of" in capsys.readouterr().err


def test_nothing_of_a_private_benchmark_is_written_or_printed(evaluated, capsys):
    place = evaluated[0] / "one"
    for file in place.glob("*"):
        if file.suffix in (".json", ".txt") or file.name == "gpqa.problems.jsonl":
            assert "99999" not in file.read_text(), file.name
    assert [p.prompt for p in store.read(place).problems["gpqa"]] == ["", ""]
    assert len(read(place, "gpqa")) == 8


def test_an_evaluation_that_is_not_complete_says_so(evaluated, tmp_path, capsys):
    for file in (evaluated[0] / "two").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    store.write_rows(tmp_path / "math500.responses.jsonl", read(tmp_path)[:-1])
    assert invoke("compare-evals", evaluated[0] / "one", tmp_path) == 2
    assert "math500 holds 31 of 32 responses, in 31 lines; give the same gdro eval" in capsys.readouterr().err


def test_a_response_twice_is_not_another_one(tmp_path):
    problems = [Problem(n, "", "1", "") for n in range(2)]
    store.begin(tmp_path, {"samples": 2, "sets": {"a": {}}}, {"a": (problems, False)})
    rows = [Graded(p.id, rank, "1", 1.0, True, True) for p in problems for rank in range(2)]
    store.replace(tmp_path, "a", rows)
    assert store.read(tmp_path).responses == {"a": rows}
    for more, said in (([rows[0]], "4 of 4 responses, in 5 lines"), ([], "3 of 4 responses, in 4 lines")):
        store.replace(tmp_path, "a", rows + more if more else [*rows[:3], rows[0]])
        with pytest.raises(store.StoreError, match=said):
            store.read(tmp_path)
