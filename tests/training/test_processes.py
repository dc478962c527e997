"""Real jobs of two processes over gloo: the run of one process, and how they end together."""

import datetime
import errno
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from gdro_jax import cli, commands, rewards, sampling
from gdro_jax.models import hf
from gdro_jax.models.checkpoint import CheckpointError
from gdro_jax.training import InputError, export, guard, processes, run_folder, run_log, setup
from gdro_jax.training.config import ModelConfig

PATIENCE = 400.0  # seconds: a bound for a hung process on a busy machine, far from what it takes


def settings(tmp_path, tiny_folder, output, **more):
    fields = {
        "model.path": tiny_folder,
        "run.output": tmp_path / output,
        "run.steps": 3,
        "run.checkpoint_every": 1,
        "data.train": tmp_path / "twelve.jsonl",
        "data.verifier": "math",
        "data.template": "boxed",
        "train.prompts_per_step": 4,
        "train.learning_rate": 0.01,
        "train.warmup_steps": 0,
        "sampling.max_new_tokens": 3,
        "sampling.gap_tolerance": "null",
        "eval.data": "null",
        "mesh.fsdp": 2,
    }
    fields |= {name.replace("__", "."): value for name, value in more.items()}
    return [f"--{name}={value}" for name, value in fields.items()]


class Pair:
    """Two processes of one job, two devices each."""

    def __init__(self, words, second=(), command="train"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        program = [sys.executable, "-m", "gdro_jax.cli", command]
        self.running = [
            subprocess.Popen(
                [*program, *words, *(second if number else ()), f"--process-id={number}"],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(2)
        ]

    def until(self, true):
        deadline = time.monotonic() + PATIENCE
        while not true():
            if any(p.poll() is not None for p in self.running) or time.monotonic() > deadline:
                for process in self.running:
                    process.kill()
                pytest.fail("\n".join(process.communicate()[1] for process in self.running))
            time.sleep(0.1)

    def ended(self, timeout=PATIENCE):
        """Exit codes, lines of standard error and of standard output, without gloo's and the compiler's own."""
        try:
            said = [process.communicate(timeout=timeout) for process in self.running]
        finally:
            for process in self.running:
                process.kill()
        own = re.compile(r"\[Gloo\]|spmd_partitioner\.cc:.*Involuntary full rematerialization")
        printed, lines = (
            [[line for line in text.splitlines() if not own.search(line)] for text in texts]
            for texts in zip(*said, strict=True)
        )
        return [process.returncode for process in self.running], lines, printed


@pytest.fixture
def problems(tmp_path):
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i), "stratum": "xyz"[i % 3]} for i in range(12)]
    (tmp_path / "twelve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_that_differ_end_with_the_field_that_does(tmp_path, tiny_folder, problems):
    pair = Pair(settings(tmp_path, tiny_folder, "run"), second=["--train.learning_rate=0.02"])
    codes, lines, _ = pair.ended()
    assert codes == [2, 2]
    why = "train.learning_rate=0.02 in process 1 and 0.01 in process 0: all processes of a run must have the same"
    assert lines[0][-1] == lines[1][-1] == f"gdro train: {why}"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_are_one_and_go_on_after_a_signal_to_one(tmp_path, tiny_folder, problems):
    """One process on one device; two with two each, of which one is told to stop after a step or two."""
    graded = {"data__verifier": "operator:le"}  # rewards that differ: of none, Adam makes steps out of rounding
    alone = settings(tmp_path, tiny_folder, "alone", mesh__fsdp=1, mesh__data=1, **graded)
    assert cli.main(["train", *alone]) == 0
    evenly = settings(tmp_path, tiny_folder, "both", run__steps=100_000, **graded)
    pair = Pair(evenly)
    metrics = tmp_path / "both" / "metrics.jsonl"
    pair.until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 1)
    pair.running[1].send_signal(signal.SIGTERM)
    codes, lines, _ = pair.ended()
    assert codes == [75, 75], lines
    done = len(logged(tmp_path / "both"))
    codes, lines, out = Pair(settings(tmp_path, tiny_folder, "both", run__steps=done + 1, **graded)).ended()
    assert codes == [0, 0], lines
    assert out == [[str(tmp_path / "both" / "report.html")], []]
    got, want = logged(tmp_path / "both"), logged(tmp_path / "alone")
    assert [line["step"] for line in got] == list(range(1, done + 2))
    for a, b in zip(got, want, strict=False):
        for name in ("loss", "grad_norm", "reward", "response_length"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6)
        assert a["ledger"]["tokens"] == b["ledger"]["tokens"] and a["ledger"]["scored"] == b["ledger"]["scored"]
    saved = hf.load(tmp_path / "both" / "model")
    assert all(np.isfinite(np.asarray(x)).all() for x in saved.arrays().values())


@pytest.mark.slow
def test_a_fault_of_all_is_one_line_of_each_and_a_checkpoint(tmp_path, tiny_folder, problems, monkeypatch):
    (tmp_path / "moody.py").write_text("def grade(response, answer):\n    return None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    codes, lines, _ = Pair(settings(tmp_path, tiny_folder, "run", data__verifier="moody:grade")).ended()
    assert codes == [1, 1], lines
    assert lines[0][-1] == lines[1][-1] and lines[1][-1].startswith("gdro train: step 1: 100% of the responses could")
    assert len(lines[1]) == 1
    assert [place.name for place in (tmp_path / "run" / "checkpoints").iterdir()] == ["0"]


@pytest.mark.slow
def test_two_processes_do_all_that_one_does_and_one_goes_on_with_it(tmp_path, tiny_folder, problems):
    """Gate, evaluation, parameters cut over both processes, rows packed by length; one process makes the last step."""
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "stratum": "ab"[i % 2]} for i in range(2)]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"sampling.gap_tolerance": 0.05, "eval.data": tmp_path / "heldout.jsonl", "eval.samples": 2, "eval.k": 2}
    more |= {"train.attention_tile": 2, "controller.mean_rollouts": 2, "run.steps": 2, "data.template": "plain"}
    one = {"mesh.fsdp": 1, "mesh.data": 1}
    assert cli.main(["train", *settings(tmp_path, tiny_folder, "alone", **more, **one)]) == 0
    together = settings(tmp_path, tiny_folder, "both", **more | {"mesh.fsdp": 4, "run.steps": 1})
    codes, lines, _ = Pair(together).ended()
    assert codes == [0, 0], lines
    assert cli.main(["train", *settings(tmp_path, tiny_folder, "both", **more, **one)]) == 0
    got, want = logged(tmp_path / "both"), logged(tmp_path / "alone")
    assert [line["step"] for line in got] == [0, 1, 2]
    for a, b in zip(got, want, strict=True):
        for name in ("loss", "grad_norm", "reward", "response_length", "logprob_gap") if a["step"] else ():
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-5), (a["step"], name)
        for name in ("rollouts", "tokens", "scored", "prompts"):
            assert a["ledger"][name] == b["ledger"][name]
        assert a["step"] == 1 or a["eval"] == b["eval"]
    saved, alone = (hf.load(tmp_path / run / "model").arrays() for run in ("both", "alone"))
    for name, array in alone.items():
        np.testing.assert_allclose(saved[name], array, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_processes_compare_as_one_does(tmp_path, tiny_folder, problems):
    words = [word for word in settings(tmp_path, tiny_folder, "", run__steps=1) if not word.startswith("--run.output")]
    words += ["--compare.methods={uniform: , joint: }", "--compare.seeds=[1]"]
    alone = ["--mesh.fsdp=1", "--mesh.data=1", f"--compare.output={tmp_path / 'alone'}"]
    assert cli.main(["compare", *words, *alone]) == 0
    codes, lines, out = Pair([*words, f"--compare.output={tmp_path / 'both'}"], command="compare").ended()
    assert codes == [0, 0], lines
    assert out[0][-1] == str(tmp_path / "both" / "report.html") and out[1] == []
    for label in ("uniform-seed1", "joint-seed1"):
        (got,), (want,) = (logged(tmp_path / folder / label) for folder in ("both", "alone"))
        for name in ("loss", "grad_norm", "reward", "response_length"):
            assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other_within_a_minute(tmp_path, tiny_folder, problems):
    pair = Pair(settings(tmp_path, tiny_folder, "run", run__steps=100_000))
    metrics = tmp_path / "run" / "metrics.jsonl"
    pair.until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 1)
    pair.running[1].kill()
    killed = time.monotonic()
    pair.running[0].wait(timeout=60)
    assert time.monotonic() - killed < 60
    codes, lines, _ = pair.ended()
    assert codes[0] not in (0, 2, 75)
    said = "\n".join(lines[0])
    assert "the loss of a process that has ended" in said or "another task died" in said


def test_the_job_is_named_by_flags_or_environment():
    there = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert processes.job(None, None, None, {}) is None
    assert processes.job(None, None, None, there) == ("h:1", 4, 3)
    assert processes.job("a:2", 2, 0, there) == ("a:2", 2, 0)
    assert processes.job("auto", None, None, {}) == (None, None, None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--num-processes=2"], "need --coordinator HOST:PORT"),
        (["--coordinator=host"], "--coordinator='host': expected HOST:PORT"),
        (["--coordinator=h:1", "--num-processes=2"], "--process-id: needed with --coordinator"),
        (["--coordinator=h:1", "--num-processes=2", "--process-id=2"], "--process-id=2: must be in 0..1"),
        (["--join-timeout=5"], "--join-timeout: needs --coordinator"),
        (["--join-timeout=nan"], "--join-timeout=nan: must be above 0"),
    ],
)
def test_a_job_that_is_not_named_whole_is_one_line(words, says, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *words])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and says in error


@pytest.mark.parametrize(
    ("number", "why"),
    [(0, "process 1 of 2 did not come within 0.2 s"), (1, "process 0 was not found within 0.2 s (Connection refused)")],
)
def test_a_process_that_never_comes_is_one_line(number, why, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    job = [f"--coordinator={address}", "--num-processes=2", f"--process-id={number}", "--join-timeout=0.2"]
    assert cli.main(["train", *job]) == 2
    assert capsys.readouterr().err == f"gdro train: --coordinator={address}: {why}\n"


def test_without_others_nothing_is_asked_of_them():
    assert processes.gathered({"a": 1}) == [{"a": 1}] and processes.on_first(pathlib.Path) == pathlib.Path()
    stop = lambda: True  # noqa: E731
    assert processes.agreed(stop) is stop
    processes.agree({"a": 1})
    with pytest.raises(ValueError, match="mine"):
        processes.together(lambda: int("mine"))


class Two:
    """Two pretended processes: what process 1 passes to `gathered` is what `other` makes of process 0's."""

    def __init__(self, monkeypatch, number=0, other=lambda value: value):
        monkeypatch.setattr(processes, "count", lambda: 2)
        monkeypatch.setattr(processes, "number", lambda: number)
        monkeypatch.setattr(processes, "gathered", lambda value: [value, other(value)][:: -1 if number else 1])


def changed_file(folder, name, change):
    file = folder / name
    file.write_bytes(change(file.read_bytes()))


INPUTS = {
    "data.train": lambda at: changed_file(at, "twelve.jsonl", lambda text: text.replace(b'"4"', b'"5"')),
    "eval.data": lambda at: changed_file(at, "heldout.jsonl", lambda text: text.replace(b'"4"', b'"5"')),
    "rms_norm_eps of": lambda at: changed_file(
        at / "model", "config.json", lambda text: text.replace(b"1e-06", b"1e-05")
    ),
    "weights of": lambda at: changed_file(
        at / "model", "model.safetensors", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])
    ),
    "stop tokens": lambda at: (at / "model" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}'),
    "tokenizer=": lambda at: changed_file(
        at / "model", "tokenizer.json", lambda text: text.replace(b'"!":', b'"!!!":')
    ),
}


@pytest.mark.parametrize("what", INPUTS)
def test_inputs_that_differ_between_processes_are_named(what, configure, tmp_path, tiny_folder, monkeypatch):
    """What decides a run's numbers and is no field of its configuration."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    config = configure(f"eval.data={tmp_path / 'heldout.jsonl'}", f"model.path={tmp_path / 'model'}")
    (tmp_path / "heldout.jsonl").write_bytes((tmp_path / "twelve.jsonl").read_bytes())
    here = setup.facts(config, setup.check(config))
    INPUTS[what](tmp_path)
    there = setup.facts(config, setup.check(config))
    Two(monkeypatch, other=lambda value: {name: repr(fact) for name, fact in there.items()})
    with pytest.raises(processes.JobError, match=f"{what}.* in process 1 and .* in process 0: all processes") as caught:
        processes.agree(here)
    assert "\n" not in str(caught.value)


def test_what_json_cannot_write_is_compared_too(monkeypatch):
    Two(monkeypatch)
    processes.agree({"data.chat": {"day": datetime.date(2026, 1, 1), datetime.date(2026, 1, 2): float("nan")}})


def test_versions_of_what_draws_tokenises_and_grades_are_compared():
    assert {f"version of {name}" for name in ("jax", "transformers", "tokenizers", "math-verify")} <= set(
        processes.versions()
    )


def test_a_folder_that_is_not_shared_is_refused_with_an_old_run_in_it_too(configure, tmp_path, monkeypatch):
    """Process 1 looks at a folder of its own, where the configuration of an earlier run lies."""
    config, there = configure(), configure(output="local")
    for one in (config, there):
        run_folder.claim(one).release()
    monkeypatch.setattr(run_folder, "PATIENCE", 0.0)
    Two(monkeypatch)
    run_folder.claim(config).release()  # process 0 sees what it wrote
    assert not (tmp_path / "run" / ".shared").exists()
    Two(monkeypatch, number=1, other=lambda value: None)
    with pytest.raises(
        InputError, match=r"run.output=.*local': what process 0 writes there is not seen within 0 s; all"
    ):
        run_folder.claim(there)


def test_a_stop_of_another_process_is_heard_within_a_segment(configure, launch, monkeypatch):
    trainer, heard = launch(configure("run.steps=1")), []
    segment = sampling.Progress(np.zeros(0, int), 5, 24, 40, 48)
    monkeypatch.setattr(trainer, "try_update", lambda: None)
    monkeypatch.setattr(trainer._sampler, "stream", lambda *args: iter([segment] * 3))
    Two(monkeypatch, other=lambda value: bool(heard) if value is False else value)
    assert trainer.run(lambda record: None, on_sampled=lambda step, progress: heard.append(progress)) is False
    assert heard == [segment]
    assert trainer.step == trainer.checkpoints.latest() == 0


def test_another_last_checkpoint_is_refused(configure, launch, monkeypatch):
    trainer = launch(configure())
    Two(monkeypatch, other=lambda value: {name: "7" for name in value})
    with pytest.raises(processes.JobError, match=r"the last checkpoint in run.output=.*=7 in process 1 and None in"):
        trainer._resume()


def test_a_model_that_could_not_be_written_is_found_before_anything_is_trained(configure, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds notes.txt, which is no checkpoint file; refusing to replace it"):
        run_folder.claim(configure("run.save_model=true"))
    run_folder.claim(configure()).release()


@pytest.mark.parametrize("number", [0, 1])
def test_a_model_that_process_0_cannot_write_ends_all(number, tmp_path, tiny_model, tiny_folder, monkeypatch):
    """Every process takes part in gathering it, and every one hears of it."""
    (tmp_path / "notes.txt").write_text("mine")
    Two(monkeypatch, number, other=lambda value: ["no checkpoint file", False] if number else None)
    monkeypatch.setattr(jax, "process_index", lambda: number)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    gathered, params = [], hf._gathered

    def counted(model):
        for name, array in params(model):
            gathered.append(name)
            yield name, array

    monkeypatch.setattr(hf, "_gathered", counted)
    with pytest.raises(CheckpointError if number == 0 else processes.JobError, match="no checkpoint file"):
        export.save_policy(tiny_model, tmp_path, ModelConfig(path=str(tiny_folder)), (1,))
    assert gathered == [name for name, _ in params(tiny_model)]


@pytest.mark.slow
def test_a_fault_that_all_find_leaves_a_checkpoint_and_one_line(configure, launch, monkeypatch):
    trainer = launch(configure("data.max_unscorable=0.1"), None)
    trainer.verifier = type(trainer.verifier)(unscorable=2)
    Two(monkeypatch)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("left without the others"))
    with pytest.raises(rewards.UnscorableError) as caught, processes.Membership(None, commands.ENDS_ALIKE):
        trainer.run(lambda record: None)
    assert isinstance(caught.value, commands.FAULTS)
    assert trainer.checkpoints.latest() == 0


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("what", ["log", "first prompt", "batch"])
def test_a_full_disk_of_process_0_ends_all_with_one_line(what, number, tmp_path, case, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "there")

    log = run_log.RunLog(tmp_path / "metrics.jsonl", None)
    if number:
        log._file = None
    said = ["[Errno 28] No space left on device: 'there'", True]
    Two(monkeypatch, number, other=lambda value: said if number else None)
    monkeypatch.setattr(np, "savez", full)
    monkeypatch.setattr(pathlib.Path, "write_text", full)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(processes.JobFault, match=r"^process 0: .* No space left on device: 'there'$") as caught:
        if what == "log":
            log.write({"step": 1})
        elif what == "batch":
            guard.keep(tmp_path, 1, case.batch)
        else:
            run_folder.keep_first_prompt(tmp_path, [1], "one", 0)
    assert isinstance(caught.value, commands.FAULTS) and isinstance(caught.value, commands.ENDS_ALIKE)
