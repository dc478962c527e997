"""The command line: parse, call, exit code.

Exit codes: 0 done; 2 bad input, one line on standard error; 75 stopped by a signal after a checkpoint (the same command
again goes on); 1 a fault, in one line where that says it all (the verifier failed), else with its traceback.
"""

import argparse
import dataclasses
import errno
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

DONE, FAULT, BAD_INPUT, STOPPED = 0, 1, 2, 75
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)  # their text says it all
_WRONG_PATHS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)  # bad input, and theirs too
_UNUSED = {  # sections and fields that a command does not look at: giving one is an error
    "train": ("compare",),
    "compare": ("run.seed", "run.output", "controller.name"),
    "plan": (  # what is read later, or is a number that takes no memory
        *("reward", "compare", "run", "controller.settings", "model.random_init", "model.lora_alpha"),
        *(f"eval.{n}" for n in ("every", "samples", "k", "temperature", "top_p", "top_k", "min_p", "min_new_tokens")),
        *(f"eval.{n}" for n in ("template", "problems_per_call", "problems_per_stratum")),
        *(f"sampling.{n}" for n in ("temperature", "top_p", "top_k", "min_p", "min_new_tokens", "gap_tolerance")),
        *("sampling.server_model", "sampling.server_timeout", "data.max_unscorable"),
        *(f"train.{n}" for n in ("learning_rate", "warmup_steps", "decay", "decay_steps", "final_rate")),
        *(f"train.{n}" for n in ("adam_b1", "adam_b2", "adam_eps", "weight_decay", "max_grad_norm", "max_skipped")),
        *("train.clip_low", "train.clip_high"),
    ),
    "eval": (
        *("controller", "train", "mesh", "compare", "reward", "model.path", "model.param_dtype", "model.remat"),
        *(f"model.lora_{n}" for n in ("rank", "alpha", "targets")),
        *(f"run.{n}" for n in ("output", "steps", "checkpoint_every", "keep_checkpoints", "log_every", "save_model")),
        *(f"data.{n}" for n in ("train", "mixture", "loader", "contamination", "benchmarks")),
        *(f"sampling.{n}" for n in ("temperature", "top_p", "top_k", "min_p", "min_new_tokens", "gap_tolerance")),
        *(f"sampling.server{n}" for n in ("", "_folder", "_model", "_timeout")),
        *(f"eval.{n}" for n in ("data", "every", "problems_per_stratum")),
    ),
}
_UNUSED_BY_BENCHMARKS = (  # each has its own columns, verifier and answers, none has training's summary
    *(f"data.{n}" for n in ("verifier", "gold_check", "template", "prompt_column", "answer_column", "stratum_column")),
    "eval.k",
)
_UNREAD_UNDER_A_LIMIT = ("data", "eval", "model.tokenizer")  # by a plan, which then takes prompts to be that long
_USED = {"regrade": ("data.verifier_workers", "data.verifier_timeout", "data.max_unscorable")}  # and nothing else
_WITHOUT_FIELDS = ("report", "export", "compare-evals")


class _Parser(argparse.ArgumentParser):
    """Bad usage in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Stop:
    """Turns the first interrupt or termination signal into a request to stop; a second one is final.

    Args:
      what: happens at the first signal, for the person who sent it.
    """

    def __init__(self, what: str = "stopping, with a checkpoint of the last whole step") -> None:
        self.asked, self.what = False, what
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._heard)

    def _heard(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)
        after = "after what is being compiled or computed, which may take minutes"  # neither can be broken off
        os.write(2, f"\n{self.what}, {after}; once more to stop at once\n".encode())

    def __call__(self) -> bool:
        return self.asked


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before anything imports it
    parser = _parser()
    words, overrides = _overrides(parser, sys.argv[1:] if arguments is None else arguments)
    known = parser.parse_args(words)
    from gdro_jax import commands, eval_commands
    from gdro_jax.training.config_io import load

    try:
        if known.command in _WITHOUT_FIELDS and overrides:
            parser.error(f"unknown option --{overrides[0][0]}")
        if known.command == "report":
            return commands.report(known.folders, known.out)
        if known.command == "export":
            return commands.export(known.source, known.out, known.dtype, known.max_file_bytes)
        if known.command == "compare-evals":
            eval_commands.compare_evals(known.folders, known.out)
            return DONE
        for name, _ in overrides:
            if _unused(known.command, name):
                parser.error(f"--{name} does nothing in gdro {known.command}")
        if known.command in ("train", "compare"):
            return _train(parser, known, overrides)
        names = [name for name in (getattr(known, "benchmarks", None) or "").split(",") if name]
        for name, _ in overrides if names else ():
            if name in _UNUSED_BY_BENCHMARKS:
                parser.error(f"--{name} does nothing in gdro eval --benchmarks")
        if names:  # every k is reported: this one is not to be refused as above eval.samples
            overrides = [*overrides, ("eval.k", "1")]
        config = load(getattr(known, "file", None) or known.config, overrides)
        if known.command == "regrade":
            eval_commands.regrade(known.folder, config)
            return DONE
        if known.command == "plan":
            for name, _ in overrides if config.data.max_prompt_tokens is not None else ():
                if _among(name, _UNREAD_UNDER_A_LIMIT) and name != "data.max_prompt_tokens":
                    parser.error(f"--{name} does nothing in gdro plan with data.max_prompt_tokens")
            return DONE if commands.plan(config, known.topology) else FAULT
        if (known.problems is None) == (not names):
            parser.error("eval: either a file of problems or --benchmarks is needed")
        if known.benchmark_folder is not None and not names:
            parser.error("eval: --benchmark-folder does nothing without --benchmarks")
        asked = (known.problems, names, known.benchmark_folder, known.out)
        stop = _Stop("stopping" + ", what is graded is kept" * (known.out is not None))
        return DONE if eval_commands.evaluate(known.model, *asked, config, stop) else STOPPED
    except (*commands.BAD_INPUT_ERRORS, *commands.FAULTS) as error:
        sys.stderr.write(f"gdro {known.command}: {' '.join(str(error).split())}\n")
        return FAULT if isinstance(error, commands.FAULTS) else BAD_INPUT
    except OSError as error:
        if error.errno not in (*_DISK_FAULTS, *_WRONG_PATHS):
            raise
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"gdro {known.command}: {where}{error.strerror}\n")
        return FAULT if error.errno in _DISK_FAULTS else BAD_INPUT


def _train(parser: argparse.ArgumentParser, known: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    """`train` or `compare`, as one of several processes where flags or environment say so."""
    from gdro_jax import commands
    from gdro_jax.training import config_io, processes

    try:
        job = processes.job(known.coordinator, known.num_processes, known.process_id, os.environ)
    except ValueError as error:
        parser.error(f"{known.command}: {error}")
    patience = processes.JOIN_SECONDS if known.join_timeout is None else known.join_timeout
    if not 0 < patience < float("inf"):
        parser.error(f"{known.command}: --join-timeout={patience:g}: must be above 0 seconds, and finite")
    if known.join_timeout is not None and job is None:
        parser.error(f"{known.command}: --join-timeout: needs --coordinator HOST:PORT, where process 0 is")
    with processes.Membership(job, commands.ENDS_ALIKE, patience, commands.FAULTS):
        config = processes.together(lambda: config_io.load(known.config, overrides))
        run = commands.train if known.command == "train" else commands.compare
        done = run(config, _Stop())
        processes.gathered(None)  # none leaves before process 0 has written its report
        return DONE if done else STOPPED


def _unused(command: str, name: str) -> bool:
    if command in _USED:
        return name not in _USED[command]
    return _among(name, _UNUSED[command])


def _among(name: str, fields: Sequence[str]) -> bool:
    """Whether a field is one of these, or in a section that is."""
    return any(name == field or name.startswith(field + ".") for field in fields)


def _parser() -> argparse.ArgumentParser:
    about = "Train reasoning language models with GRPO and GDRO, and see what differs."
    parser = _Parser(prog="gdro", description=about)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="COMMAND")
    texts = {
        "train": "one run; give the same command again to resume it",
        "compare": "several methods on the same prompts, budget and seeds, with a table and a report",
        "plan": "what a training step needs on its mesh, before anything runs; exit code 1: too large",
        "eval": "mean@k, pass@k and maj@k of a model on problems or benchmarks, by level and subject, with intervals",
        "regrade": "grade the responses that gdro eval kept again",
        "compare-evals": "paired differences between evaluations that gdro eval kept",
        "export": "the policy of a run, or of one of its checkpoints, as a Hugging Face folder",
        "report": "figures and report.html of one run, or of several compared",
    }
    for name, text in texts.items():
        epilog = None if name in _WITHOUT_FIELDS else f"Every field, with its default:\n{_fields(name)}"
        sub = commands.add_parser(name, help=text, description=text, epilog=epilog, allow_abbrev=False)
        sub.formatter_class = argparse.RawDescriptionHelpFormatter
        if name == "report":
            sub.add_argument("folders", nargs="+", metavar="FOLDER", help="run folders, or one folder of a comparison")
            sub.add_argument("--out", metavar="FOLDER", help="where to write; beside the runs by default")
            continue
        if name == "export":
            sub.add_argument(
                "source", help="a run's folder, RUN/checkpoints/STEP, a Hugging Face folder or name, or 'embedded'"
            )
            sub.add_argument("out", help="the folder to make; one that holds a model is replaced as a whole")
            sub.add_argument(
                "--dtype",
                choices=("float32", "bfloat16", "float16"),
                help="of the tensors; the run's model.dtype by default",
            )
            sub.add_argument("--max-file-bytes", type=int, default=5_000_000_000, metavar="N", help="split above it")
            continue
        if name == "compare-evals":
            sub.add_argument(
                "folders", nargs="+", metavar="FOLDER", help="folders of gdro eval; the first is compared with"
            )
            sub.add_argument("--out", metavar="FILE", help="write everything there as JSON")
            continue
        if name == "regrade":
            sub.add_argument("folder", help="a folder of gdro eval")
        if name == "eval":
            sub.add_argument("model", help="a Hugging Face folder or name, a run's model/, or 'embedded'")
            sub.add_argument("problems", nargs="?", help="a JSON-lines file, or 'embedded' for the held-out set")
            sub.add_argument(
                "--benchmarks", metavar="NAMES", help=f"instead of a file: all, or some of {_benchmarks()}"
            )
            sub.add_argument("--benchmark-folder", metavar="FOLDER", help="where the benchmarks' published files are")
            sub.add_argument("--out", metavar="FOLDER", help="keep summary, table, figure and every response there")
        if name == "plan":
            sub.add_argument(
                "--topology", metavar="NAME", help="compile for the slice v5e:8x8, say; needs libtpu, no TPU"
            )
        either = sub.add_mutually_exclusive_group()
        either.add_argument("--config", metavar="FILE", help="YAML with any of the sections below")
        if name == "plan":
            either.add_argument("file", nargs="?", metavar="CONFIG", help="the same without --config")
        if name in ("train", "compare"):
            job = sub.add_argument_group("one of several processes, each given the same command but for its number")
            job.add_argument(
                "--coordinator", metavar="HOST:PORT", help="where process 0 is; auto on Cloud TPU, Slurm, Open MPI, GKE"
            )
            job.add_argument("--num-processes", type=int, metavar="N")
            job.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1")
            job.add_argument(
                "--join-timeout", type=float, metavar="SECONDS", help="that the others are waited for; 60 by default"
            )
    return parser


def _overrides(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The other words, and the pairs from `--section.field VALUE` and `--section.field=VALUE`, wherever they stand.

    Of the others, options come last: argparse would give a value that may be left out none if it stood behind one.
    """
    others, options, pairs, words = [], [], [], list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("-") or word == "-":
            others.append(word)
            continue
        if "." not in name or not word.startswith("--"):
            options.append(word)
            if not equals and word not in ("-h", "--help") and words:
                options.append(words.pop(0))
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                parser.error(f"{word} needs a value")
            value = words.pop(0)
        pairs.append((name, value))
    return others + options, pairs


def _benchmarks() -> str:
    from gdro_jax.data.benchmarks import BENCHMARKS

    return ",".join(BENCHMARKS)


def _fields(command: str) -> str:
    from gdro_jax.training.config import Config

    lines, config = [], Config()
    for section in dataclasses.fields(config):
        defaults = getattr(config, section.name)
        for field in dataclasses.fields(defaults):
            if _unused(command, f"{section.name}.{field.name}"):
                continue
            default = getattr(defaults, field.name)
            lines.append(f"  --{section.name}.{field.name}  {'null' if default is None else default}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
