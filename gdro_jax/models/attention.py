"""Causal grouped-query attention: one meaning, from a maintained kernel on every platform, chosen by one function.

`xla` is plain JAX and runs everywhere. `cudnn` is cuDNN's flash attention by way of `jax.nn.dot_product_attention`, on
NVIDIA GPUs. `splash` is JAX's Pallas kernel for TPUs (`jax.experimental.pallas.ops.tpu.splash_attention`). The last two
never hold the weights of all queries and keys.
Letters: N sequences, S queries, B keys before them, U = B + S keys, H heads, K KV heads, C head size.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from gdro_jax.models.recompute import attend
from gdro_jax.models.sharding import TENSOR_AXIS

KERNELS = ("xla", "cudnn", "splash")
INTERPRETED = "splash_interpreted"  # the same kernel run by an interpreter, for tests on any platform
_LANES, _LARGEST_BLOCK = 128, 512

Pair = tuple[jax.Array, jax.Array]
Attend = Callable[..., jax.Array]


def choose(asked: str, platform: str, head_dim: int, dtype: str) -> str:
    """The kernel that a model uses.

    Args:
      asked: one of `KERNELS`, or `auto` for the platform's own where it can run, in bfloat16, and `xla` elsewhere.
      platform: what it will run on: `cpu`, `gpu` (or `cuda`), `tpu`.
      head_dim: C.
      dtype: of queries, keys and values.

    Raises:
      ValueError: the kernel asked for cannot run; one line that says why.
    """
    kinds = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}
    if asked not in (*KERNELS, "auto"):
        raise ValueError(f"attention={asked!r}: must be one of auto, {', '.join(KERNELS)}")
    kernel = kinds.get(platform, "xla") if asked == "auto" else asked
    why = None
    if kernel != "xla" and kinds.get(platform) != kernel:
        why = f"runs on a {'TPU' if kernel == 'splash' else 'GPU of NVIDIA'}, this is {platform}"
    elif kernel == "splash" and head_dim % _LANES:
        why = f"needs heads of a multiple of {_LANES}, the model's are of {head_dim}"
    elif kernel == "splash" and asked == "auto" and dtype == "float32":
        why = "multiplies float32 in fewer bits"
    elif kernel == "cudnn" and dtype not in ("bfloat16", "float16"):
        why = f"needs model.dtype=bfloat16, not {dtype}"
    elif kernel == "cudnn" and (head_dim % 8 or head_dim > _LANES):
        why = f"needs heads of a multiple of 8 up to {_LANES}, the model's are of {head_dim}"
    if why is None or asked == "auto":
        return kernel if why is None else "xla"
    raise ValueError(f"attention={asked!r}: {why}; auto takes what can run")


def causal(kernel: str, real: jax.Array, before: jax.Array | None = None) -> Attend:
    """Attention in which query i sees what stands before it, and of its own sequence's keys those up to i.

    Made once for all layers: what depends on masks alone is worked out here.

    Args:
      kernel: one of `KERNELS`, or `INTERPRETED`.
      real: bool[N, S], tokens that are not padding, of queries and their own keys alike; padding may stand anywhere.
      before: bool[N, B], the same of keys that all queries of a sequence see; None where there are none.

    Returns:
      A function of q [N, S, H, C], k and v [N, S, K, C] and, where `before` is given, a pair of [N, B, K, C] to
      [N, S, H, C]. Its results at padding are finite and meaningless.
    """
    if kernel == "xla":
        return _xla(real, before)
    seen = real if before is None else jnp.concatenate([before, real], axis=1)
    flash = _packed(seen, real.shape[1]) if kernel == "cudnn" else _splash(seen, kernel == INTERPRETED)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, prefix: Pair | None = None) -> jax.Array:
        if prefix is not None:
            k, v = (jnp.concatenate(both, axis=1) for both in zip(prefix, (k, v), strict=True))
        return flash(q, k, v)

    return attend


def _xla(real: jax.Array, before: jax.Array | None) -> Attend:
    steps = jnp.arange(real.shape[1])
    own = (steps[None, :, None] >= steps[None, None, :]) & real[:, None, :]
    seen = None if before is None else jnp.broadcast_to(before[:, None, :], (*real.shape, before.shape[1]))

    def attend_own(q: jax.Array, k: jax.Array, v: jax.Array, prefix: Pair | None = None) -> jax.Array:
        parts = [] if prefix is None or seen is None else [(*prefix, seen)]
        return attend(q, [*parts, (k, v, own)])

    return attend_own


def _packed(seen: jax.Array, queries: int, implementation: Literal["cudnn", "xla"] = "cudnn") -> Attend:
    """For kernels that know a causal square and lengths but no masks: real tokens of a sequence are moved together.

    Args:
      seen: bool[N, U]; the last `queries` of the U positions have queries too.
      implementation: of `jax.nn.dot_product_attention`.
    """
    order = jnp.argsort(~seen, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)[:, -queries:]
    length = seen.sum(axis=1, dtype=jnp.int32)

    def flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q = jnp.pad(q, ((0, 0), (k.shape[1] - queries, 0), (0, 0), (0, 0)))
        q, k, v = (_where(seen, x)[jnp.arange(len(x))[:, None], order] for x in (q, k, v))
        out = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, query_seq_lengths=length, key_value_seq_lengths=length,
            implementation=implementation,
        )  # fmt: skip
        return _where(seen[:, -queries:], out[jnp.arange(len(out))[:, None], back])

    return flash


def _where(real: jax.Array, x: jax.Array) -> jax.Array:
    """Zero at padding, and no gradient from there, whatever a kernel leaves behind."""
    return jnp.where(real[:, :, None, None], x, 0)


def _splash(seen: jax.Array, interpret: bool) -> Attend:
    """On a mesh (`jax.set_mesh`, or inside `jax.shard_map`) every device attends its own heads.

    Sequences of several devices come through `jax.vmap` with `spmd_axis_name`, whose axes are taken before these.
    """

    local = functools.partial(_splash_local, interpret=interpret)

    def flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        free = set(mesh.axis_names) - set(mesh.manual_axes)  # a kernel is split along none by itself
        if not free:
            return local(q, k, v, seen)
        heads = TENSOR_AXIS if TENSOR_AXIS in free and k.shape[2] % mesh.shape[TENSOR_AXIS] == 0 else None
        spec = jax.P(None, None, heads, None)
        split = jax.shard_map(
            local, in_specs=(spec, spec, spec, jax.P()), out_specs=spec, axis_names=free, check_vma=False
        )
        return split(q, k, v, seen)

    return flash


def _splash_local(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, interpret: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (_, queries, heads, size), keys = q.shape, k.shape[1]
    block_q, block_k = _block(queries), _block(keys)
    more_q, more_k = -queries % block_q, -keys % block_k
    blocks = kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_q_dq=block_q,
        block_kv_dq=block_k,
    )
    mask = masks.CausalMask((queries + more_q, keys + more_k), offset=keys - queries)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
    )

    def lay_out(x: jax.Array, more: int) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))).swapaxes(1, 2)

    ids = jnp.pad(seen, ((0, 0), (0, more_k))).astype(jnp.int32)
    ones = jnp.ones(queries + more_q, jnp.int32)
    scaled = q * jnp.asarray(size**-0.5, q.dtype)  # the kernel does not

    def one(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        return kernel(q, k, v, segment_ids=kernels.SegmentIds(q=ones, kv=ids))

    out = jax.vmap(one)(lay_out(scaled, more_q), lay_out(k, more_k), lay_out(v, more_k), ids)
    return out.swapaxes(1, 2)[:, :queries]


def _block(length: int) -> int:
    """The largest block, or one that holds it all where that is smaller; blocks are of whole vector registers."""
    return min(_LARGEST_BLOCK, -(-length // _LANES) * _LANES)
