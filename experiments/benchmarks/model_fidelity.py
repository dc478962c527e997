"""Largest difference of logits from transformers' Qwen3, by configuration and precision (needs torch).

    python experiments/benchmarks/model_fidelity.py --out results.json

Weights are the tests' own (norms away from one, sharp attention, biases away from zero). Errors are shares of the
largest logit, at real tokens, over the tests' padding patterns and over one row of 700 tokens. In bfloat16 both sides
are compared with transformers in float32 on the same bfloat16 weights: the second column is what bfloat16 itself costs.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tests" / "models"))
from model_cases import CASES, MASKS, make_model, make_tokens

from gdro_jax.models import hf, qwen3
from gdro_jax.models.presets import PRESETS

LONG = np.arange(700)[None] < np.array([[700]])
SHAPE_OF_1_7B = dataclasses.replace(PRESETS["1.7B"], vocab_size=2048, num_layers=3, max_positions=1024)


def main() -> None:
    """Measures every case and writes one JSON object."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    known = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: measure(cfg, MASKS) for name, cfg in CASES.items()}
    rows["grouped_query, 700 tokens"] = measure(dataclasses.replace(CASES["grouped_query"], max_positions=1024), LONG)
    rows["rope_yarn, 700 tokens"] = measure(dataclasses.replace(CASES["rope_yarn"], max_positions=1024), LONG)
    rows["width and heads of 1.7B, 3 layers"] = measure(SHAPE_OF_1_7B, MASKS, scale=0.06)
    versions = {"jax": jax.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    known.out.write_text(json.dumps({"versions": versions, "backend": jax.default_backend(), "errors": rows}, indent=2))


def measure(cfg: qwen3.Qwen3Config, mask: np.ndarray, scale: float = 1.0) -> dict[str, float]:
    """Errors of one configuration in both precisions."""
    model, tokens = scaled(make_model(cfg), scale), make_tokens(cfg, mask.shape)
    low = qwen3.Qwen3(cfg, {name: x.astype(jnp.bfloat16) for name, x in model.arrays().items()})
    high = qwen3.Qwen3(cfg, {name: x.astype(jnp.float32) for name, x in low.arrays().items()})
    exact = reference(high, tokens, mask)
    bfloat16 = [error(x, exact, mask) for x in (ours(low, tokens, mask), reference(low, tokens, mask))]
    return {
        "float32": error(ours(model, tokens, mask), reference(model, tokens, mask), mask),
        "bfloat16": bfloat16[0],
        "bfloat16_of_transformers": bfloat16[1],
    }


def scaled(model: qwen3.Qwen3, scale: float) -> qwen3.Qwen3:
    """The matrices multiplied: wide layers need smaller weights to keep attention from saturating."""
    arrays = {name: x if "norm" in name else x * scale for name, x in model.arrays().items()}
    return qwen3.Qwen3(model.config, arrays)


def ours(model: qwen3.Qwen3, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits float32[N, S, V]."""
    return np.asarray(jax.jit(qwen3.logits)(model, tokens, mask))


def reference(model: qwen3.Qwen3, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits float32[N, S, V] of the same weights in transformers, through a saved folder, in the weights' dtype."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save(model, pathlib.Path(folder) / "model")
        theirs = transformers.Qwen3ForCausalLM.from_pretrained(pathlib.Path(folder) / "model", local_files_only=True)
    positions = torch.tensor(np.maximum(np.cumsum(mask, -1) - 1, 0))
    with torch.no_grad():
        out = theirs.eval()(torch.tensor(tokens).long(), torch.tensor(mask).long(), position_ids=positions)
    return out.logits.float().numpy()


def error(got: np.ndarray, want: np.ndarray, mask: np.ndarray) -> float:
    """Largest difference at real tokens as a share of the largest logit there."""
    return float(np.abs(got - want)[mask].max() / np.abs(want[mask]).max())


if __name__ == "__main__":
    main()
