"""The trained policy out of a run, as a Hugging Face folder: what transformers opens."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator

import jax
import numpy as np

from gdro_jax.models import hf, lora, qwen3
from gdro_jax.models.checkpoint import no_folder, read_config
from gdro_jax.training import config_io, processes, setup
from gdro_jax.training.checkpoint import saved_counters, saved_part
from gdro_jax.training.config import ModelConfig

_PREFIX = ".learner.model."


def export(source: str, out: str, *, dtype: str | None = None, max_file_bytes: int = 5_000_000_000) -> pathlib.Path:
    """Writes the policy of a run, of one of its checkpoints, or of a Hugging Face folder to the folder `out`.

    Nothing but the policy is read: neither the optimiser's state nor the data of the run need be there. It is read,
    cast and written parameter by parameter, on the host; of adapters' sums one at a time is made on a device.

    Args:
      source: a run's folder (its newest checkpoint is taken), `RUN/checkpoints/STEP`, a Hugging Face folder or
        name, or `embedded`.
      out: the folder to make, with weights, config.json, tokenizer and generation_config.json; whole or not at all.
      dtype: of the tensors; None for the run's `model.dtype`, and for that of the files of a Hugging Face folder.
        The run's parameters, or the float32 sum of its base and adapters, are rounded to this alone.
      max_file_bytes: above it the weights are split over several files with an index.

    Raises:
      InputError, ConfigError, CheckpointError, DataError: a source that holds no policy, an `out` that cannot be
        written or holds something else, before any parameter is read; a parameter that is not finite in `dtype`.
    """
    place, target, config = pathlib.Path(source), pathlib.Path(out), None
    run, step = (place.parent.parent, place.name) if place.parent.name == "checkpoints" else (place, None)
    if (run / "config.yaml").is_file():
        config = config_io.load(run / "config.yaml").model
        tokens_at, made_from = _folders(config)
    else:
        made_from = tokens_at = setup.model_folder(source, weights=False)
        if not made_from.is_dir():
            raise setup.InputError(
                f"{source}: {no_folder(made_from)}; expected a run, one of its checkpoints, or a model"
            )
        if not (made_from / "config.json").is_file():
            raise setup.InputError(f"{source}: holds neither config.yaml, as a run does, nor config.json, as a model")
    architecture = read_config(made_from)
    hf.check_target(target, tokens_at, made_from)
    _, stops = setup.tokens_of(made_from, tokens_at, architecture.vocab_size)  # what would not open is not passed on
    if config is not None:
        dtype = config.dtype if dtype is None else dtype
        params = _of_run(_checkpoint(run, step), config, architecture, dtype)
    else:
        made_from = setup.model_folder(source)  # no sooner: a Hub name's weights are downloaded here
        hf.check(made_from)
        dtype = hf.stored_dtype(made_from) if dtype is None else dtype
        params = hf.read_params(made_from, dtype)
    setup.claim_folder(str(target.resolve().parent), "OUT's parent")
    hf.write(
        architecture, dtype, hf.refuse_not_finite(architecture, params), target,
        tokenizer_from=tokens_at, generation_from=made_from, stops=stops, max_file_bytes=max_file_bytes,
    )  # fmt: skip
    return target


def save_policy(model: qwen3.Qwen3, out: str | pathlib.Path, config: ModelConfig, stops: tuple[int, ...]) -> None:
    """Writes the model in its compute dtype, with its tokenizer and the ids that end a text.

    In a job of several processes all call it, and all end if process 0 cannot write.

    Raises:
      CheckpointError: the folder holds something else, or there is no tokenizer.
    """
    tokens_at, made_from = _folders(config)
    whole = qwen3.working(model)
    processes.together(lambda: hf.save(whole, out, tokenizer_from=tokens_at, generation_from=made_from, stops=stops))


def _folders(config: ModelConfig) -> tuple[pathlib.Path, pathlib.Path]:
    """Of the tokenizer, and of the model that was begun with."""
    return setup.tokenizer_folder(config), setup.model_folder(config.path, weights=False)


def _checkpoint(run: pathlib.Path, step: str | None) -> pathlib.Path:
    saved = sorted(int(p.name) for p in (run / "checkpoints").glob("*") if re.fullmatch(r"\d+", p.name))
    if not saved:
        raise setup.InputError(f"{run}: holds no checkpoint yet; expected one in {run / 'checkpoints'}")
    if step is not None and step not in map(str, saved):
        raise setup.InputError(f"{run}: no checkpoint {step}; there are {', '.join(map(str, saved))}")
    return run / "checkpoints" / (str(saved[-1]) if step is None else step)


def _of_run(
    checkpoint: pathlib.Path, config: ModelConfig, architecture: qwen3.Qwen3Config, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """The policy's parameters in `dtype`, one on the host at a time; what the run lacks is said before the first."""
    specs = qwen3.param_specs(architecture)
    if config.lora_rank is None:
        shapes = {f"{_PREFIX}{name}.value": qwen3.stored_shape(architecture, spec) for name, spec in specs.items()}
        held = saved_part(checkpoint, shapes)
        return ((name, _cast(held(path), dtype)) for name, path in zip(specs, shapes, strict=True))
    like = jax.eval_shape(lambda: setup.adapters(config, architecture, jax.random.key(0)))
    shapes = {f"{_PREFIX}arrays[{name!r}]": array.shape for name, array in like.arrays.items()}
    held = saved_part(checkpoint, shapes)
    base = _base(config)
    if saved_counters(checkpoint).get("reference") not in (None, setup.weights_of(config)):
        raise setup.InputError(f"{config.path}: are not the weights that the run began with, which its adapters lie on")
    return _merged(
        base, dataclasses.replace(like, arrays=dict(zip(like.arrays, map(held, shapes), strict=True))), dtype
    )


def _base(config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """What adapters lie on, as the run holds it."""
    if config.random_init is None:
        folder = setup.model_folder(config.path)
        hf.check(folder)
        return hf.read_params(folder, config.dtype)
    made = setup.load_policy(dataclasses.replace(config, attention="xla")).model
    return ((name, np.asarray(array)) for name, array in made.arrays().items())


def _merged(
    base: Iterator[tuple[str, np.ndarray]], adapters: lora.Adapters, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    low = adapters.scaled()
    for name, w in base:
        if f"{name}_a" in low:
            yield name, np.asarray(lora.merged(w, low[f"{name}_a"], low[f"{name}_b"], dtype))
        else:
            yield name, _cast(w, dtype)


def _cast(array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # infinite then, which is refused
        return array.astype(dtype)
