"""Time and peak host memory of loading a checkpoint of a published size, on one device and on eight.

    python experiments/benchmarks/model_loading.py --size 1.7B --folder SCRATCH --out results.json

Writes a checkpoint of random bfloat16 numbers into SCRATCH (removed at the end), then loads it in a fresh process per
setting. On the CPU a device's memory is the host's, so the peak must hold the model itself; what counts is how much
more it holds. `anonymous` is memory that the process asked for; `resident` also counts pages of the mapped files,
which the system takes back when it needs them.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from gdro_jax.models import checkpoint
from gdro_jax.models.presets import PRESETS

SETTINGS = {
    "one device, bfloat16": (1, "bfloat16"),
    "eight devices, bfloat16": (8, "bfloat16"),
    "one device, float32": (1, "float32"),
}
SHARD_BYTES = 1_000_000_000


def main() -> None:
    """Makes the checkpoint, measures every setting, removes it again."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--size", choices=PRESETS, default="1.7B")
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="made, and removed at the end")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    known = parser.parse_args()
    known.folder.mkdir(parents=True)
    try:
        facts = make(known.size, known.folder)
        rows = {name: in_own_process(known.folder, *setting) for name, setting in SETTINGS.items()}
    finally:
        shutil.rmtree(known.folder)
    text = json.dumps({"size": known.size, **facts, "cores": len(os.sched_getaffinity(0)), "loads": rows}, indent=2)
    known.out.write_text(text + "\n")
    print(text)


def make(size: str, folder: pathlib.Path) -> dict[str, int]:
    """A checkpoint of random numbers, in shards; bytes of all its tensors and of the largest."""
    config, rng, shard, number, places = PRESETS[size], np.random.default_rng(0), {}, 0, {}
    sizes = []
    shapes = list(checkpoint.expected_shapes(config).items())
    for name, shape in shapes:
        noise = rng.integers(0, 2**14, shape, np.uint16)  # bfloat16 of a small size, never infinite
        shard[name] = noise.view(ml_dtypes.bfloat16)
        sizes.append(noise.nbytes)
        if sum(x.nbytes for x in shard.values()) > SHARD_BYTES or name == shapes[-1][0]:
            number += 1
            save_file(shard, folder / f"model-{number}.safetensors")
            places |= dict.fromkeys(shard, f"model-{number}.safetensors")
            shard = {}
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    (folder / checkpoint.INDEX_FILE).write_text(json.dumps({"weight_map": places}))
    return {"file_bytes": sum(sizes), "largest_tensor_bytes": max(sizes)}


def in_own_process(folder: pathlib.Path, devices: int, dtype: str) -> dict[str, float]:
    """What `load` below says, from a fresh interpreter with so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = f"import model_loading; model_loading.load({str(folder)!r}, {devices}, {dtype!r})"
    here = pathlib.Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", command], env=environment, cwd=here, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def load(folder: str, devices: int, dtype: str) -> None:
    """Loads and prints one JSON line: seconds and bytes above what the process held before."""
    import jax

    from gdro_jax.models import hf

    mesh = None if devices == 1 else jax.make_mesh((devices,), ("fsdp",))
    jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.ones(8)))  # the runtime's own memory is there from now on
    before, peaks, done = memory(), {"RssAnon": 0, "VmRSS": 0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            for name, now in memory().items():
                peaks[name] = max(peaks[name], now)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    model = jax.block_until_ready(hf.load(folder, dtype=dtype, mesh=mesh))
    seconds = time.perf_counter() - begun
    done.set()
    watcher.join()
    leaves = jax.tree.leaves(model)
    shards = [sum(leaf.addressable_shards[d].data.nbytes for leaf in leaves) for d in range(devices)]
    held = sum(leaf.nbytes for leaf in leaves)
    anonymous = peaks["RssAnon"] - before["RssAnon"]
    result = {
        "seconds": round(seconds, 1),
        "model_bytes": held,
        "bytes_on_each_device": shards if devices > 1 else [held],
        "peak_anonymous_bytes": anonymous,
        "peak_anonymous_over_model": round(anonymous / held, 3),
        "peak_resident_bytes": peaks["VmRSS"] - before["VmRSS"],
    }
    print(json.dumps(result))


def memory() -> dict[str, int]:
    """Bytes of this process now: asked for, and resident with mapped files."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split(":")[1] for line in lines}
    return {name: int(found[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS")}


if __name__ == "__main__":
    main()
