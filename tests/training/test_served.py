"""Sampling by a served model: a local server that speaks vLLM's completions, its weights read from the run's folder."""

import contextlib
import http.server
import json
import pathlib
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from gdro_jax.commands import BAD_INPUT_ERRORS
from gdro_jax.models import hf
from gdro_jax.sampling import Sampler, SamplingConfig, ServedModel, ServerError
from gdro_jax.training import agreement

SETTINGS = {"max_new_tokens": 3, "stop_tokens": (1, 9)}
PROMPTS = np.array([[5, 9, 33], [70, 1, 0]], np.int32)
MASK = np.array([[1, 1, 1], [1, 1, 0]], bool)
INDEX = np.array([0, 0, 0, 1, 1])
KEY = jax.random.key(3)


class Server(http.server.ThreadingHTTPServer):
    """Completions of the policy in `folder`, read when it is asked to; `broken` makes another answer of one."""

    daemon_threads = False  # closing waits for answers under way: one that still samples at exit aborts the process

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder: pathlib.Path | None = None
        self.sampler: Sampler | None = None
        self.stops: tuple[int, ...] = SETTINGS["stop_tokens"]
        self.broken = lambda answer: answer
        self.asked: list[dict] = []
        self.reloads, self.turn = 0, threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def load(self) -> None:
        model = hf.load(self.folder)
        if self.sampler is None:
            self.sampler = Sampler(model, SamplingConfig(**SETTINGS | {"stop_tokens": self.stops}))
        self.sampler.update(model)
        self.reloads += 1


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.turn:  # one at a time
            if self.path == "/collective_rpc":
                assert body == {"method": "reload_weights"}
                server.load()
            answer = server.broken(self.complete(body)) if self.path == "/v1/completions" else None
        status, text = (200, json.dumps(answer)) if not isinstance(answer, int) else (answer, "no such\nmodel")
        with contextlib.suppress(ConnectionError):  # whoever asked may have stopped meanwhile
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"" if answer is None else text.encode())

    def complete(self, body: dict) -> dict:
        self.server.asked.append(body)
        assert tuple(body["stop_token_ids"]) == self.server.stops
        assert body["return_token_ids"] and body["temperature"] == 1.0 and body["top_k"] == -1
        out = self.server.sampler([body["prompt"]], [0], jax.random.key(body["seed"]), None, 16, [body["max_tokens"]])
        count = int(out.mask.sum())
        logprobs = out.logprobs[0, :count].tolist()
        choice = {"token_ids": out.tokens[0, :count].tolist(), "logprobs": {"token_logprobs": logprobs}}
        return {"choices": [choice]}

    def log_message(self, *_: object) -> None:
        """Silent."""


def said(tokens: list | None, logprobs: list) -> dict:
    return {"choices": [{"token_ids": tokens, "logprobs": {"token_logprobs": logprobs}}]}


@pytest.fixture
def server(tiny_folder: pathlib.Path) -> Iterator[Server]:
    with Server() as server:
        server.folder = tiny_folder
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_responses_are_of_the_policy_and_each_of_its_own_seed(server, tiny_model):
    server.load()
    served = ServedModel(server.url, "policy", SamplingConfig(**SETTINGS, slots=2))
    assert agreement.measure(served, tiny_model, PROMPTS, MASK, INDEX, INDEX, KEY, 1.0, 3).largest < 1e-4
    out, again = (served.rows(PROMPTS, MASK, INDEX, INDEX, KEY, np.array([3, 3, 1, 3, 2])) for _ in range(2))
    for one, two in zip(out, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert len({body["seed"] for body in server.asked}) == 5 and {body["model"] for body in server.asked} == {"policy"}
    lengths = out.mask.sum(1)
    assert (lengths <= [3, 3, 1, 3, 2]).all() and served.slot_steps == lengths.sum()
    last = out.tokens[np.arange(5), lengths - 1]
    np.testing.assert_array_equal(out.finished, np.isin(last, (1, 9)))
    assert (out.logprobs[out.mask] < 0).all() and not out.tokens[~out.mask].any()


@pytest.mark.slow
def test_a_run_by_a_served_model_brings_it_every_policy(server, configure, launch, tmp_path):
    at = tmp_path / "served"
    server.folder, server.stops = at, (1,)
    asked = (f"sampling.server={server.url}", f"sampling.server_folder={at}", "sampling.server_model=m")
    gate = ("sampling.gap_tolerance=1e-3", "run.steps=2")
    records = []
    assert launch(configure(*asked, *gate)).run(records.append)
    assert server.reloads == 2 and {body["model"] for body in server.asked} == {"m"}  # the gate's policy is step 1's
    assert [record["logprob_gap"] < 1e-3 for record in records] == [True, True]
    assert records[-1]["ledger"]["rollouts"] == 2 * 24


@pytest.mark.slow
def test_a_server_that_stops_reading_new_weights_ends_the_run_before_they_are_trained_on(
    server, configure, launch, tmp_path
):
    """The gate before the first step cannot see it: there the server has the right weights."""
    at, load = tmp_path / "served", server.load
    server.folder, server.stops = at, (1,)
    server.load = lambda: load() if server.reloads < 1 else None  # it says it has read them, and has not
    asked = (f"sampling.server={server.url}", f"sampling.server_folder={at}", "sampling.gap_tolerance=0.01")
    trainer, records = launch(configure(*asked, "train.learning_rate=0.1")), []
    with pytest.raises(agreement.Disagreement, match=r"^step 2: sampling\.gap_tolerance=0\.01: sampler and") as caught:
        trainer.run(records.append)
    assert "\n" not in str(caught.value) and isinstance(caught.value, BAD_INPUT_ERRORS)
    assert [record["step"] for record in records] == [1] and trainer.checkpoints.latest() == 1


@pytest.mark.slow  # the check itself is test_agreement's
def test_a_server_with_other_weights_is_refused(server, configure, launch, tmp_path, tiny_model):
    server.stops = (1,)
    server.load()
    server.sampler.update(jax.tree.map(lambda x: x * 1.5, tiny_model))
    server.load = lambda: None  # it says it has read them, and has not
    at = (f"sampling.server={server.url}", f"sampling.server_folder={tmp_path / 'served'}")
    trainer, records = launch(configure(*at, "sampling.gap_tolerance=0.05")), []
    with pytest.raises(agreement.Disagreement, match="sampler and trainer differ"):
        trainer.run(records.append)
    assert not records


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda answer: 404, "completions: status 404: no such model"),
        (lambda answer: [answer], "expected a JSON object, got list"),
        (lambda answer: {"choices": []}, "lacks token ids or log-probs"),
        (lambda answer: {"choices": [{"text": "hello"}]}, r"lacks token ids or log-probs \(KeyError\('token_ids'\)\)"),
        (lambda answer: said(None, []), "lacks token ids"),
        (lambda answer: said(["5"], [-1.0]), "lacks token ids"),
        (lambda answer: said([5], [None]), "lacks token ids"),
        (lambda answer: said([], []), "gave 0 tokens"),
        (lambda answer: said([4, 5], [-1.0]), "and 1 log-prob"),
        (lambda answer: said([-4, 5, 9], [-1.0] * 3), r"gave a token outside the vocabulary, of -4\.\.9"),
        (lambda answer: said([4, 128, 9], [-1.0] * 3), r"gave a token outside the vocabulary, of 4\.\.128"),
        (lambda answer: said([4, 5, 9], [-1.0, 0.5, -1.0]), r"gave a log-prob above 0, 0\.5"),
        (lambda answer: said([4, 9, 5], [-1.0] * 3), "went on behind a stop token; it must heed stop_token_ids"),
        (lambda answer: said([4, 5], [-1.0] * 2), "ended a response after 2 of 3 tokens, at no stop token"),
        (lambda answer: time.sleep(1.0), r"completions: no answer within 0\.2 s"),
    ],
)
def test_what_goes_wrong_is_one_line(server, tiny_model, broken, words):
    server.load()
    server.broken = broken
    Handler.complete, whole = lambda self, body: {}, Handler.complete
    try:
        with pytest.raises(ServerError, match=words) as caught:
            served = ServedModel(server.url, "policy", SamplingConfig(**SETTINGS, slots=1), timeout=0.2)
            served.update(tiny_model)
            served.rows(PROMPTS, MASK, INDEX[:1], INDEX[:1], KEY)
    finally:
        Handler.complete = whole
    assert "\n" not in str(caught.value) and server.url in str(caught.value)


def test_nobody_there():
    served = ServedModel("http://127.0.0.1:9/v1", "policy", SamplingConfig(**SETTINGS), timeout=5.0)
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:9/v1/completions: ConnectionRefusedError"):
        served.rows(PROMPTS, MASK, INDEX, INDEX, KEY)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"url": "localhost:8000"}, "url='localhost:8000': must start with"),
        ({"timeout": 0.0}, "timeout=0.0: must be above"),
        ({"config": SamplingConfig(max_new_tokens=3, top_k=3)}, "samples from the whole distribution"),
        ({"config": SamplingConfig(max_new_tokens=3, temperature=0.0)}, "samples from the whole distribution"),
        ({"config": SamplingConfig(max_new_tokens=3, cache_dtype="int8")}, "cache_dtype='int8': must be None"),
        ({"config": SamplingConfig(max_new_tokens=3, cache="paged")}, "cache='paged': must be auto"),
    ],
)
def test_what_a_server_cannot_do_is_refused(change, words):
    settings = {"url": "http://x/v1", "name": "m", "config": SamplingConfig(max_new_tokens=3)} | change
    with pytest.raises(ValueError, match=words):
        ServedModel(**settings)
