# ruff: noqa: E402
"""Eight host devices on the CPU for every test, and the small model folder that several rooms share."""

import os
import pathlib
import sys

# Tests are made of many small programs: compiling them takes most of the time, and halves without optimisation.
for flag, value in (("--xla_force_host_platform_device_count", 8), ("--xla_backend_optimization_level", 0)):
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests, and the processes that they start, compile the same programs: each is compiled once and kept.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import importlib.resources
import signal
from collections.abc import Iterator

import hypothesis
import jax
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # whatever pytest's import mode
import small_tokenizer

from gdro_jax.models import hf, qwen3

# The gate draws the same examples every time; `HYPOTHESIS_PROFILE=explore` draws new ones.
hypothesis.settings.register_profile("gate", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))

EMBEDDED = pathlib.Path(str(importlib.resources.files("gdro_jax") / "embedded" / "base"))
TINY = qwen3.Qwen3Config(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    rope_theta=10_000.0,
    max_positions=128,
)


@pytest.fixture(scope="session")
def tiny_model() -> qwen3.Qwen3:
    """A random policy whose next-token distributions are far from uniform."""
    arrays = qwen3.init(TINY, jax.random.key(7)).arrays()
    return qwen3.Qwen3(TINY, {name: x if "norm" in name else x * 12.0 for name, x in arrays.items()})


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: qwen3.Qwen3) -> pathlib.Path:
    """The same policy as a Hugging Face folder with the tokenizer that ships with the package."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    hf.save(tiny_model, folder, tokenizer_from=EMBEDDED)
    return folder


@pytest.fixture(scope="session", params=["made here", "published"])
def qwen_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a tokenizer of Qwen3's kind: a small one, and the published one where it is at hand."""
    if request.param == "made here":
        return small_tokenizer.make(tmp_path_factory.mktemp("qwen") / "tokenizer")
    if "GDRO_SHARED_DATA" not in os.environ:
        pytest.skip("GDRO_SHARED_DATA (the folder of real data) is not set")
    return pathlib.Path(os.environ["GDRO_SHARED_DATA"]) / "qwen3_tokenizer"


@pytest.fixture(autouse=True)
def forget_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process may hold 65,530 pieces of memory, and dies of more; eight devices' programs take 10,000 a long test."""
    yield
    held = pathlib.Path("/proc/self/maps")
    if request.node.get_closest_marker("slow") and held.exists() and held.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def keep_signal_handlers() -> Iterator[None]:
    """The command line takes the signals over; tests give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
