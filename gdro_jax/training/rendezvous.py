"""Waits for every process of a job at the coordinator's address, before jax does.

Where one never comes, jax aborts without a line that says which. So process 0 listens at the port that jax will take,
each other process says its number there, and all go on, or all end, with what process 0 answers.
"""

import os
import selectors
import socket
import time

_HELLO, _GO = "gdro-jax", "go"
_AGAIN = 0.2  # seconds until a process looks for process 0 again
_ROOM = 4096  # bytes of a line
_GRACE = 10.0  # seconds that an answer may take on top of what process 0 waits


class MeetingError(ValueError):
    """Not all came, or not those that belong together; its text is one line."""


def meet(address: str, processes: int, own: int, seconds: float) -> None:
    """Returns once all processes have called this.

    Args:
      address: HOST:PORT of process 0; `JAX_COORDINATOR_BIND_ADDRESS` says where it listens, if not there.
      processes: how many there are.
      own: the number of this one.
      seconds: how long process 0 waits for the others, and they for it.

    Raises:
      MeetingError: who did not come, came twice, or counts the processes otherwise.
    """
    if own:
        _visit(*_place(address), processes, own, seconds)
    else:
        bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", f":{_place(address)[1]}")
        _host(*_place(bind), processes, seconds)


def _place(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _listen(host: str, port: int) -> socket.socket:
    if host in ("", "::") and socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def _host(host: str, port: int, processes: int, seconds: float) -> None:
    here: dict[int, socket.socket] = {}
    deadline = time.monotonic() + seconds
    try:
        listener = _listen(host, port)
    except OSError as error:
        raise MeetingError(f"process 0 cannot listen at port {port} ({error.strerror})") from None
    with listener, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        try:
            while len(here) < processes - 1:
                left = deadline - time.monotonic()
                if left <= 0:
                    absent = [str(number) for number in range(1, processes) if number not in here]
                    raise MeetingError(f"process {', '.join(absent)} of {processes} did not come within {seconds:g} s")
                for key, _ in selector.select(left):
                    if key.fileobj is listener:
                        guest, _ = listener.accept()
                        guest.settimeout(_GRACE)
                        selector.register(guest, selectors.EVENT_READ)
                    else:
                        assert isinstance(key.fileobj, socket.socket)
                        _hear(key.fileobj, here, processes, selector)
            _answer(here, _GO)
        except MeetingError as error:
            _answer(here, str(error))
            raise
        finally:
            for key in list(selector.get_map().values()):
                if key.fileobj is not listener:
                    assert isinstance(key.fileobj, socket.socket)
                    key.fileobj.close()


def _hear(
    guest: socket.socket, here: dict[int, socket.socket], processes: int, selector: selectors.BaseSelector
) -> None:
    """Whom a line is from; who leaves again, or is no process of a run, is forgotten."""
    words = _line(guest).split()
    if len(words) != 3 or words[0] != _HELLO:
        selector.unregister(guest)
        guest.close()
        for number in [number for number, known in here.items() if known is guest]:
            del here[number]
        return
    number, theirs = int(words[1]), int(words[2])
    twice = number in here
    here[-1 if twice else number] = guest
    if theirs != processes:
        raise MeetingError(f"--num-processes={theirs} in process {number} and {processes} in process 0")
    if twice:
        raise MeetingError(f"--process-id={number}: two processes have this number")


def _answer(here: dict[int, socket.socket], text: str) -> None:
    """Tells all, and lets them hang up first: the port is then free for jax."""
    for guest in here.values():
        try:
            guest.sendall(f"{text}\n".encode())
            guest.recv(1)
        except OSError:
            continue  # it has ended


def _line(end: socket.socket) -> str:
    """One line, or what came before the other side hung up or fell silent."""
    said = b""
    try:
        while not said.endswith(b"\n") and len(said) < _ROOM:
            more = end.recv(_ROOM)
            if not more:
                break
            said += more
    except OSError:
        pass
    return said.decode(errors="replace").strip()


def _visit(host: str, port: int, processes: int, own: int, seconds: float) -> None:
    deadline, why = time.monotonic() + seconds, "it hung up"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as end:
                end.sendall(f"{_HELLO} {own} {processes}\n".encode())
                end.settimeout(seconds + _GRACE)
                answer = _line(end)
        except OSError as error:
            answer, why = "", error.strerror or str(error)
        if answer == _GO:
            return
        if answer:
            raise MeetingError(answer)
        time.sleep(_AGAIN)
    raise MeetingError(f"process 0 was not found within {seconds:g} s ({why})")
