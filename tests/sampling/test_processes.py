"""The same tokens from two processes, each with a half of the devices, as from one device."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from gdro_jax.models import hf
from gdro_jax.models.qwen3 import Qwen3, param_specs
from gdro_jax.models.sharding import param_sharding
from gdro_jax.sampling import Sampler, SamplingConfig

PROMPTS = [[5, 9, 33], [70], [12, 13, 14, 15, 16, 17], [99, 3]]
INDEX = np.repeat(np.arange(4), [5, 3, 1, 6])  # 15 rows over 2 or 4 shards
CONFIG = SamplingConfig(max_new_tokens=10, stop_tokens=(3, 17, 40), segment=4, slots=8)
PAGED = dataclasses.replace(CONFIG, cache="paged", page_tokens=4)
CASES = (
    ({"data": 4}, CONFIG),
    ({"data": 2, "tensor": 2}, CONFIG),
    ({"data": 4}, PAGED),
    ({"data": 2, "tensor": 2}, PAGED),
)


def one_of_two(folder: str, out: str, address: str, number: int) -> None:
    """What each process runs: the meshes span both."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, number)
    assert jax.process_count() == 2 and len(jax.devices()) == 4 and len(jax.local_devices()) == 2
    plain = hf.load(folder)
    for which, (shape, config) in enumerate(CASES):
        types = (jax.sharding.AxisType.Auto,) * len(shape)
        mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=types)
        specs = param_specs(plain.config)
        arrays = {}
        for name, array in plain.arrays().items():
            whole, place = np.asarray(array), param_sharding(plain.config, specs[name], mesh)
            arrays[name] = jax.make_array_from_callback(whole.shape, place, lambda part, whole=whole: whole[part])
        got = Sampler(Qwen3(plain.config, arrays), config, mesh)(PROMPTS, INDEX, jax.random.key(11))
        np.savez(f"{out}-{which}-{number}.npz", **got._asdict())


@pytest.mark.slow
def test_two_processes_sample_what_one_does(tiny_model: Qwen3, tiny_folder: pathlib.Path, tmp_path: pathlib.Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    devices = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, str(tiny_folder), str(tmp_path / "got"), address]
    pair = [subprocess.Popen([*command, str(number)], env=environment) for number in range(2)]
    try:
        assert [process.wait(timeout=400) for process in pair] == [0, 0]
    finally:
        for process in pair:
            process.kill()
    alone = Sampler(tiny_model, CONFIG)(PROMPTS, INDEX, jax.random.key(11))
    for which in range(len(CASES)):
        for number in range(2):
            got = np.load(tmp_path / f"got-{which}-{number}.npz")
            for name in ("tokens", "mask", "finished"):
                np.testing.assert_array_equal(got[name], getattr(alone, name))
            np.testing.assert_allclose(got["logprobs"], alone.logprobs, atol=1e-5)


if __name__ == "__main__":
    one_of_two(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
