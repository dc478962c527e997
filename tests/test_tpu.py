"""The TPU scripts: what they print, what they refuse, and what the shell they send does on two pretended hosts."""

import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time
import types

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
SLICE = ("--name", "my-slice", "--zone", "us-west4-a")
FAKE_GCLOUD = r"""#!/bin/sh
# Runs --command=... with sh, once for each of two hosts, as `gcloud ... ssh --worker=all` would over ssh.
for word in "$@"; do case "$word" in --command=*) script="${word#--command=}";; esac; done
for host in 0 1; do
  (cd / && env HOME="$HOSTS/$host" TPU_WORKER_ID=$host sh -c "$script") || code=$?
done
exit ${code-0}
"""


def _load(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tpu" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


launch, host = _load("launch"), _load("host")


def _refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        launch.main(words)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("step", ["setup", "train", "status", "stop"])
def test_dry_run_prints_the_command_and_runs_nothing(
    step: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("ran something"))
    more = ["--repo", "https://example.org/r.git"] if step == "setup" else []
    assert launch.main([step, *SLICE, "--project", "p-1", *more, "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "my-slice"]
    assert words[6:9] == ["--zone=us-west4-a", "--project=p-1", "--worker=all"]
    assert len(words) == 10
    script = words[9].removeprefix("--command=")
    assert subprocess.Popen(["sh", "-n", "-c", script]).wait() == 0  # the shell can parse it


def test_setup_checks_out_and_installs_at_the_locked_versions(capsys: pytest.CaptureFixture[str]) -> None:
    launch.main(
        ["setup", *SLICE, "--repo", "git@example.org:o/r.git", "--ref", "v1", "--python", "python3.12", "--dry-run"]
    )
    script = shlex.split(capsys.readouterr().out)[-1]
    assert "git fetch -q --tags git@example.org:o/r.git v1" in script
    assert "python3.12 -m venv .venv" in script
    assert "install -q -c requirements.lock -e '.[tpu]'" in script


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "required: STEP"),
        (["fly"], "invalid choice"),
        (["train", "--zone", "z"], "required: --name"),
        (["train", *SLICE, "--run.seed"], "--run.seed needs a value"),
        (["train", *SLICE, "--steps", "3"], "unknown argument '--steps'"),
        (["train", *SLICE, "--run.seed;reboot", "3"], "unknown argument"),
        (["status", *SLICE, "--run.seed", "3"], "unknown argument '--run.seed'"),
        (["setup", *SLICE], "required: --repo"),
        (["setup", *SLICE, "--repo", "x", "--folder", "../other"], "not a folder below"),
        (["stop", "--name", "a b", "--zone", "z"], "is not a name"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in _refused(words, capsys)


def test_an_address_with_a_password_is_refused_and_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    for address in ("https://me:hunter2@example.org/r.git", "https://hunter2@example.org/r.git"):
        assert "hunter2" not in _refused(["setup", *SLICE, "--repo", address, "--dry-run"], capsys)


def test_without_gcloud_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "gcloud is not installed here" in _refused(["status", *SLICE], capsys)


@pytest.fixture
def two_hosts(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Two home folders with a checkout whose Python only writes down what it is given, and waits to be stopped."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcloud").write_text(FAKE_GCLOUD)
    (tmp_path / "bin" / "gcloud").chmod(0o755)
    for number in "01":
        checkout = tmp_path / number / "gdro-jax"
        (checkout / ".venv" / "bin").mkdir(parents=True)
        (checkout / "tpu").mkdir()
        (checkout / "tpu" / "host.py").write_text(
            "import json, signal, sys, time\n"
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
            "print(json.dumps(sys.argv[1:]), flush=True)\n"
            "time.sleep(60)\n"
        )
        python = checkout / ".venv" / "bin" / "python"
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HOSTS", str(tmp_path))
    return tmp_path


def _until(text: str, times: int, capfd: pytest.CaptureFixture[str]) -> str:
    """Output of `status` once it says `text` so many times."""
    for _ in range(100):
        capfd.readouterr()
        launch.main(["status", *SLICE])
        out = capfd.readouterr().out
        if out.count(text) == times:
            return out
        time.sleep(0.1)
    pytest.fail(f"never said {text!r}: {out}")


def test_a_run_is_started_seen_and_stopped_on_every_host(
    two_hosts: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    odd = "a 'b' \"c\" $HOME; exit 1"
    train = ["train", *SLICE, "--each-host-seed", "--config", "my runs/c.yaml", "--run.output", odd, "--run.steps=3"]
    assert launch.main(train) == 0
    assert _until("--run.steps=3", 2, capfd).count(": running") == 2
    words = yaml.safe_load((two_hosts / "1" / "gdro-jax" / "tpu-run.log").read_text())
    assert words == ["--each-host-seed", "--config", "my runs/c.yaml", f"--run.output={odd}", "--run.steps=3"]
    assert launch.main(train) == 2  # one at a time
    assert "going on already" in capfd.readouterr().err
    assert launch.main(["stop", *SLICE]) == 0
    _until("ended with code 75", 2, capfd)
    assert launch.main(["stop", *SLICE]) == 0
    assert capfd.readouterr().out.count("no run is going on") == 2


def test_each_host_takes_its_own_seed_and_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr("gdro_jax.cli.main", lambda words: given.append(words) or 0)
    monkeypatch.setattr(os, "environ", dict(os.environ, TPU_WORKER_ID="3"))
    assert host.main(["--each-host-seed", "--run.seed=10", "--run.output=runs/a"]) == 0
    assert given[0][-2:] == ["--run.seed=13", "--run.output=runs/a-seed13"]
    assert os.environ["TPU_PROCESS_BOUNDS"] == "1,1,1"


def test_a_bad_field_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ, TPU_WORKER_ID="0"))
    assert host.main(["--each-host-seed", "--run.sede=1"]) == 2
    assert re.fullmatch(r"host.py: .*'sede' \(given 1\); did you mean 'seed'\?\n", capsys.readouterr().err)


def test_hosts_join_one_job_which_is_found_out_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr("gdro_jax.cli.main", lambda words: given.append(words) or 0)
    assert host.main(["--config", "c.yaml", "--run.seed=10"]) == 0
    assert host.main(["--coordinator", "h:1", "--num-processes", "2", "--process-id", "1", "--join-timeout", "9"]) == 0
    assert given == [
        ["train", "--config", "c.yaml", "--run.seed=10", "--coordinator=auto", "--join-timeout=300"],
        ["train", "--coordinator=h:1", "--join-timeout=9.0", "--num-processes=2", "--process-id=1"],
    ]


@pytest.mark.parametrize("flag", ["--coordinator=h:1", "--num-processes=2", "--join-timeout=9"])
def test_seeds_of_hosts_join_no_job(flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("gdro_jax.cli.main", lambda words: pytest.fail("trained"))
    assert host.main(["--each-host-seed", flag]) == 2
    name = flag.partition("=")[0]
    assert capsys.readouterr().err == f"host.py: {name}: does nothing with --each-host-seed, where no job is joined\n"
