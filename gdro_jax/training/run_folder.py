"""A run's folder: made, or found to hold this very run, before anything is written to it."""

import pathlib

from gdro_jax.training import config_io
from gdro_jax.training.config import Config
from gdro_jax.training.setup import InputError, claim_folder


def claim(config: Config, write: bool = True) -> None:
    """Makes the run's folder, or checks that the run in it is this one (its length and logging may differ).

    With `write=False` only looks.

    Raises:
      InputError: the folder holds something else, or cannot be written.
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
            if value != theirs[section][name] and (section not in ("run", "compare") or name == "seed")
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
    if write:
        claim_folder(str(folder), "run.output")
        config_io.save(config, file)
