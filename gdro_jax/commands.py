"""What each command does, on a validated configuration."""

import pathlib
import re
import sys
from collections.abc import Callable

import yaml

from gdro_jax import evaluation, rewards
from gdro_jax import report as reports
from gdro_jax.data import sources
from gdro_jax.evaluation import store
from gdro_jax.models.hf import CheckpointError
from gdro_jax.sampling import ServerError
from gdro_jax.training import chips, config_io, inputs, processes, run_folder, setup
from gdro_jax.training import export as exporting
from gdro_jax.training import plan as planning
from gdro_jax.training.checkpoint import SaveError
from gdro_jax.training.compiles import CompileCounter
from gdro_jax.training.config import Config
from gdro_jax.training.guard import NotFiniteError
from gdro_jax.training.loop import FAULTS_OF_ALL, Trainer
from gdro_jax.training.progress import Progress

BAD_INPUT_ERRORS = (
    config_io.ConfigError,
    setup.InputError,
    sources.DataError,
    store.StoreError,
    reports.RunError,
    CheckpointError,
    processes.JobError,
)
"""Errors that mean bad input: one clear line, exit code 2."""
FAULTS = (
    rewards.UnscorableError,
    rewards.VerifierError,
    evaluation.NothingScorableError,
    ServerError,
    NotFiniteError,
    SaveError,
    processes.JobFault,
)
"""Faults that say all there is to say in one line, exit code 1. Anything else keeps its traceback."""
ENDS_ALIKE = (*BAD_INPUT_ERRORS, *FAULTS_OF_ALL, processes.JobFault)
"""Errors that all processes of a job end with, each by itself."""


def train(config: Config, stop: Callable[[], bool]) -> bool:
    """One run, its report at the end; False when it was stopped before its last step.

    Of several processes all call this with the same configuration.
    """
    _agree(config)
    checked = processes.together(lambda: setup.check(config))
    _agree_on_inputs(config, checked)
    run_folder.check_free(config)
    policy = processes.together(lambda: setup.load_policy(config.model, checked.layout, checked.outline))
    done = _run(config, setup.assemble(config, policy, checked), stop, config.controller.name, release=True)
    page = processes.on_first(lambda: reports.write(config.run.output)) if done else None
    if page is not None:
        print(page)
    return done


def compare(config: Config, stop: Callable[[], bool]) -> bool:
    """Every method with every seed, then the table and the report; runs already finished are not repeated."""
    _agree(config)
    runs = comparison(config)
    checked = processes.together(lambda: _checked(config, runs))  # mistakes come first
    first = next(iter(checked.values()))
    _agree_on_inputs(config, first)
    folder = processes.on_first(lambda: _listed(config, runs))
    policy = processes.together(lambda: setup.load_policy(config.model, first.layout, first.outline))
    stop = processes.agreed(stop)
    for label, run in runs.items():
        if stop() or not _run(run, setup.assemble(run, policy, checked[label]), stop, label):
            return False
    for text in processes.on_first(lambda: _reported(folder)) or ():
        print(text)
    return True


def _reported(folder: pathlib.Path | None) -> tuple[str, str]:
    """The table of a comparison, and where its report is."""
    assert folder is not None
    page = reports.write(folder)
    return reports.format_table(reports.read_comparison(folder)), str(page)


def _checked(config: Config, runs: dict[str, Config]) -> dict[str, setup.Checked]:
    """The parts of all runs, which share model and data; every input problem is found here."""
    seen, data = setup.outline(config.model), inputs.load(config)
    checked = {label: setup.check(run, seen, data) for label, run in runs.items()}
    for run in runs.values():
        run_folder.check(run)
    return checked


def _listed(config: Config, runs: dict[str, Config]) -> pathlib.Path:
    """The comparison's folder, with the list of its runs in it."""
    folder = setup.claim_folder(config.compare.output, "compare.output")
    labels = {label: {"method": label.rsplit("-seed", 1)[0], "seed": run.run.seed} for label, run in runs.items()}
    listing = {"methods": list(config.compare.methods), "seeds": list(config.compare.seeds), "runs": labels}
    (folder / "compare.yaml").write_text(yaml.safe_dump(listing, sort_keys=False))
    return folder


def _agree(config: Config) -> None:
    """Refuses processes of other versions or configurations."""
    fields = {
        f"{section}.{name}": value
        for section, values in config_io.to_dict(config).items()
        for name, value in values.items()
    }
    processes.agree(processes.versions() | fields)


def _agree_on_inputs(config: Config, checked: setup.Checked) -> None:
    """Refuses processes of other problems or models, before any device works on them."""
    if processes.count() > 1:
        processes.agree(processes.together(lambda: setup.facts(config, checked)))


def comparison(config: Config) -> dict[str, Config]:
    """The runs of a comparison, `METHOD-seedN` to its configuration.

    Raises:
      ConfigError: no method, or a method that changes what all must share (prompts, rollouts, steps, seeds).
    """
    if not config.compare.methods:
        raise config_io.ConfigError("compare.methods: names no method; give at least one, such as {uniform: , joint: }")
    shared = {k: v for k, v in config_io.to_dict(config).items() if k != "compare"}
    runs = {}
    for seed in config.compare.seeds:
        for method, changes in config.compare.methods.items():
            label = f"{method}-seed{seed}"
            raw = _merged(shared, {"controller": {"name": method}})
            raw = _merged(raw, _changes(method, changes))
            raw = _merged(raw, {"run": {"seed": seed, "output": str(pathlib.Path(config.compare.output) / label)}})
            runs[label] = config_io.from_dict(raw, where=f"compare.methods.{method}")
            unlike = [
                f"{section}.{field}"
                for section, field in (("train", "prompts_per_step"), ("controller", "mean_rollouts"))
                if getattr(getattr(runs[label], section), field) != getattr(getattr(config, section), field)
            ]
            if unlike:
                raise config_io.ConfigError(
                    f"compare.methods.{method}: changes {', '.join(unlike)}; "
                    "methods are compared on the same prompts, at the same budget"
                )
    return runs


def _changes(method: str, changes: object) -> dict:
    """The sections that a method changes.

    Raises:
      ConfigError: no sections, sections that all methods must share, or a label that is no name for a folder.
    """
    if not isinstance(changes, dict | None):
        raise config_io.ConfigError(f"compare.methods.{method}={changes!r}: expected sections, or nothing")
    if not re.fullmatch(r"[\w+-][\w.+-]*", str(method)):
        raise config_io.ConfigError(
            f"compare.methods: {method!r} names a folder; expected letters, digits and any of _ . + -"
        )
    other = sorted(set(changes or {}) - {"controller", "train"})
    if other:
        raise config_io.ConfigError(
            f"compare.methods.{method}: changes {', '.join(map(str, other))}; methods differ in controller and train "
            "alone, on the same prompts, at the same budget"
        )
    return changes or {}


def plan(config: Config, topology: str | None) -> bool:
    """Prints what a step needs on the configuration's mesh over the devices here or of a TPU slice; whether it fits."""
    try:
        devices = chips.devices(topology)
    except ValueError as error:
        raise setup.InputError(str(error)) from None
    layout = setup.layout(config, None if topology is None else devices)
    architecture = setup.architecture(config.model)
    shape = planning.shapes(config, setup.longest_prompt(config), layout)
    compiled, chip = planning.compile_step(config, architecture, shape, devices[0], layout), chips.chip(devices[0])
    sampler = planning.compile_sampler(config, architecture, shape, devices[0], layout)
    print(planning.text(config, architecture, shape, compiled, chip, layout, sampler))
    programs = [compiled, *(sampler.programs.values() if sampler is not None else ())]
    return all(planning.fits(program, chip) for program in programs)


def export(source: str, out: str, dtype: str | None, max_file_bytes: int) -> int:
    """Writes the policy of a run as a Hugging Face folder and prints where it is."""
    if max_file_bytes < 1:
        raise setup.InputError(f"--max-file-bytes={max_file_bytes}: must be at least 1")
    print(exporting.export(source, out, dtype=dtype, max_file_bytes=max_file_bytes))
    return 0


def report(folders: list[str], out: str | None) -> int:
    """Writes the report of runs and prints where it is."""
    print(reports.write(folders[0] if len(folders) == 1 else folders, out))
    return 0


def _run(config: Config, parts: setup.Setup, stop: Callable[[], bool], label: str, release: bool = False) -> bool:
    with CompileCounter() as compiles, inputs.verifier(config) as verifier:
        trainer = Trainer(config, parts, verifier, compiles, release)
        try:
            if not processes.is_first():
                return trainer.run(lambda record: None, stop)
            for note in parts.notes:
                sys.stderr.write(f"{label}  {note}\n")
            if trainer.step > 0:
                what = "goes on from" if trainer.step < config.run.steps else "has already made"
                sys.stderr.write(f"{label}  {what} step {trainer.step} of {config.run.steps}\n")
            if trainer.step < config.run.steps:
                sys.stderr.write(f"{label}  compiling a step's programs, which may take minutes\n")
            progress = Progress(label, config.run.steps, trainer.step, config.run.log_every)
            return trainer.run(progress, stop, progress.sampled)
        finally:
            trainer.close()


def _merged(base: dict, changes: dict) -> dict:
    """`base` with nested values replaced by those of `changes`."""
    out = dict(base)
    for key, value in changes.items():
        inner = out.get(key)
        out[key] = _merged(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return out
