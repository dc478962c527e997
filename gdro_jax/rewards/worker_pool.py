"""Worker processes with a deadline for each job: killed and replaced when it passes, or when they die.

A worker for math-verify is a process that has imported it, and a copy of that process which answers: the copy is what
is killed, and the next is there at once. Others are started anew, with a spare kept. One loop waits on the pipes of all
workers. There are no threads and no signal handlers; no process is forked with this one's state, and all end when their
input does.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

WORKER_PROGRAM = Path(__file__).with_name("_worker.py")
START_LIMIT = 600.0
"""Seconds that a worker may take to be ready; importing is slow on a busy machine."""
MAX_FAILED_STARTS = 3
"""Workers in a row that end before they are ready until the pool gives up."""


class VerifierError(RuntimeError):
    """The verifier itself cannot work, whatever the responses are."""


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    deadline: float
    copy: int | None = None
    ready: bool = False
    job: int | None = None
    unread: bytes = b""

    @property
    def pid(self) -> int:
        """Of the process that answers."""
        return self.process.pid if self.copy is None else self.copy

    @property
    def busy(self) -> bool:
        """It owes a line: a reply, or that it is ready."""
        return not self.ready or self.job is not None

    def receive(self) -> list[dict[str, object]]:
        """The whole lines there are. EOFError once the worker is gone."""
        assert self.process.stdout is not None
        chunk = os.read(self.process.stdout.fileno(), 65536)
        if not chunk:
            raise EOFError
        *lines, self.unread = (self.unread + chunk).split(b"\n")
        return [dict(json.loads(line)) for line in lines]


def check_settings(workers: int, timeout: float, memory_mb: int) -> None:
    """ValueError for a setting that a pool cannot work with."""
    if workers < 1:
        raise ValueError(f"workers: {workers!r} is not allowed; it must be at least 1")
    if not 0.0 < timeout < float("inf"):
        raise ValueError(f"timeout: {timeout!r} is not allowed; it must be a positive number of seconds")
    if memory_mb < 256:
        raise ValueError(f"memory_mb: {memory_mb!r} is not allowed; it must be at least 256")


class WorkerPool:
    """Runs jobs (small JSON objects) on worker processes; see ``_worker.py`` for what is said to them."""

    def __init__(self, *, workers: int, timeout: float, memory_mb: int, arguments: Sequence[str] = ()) -> None:
        check_settings(workers, timeout, memory_mb)
        self._timeout = timeout
        self._memory_mb = memory_mb
        self._arguments = tuple(arguments)
        self._failed_starts = 0
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        self._workers: list[_Worker] = []
        self._spares: list[_Worker] = []  # of workers without copies, from the first loss on
        self._closed = False
        self._finalizer = weakref.finalize(self, _kill_all, self._workers, self._spares)
        for _ in range(workers):
            self._workers.append(self._start())

    def run(self, jobs: Sequence[Mapping[str, str | None]]) -> list[bool | str]:
        """One verdict a job: True, False, or the reason why there is none.

        Raises:
            VerifierError: the pool is closed, or workers end before they are ready.
        """
        if self._closed:
            raise VerifierError("the verifier is closed")
        verdicts: dict[int, bool | str] = {}
        pending = deque(range(len(jobs)))
        try:
            while len(verdicts) < len(jobs):
                for worker in list(self._workers):
                    if pending and not worker.busy:
                        self._send(worker, pending, jobs)
                for worker in self._readable():
                    self._read(worker, verdicts)
                self._expire(verdicts)
        finally:
            for worker in [worker for worker in self._workers if worker.job is not None]:
                self._replace(worker)  # only after an interruption: its reply would be taken for a later job's
        return [verdicts[job] for job in range(len(jobs))]

    def close(self) -> None:
        """Kill the workers. Closing twice is allowed."""
        self._closed = True
        self._finalizer()
        self._errors.close()

    # One turn of the loop -------------------------------------------------------------------------------------------
    def _send(self, worker: _Worker, pending: deque[int], jobs: Sequence[Mapping[str, str | None]]) -> None:
        assert worker.process.stdin is not None
        job = pending[0]
        try:
            worker.process.stdin.write(json.dumps({"id": job, **jobs[job]}).encode() + b"\n")
        except BrokenPipeError:  # it died while idle: not this job's fault
            self._replace(worker)
            return
        pending.popleft()
        worker.job = job
        worker.deadline = time.monotonic() + self._timeout

    def _readable(self) -> list[_Worker]:
        """Workers that said something or ended, waiting for that until the nearest deadline."""
        waiting = [worker for worker in self._workers if worker.busy]
        with selectors.DefaultSelector() as selector:
            for worker in waiting:
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            nearest = min((worker.deadline for worker in waiting), default=time.monotonic())
            return [key.data for key, _ in selector.select(max(0.0, nearest - time.monotonic()))]

    def _read(self, worker: _Worker, verdicts: dict[int, bool | str]) -> None:
        try:
            messages = worker.receive()
        except EOFError:
            self._ended(worker, verdicts)
            return
        for message in messages:
            if "ready" in message:
                self._begins(worker, message.get("copy"))
            elif "ended" in message:
                self._copy_ended(worker, message, verdicts)
            elif worker.ready:  # else it was given up
                job, verdict = message["id"], message["verdict"]
                assert isinstance(job, int) and job == worker.job and isinstance(verdict, bool | str)
                verdicts[job] = verdict
                worker.job = None

    def _begins(self, worker: _Worker, copy: object) -> None:
        assert copy is None or isinstance(copy, int)
        worker.ready, worker.copy, worker.deadline = True, copy, time.monotonic() + self._timeout
        self._failed_starts = 0

    def _copy_ended(self, worker: _Worker, message: dict[str, object], verdicts: dict[int, bool | str]) -> None:
        killed_idle = not worker.ready and not message["busy"]
        if worker.job is not None and message["busy"]:  # else its job waits for the next copy
            verdicts[worker.job] = f"the worker ended with code {message['ended']}"
            worker.job = None
        worker.ready, worker.deadline = False, time.monotonic() + START_LIMIT
        if killed_idle:  # it had not begun the job that took too long: the next one is not to find that
            self._replace(worker)

    def _ended(self, worker: _Worker, verdicts: dict[int, bool | str]) -> None:
        code = worker.process.wait()
        if not worker.ready:
            self._failed_start(f"ended with code {code}")
        elif worker.job is not None:
            verdicts[worker.job] = f"the worker ended with code {code}"
        self._replace(worker)

    def _expire(self, verdicts: dict[int, bool | str]) -> None:
        now = time.monotonic()
        for worker in [worker for worker in self._workers if worker.busy and worker.deadline <= now]:
            if not worker.ready:
                self._failed_start(f"was not ready after {START_LIMIT:g} s")
                self._replace(worker)
                continue
            assert worker.job is not None
            verdicts[worker.job] = f"took longer than {self._timeout:g} s"
            if worker.copy is None:
                self._replace(worker)
                continue
            worker.ready, worker.job, worker.deadline = False, None, now + START_LIMIT
            _kill_process(worker.copy)

    # Processes ------------------------------------------------------------------------------------------------------
    def _start(self) -> _Worker:
        process = subprocess.Popen(
            # -P: the program's own folder must not shadow what it imports.
            [sys.executable, "-P", str(WORKER_PROGRAM), str(self._memory_mb), str(self._timeout), *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for this process to handle
            env={**os.environ, "PYTHONHASHSEED": "0"},  # the same grade in every run
        )
        return _Worker(process, deadline=time.monotonic() + START_LIMIT)

    def _replace(self, worker: _Worker) -> None:
        _kill(worker)
        self._workers[self._workers.index(worker)] = self._spares.pop() if self._spares else self._start()
        self._spares.append(self._start())

    def _failed_start(self, what: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            self._errors.seek(0)
            last = self._errors.read().decode("utf-8", "replace").strip().splitlines()[-1:]
            raise VerifierError(f"a verifier worker {what}, {self._failed_starts} times in a row: {''.join(last)}")


def _kill(worker: _Worker) -> None:
    worker.process.kill()
    if worker.copy is not None:
        _kill_process(worker.copy)
    worker.process.wait()
    for pipe in (worker.process.stdin, worker.process.stdout):
        if pipe is not None:
            pipe.close()


def _kill_process(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _kill_all(*groups: list[_Worker]) -> None:
    for workers in groups:
        for worker in workers:
            _kill(worker)
        workers.clear()
