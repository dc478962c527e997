"""What one host of a TPU slice runs: `gdro train`, as one job of the slice or as a run of its own.

    python tpu/host.py [--config FILE] [--each-host-seed] [--section.field=VALUE ...]

Without `--each-host-seed` the hosts join one job, `gdro train --coordinator auto`: one run over all chips of the slice,
whose folder all hosts share. With it, hosts do not join: each trains on its own with seed run.seed + its number, into
run.output + "-seedN", on one chip.
"""

import argparse
import os
import sys
import urllib.request
from collections.abc import Mapping, MutableMapping, Sequence

BAD_INPUT = 2
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number"
_JOIN_SECONDS = 300  # hosts start one after another
_ONE_CHIP = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1", "TPU_VISIBLE_CHIPS": "0"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `gdro train` and returns its exit code."""
    parser = argparse.ArgumentParser(prog="host.py", description="One host of a TPU slice.", allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--each-host-seed", action="store_true")
    job = parser.add_argument_group("the job, where jax cannot find it out by itself (not on Cloud TPU)")
    job.add_argument("--coordinator", help="HOST:PORT of process 0")
    job.add_argument("--num-processes", type=int)
    job.add_argument("--process-id", type=int)
    job.add_argument("--join-timeout", type=float, help="seconds; hosts of a slice start minutes apart")
    known, fields = parser.parse_known_args(arguments)
    command = ["train", *([] if known.config is None else ["--config", known.config]), *fields]
    joined = {"--coordinator": known.coordinator, "--num-processes": known.num_processes}
    joined["--join-timeout"] = known.join_timeout
    if known.each_host_seed:
        if given := [name for name, value in joined.items() if value is not None]:
            sys.stderr.write(f"host.py: {given[0]}: does nothing with --each-host-seed, where no job is joined\n")
            return BAD_INPUT
        number = known.process_id if known.process_id is not None else worker_number(os.environ)
        use_one_chip(os.environ)
        return train_own(command, known.config, fields, number)
    from gdro_jax.cli import main as gdro

    joined = {"--coordinator": "auto", "--join-timeout": _JOIN_SECONDS} | {
        name: value for name, value in (joined | {"--process-id": known.process_id}).items() if value is not None
    }
    return gdro([*command, *[f"{name}={value}" for name, value in joined.items()]])


def train_own(command: list[str], config: str | None, fields: Sequence[str], number: int) -> int:
    """Trains alone: the seed and the folder are the configuration's, moved on by this host's number."""
    from gdro_jax.cli import main as gdro
    from gdro_jax.training.config_io import ConfigError, load

    try:
        run = load(config, [_pair(field) for field in fields]).run
    except ConfigError as error:
        sys.stderr.write(f"host.py: {' '.join(str(error).split())}\n")
        return BAD_INPUT
    seed = run.seed + number
    return gdro([*command, f"--run.seed={seed}", f"--run.output={run.output}-seed{seed}"])


def _pair(field: str) -> tuple[str, str]:
    name, _, value = field.removeprefix("--").partition("=")
    return name, value


def worker_number(environment: Mapping[str, str]) -> int:
    """This host's number in its slice: TPU_WORKER_ID, or what Cloud TPU's metadata server says."""
    if "TPU_WORKER_ID" in environment:
        return int(environment["TPU_WORKER_ID"])
    request = urllib.request.Request(_METADATA, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return int(answer.read())


def use_one_chip(environment: MutableMapping[str, str]) -> None:
    """Makes libtpu see one chip of this host and no other host; it would wait for the whole slice otherwise."""
    for name, value in _ONE_CHIP.items():
        environment.setdefault(name, value)


if __name__ == "__main__":
    sys.exit(main())
