"""Every attention kernel is the plain one: values, gradients, padding, a mesh; the one that runs is chosen by rule."""

import re
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from model_cases import config, make_model, make_tokens

from gdro_jax.models import attention, qwen3
from gdro_jax.training import config_io, mesh, setup

N, B, S, H, K, C = 4, 20, 130, 4, 2, 128  # more than a block of queries, and none of the lengths is a whole one
REAL = np.arange(S)[None] < np.array([[130], [7], [1], [60]])
REAL[3, :5] = False  # padding on the left as well
BEFORE = np.arange(B)[None] < np.array([[20], [3], [20], [1]])


def arrays() -> tuple[jax.Array, ...]:
    """q, k, v and the keys and values before them."""
    rng = np.random.default_rng(0)
    shapes = (N, S, H, C), (N, S, K, C), (N, S, K, C), (N, B, K, C), (N, B, K, C)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def packed(real: jax.Array, before: jax.Array) -> attention.Attend:
    """The form that cuDNN is given, through JAX's own implementation of the same function."""
    flash = attention._packed(jnp.concatenate([before, real], axis=1), real.shape[1], "xla")

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, prefix: tuple[jax.Array, jax.Array]) -> jax.Array:
        return flash(q, *(jnp.concatenate(both, axis=1) for both in zip(prefix, (k, v), strict=True)))

    return attend


def interpreted(real: jax.Array, before: jax.Array) -> attention.Attend:
    return attention.causal(attention.INTERPRETED, real, before)


def plain(real: jax.Array, before: jax.Array) -> attention.Attend:
    return attention.causal("xla", real, before)


def mixed(form: Callable, *given: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A number that depends on every real result, and the real results."""
    q, k, v, *prefix = given
    out = form(jnp.asarray(REAL), jnp.asarray(BEFORE))(q, k, v, tuple(prefix))
    out = jnp.where(REAL[:, :, None, None], out, 0)
    return (out**2 + out * jnp.cos(jnp.arange(C))).sum(), out


@pytest.mark.parametrize("form", [packed, interpreted])
def test_results_and_gradients_are_those_of_plain_attention(form: Callable) -> None:
    (want, got), (grads, more) = zip(
        *(
            jax.jit(jax.value_and_grad(lambda *x, f=f: mixed(f, *x), argnums=range(5), has_aux=True))(*arrays())
            for f in (plain, form)
        ),
        strict=True,
    )
    for name, a, b in zip(("out", *"qkv", "k before", "v before"), (want[1], *grads), (got[1], *more), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * float(jnp.abs(a).max()), rtol=0, err_msg=name)


def test_on_a_mesh_sequences_and_heads_are_split() -> None:
    """As the training step maps over shards: two of two sequences each, their heads on two devices."""
    q, k, v, *prefix = (x[:, :6] for x in arrays())
    real, before = jnp.asarray(REAL[:, :6]), jnp.asarray(BEFORE[:, :6])
    layout = mesh.make(data=2, fsdp=2, tensor=2)

    @jax.jit
    def attended(*given: jax.Array) -> jax.Array:
        shards = jax.tree.map(lambda x: x.reshape(4, len(x) // 4, *x.shape[1:]), given)
        return layout.over_shards(lambda part: interpreted(*part[:2])(*part[2:5], tuple(part[5:])), shards)

    given = (real, before, q, k, v, *prefix)
    split = attended(*given)
    assert split.sharding.spec[0] == ("data", "fsdp")
    assert "P(('data', 'fsdp'), None, None, 'tensor', None)" in str(jax.make_jaxpr(attended)(*given))
    split = split.reshape(q.shape)
    alone = plain(real, before)(q, k, v, tuple(prefix))
    np.testing.assert_allclose(np.where(real[..., None, None], split - alone, 0), 0, atol=1e-5)


def test_prefill_and_extend_use_the_kernel_of_the_model() -> None:
    cfg = config(head_dim=128, num_layers=2)
    prompts, responses = jnp.asarray(make_tokens(cfg, (2, 6), 1)), jnp.asarray(make_tokens(cfg, (3, 5), 2))
    prompt_mask, mask = np.arange(6)[None] < np.array([[6], [3]]), np.arange(5)[None] < np.array([[5], [2], [4]])

    def hidden(kernel: str) -> tuple[np.ndarray, np.ndarray]:
        model = qwen3.Qwen3(cfg, make_model(cfg).arrays(), kernel=kernel)

        @jax.jit
        def run(model: qwen3.Qwen3) -> tuple[jax.Array, jax.Array]:
            kv, last = qwen3.prefill(model, prompts, jnp.asarray(prompt_mask))
            return last, qwen3.extend(model, responses, jnp.asarray(mask), kv, jnp.array([0, 1, 1]))

        assert ("pallas_call" in str(jax.make_jaxpr(run)(model))) == (kernel != "xla")
        last, later = run(qwen3.working(model))
        return np.asarray(last), np.where(mask[..., None], later, 0)

    for want, got in zip(hidden("xla"), hidden(attention.INTERPRETED), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_cudnn_lowers_for_cuda_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed to lower for one; only the version of its cuDNN has to be said."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_100)
    cfg = config(head_dim=128, num_layers=2)
    model = qwen3.Qwen3(cfg, make_model(cfg).arrays(), "bfloat16", kernel="cudnn")
    prompts, responses = jnp.ones((2, 6), jnp.int32), jnp.ones((3, 70), jnp.int32)

    def loss(model: qwen3.Qwen3) -> jax.Array:
        kv, _ = qwen3.prefill(model, prompts, jnp.ones(prompts.shape, bool))
        later = qwen3.extend(model, responses, jnp.ones(responses.shape, bool), kv, jnp.array([0, 1, 1]))
        return later.astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss)).trace(model).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"@__cudnn\$fmhaSoftmax(Backward)?\(", text)
    assert calls.count("") >= 2 and calls.count("Backward") == 2  # of prompts and of responses
    assert text.count("PADDING_CAUSAL") == len(calls)


@pytest.mark.parametrize(
    ("asked", "platform", "head_dim", "dtype", "kernel"),
    [
        ("auto", "cpu", 128, "bfloat16", "xla"),
        ("auto", "tpu", 128, "bfloat16", "splash"),
        ("auto", "tpu", 128, "float32", "xla"),
        ("splash", "tpu", 128, "float32", "splash"),
        ("auto", "tpu", 64, "bfloat16", "xla"),
        ("auto", "gpu", 128, "bfloat16", "cudnn"),
        ("auto", "cuda", 128, "float32", "xla"),
        ("xla", "tpu", 128, "bfloat16", "xla"),
        ("splash", "tpu", 256, "bfloat16", "splash"),
        ("cudnn", "gpu", 64, "bfloat16", "cudnn"),
    ],
)
def test_the_kernel_chosen(asked: str, platform: str, head_dim: int, dtype: str, kernel: str) -> None:
    assert attention.choose(asked, platform, head_dim, dtype) == kernel


@pytest.mark.parametrize(
    ("asked", "platform", "head_dim", "dtype", "why"),
    [
        ("splash", "cpu", 128, "bfloat16", "runs on a TPU, this is cpu"),
        ("cudnn", "tpu", 128, "bfloat16", "runs on a GPU of NVIDIA, this is tpu"),
        ("splash", "tpu", 64, "bfloat16", "needs heads of a multiple of 128, the model's are of 64"),
        ("cudnn", "gpu", 128, "float32", "needs model.dtype=bfloat16, not float32"),
        ("cudnn", "gpu", 256, "bfloat16", "needs heads of a multiple of 8 up to 128, the model's are of 256"),
        ("flash", "gpu", 128, "bfloat16", "must be one of auto, xla, cudnn, splash"),
    ],
)
def test_one_that_cannot_run_is_refused(asked: str, platform: str, head_dim: int, dtype: str, why: str) -> None:
    with pytest.raises(ValueError, match=rf"^attention='{asked}': .*{why}"):
        attention.choose(asked, platform, head_dim, dtype)


@pytest.mark.parametrize(
    ("platform", "capability", "kernel"),
    [
        ("gpu", "9.0", "cudnn"),
        ("cuda", "8.0", "cudnn"),
        ("gpu", "7.5", "xla"),
        ("gpu", "gfx942", "xla"),
        ("tpu", None, "splash"),
    ],
)
def test_auto_takes_cudnn_from_ampere_on(platform: str, capability: str | None, kernel: str) -> None:
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    asked = config_io.load(None, [("model.dtype", "bfloat16")]).model
    assert setup.attention_kernel(asked, config(head_dim=128), device) == kernel
    if kernel == "xla":
        asked = config_io.load(None, [("model.dtype", "bfloat16"), ("model.attention", "cudnn")]).model
        with pytest.raises(setup.InputError, match="runs on a GPU of NVIDIA, this is gpu without flash attention"):
            setup.attention_kernel(asked, config(head_dim=128), device)


def test_the_configuration_reaches_the_model() -> None:
    given = config_io.load(None, [("model.attention", "xla"), ("model.dtype", "bfloat16")]).model
    model = setup.load_policy(given).model
    assert model.kernel == "xla" == qwen3.working(model).kernel
    with pytest.raises(setup.InputError, match=r"^model\.attention='splash': runs on a TPU, this is cpu; auto takes"):
        setup.load_policy(config_io.load(None, [("model.attention", "splash")]).model)
    with pytest.raises(config_io.ConfigError, match=r"model\.attention='flash': must be auto or xla or cudnn"):
        config_io.load(None, [("model.attention", "flash")])
    with pytest.raises(ValueError, match=r"^kernel='auto': must be one of xla, cudnn, splash"):
        qwen3.Qwen3(model.config, model.arrays(), kernel="auto")
