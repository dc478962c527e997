"""The published dense Qwen3 sizes (Qwen3 Technical Report, arXiv 2505.09388, table 1, and their `config.json`).

A checkpoint's own `config.json` always decides; these are for what needs no weights: planning memory, compiling ahead
of time, benchmarks with random weights.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from gdro_jax.models.config import Qwen3Config

_SMALL = Qwen3Config(
    vocab_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1_000_000.0,
    tie_embeddings=True,
    max_positions=32_768,
)


def _size(width: int, mlp: int, layers: int, heads: int, tied: bool) -> Qwen3Config:
    return dataclasses.replace(
        _SMALL, hidden_size=width, intermediate_size=mlp, num_layers=layers, num_heads=heads, tie_embeddings=tied
    )


PRESETS: Mapping[str, Qwen3Config] = MappingProxyType(
    {
        "0.6B": _SMALL,
        "1.7B": _size(2048, 6144, 28, 16, True),
        "4B": _size(2560, 9728, 36, 32, True),
        "8B": _size(4096, 12_288, 36, 32, False),
        "14B": _size(5120, 17_408, 40, 40, False),
        "32B": _size(5120, 25_600, 64, 64, False),
    }
)
"""`Qwen/Qwen3-SIZE-Base` by size; the chat models of the same sizes differ in `max_positions` (40,960) alone, and 32B,
of which no base was published, is given with the base models' 32,768."""
