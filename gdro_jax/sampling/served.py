"""Samples from a served model instead: an OpenAI-style completions endpoint that takes and gives token ids, as vLLM's.

The policy there must be the one that is trained. Whether it is, is the server's and the caller's affair (`push`), and
is checked, not believed: `training.agreement` compares its log-probs with the trainer's before a run starts, and some
responses of every step before they are trained on.
"""

import http.client
import json
import operator
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import jax
import numpy as np

from gdro_jax.models import qwen3
from gdro_jax.sampling.config import SamplingConfig
from gdro_jax.sampling.engine import Engine
from gdro_jax.sampling.rollouts import Progress, Rollouts

_ROUNDING = 1e-3  # above 0 that a log-prob of a token that is all but certain may come to


class ServerError(RuntimeError):
    """The server cannot be reached, refuses, or answers with something else than was asked for; one line."""


class _Said(NamedTuple):
    """One completion."""

    tokens: list[int]
    logprobs: list[float]
    stopped: bool


class ServedModel(Engine):
    """Samples by HTTP; stands in for `Sampler` in training and evaluation.

    The server has to return token ids (`return_token_ids`) and the log-probs of what it sampled from, temperature
    included: vLLM from 0.10.2 on, started with `--logprobs-mode processed_logprobs`. Rows are reproducible as far as
    the server's seeds are; unlike the sampler's they may depend on what else it decodes.

    Args:
      url: up to and with the version, such as `http://localhost:8000/v1`.
      name: what the server calls the model.
      config: as of the sampler; `slots` is how many requests are open at a time, 64 by default. What truncates the
        distribution is refused: the server would not tell the policy's own log-probs.
      timeout: seconds that one response may take.
      push: brings a policy to the server, called with every new one; None where the served model never changes.

    Raises:
      ValueError: a bad url or setting, or a configuration that truncates, is greedy, or keeps its cache otherwise.
    """

    def __init__(
        self,
        url: str,
        name: str,
        config: SamplingConfig,
        *,
        timeout: float = 600.0,
        push: Callable[[qwen3.Qwen3], None] | None = None,
    ):
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise ValueError(f"url={url!r}: must start with http:// or https://")
        if not 0 < timeout < float("inf"):
            raise ValueError(f"timeout={timeout}: must be above 0 seconds, and finite")
        if config.truncates or config.temperature == 0:
            raise ValueError("config: a served model samples from the whole distribution at a temperature above 0")
        if config.cache_dtype is not None:
            raise ValueError(f"cache_dtype={config.cache_dtype!r}: must be None; the server chooses its own")
        if config.cache != "auto":
            raise ValueError(f"cache={config.cache!r}: must be auto; the server chooses its own")
        self.config, self.slot_steps = config, 0
        self._url, self._name, self._timeout, self._push = url.rstrip("/"), name, timeout, push
        self._pushed: qwen3.Qwen3 | None = None
        self._vocab = float("inf")  # until a model is known

    def update(self, model: qwen3.Qwen3) -> None:
        """Samples from `model` from now on, if `push` brings it there."""
        self._vocab = model.config.vocab_size
        if self._push is not None and model is not self._pushed:
            self._push(model)
            self._pushed = model

    def stream(
        self,
        out: Rollouts,
        prompts: np.ndarray,
        prompt_mask: np.ndarray,
        index: np.ndarray,
        identity: np.ndarray,
        key: jax.Array,
        limits: np.ndarray | None = None,
    ) -> Iterator[Progress]:
        """As `Engine.stream`, a row at a time as responses arrive.

        Raises:
          ServerError: see there.
        """
        asked = [prompts[i][prompt_mask[i]].tolist() for i in index]
        limits = np.full(len(index), self.config.max_new_tokens) if limits is None else limits
        words = np.asarray(jax.random.key_data(key)).ravel().tolist()
        seeds = np.random.SeedSequence(words).generate_state(len(index)) >> 1
        self.slot_steps = done = 0
        pool = ThreadPoolExecutor(self.config.slots or 64, thread_name_prefix="served")
        try:
            waiting = {
                pool.submit(self._complete, asked[row], int(limits[row]), int(seeds[row])): row
                for row in range(len(index))
            }
            for future in as_completed(waiting):
                row, said = waiting[future], future.result()
                length = len(said.tokens)
                out.tokens[row, :length], out.mask[row, :length] = said.tokens, True
                out.logprobs[row, :length] = out.policy_logprobs[row, :length] = said.logprobs
                out.finished[row] = said.stopped
                self.slot_steps, done = self.slot_steps + length, done + 1
                yield Progress(np.array([row]), done, len(index), self.slot_steps, self.slot_steps)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _complete(self, prompt: list[int], limit: int, seed: int) -> _Said:
        body = {
            "model": self._name,
            "prompt": prompt,
            "max_tokens": limit,
            "temperature": self.config.temperature,
            "top_p": 1.0,  # this and the next three: a server may take other defaults from the model's folder
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": seed,
            "logprobs": 0,
            "return_token_ids": True,
            "stop_token_ids": list(self.config.stop_tokens),
            "ignore_eos": True,  # the stop tokens alone stop a row
        }
        try:
            (choice,) = post(f"{self._url}/completions", body, self._timeout)["choices"]
            tokens = [operator.index(token) for token in choice["token_ids"]]
            logprobs = [float(logprob) for logprob in choice["logprobs"]["token_logprobs"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(f"{self._url}: the answer lacks token ids or log-probs ({error!r})") from None
        if not 1 <= len(tokens) <= limit or len(tokens) != len(logprobs) or not all(np.isfinite(logprobs)):
            raise ServerError(
                f"{self._url}: gave {len(tokens)} tokens and {len(logprobs)} log-probs; "
                f"expected as many of both, finite, 1..{limit}"
            )
        if min(tokens) < 0 or max(tokens) >= self._vocab:
            raise ServerError(f"{self._url}: gave a token outside the vocabulary, of {min(tokens)}..{max(tokens)}")
        if max(logprobs) > _ROUNDING:
            raise ServerError(f"{self._url}: gave a log-prob above 0, {max(logprobs):g}")
        stops = self.config.stop_tokens
        if any(token in stops for token in tokens[:-1]):
            raise ServerError(f"{self._url}: went on behind a stop token; it must heed stop_token_ids")
        if len(tokens) < limit and tokens[-1] not in stops:
            raise ServerError(f"{self._url}: ended a response after {len(tokens)} of {limit} tokens, at no stop token")
        return _Said(tokens, logprobs, tokens[-1] in stops)


def reload(url: str, timeout: float) -> None:
    """Makes a vLLM server read its weights again from the folder it serves, and forget what it kept of old ones.

    It needs the server's development endpoints (`VLLM_SERVER_DEV_MODE=1`), which stand beside `/v1`.

    Raises:
      ServerError: see `post`.
    """
    root = url.rstrip("/").removesuffix("/v1")
    post(f"{root}/collective_rpc", {"method": "reload_weights"}, timeout)
    post(f"{root}/reset_prefix_cache", {}, timeout)


def post(url: str, body: dict[str, object], timeout: float) -> dict:
    """The answer to a JSON request, {} where it is empty.

    Raises:
      ServerError: no connection, no answer within `timeout` seconds, an error status, or no JSON object.
    """
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            got = json.loads(answer.read() or b"{}")
    except urllib.error.HTTPError as error:
        said = " ".join(error.read(500).decode(errors="replace").split())
        raise ServerError(f"{url}: status {error.code}: {said}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        late = isinstance(error, TimeoutError) or isinstance(reason, TimeoutError)
        raise ServerError(f"{url}: " + (f"no answer within {timeout} s" if late else repr(reason))) from None
    if not isinstance(got, dict):
        raise ServerError(f"{url}: expected a JSON object, got {type(got).__name__}")
    return got
