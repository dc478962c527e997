"""Small models and batches that the tests of this folder and `make_golden.py` share.

Weights come from an integer hash, not from a random generator, so that golden files stay valid with any version of
any library.
"""

import jax.numpy as jnp
import numpy as np

from gdro_jax.models import qwen3
from gdro_jax.models.rope import RopeScaling

BASE = qwen3.Qwen3Config(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,  # not 32 / 4
    rope_theta=10_000.0,
    max_positions=64,
)


def config(**changes: object) -> qwen3.Qwen3Config:
    """`BASE` with some fields changed."""
    fields = {name: getattr(BASE, name) for name in BASE.__dataclass_fields__}
    return qwen3.Qwen3Config(**(fields | changes))


CASES: dict[str, qwen3.Qwen3Config] = {
    "grouped_query": BASE,
    "multi_head": config(num_kv_heads=4),
    "one_kv_head": config(num_kv_heads=1),
    "head_is_width_over_heads": config(head_dim=8),
    "wide_head": config(head_dim=32, num_heads=2),
    "untied": config(tie_embeddings=False),
    "rope_base": config(rope_theta=1_000_000.0),
    "rope_base_small": config(rope_theta=50.0),
    "rope_yarn": config(rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_positions=16)),
    "rope_yarn_settings": config(
        rope_theta=500.0,
        head_dim=32,
        rope_scaling=RopeScaling(
            kind="yarn",
            factor=3.0,
            original_positions=40,
            beta_fast=4.0,
            beta_slow=0.5,
            attention_factor=1.3,
            truncate=False,
        ),
    ),
    "rope_linear": config(rope_scaling=RopeScaling(kind="linear", factor=2.5, original_positions=64)),
    "norm_eps": config(rms_norm_eps=0.1),
    "one_layer": config(num_layers=1),
    "five_layers": config(num_layers=5),
    "attention_bias": config(attention_bias=True),
    "bias_untied_multi_head": config(attention_bias=True, tie_embeddings=False, num_kv_heads=4, vocab_size=61),
    "sizes": config(vocab_size=80, hidden_size=24, intermediate_size=72, num_heads=6, num_kv_heads=3),
}

LENGTH = 11
MASKS = np.array(
    [
        [1] * LENGTH,
        [1] * 6 + [0] * 5,  # right padding
        [0] * 4 + [1] * 7,  # left padding
        [1] * 1 + [0] * 10,
    ],
    bool,
)

LONG_CASES = ("grouped_query", "rope_yarn_settings", "bias_untied_multi_head")
LONG_MASKS = np.stack(
    [
        np.ones(300, bool),
        np.arange(300) < 231,  # right padding
        np.arange(300) >= 69,  # left padding
        (np.arange(300) >= 33) & (np.arange(300) < 190),
    ]
)
LONG_PLACES = LONG_MASKS & np.isin(np.cumsum(LONG_MASKS, -1), (1, 64, 65, 129, 157, 231, 300))
"""The real tokens, by how many stand before them, whose logits are kept: beyond a block of every kernel."""


def hashed(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 numbers in [-1, 1), the same on every machine."""
    x = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's finaliser
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x = x ^ (x >> np.uint64(31))
    return ((x >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - 1).reshape(shape)


def make_model(cfg: qwen3.Qwen3Config, dtype: str = "float32") -> qwen3.Qwen3:
    """A model whose every parameter matters: norms away from one, biases away from zero, sharp attention."""
    arrays = {}
    for i, (name, spec) in enumerate(qwen3.param_specs(cfg).items()):
        noise = hashed(qwen3.stored_shape(cfg, spec), i + 1)
        values = 1 + 0.5 * noise if spec.scale is None else 0.4 * noise
        arrays[name] = jnp.asarray(values).astype(dtype)
    return qwen3.Qwen3(cfg, arrays)


def widened(model: qwen3.Qwen3) -> qwen3.Qwen3:
    """The same numbers in float32."""
    return qwen3.Qwen3(model.config, {name: x.astype(jnp.float32) for name, x in model.arrays().items()})


def make_tokens(cfg: qwen3.Qwen3Config, shape: tuple[int, ...], seed: int = 99) -> np.ndarray:
    """int32 token ids."""
    return ((hashed(shape, seed) + 1) / 2 * cfg.vocab_size).astype(np.int32)
