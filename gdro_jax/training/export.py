"""The trained policy out of a run, as a Hugging Face folder: what transformers and vLLM open."""

import dataclasses
import pathlib
import re

import jax

from gdro_jax.data import prompts
from gdro_jax.models import hf, hub, qwen3
from gdro_jax.models.checkpoint import read_config
from gdro_jax.training import config_io, processes, setup
from gdro_jax.training.checkpoint import restore_part
from gdro_jax.training.config import Config

_PREFIX = ".learner.model."


def export(source: str, out: str, *, dtype: str | None = None, max_file_bytes: int = 5_000_000_000) -> pathlib.Path:
    """Writes the policy of a run, of one of its checkpoints, or of a Hugging Face folder to the folder `out`.

    Nothing but the policy is read: neither the optimiser's state nor the data of the run need be there.

    Args:
      source: a run's folder (its newest checkpoint is taken), `RUN/checkpoints/STEP`, a Hugging Face folder or name.
      out: the folder to make, with weights, config.json, tokenizer and generation_config.json; whole or not at all.
      dtype: of the tensors; None for the run's `model.dtype`, and for that of the files of a Hugging Face folder.
      max_file_bytes: above it the weights are split over several files with an index.

    Raises:
      InputError, ConfigError, CheckpointError: a source that holds no policy, an `out` that holds something else.
    """
    place, stops = pathlib.Path(source), None
    run, step = (place.parent.parent, place.name) if place.parent.name == "checkpoints" else (place, None)
    if (run / "config.yaml").is_file():
        config = config_io.load(run / "config.yaml")
        model = _of_run(run, step, config)
        tokens_at = setup.tokenizer_folder(config.model)
        tokenizer = setup.load_tokenizer(tokens_at)
        stops = prompts.stop_tokens(setup.model_folder(config.model.path, weights=False), tokenizer)
        dtype = config.model.dtype if dtype is None else dtype
    else:
        folder = hub.resolve(source)
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "no such folder"
            raise setup.InputError(f"{source}: {what}; expected a run, one of its checkpoints, or a model")
        if not (folder / "config.json").is_file():
            raise setup.InputError(f"{source}: holds neither config.yaml, as a run does, nor config.json, as a model")
        read_config(folder)
        if (folder / "tokenizer.json").is_file():
            setup.load_tokenizer(folder)  # what would not open is not passed on
        model = hf.load(folder, dtype=hf.stored_dtype(folder) if dtype is None else dtype)
        tokens_at = folder
    save_policy(qwen3.Qwen3(model.config, model.arrays(), dtype), out, tokens_at, stops, max_file_bytes)
    return pathlib.Path(out)


def save_policy(
    model: qwen3.Qwen3,
    out: str | pathlib.Path,
    tokens_at: pathlib.Path,
    stops: tuple[int, ...] | None,
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Writes the model in its compute dtype, with its tokenizer and, where `stops` are given, the ids that end a text.

    In a job of several processes all call it, and all end if process 0 cannot write.

    Raises:
      CheckpointError: the folder holds something else, or `tokens_at` no tokenizer.
    """
    generation = None if stops is None else {"eos_token_id": list(stops)}
    whole = qwen3.working(model)
    processes.together(
        lambda: hf.save(whole, out, tokenizer_from=tokens_at, generation=generation, max_file_bytes=max_file_bytes)
    )


def _of_run(run: pathlib.Path, step: str | None, config: Config) -> qwen3.Qwen3:
    saved = sorted(int(p.name) for p in (run / "checkpoints").glob("*") if re.fullmatch(r"\d+", p.name))
    if not saved:
        raise setup.InputError(f"{run}: holds no checkpoint yet; expected one in {run / 'checkpoints'}")
    if step is not None and step not in map(str, saved):
        raise setup.InputError(f"{run}: no checkpoint {step}; there are {', '.join(map(str, saved))}")
    folder = run / "checkpoints" / (str(saved[-1]) if step is None else step)
    if config.model.lora_rank is not None:
        base = setup.load_policy(dataclasses.replace(config.model, attention="xla")).model
        like = jax.eval_shape(lambda: setup.adapters(config.model, base.config, jax.random.key(0)))
        paths = {f"{_PREFIX}arrays[{name!r}]": name for name in like.arrays}
        factors = {paths[path]: array for path, array in restore_part(folder, list(paths)).items()}
        return qwen3.working(qwen3.adapted(base, dataclasses.replace(like, arrays=factors)))
    architecture = read_config(setup.model_folder(config.model.path, weights=False))
    wanted = {f"{_PREFIX}{name}.value": name for name in qwen3.param_specs(architecture)}
    arrays = restore_part(folder, list(wanted))
    return qwen3.Qwen3(architecture, {wanted[path]: array for path, array in arrays.items()})
