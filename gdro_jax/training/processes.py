"""Several processes of one run: how they start, what they tell each other, what they must agree on.

Every process runs the same program on the same inputs. Whatever one of them alone decides or finds (a signal, a grade,
a file that is missing) goes through `gathered`, so that all go on with the same. With one process nothing happens here.
"""

import importlib.metadata
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from gdro_jax.training import rendezvous

T = TypeVar("T")

AUTO = "auto"
HEARTBEAT_SECONDS, SHUTDOWN_SECONDS = 40, 60  # a peer that is gone for so long ends all
JOIN_SECONDS = 60.0  # a peer that has not come by then ends those that have
_ALIKE = ("gdro-jax", "jax", "jaxlib", "numpy", "tokenizers", "transformers", "math-verify")  # packages
_ROOM = 1 << 16  # bytes of a message: one shape is compiled, and another for each doubling


class JobError(ValueError):
    """The processes of a run differ, or one of them cannot go on; its text is one line, the same for all."""


class JobFault(RuntimeError):
    """A process of a job cannot go on, though what it was given is right: its disk is full, say; one line for all."""


class Job(NamedTuple):
    """Where process 0 is found, how many there are and which this one is; None where the machine knows."""

    coordinator: str | None
    processes: int | None
    number: int | None


def job(coordinator: str | None, processes: int | None, own: int | None, environment: Mapping[str, str]) -> Job | None:
    """The job that flags or environment (`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`) name.

    Args:
      coordinator: HOST:PORT of process 0, or `auto` where jax finds out by itself: Cloud TPU, Slurm, Open MPI, GKE.

    Returns:
      None for a run of one process.

    Raises:
      ValueError: a part of it is missing or no number; one line.
    """
    address = environment.get("JAX_COORDINATOR_ADDRESS") if coordinator is None else coordinator
    if address is None:
        if processes is not None or own is not None:
            raise ValueError("--num-processes, --process-id: need --coordinator HOST:PORT, where process 0 is")
        return None
    if address == AUTO:
        return Job(None, processes, own)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--coordinator={address!r}: expected HOST:PORT of process 0, or auto")
    processes = _number(processes, "--num-processes", "JAX_NUM_PROCESSES", environment)
    own = _number(own, "--process-id", "JAX_PROCESS_ID", environment)
    if not 0 <= own < processes:
        raise ValueError(f"--process-id={own}: must be in 0..{processes - 1}, of --num-processes={processes}")
    return Job(address, processes, own)


def join(asked: Job, seconds: float = JOIN_SECONDS) -> None:
    """Joins the job; nothing of jax may have run before.

    Args:
      asked: the job.
      seconds: how long the other processes are waited for.

    Raises:
      JobError: there is none, or its other processes did not come. Where the machine names the job, jax ends a process
        that waited in vain, so it says before what it waits for.
    """
    named = f"--coordinator={asked.coordinator or AUTO}"
    try:
        if asked.coordinator is None:
            sys.stderr.write(f"{named}: waits up to {seconds:g} s (--join-timeout) for all processes of the job\n")
        else:
            assert asked.processes is not None and asked.number is not None
            rendezvous.meet(asked.coordinator, asked.processes, asked.number, seconds)
        jax.distributed.initialize(
            *asked,
            initialization_timeout=math.ceil(seconds),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except rendezvous.MeetingError as error:
        raise JobError(f"{named}: {error}") from None
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise JobError(f"{named}: cannot join the job ({reason})") from None


def count() -> int:
    """How many processes the run has."""
    return jax.process_count()


def number() -> int:
    """Which of them this is."""
    return jax.process_index()


class Membership:
    """This process's part in a job, None for a run of its own; a fault inside ends all processes.

    Args:
      asked: joined on entry.
      patience: seconds that the others are waited for then.
      ends_alike: errors that every process ends with by itself; after any other this one leaves at once, and the
        others end by the broken connection, or after `HEARTBEAT_SECONDS` of silence.
      say_all: errors whose text is all there is to say; any other is shown with its traceback.
    """

    def __init__(
        self,
        asked: Job | None,
        ends_alike: tuple[type[Exception], ...],
        patience: float = JOIN_SECONDS,
        say_all: tuple[type[Exception], ...] = (),
    ):
        self._asked, self._ends_alike, self._patience, self._say_all = asked, ends_alike, patience, say_all

    def __enter__(self) -> Self:
        if self._asked is not None:
            join(self._asked, self._patience)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is None or isinstance(value, self._ends_alike) or count() == 1:
            return
        why = " ".join(str(value).split())
        if not isinstance(value, self._say_all):
            traceback.print_exception(value)
            why = f"{type(value).__name__} above is its own fault, or the loss of a process that has ended"
        sys.stderr.write(
            f"process {number()} of {count()} ends: {why}; the same command for each goes on from the last checkpoint\n"
        )
        sys.stderr.flush()
        os._exit(1)  # an exit in order would wait for the others


def is_first() -> bool:
    """Whether this process writes what all share."""
    return number() == 0


def gathered(value: Any) -> list[Any]:
    """What every process passes here, by its number; JSON-able. All must call it, in the same order."""
    if count() == 1:
        return [value]
    text = json.dumps(value).encode()
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(text)))).reshape(-1)
    message = np.zeros(max(_ROOM, 1 << int(sizes.max() - 1).bit_length()), np.uint8)
    message[: len(text)] = np.frombuffer(text, np.uint8)
    said = np.asarray(multihost_utils.process_allgather(message))
    return [json.loads(row[:size].tobytes()) for row, size in zip(said, sizes.tolist(), strict=True)]


def agreed(stop: Callable[[], bool]) -> Callable[[], bool]:
    """`stop` as all ask it at the same point: true for all as soon as it is for one."""
    return stop if count() == 1 else lambda: any(gathered(bool(stop())))


def together(build: Callable[[], T]) -> T:
    """What each process builds for itself, once all have.

    Raises:
      the ValueError or OSError of this process; in a job `JobError` for the ValueError of another, and
        `JobFault` for an OSError of any: all end, with its line.
    """
    problem: ValueError | OSError | None = None
    try:
        built = build()
    except (ValueError, OSError) as error:
        problem = error
    said = gathered(None if problem is None else [str(problem), not isinstance(problem, ValueError)])
    if problem is not None and (count() == 1 or isinstance(problem, ValueError)):
        raise problem
    for at, what in enumerate(said):
        if what is not None:
            text, fault = what
            raise (JobFault if fault else JobError)(f"process {at}: {text}")
    return built


def on_first(build: Callable[[], T]) -> T | None:
    """What process 0 builds, None elsewhere; the errors of `together`."""
    return together(lambda: build() if is_first() else None)


def agree(facts: Mapping[str, object]) -> None:
    """Compares what all must have alike, by how Python writes it.

    Raises:
      JobError: naming the first thing that differs, and both values.
    """
    first, *others = gathered({name: repr(value) for name, value in facts.items()})
    for at, theirs in enumerate(others, 1):
        for name in first | theirs:
            if first.get(name) != theirs.get(name):
                raise JobError(
                    f"{name}={theirs.get(name)} in process {at} and {first.get(name)} in process 0: "
                    "all processes of a run must have the same"
                )


def versions() -> dict[str, str]:
    """Of what computes, draws, tokenises and grades."""
    return {f"version of {name}": importlib.metadata.version(name) for name in _ALIKE}


def _number(given: int | None, flag: str, name: str, environment: Mapping[str, str]) -> int:
    if given is not None:
        return given
    text = environment.get(name)
    if text is None or not text.isdecimal():
        raise ValueError(
            f"{flag}: needed with --coordinator HOST:PORT, also as {name}" + (f"={text!r}" if text else "")
        )
    return int(text)
