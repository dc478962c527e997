"""A run's folder: made, or found to hold this very run, before anything is written to it."""

import pathlib
from collections.abc import Sequence

import filelock

from gdro_jax.training import config_io, processes
from gdro_jax.training.config import Config
from gdro_jax.training.setup import InputError, claim_folder


def claim(config: Config) -> filelock.BaseFileLock | None:
    """Makes the run's folder, or checks that the run in it is this one, and keeps other runs out of it.

    Returns:
      The lock, held by process 0; it ends with the process if it is not released.

    Raises:
      InputError: the folder holds something else, is in use, cannot be written, or is not the same for all processes.
      processes.JobError: so it is for another process.
    """
    lock = processes.on_first(lambda: _locked(config))
    file = pathlib.Path(config.run.output) / "config.yaml"

    def seen() -> None:
        if not file.exists():
            raise InputError(
                f"run.output={config.run.output!r}: {file.name} that process 0 wrote is not there; "
                "all processes of a run need a folder that they share"
            )

    try:
        processes.together(seen)
    except ValueError:
        if lock is not None:
            lock.release()
        raise
    return lock


def _locked(config: Config) -> filelock.BaseFileLock:
    check(config)
    folder = claim_folder(config.run.output, "run.output")
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(f"run.output={config.run.output!r}: another process is training in it") from None
    config_io.save(config, folder / "config.yaml")
    return lock


def keep_first_prompt(folder: pathlib.Path, tokens: Sequence[int], text: str, dropped: int) -> None:
    """`first_prompt.txt`: how many tokens and which, how many prompts were dropped, and the text of those tokens."""
    if not processes.is_first():
        return
    ids = " ".join(map(str, tokens))
    (folder / "first_prompt.txt").write_text(
        f"{len(tokens)} tokens: {ids}\n{dropped} prompts dropped as too long\n\n{text}\n"
    )


MAY_DIFFER = (
    *("sampling.gap_tolerance", "sampling.server_timeout", "data.verifier_workers"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor"),
)
"""Fields that change what a run takes or refuses, not what it computes beyond rounding."""


def check(config: Config) -> None:
    """Refuses a folder that holds something else than the run of `config`.

    Its length and logging may differ, and `MAY_DIFFER`.

    Raises:
      InputError: what differs.
    """
    folder = pathlib.Path(config.run.output)
    file = folder / "config.yaml"
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
