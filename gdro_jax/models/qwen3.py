"""The Qwen3 policy in Flax: `prefill` and `extend`, shared by the sampler and the trainer.

`prefill` runs each prompt once and returns its keys and values; `extend` runs whole responses over them (trainer), and
`decode.decode` one token at a time with a cache (sampler). All go through `run_block`, so sampler and trainer cannot
disagree. Blocks are stacked on a leading axis and scanned here, or looped over in decoding of more than
`decode.UNROLLED` layers: program size does not grow with depth.

Architecture: Qwen3 Technical Report, arXiv 2505.09388 (section 2), as published in `Qwen/Qwen3-*-Base`.
Letters: P prompts, R rows, L prompt tokens, T response tokens, S any sequence, D width, H heads, K KV heads,
C head size, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from gdro_jax import precision
from gdro_jax.models import attention, lora, rope
from gdro_jax.models.config import ParamSpec, Qwen3Config, num_params, param_specs, stored_shape

__all__ = [
    "ParamSpec", "PromptKV", "Qwen3", "Qwen3Config", "adapted", "block_weights", "embed_tokens", "extend", "final_norm",
    "init", "logits", "num_params", "param_specs", "prefill", "remembered", "rotation", "run_block", "stored_shape",
    "unembed", "unembed_weight", "working",
]  # fmt: skip

Aux = TypeVar("Aux")
REMAT = ("none", "products", "block")


class Qwen3(nnx.Module):
    """A Qwen3 decoder: a pytree of `nnx.Param` arrays, one attribute per entry of `param_specs(config)`.

    It works directly under `jax.jit`, `jax.grad` and optax. Weights are cast to the compute dtype where they are
    used, a layer at a time, so float32 parameters can be trained with bfloat16 arithmetic. Whatever the dtypes,
    norms, rotary embedding, attention weights and logits are float32, and so is a sum inside a matrix product as far
    as one device makes it; products with a layer's weights are rounded to the compute dtype, and where a mesh splits
    such a sum the parts are rounded before they are added.

    Args:
      config: the architecture (static).
      arrays: one array per name of `param_specs(config)`, of shape `stored_shape(config, spec)`.
      compute_dtype: of activations and of matrix products' inputs (static); None for the parameters' own.
      remat: what the backward pass finds kept of a block's forward pass (static): `none` keeps what products and
        attention take and give, `products` the results of matrix products with weights, `block` the block's input
        alone; the rest is made again. It changes no result.
      kernel: of attention over padded prompts and responses (static), as `attention.choose` gives it.
      adapters: low-rank changes of some of the matrices, None for none.

    Raises:
      ValueError: a missing or unexpected name, a wrong shape, or an unknown `remat` or `kernel`.
    """

    embed: nnx.Param[jax.Array]
    final_norm: nnx.Param[jax.Array]
    lm_head: nnx.Param[jax.Array]  # only where the head is not tied

    def __init__(
        self,
        config: Qwen3Config,
        arrays: dict[str, jax.Array],
        compute_dtype: str | None = None,
        remat: str = "none",
        kernel: str = "xla",
        adapters: lora.Adapters | None = None,
    ):
        specs = param_specs(config)
        if set(specs) != set(arrays):
            raise ValueError(f"parameters differ from the configuration: {sorted(set(specs) ^ set(arrays))}")
        for name, spec in specs.items():
            want = stored_shape(config, spec)
            if tuple(arrays[name].shape) != want:
                raise ValueError(f"{name}: shape {tuple(arrays[name].shape)}, the configuration needs {want}")
        if remat not in REMAT:
            raise ValueError(f"remat={remat!r}: must be one of {', '.join(REMAT)}")
        if kernel not in (*attention.KERNELS, attention.INTERPRETED):
            raise ValueError(f"kernel={kernel!r}: must be one of {', '.join(attention.KERNELS)}")
        self.config = config
        self.compute_dtype = compute_dtype
        self.remat = remat
        self.kernel = kernel
        factors = {} if adapters is None else adapters.arrays
        self.adapted, self.lora_scale = tuple(factors), None if adapters is None else adapters.scale
        for name, array in factors.items():
            setattr(self, name, nnx.Param(array))
        for name in specs:
            setattr(self, name, nnx.Param(arrays[name]))

    def arrays(self) -> dict[str, jax.Array]:
        """The parameters by name, in the order of `param_specs`."""
        return {name: getattr(self, name)[...] for name in param_specs(self.config)}

    def adapters(self) -> lora.Adapters | None:
        """The adapters, None without."""
        if self.lora_scale is None:
            return None
        return lora.Adapters(arrays={name: getattr(self, name)[...] for name in self.adapted}, scale=self.lora_scale)


class PromptKV(NamedTuple):
    """Keys and values of prompts: k, v [layers, P, L, K, C]; mask bool[P, L]; length int32[P] real tokens."""

    k: jax.Array
    v: jax.Array
    mask: jax.Array
    length: jax.Array


def init(config: Qwen3Config, key: jax.Array, dtype: str = "float32") -> Qwen3:
    """A randomly initialised model (normal 0.02, norms one), every parameter from its own folded key."""
    arrays = {}
    for i, (name, spec) in enumerate(param_specs(config).items()):
        shape = stored_shape(config, spec)
        if spec.scale is None:
            arrays[name] = jnp.ones(shape, dtype)
        else:
            noise = jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
            arrays[name] = (spec.scale * noise).astype(dtype)
    return Qwen3(config, arrays)


def adapted(base: Qwen3, adapters: lora.Adapters) -> Qwen3:
    """The base with the adapters on it; it computes with their sum."""
    return Qwen3(base.config, base.arrays(), base.compute_dtype, base.remat, base.kernel, adapters)


def working(model: Qwen3) -> Qwen3:
    """The model as it computes: adapters merged, every parameter in the compute dtype. Itself if it is so already."""
    dtype, adapters = _compute_dtype(model), model.adapters()
    arrays = model.arrays()
    if adapters is None and all(array.dtype == dtype for array in arrays.values()):
        return model
    low = {} if adapters is None else adapters.scaled()
    cast = {
        name: lora.merged(x, low[f"{name}_a"], low[f"{name}_b"], str(dtype)) if f"{name}_a" in low else x.astype(dtype)
        for name, x in arrays.items()
    }
    return Qwen3(model.config, cast, model.compute_dtype, model.remat, model.kernel)


def unembed_weight(model: Qwen3) -> jax.Array:
    """The output matrix [V, D] in the compute dtype: the embedding itself when the head is tied."""
    weight = model.embed[...] if model.config.tie_embeddings else model.lm_head[...]
    return weight.astype(_compute_dtype(model))


def unembed(model: Qwen3, hidden: jax.Array) -> jax.Array:
    """Logits float32[..., V] of final hidden states [..., D]."""
    return precision.einsum("...d,vd->...v", hidden, unembed_weight(model))


def logits(model: Qwen3, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Logits of whole sequences.

    Args:
      tokens: int32[N, S].
      mask: bool[N, S]; padding may stand anywhere, positions count real tokens only.

    Returns:
      float32[N, S, V]; entries at padding are finite and meaningless.
    """
    hidden, _ = _full(model, tokens, mask)
    return unembed(model, final_norm(model, hidden))


def prefill(model: Qwen3, tokens: jax.Array, mask: jax.Array) -> tuple[PromptKV, jax.Array]:
    """Runs every prompt once.

    Args:
      tokens: int32[P, L], padded on the right.
      mask: bool[P, L].

    Returns:
      The prompts' keys and values, and the final hidden state [P, D] of each prompt's last token, from which
      the first response token is predicted.
    """
    hidden, (k, v) = _full(model, tokens, mask)
    length = mask.sum(-1, dtype=jnp.int32)
    last = jnp.take_along_axis(hidden, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]
    return PromptKV(k, v, mask, length), final_norm(model, last)


def extend(model: Qwen3, tokens: jax.Array, mask: jax.Array, kv: PromptKV, prompt_index: jax.Array) -> jax.Array:
    """Runs whole responses over their prompts' keys and values (teacher forcing).

    Args:
      tokens: int32[R, T], padded on the right.
      mask: bool[R, T].
      kv: of P prompts.
      prompt_index: int32[R], the prompt of each row.

    Returns:
      Final hidden states [R, T, D]; position t predicts response token t + 1.
    """
    steps = jnp.arange(tokens.shape[1])
    turn = rotation(model.config, kv.length[prompt_index][:, None] + steps)
    causal = attention.causal(model.kernel, mask, kv.mask[prompt_index])

    def block(x: jax.Array, layer: tuple) -> tuple[jax.Array, None]:
        weights, shared_k, shared_v = layer

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            return causal(q, k, v, (shared_k[prompt_index], shared_v[prompt_index])), None

        return run_block(model.config, weights, x, turn, attend)

    layers = (block_weights(model), kv.k, kv.v)
    x, _ = jax.lax.scan(remembered(model, block), embed_tokens(model, jnp.where(mask, tokens, 0)), layers)
    return final_norm(model, x)


def _full(model: Qwen3, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Causal self-attention over whole sequences: hidden states before the final norm, and keys and values."""
    turn = rotation(model.config, jnp.maximum(jnp.cumsum(mask, -1) - 1, 0))
    causal = attention.causal(model.kernel, mask)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return causal(q, k, v), (k, v)

    def block(x: jax.Array, weights: dict[str, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return run_block(model.config, weights, x, turn, attend)

    return jax.lax.scan(remembered(model, block), embed_tokens(model, jnp.where(mask, tokens, 0)), block_weights(model))


def remembered(model: Qwen3, block: Callable) -> Callable:
    """A block to be scanned over, keeping for its backward pass what `model.remat` says."""
    if model.remat == "none":
        return block
    kept = None if model.remat == "block" else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(block, prevent_cse=False, policy=kept)  # a scan's body cannot be merged with its backward


def _compute_dtype(model: Qwen3) -> jnp.dtype:
    return jnp.dtype(model.compute_dtype or model.embed.dtype)


def embed_tokens(model: Qwen3, tokens: jax.Array) -> jax.Array:
    """Embeddings [..., D]; cast after rows are taken: gradients of a token's many occurrences add up in float32."""
    return jnp.take(model.embed[...], tokens, axis=0).astype(_compute_dtype(model))


def final_norm(model: Qwen3, x: jax.Array) -> jax.Array:
    """The norm [..., D] before the output matrix."""
    return _rms_norm(x, model.final_norm[...].astype(x.dtype), model.config.rms_norm_eps)


def block_weights(model: Qwen3) -> dict[str, jax.Array]:
    """The stacked parameters by name, and adapters, what blocks are scanned over."""
    adapters = model.adapters()
    stacked = {name: getattr(model, name)[...] for name, spec in param_specs(model.config).items() if spec.stacked}
    return stacked if adapters is None else stacked | adapters.scaled()


def run_block(
    config: Qwen3Config,
    weights: dict[str, jax.Array],
    x: jax.Array,
    turn: tuple[jax.Array, jax.Array],
    attend: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Aux]],
) -> tuple[jax.Array, Aux]:
    """One pre-norm block: x [N, S, D], `turn` from `rotation`; `attend` does the mixing and returns what it keeps."""
    w = lora.effective(weights, x.dtype)
    mixed, aux = attend(*_queries_keys_values(config, w, x, turn))
    x = x + _matmul(mixed.reshape(*x.shape[:2], -1), w["o_proj"]) + w.get("o_bias", 0)
    return x + _feed_forward(config, w, x), aux


# Between two matrix products nothing is kept for the backward pass: what is done to their results is cheaper to do
# again than to write and read. (`prevent_cse` is for code outside of a scan.)
_products_kept = functools.partial(
    jax.checkpoint,
    static_argnums=0,
    prevent_cse=False,
    policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
)


@_products_kept
def _queries_keys_values(
    c: Qwen3Config, w: dict[str, jax.Array], x: jax.Array, turn: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    h = _rms_norm(x, w["input_norm"], c.rms_norm_eps)
    q, k, v = (_heads(_matmul(h, w[f"{n}_proj"]) + w.get(f"{n}_bias", 0), c.head_dim) for n in "qkv")
    q = rope.rotate(_rms_norm(q, w["q_norm"], c.rms_norm_eps), turn)
    k = rope.rotate(_rms_norm(k, w["k_norm"], c.rms_norm_eps), turn)
    return q, k, v


@_products_kept
def _feed_forward(c: Qwen3Config, w: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    h = _rms_norm(x, w["post_norm"], c.rms_norm_eps)
    gated = jax.nn.silu(_matmul(h, w["gate_proj"])) * _matmul(h, w["up_proj"])
    return _matmul(gated, w["down_proj"])


def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """[..., in] by [in, out] as one matrix product: on CPU the weights' gradient is then twice as fast."""
    product = jnp.matmul(x.reshape(-1, x.shape[-1]), w, precision=precision.of(x, w))
    return product.reshape(*x.shape[:-1], -1)


def _heads(x: jax.Array, head_dim: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], -1, head_dim)


def _rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return scale * normed.astype(x.dtype)


def rotation(config: Qwen3Config, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `run_block` turns queries and keys by at positions int32[N, S]."""
    return rope.rotation(config.head_dim, config.rope_theta, config.rope_scaling, positions)
