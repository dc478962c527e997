"""A real process that is told to stop: a checkpoint, exit code 75, and the same command goes on to the end."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

PATIENCE = 240.0  # seconds: a bound for a hung process, far from what it takes


@pytest.mark.slow
def test_sigterm_then_the_same_command(tmp_path, tiny_folder):
    metrics = tmp_path / "run" / "metrics.jsonl"

    def command(steps: int) -> list[str]:
        settings = {
            "model.path": tiny_folder,
            "run.output": tmp_path / "run",
            "run.steps": steps,
            "run.checkpoint_every": "null",
            "run.save_model": "false",
            "train.prompts_per_step": 4,
            "sampling.max_new_tokens": 2,
            "eval.data": "null",
            "mesh.data": 1,
        }
        return [sys.executable, "-m", "gdro_jax.cli", "train", *(f"--{k}={v}" for k, v in settings.items())]

    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | cache
    with subprocess.Popen(command(1_000_000), env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + PATIENCE
        while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 75
    assert "stopping, with a checkpoint" in errors and "Traceback" not in errors
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 2
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [str(len(steps))]

    done = subprocess.run(
        command(len(steps) + 1), env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(steps) + 2))
    assert lines[-1]["ledger"]["rollouts"] == 16 * (len(steps) + 1)
    assert (tmp_path / "run" / "report.html").is_file()
    assert done.stdout.strip() == str(tmp_path / "run" / "report.html")
