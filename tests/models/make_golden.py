"""Writes golden/logits.npz: what transformers' Qwen3ForCausalLM in float32 gives for every case of `model_cases`.

Run from the repository root with torch installed: `python tests/models/make_golden.py`.
"""

import pathlib
import tempfile

import numpy as np
import torch
import transformers
from model_cases import CASES, MASKS, make_model, make_tokens

from gdro_jax.models import hf, qwen3

GOLDEN = pathlib.Path(__file__).parent / "golden" / "logits.npz"


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


def main() -> None:
    torch.set_num_threads(1)
    logits = {
        name: reference(make_model(cfg), make_tokens(cfg, MASKS.shape), MASKS) * MASKS[..., None]
        for name, cfg in CASES.items()
    }
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **{name: array.astype(np.float32) for name, array in logits.items()})


if __name__ == "__main__":
    main()
