"""Writes golden/logits.npz: what transformers' Qwen3ForCausalLM in float32 gives for every case of `model_cases`.

And golden/long.npz: the same of some of the cases over 300 tokens, at a few of them. And golden/bfloat16.json: the mean
error of its logits in bfloat16, as a share of the largest, against float32 on the same bfloat16 weights.

Run from the repository root with torch installed: `python tests/models/make_golden.py`.
"""

import json
import pathlib
import tempfile

import numpy as np
import torch
import transformers
from model_cases import CASES, LONG_CASES, LONG_MASKS, LONG_PLACES, MASKS, make_model, make_tokens, widened

from gdro_jax.models import hf, qwen3

FOLDER = pathlib.Path(__file__).parent / "golden"


def reference(model: qwen3.Qwen3, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits float32[N, S, V] of the same weights in transformers, through a saved folder."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save(model, pathlib.Path(folder) / "model")
        theirs = transformers.Qwen3ForCausalLM.from_pretrained(pathlib.Path(folder) / "model", local_files_only=True)
    positions = np.maximum(np.cumsum(mask, -1) - 1, 0)
    with torch.no_grad():
        out = theirs.eval()(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=torch.tensor(mask).long(),
            position_ids=torch.tensor(positions),
        )
    return out.logits.float().numpy()


def long(name: str) -> np.ndarray:
    """Logits float32[n, V] of a case at the `LONG_PLACES`."""
    tokens = make_tokens(CASES[name], LONG_MASKS.shape, seed=7)
    return reference(make_model(CASES[name]), tokens, LONG_MASKS)[LONG_PLACES]


def bfloat16(name: str) -> float:
    """The mean error in bfloat16 of a case."""
    tokens, low = make_tokens(CASES[name], MASKS.shape), make_model(CASES[name], "bfloat16")
    exact = reference(widened(low), tokens, MASKS)[MASKS]
    return float(np.abs(reference(low, tokens, MASKS)[MASKS] - exact).mean() / np.abs(exact).max())


def main() -> None:
    torch.set_num_threads(1)
    logits = {
        name: reference(make_model(cfg), make_tokens(cfg, MASKS.shape), MASKS) * MASKS[..., None]
        for name, cfg in CASES.items()
    }
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / "logits.npz", **{name: array.astype(np.float32) for name, array in logits.items()})
    np.savez_compressed(FOLDER / "long.npz", **{name: long(name) for name in LONG_CASES})
    errors = {name: float(f"{bfloat16(name):.4g}") for name in CASES}
    (FOLDER / "bfloat16.json").write_text(json.dumps(errors, indent=2) + "\n")


if __name__ == "__main__":
    main()
