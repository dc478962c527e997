"""Writes golden/logits.npz: what transformers' Qwen3ForCausalLM in float32 gives for every case of `model_cases`.

And golden/long.npz: the same of some of the cases over 300 tokens, at a few of them.

Run from the repository root with torch installed: `python tests/models/make_golden.py`.
"""

import pathlib
import tempfile

import numpy as np
import torch
import transformers
from model_cases import CASES, LONG_CASES, LONG_MASKS, LONG_PLACES, MASKS, make_model, make_tokens

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


def main() -> None:
    torch.set_num_threads(1)
    logits = {
        name: reference(make_model(cfg), make_tokens(cfg, MASKS.shape), MASKS) * MASKS[..., None]
        for name, cfg in CASES.items()
    }
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / "logits.npz", **{name: array.astype(np.float32) for name, array in logits.items()})
    np.savez_compressed(FOLDER / "long.npz", **{name: long(name) for name in LONG_CASES})


if __name__ == "__main__":
    main()
