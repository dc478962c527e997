"""The configuration and the one description of the parameters."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import BASE, CASES, config, make_model

from gdro_jax.models import qwen3, rope
from gdro_jax.models.presets import PRESETS
from gdro_jax.models.rope import RopeScaling

PUBLISHED = {  # parameters of the published files, a tied head counted once
    "0.6B": 596_049_920,
    "1.7B": 1_720_574_976,
    "4B": 4_022_468_096,
    "8B": 8_190_735_360,
    "14B": 14_768_307_200,
    "32B": 32_762_123_264,
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size: str) -> None:
    assert qwen3.num_params(PRESETS[size]) == PUBLISHED[size]


def test_every_preset_is_checked() -> None:
    assert set(PRESETS) == set(PUBLISHED)
    for preset in PRESETS.values():
        assert qwen3.Qwen3Config.from_hf(preset.to_hf()) == preset
        assert (preset.rope_theta, preset.rms_norm_eps, preset.max_positions) == (1_000_000.0, 1e-6, 32_768)
        assert (preset.vocab_size, preset.head_dim, preset.num_kv_heads) == (151_936, 128, 8)
        assert preset.rope_scaling is None and not preset.attention_bias


@pytest.mark.parametrize("name", CASES)
def test_num_params_counts_the_arrays(name: str) -> None:
    model = jax.eval_shape(lambda: qwen3.init(CASES[name], jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == qwen3.num_params(CASES[name])


def test_init_is_normal_and_stateless() -> None:
    init = jax.jit(qwen3.init, static_argnums=(0, 2))
    model, again = (init(cfg, jax.random.key(0), "float32") for cfg in (BASE, config()))
    for name, array in model.arrays().items():
        np.testing.assert_array_equal(array, again.arrays()[name])
        if name.endswith("norm"):
            assert (array == 1).all()
        else:
            assert 0.015 < float(array.std()) < 0.025, name
    assert float(jnp.abs(model.gate_proj[...] - model.up_proj[...]).max()) > 0  # keys differ
    assert (init(config(attention_bias=True), jax.random.key(0), "bfloat16").q_bias[...] == 0).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("num_layers", -1),
        ("hidden_size", 32.0),
        ("max_positions", True),
        ("num_kv_heads", 3),
        ("head_dim", 7),
        ("rms_norm_eps", 0.0),
        ("rope_theta", float("nan")),
        ("tie_embeddings", 1),
    ],
)
def test_a_bad_field_is_named_with_its_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match="num_kv_heads=3|" + field + "=" + str(value)):
        config(**{field: value})


def test_wrong_arrays_are_refused() -> None:
    arrays = make_model(BASE).arrays()
    with pytest.raises(ValueError, match="final_norm"):
        qwen3.Qwen3(BASE, {name: array for name, array in arrays.items() if name != "final_norm"})
    with pytest.raises(ValueError, match=r"embed: shape \(2, 2\)"):
        qwen3.Qwen3(BASE, arrays | {"embed": jnp.zeros((2, 2))})


def test_yarn_makes_room_for_more_positions_and_linear_does_not() -> None:
    assert BASE.positions == 64
    assert CASES["rope_yarn_settings"].positions == 120
    assert CASES["rope_yarn"].positions == 64  # 4 * 16
    assert CASES["rope_linear"].positions == 64


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones() -> None:
    """Qwen3's own: head 128, base 1e6, factor 4 over 32,768; turns above 32 are kept, below 1 divided by 4."""
    scaling = RopeScaling(kind="yarn", factor=4.0, original_positions=32_768)
    plain, one = rope.frequencies(128, 1e6, None)
    stretched, factor = rope.frequencies(128, 1e6, scaling)
    turns = plain * 32_768 / (2 * np.pi)
    np.testing.assert_allclose(stretched[turns > 40], plain[turns > 40], rtol=1e-6)
    np.testing.assert_allclose(stretched[turns < 0.8], plain[turns < 0.8] / 4, rtol=1e-6)
    assert one == 1.0 and abs(factor - 1.1386294) < 1e-6


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kind": "ntk"}, "rope_type='ntk'"),
        ({"factor": 0.5}, "factor=0.5: must be at least 1"),
        ({"factor": float("nan")}, "factor=nan"),
        ({"beta_fast": -1.0}, "beta_fast=-1.0"),
        ({"original_positions": 0}, "original_max_position_embeddings=0"),
        ({"truncate": 1}, "truncate=1"),
    ],
)
def test_a_bad_rope_scaling_is_named(changes: dict[str, object], text: str) -> None:
    fields = {"kind": "yarn", "factor": 4.0, "original_positions": 64} | changes
    with pytest.raises(ValueError, match=re.escape(text)):
        RopeScaling(**fields)
