"""The processes of a job wait for each other: here threads of one process."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from gdro_jax.training import rendezvous
from gdro_jax.training.rendezvous import MeetingError

LONG = 60.0  # nobody waits for so long here


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def met(address, *callers):
    """What became of `meet` for each (processes, number, seconds), all at once."""

    def one(caller):
        try:
            return rendezvous.meet(address, *caller)
        except MeetingError as error:
            return str(error)

    with ThreadPoolExecutor(len(callers)) as pool:
        return list(pool.map(one, callers))


def test_all_go_on_once_all_are_there_and_the_port_is_free_again(address):
    for _ in range(2):
        assert met(address, *((3, number, LONG) for number in (2, 1, 0))) == [None] * 3
    assert rendezvous.meet(address, 1, 0, LONG) is None


def test_who_does_not_come_is_named_to_all_who_did(address):
    why = "process 2, 3 of 4 did not come within 0.5 s"
    assert met(address, (4, 0, 0.5), (4, 1, LONG)) == [why, why]


def test_process_0_that_does_not_come(address):
    with pytest.raises(MeetingError, match=r"^process 0 was not found within 0.3 s \(Connection refused\)$"):
        rendezvous.meet(address, 2, 1, 0.3)


def test_other_counts_and_one_number_twice_end_all(address):
    why = "--num-processes=3 in process 1 and 2 in process 0"
    assert met(address, (2, 0, LONG), (3, 1, LONG)) == [why, why]
    why = "--process-id=1: two processes have this number"
    assert met(address, (3, 0, LONG), (3, 1, LONG), (3, 1, LONG)) == [why] * 3


def test_a_port_that_is_taken_and_a_stranger(address):
    with (
        socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))),
        pytest.raises(MeetingError, match=r"^process 0 cannot listen at port \d+ \(Address already in use.*\)$"),
    ):
        rendezvous.meet(address, 2, 0, LONG)
    with ThreadPoolExecutor(1) as pool:
        host = pool.submit(rendezvous.meet, address, 2, 0, LONG)
        while True:
            try:
                stranger = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))
                break
            except OSError:
                continue
        with stranger:
            stranger.sendall(b"GET / HTTP/1.1\n")
            assert rendezvous.meet(address, 2, 1, LONG) is None
        assert host.result() is None
