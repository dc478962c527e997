"""A run's folder: made, or found to hold this very run, before anything is written to it."""

import pathlib
import secrets
import time
from collections.abc import Sequence

import filelock

from gdro_jax.models import hf
from gdro_jax.training import config_io, processes
from gdro_jax.training.config import Config
from gdro_jax.training.setup import InputError, claim_folder

MODEL = "model"  # the trained policy
PATIENCE = 10.0  # seconds until a file of process 0 is seen: a network file system keeps what it knew for some


def claim(config: Config) -> filelock.BaseFileLock | None:
    """Makes the run's folder, or checks that the run in it is this one, and keeps other runs out of it.

    Returns:
      The lock, held by process 0; it ends with the process if it is not released.

    Raises:
      InputError: the folder holds something else, is in use, cannot be written, or is not the same for all processes.
      processes.JobError: so it is for another process.
    """
    lock = processes.on_first(lambda: _locked(config))
    try:
        if processes.count() > 1:
            _check_shared(config.run.output)
    except ValueError:
        if lock is not None:
            lock.release()
        raise
    return lock


def _check_shared(output: str) -> None:
    """Refuses a folder where a process does not find what process 0 writes now; one of an earlier run tells nothing."""
    file = pathlib.Path(output) / ".shared"
    token = processes.gathered(secrets.token_hex(8))[0]

    def seen() -> None:
        deadline = time.monotonic() + PATIENCE
        while not (file.is_file() and file.read_text() == token):
            if time.monotonic() > deadline:
                raise InputError(
                    f"run.output={output!r}: what process 0 writes there is not seen within {PATIENCE:.0f} s; "
                    "all processes of a run need a folder that they share"
                )
            time.sleep(0.1)

    try:
        processes.on_first(lambda: file.write_text(token))
        processes.together(seen)
    finally:
        if processes.is_first():
            file.unlink(missing_ok=True)


def check_free(config: Config) -> None:
    """Refuses what `claim` would, before there is anything to train; the folder is made.

    Of several processes all call it.

    Raises:
      InputError, CheckpointError: as `claim`.
    """
    processes.on_first(lambda: _lock(config).release())


def _locked(config: Config) -> filelock.BaseFileLock:
    lock = _lock(config)
    config_io.save(config, pathlib.Path(config.run.output) / "config.yaml")
    return lock


def _lock(config: Config) -> filelock.BaseFileLock:
    check(config)
    folder = claim_folder(config.run.output, "run.output")
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(f"run.output={config.run.output!r}: another process is training in it") from None
    return lock


def keep_first_prompt(folder: pathlib.Path, tokens: Sequence[int], text: str, dropped: int) -> None:
    """`first_prompt.txt`: how many tokens and which, how many prompts were dropped, and the text of those tokens.

    Of several processes all call it; the errors of `processes.on_first`.
    """
    ids = " ".join(map(str, tokens))
    content = f"{len(tokens)} tokens: {ids}\n{dropped} prompts dropped as too long\n\n{text}\n"
    processes.on_first(lambda: (folder / "first_prompt.txt").write_text(content))


MAY_DIFFER = (
    *("sampling.gap_tolerance", "sampling.server_timeout", "data.verifier_workers"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor"),
    # What other devices may force.
    *("train.microbatches", "model.remat", "sampling.slots", "sampling.segment", "eval.problems_per_call"),
)
"""Fields that change what a run takes or refuses, not what it computes beyond rounding."""


def check(config: Config) -> None:
    """Refuses a folder that holds something else than the run of `config`.

    Its length and logging may differ, and `MAY_DIFFER`.

    Raises:
      InputError: what differs.
      CheckpointError: where the model is to be, there is something else.
    """
    folder = pathlib.Path(config.run.output)
    file = folder / "config.yaml"
    if config.run.save_model:
        hf.check_target(folder / MODEL)  # not only once all is trained
    checkpoints = folder / "checkpoints"
    if checkpoints.exists() and not checkpoints.is_dir():
        raise InputError(f"run.output={config.run.output!r}: {checkpoints} must be a folder, it is a file")
    for name in ("config.yaml", "metrics.jsonl", "first_prompt.txt", "report.html", ".lock"):
        if (folder / name).is_dir():
            raise InputError(f"run.output={config.run.output!r}: {folder / name} must be a file, it is a folder")
    if file.exists():
        found = config_io.load(file)
        mine, theirs = config_io.to_dict(config), config_io.to_dict(found)
        unlike = [
            f"{section}.{name}={theirs[section][name]!r}, now {value!r}"
            for section, fields in mine.items()
            for name, value in fields.items()
            if value != theirs[section][name]
            and (section not in ("run", "compare") or name == "seed")
            and f"{section}.{name}" not in MAY_DIFFER
        ]
        if unlike:
            raise InputError(
                f"run.output={config.run.output!r}: holds a run of another configuration ({'; '.join(unlike)}); "
                "choose another folder, or give the same settings to resume it"
            )
    elif any((folder / name).exists() for name in ("checkpoints", "metrics.jsonl")):
        raise InputError(
            f"run.output={config.run.output!r}: holds a run without its config.yaml; choose another folder"
        )
