"""Sets up and starts runs on every host of a TPU slice, over `gcloud compute tpus tpu-vm ssh --worker=all`.

    python tpu/launch.py STEP --name SLICE --zone ZONE [--project P] [...] [--dry-run]

STEP is `setup`, `train`, `status` or `stop`. `--dry-run` prints the exact commands and runs nothing. This file needs
the standard library alone; what happens on a host is in `host.py`. Exit codes: 0 done; 2 bad usage, with one line on
standard error; else gcloud's own.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Sequence
from typing import NoReturn

BAD_INPUT = 2


class _Parser(argparse.ArgumentParser):
    """Bad usage in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one step and returns its exit code."""
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    if known.step == "train":
        remote = train_script(known.folder, known.config, known.each_host_seed, overrides(parser, rest))
    elif rest:
        parser.error(f"unknown argument {rest[0]!r}")
    elif known.step == "setup":
        remote = setup_script(known.folder, known.repo, known.ref, known.python)
    else:
        remote = status_script(known.folder, known.lines) if known.step == "status" else stop_script(known.folder)
    command = ssh(known.name, known.zone, known.project, known.worker, remote)
    if known.dry_run:
        print(shlex.join(command))
        return 0
    if shutil.which(command[0]) is None:
        parser.error(f"{command[0]} is not installed here; --dry-run prints the command instead")
    return subprocess.run(command, check=False).returncode


def ssh(name: str, zone: str, project: str | None, worker: str, remote: str) -> list[str]:
    """The gcloud command that runs the shell script `remote` on the slice's hosts."""
    command = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", name, f"--zone={zone}"]
    if project is not None:
        command.append(f"--project={project}")
    return [*command, f"--worker={worker}", f"--command={remote}"]


def setup_script(folder: str, repo: str, ref: str, python: str) -> str:
    """Checks out `ref` of `repo` in ~/`folder` and installs it with the TPU extra, at the locked versions."""
    old = f"{python} on this host is older than Python 3.11: install a newer one and name it with --python"
    return _lines(
        "set -eu",
        f'test -d "$HOME"/{shlex.quote(folder)}/.git || git clone -q {shlex.quote(repo)} "$HOME"/{shlex.quote(folder)}',
        f'cd "$HOME"/{shlex.quote(folder)}',
        f"git fetch -q --tags {shlex.quote(repo)} {shlex.quote(ref)}",
        "git checkout -q --detach FETCH_HEAD",
        f"{shlex.quote(python)} -c 'import sys; sys.exit(sys.version_info < (3, 11))'"
        f" || {{ echo {shlex.quote(old)} >&2; exit 2; }}",
        f"test -x .venv/bin/python || {shlex.quote(python)} -m venv .venv",
        ".venv/bin/python -m pip install -q -c requirements.lock -e '.[tpu]'",
        'echo "$(hostname): ready at $(git rev-parse --short HEAD)"',
    )


def train_script(folder: str, config: str | None, each_host_seed: bool, fields: Sequence[str]) -> str:
    """Starts `host.py` in the background, detached from the connection; refuses while one is running."""
    words = [".venv/bin/python", "tpu/host.py"]
    if each_host_seed:
        words.append("--each-host-seed")
    if config is not None:
        words += ["--config", config]
    return _lines(
        "set -eu",
        f'cd "$HOME"/{shlex.quote(folder)}',
        f'if {_ALIVE}; then echo "$(hostname): a run is going on already" >&2; exit 2; fi',
        "rm -f tpu-run.pid tpu-run.exit",
        "nohup sh -c '\"$@\" & echo $! > tpu-run.pid; wait $!; echo $? > tpu-run.exit' sh "
        f"{shlex.join([*words, *fields])} > tpu-run.log 2>&1 < /dev/null &",
        'echo "$(hostname): started; log in $PWD/tpu-run.log"',
    )


def status_script(folder: str, lines: int) -> str:
    """Says whether the run goes on, or with what code it ended, and shows the end of its log."""
    return _lines(
        f'cd "$HOME"/{shlex.quote(folder)}',
        f'if {_ALIVE}; then echo "$(hostname): running"',
        'elif test -f tpu-run.exit; then echo "$(hostname): ended with code $(cat tpu-run.exit)"',
        'else echo "$(hostname): nothing was started, or the host was restarted"; fi',
        f"test ! -f tpu-run.log || tail -n {lines} tpu-run.log",
    )


def stop_script(folder: str) -> str:
    """Asks the run to save a checkpoint after its step and end (exit code 75); `train` again goes on from there."""
    return _lines(
        f'cd "$HOME"/{shlex.quote(folder)}',
        f'if {_ALIVE}; then kill -TERM "$(cat tpu-run.pid)" && echo "$(hostname): stopping after this step"',
        'else echo "$(hostname): no run is going on"; fi',
    )


def overrides(parser: argparse.ArgumentParser, rest: Sequence[str]) -> list[str]:
    """`--section.field VALUE` words as they are; anything else is bad usage. Values are checked on the hosts."""
    words, kept = list(rest), []
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not re.fullmatch(r"--[a-z_]+(\.\w+)+", name):
            parser.error(f"unknown argument {word!r}")
        if not equals:
            if not words:
                parser.error(f"{word} needs a value")
            value = words.pop(0)
        kept.append(f"{name}={value}")
    return kept


_ALIVE = 'test -f tpu-run.pid && grep -qs tpu/host.py "/proc/$(cat tpu-run.pid)/cmdline"'  # not another's, reused id


def _lines(*lines: str) -> str:
    return "\n".join(lines)


def _repo(text: str) -> str:
    """A repository's address, refused where it carries a password: commands are printed, and visible on the hosts."""
    parts = urllib.parse.urlsplit(text)
    if parts.password is not None or (parts.scheme in ("http", "https") and parts.username is not None):
        raise argparse.ArgumentTypeError("holds a user name or password; use an address without, or ssh")
    if not text or text.startswith("-"):
        raise argparse.ArgumentTypeError(f"{text!r} is not an address")
    return text


def _folder(text: str) -> str:
    if not re.fullmatch(r"[\w.][\w./-]*", text) or ".." in text.split("/"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder below the home folder")
    return text


def _word(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.@:/-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="launch.py", description="Set up and start runs on every host of a TPU slice.")
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP", parser_class=_Parser)
    texts = {
        "setup": "check out the code on every host and install it",
        "train": "start the run on every host, in the background; the same command again resumes it",
        "status": "is it running, and the end of its log, of every host",
        "stop": "checkpoint and end the run on every host",
    }
    for step, text in texts.items():
        sub = steps.add_parser(step, help=text, description=text, allow_abbrev=False)
        sub.add_argument(
            "--name", required=True, type=_word, help="the slice, as `gcloud compute tpus tpu-vm list` says"
        )
        sub.add_argument("--zone", required=True, type=_word)
        sub.add_argument("--project", type=_word, help="gcloud's own by default")
        sub.add_argument("--worker", default="all", type=_word, help="one host's number instead of all")
        sub.add_argument("--folder", default="gdro-jax", type=_folder, help="of the checkout, below the home folder")
        sub.add_argument("--dry-run", action="store_true", help="print the command and run nothing")
        if step == "setup":
            sub.add_argument("--repo", required=True, type=_repo, help="what `git clone` takes")
            sub.add_argument("--ref", default="main", type=_word, help="branch, tag or commit")
            sub.add_argument("--python", default="python3", type=_word, help="3.11 or newer, on the hosts")
        if step == "train":
            sub.add_argument("--config", help="YAML file, in the checkout or on the hosts")
            text = "one independent run per host, its seed run.seed + the host's number"
            sub.add_argument("--each-host-seed", action="store_true", help=text)
            sub.usage = "%(prog)s --name NAME --zone ZONE [options] [--section.field VALUE ...]"
        if step == "status":
            sub.add_argument("--lines", type=int, default=5, help="of the log's end")
    return parser


if __name__ == "__main__":
    sys.exit(main())
