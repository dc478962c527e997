"""The policy's optimiser: AdamW, Adafactor or Muon from optax, a schedule, a clip of the gradient's global norm.

Adafactor, arXiv 1804.04235, is without its scaling by the parameters' size, so that learning rates read as AdamW's.
Muon (K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024) takes the blocks' matrices, each
layer for itself, with update sizes matched to AdamW's (arXiv 2502.16982, section 2.2); everything else goes to AdamW,
both with Nesterov momentum.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from optax import contrib

from gdro_jax.training.config import TrainConfig

FACTORED_FROM = 128  # a matrix's second moment is factored where both its sides are at least so long


def make_optimiser(config: TrainConfig) -> optax.GradientTransformation:
    """The configured rule behind a clip of the gradient's global norm.

    `moment_dtype` is of the first moment (AdamW's, or Muon's momentum). The second moment is float32 always: near 1 a
    bfloat16 number moves in steps of 1/128, more than `1 - adam_b2` often asks of it, and would stand still. Updates
    are float32, too, and rounded to the parameters' dtype once they are applied.
    """
    rate, decay = learning_rate(config), config.weight_decay
    if config.optimiser == "adafactor":
        rule = optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=FACTORED_FROM),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(decay),
            optax.scale_by_learning_rate(rate),
        )
    elif config.optimiser == "muon":
        rule = contrib.muon(
            rate,
            weight_decay=decay,
            mu_dtype=config.moment_dtype,
            adam_b1=config.adam_b1,
            adam_b2=config.adam_b2,
            eps=config.adam_eps,
            adam_weight_decay=decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_layer_matrices,
        )
    else:
        rule = optax.adamw(
            rate,
            config.adam_b1,
            config.adam_b2,
            config.adam_eps,
            mu_dtype=config.moment_dtype,
            weight_decay=decay,
        )
    return _in_float32(optax.chain(optax.clip_by_global_norm(config.max_grad_norm), rule))


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Update number (from 0) to learning rate: linear warm-up, then constant or down to `final_rate` of the peak."""
    peak, warm = config.learning_rate, float(config.warmup_steps)  # whole numbers may be above int32

    def rate(count: ArrayLike) -> jax.Array:
        done = jnp.asarray(count, jnp.float32)
        rising = peak * jnp.minimum(1.0, (done + 1) / max(warm, 1.0))
        if config.decay is None or config.decay_steps is None:
            return rising
        gone = jnp.clip((done - warm) / float(config.decay_steps), 0.0, 1.0)
        left = 0.5 * (1 + jnp.cos(jnp.pi * gone)) if config.decay == "cosine" else 1 - gone
        return rising * (config.final_rate + (1 - config.final_rate) * left)

    return rate


def _in_float32(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """The rule for parameters of any dtype: left to itself optax gives its state theirs."""

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return rule.update(wide(grads), state, wide(params))

    return optax.GradientTransformation(lambda params: rule.init(wide(params)), update)


def _layer_matrices(params: Any) -> Any:
    """Which parameters Muon takes: [layers, in, out], layer by layer; None for the rest."""
    dims = contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
    return jax.tree.map(lambda p: dims if p.ndim == 3 else None, params)
