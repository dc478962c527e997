"""Builds what a run works on from its configuration; every input problem is found here, before anything is trained."""

import dataclasses
import hashlib
import importlib.resources
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import jax
import transformers
from huggingface_hub.errors import StrictDataclassError

from gdro_jax import controllers
from gdro_jax.data import orders, prompts
from gdro_jax.models import attention, hf, hub, lora, qwen3
from gdro_jax.models.checkpoint import CheckpointError, digest, no_folder, read_config
from gdro_jax.training import inputs, mesh
from gdro_jax.training.config import Config, ControllerConfig, MeshConfig, ModelConfig


class InputError(ValueError):
    """Input that cannot be used; its text is one line that says what, where, which value and what is allowed."""


class Policy(NamedTuple):
    """A model with its tokenizer and the ids that end a response."""

    model: qwen3.Qwen3
    tokenizer: transformers.PreTrainedTokenizerBase
    stop_tokens: tuple[int, ...]


class Outline(NamedTuple):
    """All of a policy but its weights, found to fit together before any of them is read."""

    folder: pathlib.Path
    architecture: qwen3.Qwen3Config
    kernel: str
    tokenizer: transformers.PreTrainedTokenizerBase
    stop_tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run works on besides its policy; `heldout` is None without evaluation; `notes` say what was noticed."""

    train: prompts.Prompts
    heldout: prompts.Prompts | None
    rule: controllers.Rule
    order: orders.Order
    layout: mesh.Layout
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked(Parts):
    """A run's parts with all of the policy but its weights."""

    outline: Outline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup(Parts):
    """A run's parts with its policy."""

    policy: Policy


def model_folder(path: str, weights: bool = True) -> pathlib.Path:
    """The folder of a model; `embedded` is the base that ships with the package, a Hugging Face name is downloaded.

    Raises:
      CheckpointError: a name that cannot be had, or not of a dense Qwen3; one line.
    """
    if path == "embedded":
        return pathlib.Path(str(importlib.resources.files("gdro_jax") / "embedded" / "base"))
    return hub.resolve(path, weights)


def weights_of(config: ModelConfig) -> str:
    """Tells apart the weights that a run begins with; the errors of `model_folder`."""
    return digest(model_folder(config.path, weights=False), "", weights=config.random_init is None)


def tokenizer_folder(config: ModelConfig) -> pathlib.Path:
    """Where the tokenizer is: `model.tokenizer`, or the model's own folder; the errors of `model_folder`."""
    return model_folder(config.path if config.tokenizer is None else config.tokenizer, weights=False)


def load_tokenizer(folder: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a folder.

    Raises:
      InputError, CheckpointError: its files are malformed.
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            hf.read_object(folder / name)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except StrictDataclassError as error:  # of config.json, which it reads too
        raise InputError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"model.tokenizer: {folder}: cannot be opened ({error!r})") from error
    except Exception as error:
        if type(error) is not Exception:  # `tokenizers` raises these, plain, for a malformed tokenizer.json
            raise
        raise InputError(f"model.tokenizer: {folder / 'tokenizer.json'}: malformed ({error})") from error


def layout(config: Config, devices: Sequence[jax.Device] | None = None) -> mesh.Layout:
    """The configuration's mesh over the job's devices, or over those given.

    Raises:
      InputError: it does not fit the devices, or the step's rows do not divide over it.
    """
    if config.mesh == MeshConfig(data=1) and devices is None and jax.process_count() == 1:
        return mesh.ONE_DEVICE
    try:
        found = mesh.make(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    except ValueError as error:
        raise InputError(f"mesh: {error}") from None
    each = config.train.microbatches if config.train.attention_tile is None else 1
    pieces = config.train.minibatches * each * found.shards
    if config.rows_per_step % pieces:
        raise InputError(
            f"mesh: the step's {config.rows_per_step} rows must divide into {pieces} equal pieces, train.minibatches="
            f"{config.train.minibatches} x {each} microbatches x {found.shards} of mesh.data x mesh.fsdp; mesh.data=1 "
            "takes one device"
        )
    microbatches, rows = config.train.microbatches, config.rows_per_step // pieces
    if config.train.attention_tile is not None and rows < microbatches:
        raise InputError(
            f"train.microbatches={microbatches}: must be at most {rows}, the rows of a minibatch that each of the "
            f"mesh's {found.shards} shards gets, with train.attention_tile"
        )
    return found


def outline(config: ModelConfig) -> Outline:
    """Everything that can be wrong with a policy but its weights, found from its small files alone.

    Raises:
      InputError, CheckpointError, DataError: a missing folder or file, or one that does not fit.
    """
    folder = model_folder(config.path, weights=False)
    if not folder.is_dir():
        raise InputError(
            f"model.path={config.path!r}: {no_folder(folder)}; expected config.json and *.safetensors in it"
        )
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        raise InputError(
            f"model.path={config.path!r}: is a run, not a model; what it trained is in {folder / 'model'} once it is "
            "done, and `gdro export` writes it from a checkpoint"
        )
    cut = architecture(config)
    tokens_at = tokenizer_folder(config)
    if not (tokens_at / "tokenizer.json").is_file():
        raise InputError(f"model.tokenizer: {tokens_at} holds no tokenizer.json")
    kernel = attention_kernel(config, cut, jax.devices()[0])
    tokenizer, stops = tokens_of(folder, tokens_at, cut.vocab_size)
    if config.random_init is None:
        folder = model_folder(config.path)  # no sooner: a Hub name's weights are downloaded here
        hf.check(folder)
    return Outline(folder, cut, kernel, tokenizer, stops)


def tokens_of(
    folder: pathlib.Path, tokens_at: pathlib.Path, vocab: int
) -> tuple[transformers.PreTrainedTokenizerBase, tuple[int, ...]]:
    """The tokenizer, and the ids that end a text of the model in `folder`, whose vocabulary all are within.

    Raises:
      InputError, CheckpointError, DataError: a file is malformed, an id outside, or nothing ends a text.
    """
    tokenizer = load_tokenizer(tokens_at)
    if len(tokenizer) > vocab:
        raise InputError(f"model.tokenizer: {tokens_at} has {len(tokenizer)} tokens, the model's vocabulary is {vocab}")
    stops = prompts.stop_tokens(folder, tokenizer)
    if outside := [t for t in stops if t >= vocab]:
        raise InputError(f"model.path='{folder}': stop tokens {outside} are outside the vocabulary of {vocab}")
    return tokenizer, stops


def load_policy(config: ModelConfig, layout: mesh.Layout = mesh.ONE_DEVICE, seen: Outline | None = None) -> Policy:
    """Model, tokenizer and stop tokens; parameters are read straight to where the layout wants them.

    Args:
      seen: what `outline(config)` gave before; None checks it now.

    Raises:
      InputError, CheckpointError, DataError: a missing folder or file, or one that does not fit; before any parameter
        is placed.
    """
    seen = outline(config) if seen is None else seen
    held = config.param_dtype if config.lora_rank is None else config.dtype  # what is frozen need not be finer
    if config.random_init is None:
        model = hf.load(seen.folder, dtype=held, mesh=layout.mesh)
    else:
        key, cut = jax.random.key(config.random_init), seen.architecture
        model = layout.made(cut, lambda key: qwen3.init(cut, key, held), key)
    model = qwen3.Qwen3(model.config, model.arrays(), config.dtype, config.remat, seen.kernel)
    return Policy(model, seen.tokenizer, seen.stop_tokens)


def adapters(config: ModelConfig, architecture: qwen3.Qwen3Config, key: jax.Array) -> lora.Adapters:
    """The adapters that are trained, where `lora_rank` is given; they change nothing yet."""
    assert config.lora_rank is not None
    return lora.init(
        architecture,
        key,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        names=lora.targets(config.lora_targets),
        dtype=config.param_dtype,
    )


def check(config: Config, seen: Outline | None = None, data: inputs.Inputs | None = None) -> Checked:
    """Everything a run needs but the weights, so that no mistake is found after they are read.

    Args:
      config: the run's configuration.
      seen: what `outline(config.model)` gave before; None makes it.
      data: what `inputs.load(config)` gave before, to check it once for several runs; None loads it.

    Raises:
      InputError, DataError, CheckpointError: with one clear line.
    """
    where = layout(config)
    data = inputs.load(config) if data is None else data
    seen = outline(config.model) if seen is None else seen
    tokenizer, most = seen.tokenizer, most_prompt_tokens(config, seen.architecture, _response(config))
    train, notes = inputs.ready(data.train, config.data.template, tokenizer, config, most)
    notes = [*data.notes, *notes, inputs.first_prompt(train, tokenizer)]
    heldout = None
    if data.heldout is not None:
        heldout, more = inputs.ready(data.heldout, config.eval_template, tokenizer, config, most)
        notes += more
    if config.train.prompts_per_step > len(train.problems):
        raise InputError(
            f"train.prompts_per_step={config.train.prompts_per_step}: only {len(train.problems)} problems are usable"
        )
    shares = [1.0] if config.data.mixture is None else [float(str(s)) for s in config.data.mixture.values()]
    parts = [[p.id for p in train.problems if p.part == part] for part in range(len(shares))]
    order = orders.make(config.data.loader, config.run.seed, parts, shares, config.train.prompts_per_step)
    if config.data.mixture is not None:
        counts = orders.split(config.train.prompts_per_step, shares, [len(part) for part in parts])
        of_each = ", ".join(f"{n} of {name}" for n, name in zip(counts, config.data.mixture, strict=True))
        notes.append(f"each step's {config.train.prompts_per_step} prompts: {of_each}")
    try:
        rule = controllers.make(
            config.controller.name,
            num_prompts=len(train.problems),
            prompts_per_step=config.train.prompts_per_step,
            mean_rollouts=config.controller.mean_rollouts,
            **{k: tuple(v) if isinstance(v, list) else v for k, v in config.controller.settings.items()},
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"controller: {error}") from None
    longest = max(p.longest for p in (train, heldout) if p is not None)
    check_length(seen.architecture, longest, _response(config), config)
    return Checked(outline=seen, train=train, heldout=heldout, rule=rule, order=order, layout=where, notes=tuple(notes))


def facts(config: Config, checked: Checked) -> dict[str, object]:
    """What decides the numbers of a run and is not in its configuration, to compare between processes."""
    model, seen = config.model, checked.outline
    tokens = seen.tokenizer.backend_tokenizer.to_str()
    heldout = None if checked.heldout is None else checked.heldout.fingerprint
    return {
        f"problems of data.train={config.data.train}": checked.train.fingerprint,
        f"problems of eval.data={config.eval.data}": heldout,
        **{f"{name} of model.path={model.path}": value for name, value in seen.architecture.to_hf().items()},
        f"weights of model.path={model.path}": weights_of(model),
        "stop tokens": seen.stop_tokens,
        "tokens of the tokenizer": len(seen.tokenizer),
        "tokenizer": hashlib.sha256(tokens.encode()).hexdigest()[:16],
    }


def assemble(config: Config, policy: Policy | None = None, checked: Checked | None = None) -> Setup:
    """Checks and loads everything a run needs.

    Args:
      config: the run's configuration.
      policy: what `load_policy(config.model, layout(config))` gave before, to hold one copy for several runs;
        None loads it.
      checked: what `check(config)` gave before; None makes it.

    Raises:
      InputError, DataError, CheckpointError: with one clear line.
    """
    checked = check(config) if checked is None else checked
    policy = load_policy(config.model, checked.layout, checked.outline) if policy is None else policy
    return Setup(policy=policy, **{field.name: getattr(checked, field.name) for field in dataclasses.fields(Parts)})


def most_rollouts(config: ControllerConfig) -> int | None:
    """Rollouts that a prompt can get where all get the same, None where the rule allots them."""
    return None if "max_rollouts" in controllers.settings(config.name) else config.mean_rollouts


def architecture(config: ModelConfig) -> qwen3.Qwen3Config:
    """The model's, from its config.json alone; adapters that are asked for fit it.

    Raises:
      InputError, CheckpointError: a missing folder or file, or one that does not fit.
    """
    folder = model_folder(config.path, weights=False)
    try:
        found = read_config(folder)
    except CheckpointError as error:
        raise InputError(f"model.path={config.path!r}: {error}") from None
    if config.lora_rank is not None:
        try:
            lora.adapter_specs(found, config.lora_rank, lora.targets(config.lora_targets))
        except ValueError as error:
            raise InputError(f"model.{error}") from None
    return found


def _platform(device: jax.Device) -> str:
    """A device as `attention.choose` tells platforms apart: cuDNN's flash attention is for Ampere and later."""
    if device.platform not in ("gpu", "cuda"):
        return device.platform
    generation = str(getattr(device, "compute_capability", "")).partition(".")[0]  # "gfx..." on AMD
    return "gpu" if generation.isdecimal() and int(generation) >= 8 else "gpu without flash attention"


def attention_kernel(config: ModelConfig, model: qwen3.Qwen3Config, device: jax.Device) -> str:
    """The kernel of `model.attention` on a device.

    Raises:
      InputError: it cannot run there.
    """
    try:
        return attention.choose(config.attention, _platform(device), model.head_dim, config.dtype)
    except ValueError as error:
        raise InputError(f"model.{error}") from None


def longest_prompt(config: Config) -> int:
    """What `data.max_prompt_tokens` allows, without reading any prompt; where it is not given, tokens of the longest.

    Raises:
      InputError, DataError, CheckpointError: with one clear line; with the longest response they need more positions
        than the model has, too.
    """
    model, longest = architecture(config.model), config.data.max_prompt_tokens
    if longest is None:
        most = most_prompt_tokens(config, model, _response(config))
        tokenizer = load_tokenizer(tokenizer_folder(config.model))
        longest = inputs.ready(inputs.load(config).train, config.data.template, tokenizer, config, most)[0].longest
    check_length(model, longest, _response(config), config)
    return longest


def most_prompt_tokens(config: Config, model: qwen3.Qwen3Config, response: int) -> int | None:
    """Tokens above which a prompt is too long: `data.max_prompt_tokens`; without it, where such prompts are to be
    dropped, what the model's positions leave besides `response` tokens; else None."""
    if config.data.max_prompt_tokens is not None or config.data.overlong != "drop":
        return config.data.max_prompt_tokens
    if response >= model.positions:
        raise _no_room(response, 1, model.positions, config)
    return model.positions - response


def _response(config: Config) -> int:
    """Tokens of the longest response, in training or evaluation."""
    return max(config.sampling.max_new_tokens, config.eval.max_new_tokens or 0)


def check_length(model: qwen3.Qwen3Config, longest: int, response: int, config: Config, whose: str = "") -> None:
    """Prompts of up to `longest` tokens, or the limit there is, and `response` tokens must have a position each.

    Args:
      whose: the prompts, said in the error as `math500's `.

    Raises:
      InputError: they may need more than the model has.
    """
    longest = config.data.max_prompt_tokens or longest
    if longest + response > model.positions:
        raise _no_room(response, longest, model.positions, config, whose)


def _no_room(response: int, longest: int, positions: int, config: Config, whose: str = "") -> InputError:
    field = "eval" if config.eval.max_new_tokens == response else "sampling"
    return InputError(
        f"{field}.max_new_tokens={response}: with {whose}prompts of up to {longest} tokens that is "
        f"{longest + response} positions, the model has {positions} (max_position_embeddings in its config.json)"
    )


def claim_folder(path: str, field: str) -> pathlib.Path:
    """Makes a folder to write to.

    Raises:
      InputError: it cannot be made or written, or something else is there.
    """
    folder = pathlib.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        file = next((place for place in (folder, *folder.parents) if os.path.isfile(place)), None)
        why = error.strerror if file is None else f"{file} is a file"
        raise InputError(f"{field}={path!r}: not a folder that can be written ({why})") from None
    return folder
