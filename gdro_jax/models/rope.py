"""Rotary embedding: the frequencies, plain or stretched for longer texts, and the turn itself.

RoPE: Su et al., arXiv 2104.09864. YaRN: Peng et al., arXiv 2309.00071 (section 3.2 the ramp, Eq. 22 the temperature),
with the defaults that published `rope_scaling` entries rely on.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the positions of pre-training.

    Attributes:
      kind: `linear` divides every frequency by `factor`; `yarn` only the slow ones, and sharpens attention.
      factor: how many times more positions.
      original_positions: of pre-training; `yarn` counts turns within them. Unused by `linear`.
      beta_fast, beta_slow: turns within `original_positions` above which a frequency is kept, below which it is
        divided; in between a ramp over the dimensions.
      attention_factor: multiplies cosine and sine; None for 0.1 ln(factor) + 1 under `yarn`. Unused by `linear`.
      truncate: whether the ends of the ramp are rounded outwards to whole dimensions.

    Raises:
      ValueError: naming the field, the value and what is allowed.
    """

    kind: str
    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "yarn"):
            raise ValueError(f"rope_type={self.kind!r}: only 'default', 'linear' and 'yarn' are supported")
        for name in ("factor", "beta_fast", "beta_slow", "attention_factor"):
            value = getattr(self, name)
            optional = value is None and name == "attention_factor"
            if not optional and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6):
                raise ValueError(f"rope_scaling {name}={value!r}: must be a finite number above 0")
        if self.factor < 1:
            raise ValueError(f"rope_scaling factor={self.factor!r}: must be at least 1")
        if not isinstance(self.original_positions, int) or self.original_positions < 1:
            value = self.original_positions
            raise ValueError(f"rope_scaling original_max_position_embeddings={value!r}: must be at least 1")
        if not isinstance(self.truncate, bool):
            raise ValueError(f"rope_scaling truncate={self.truncate!r}: must be true or false")

    @property
    def positions(self) -> int:
        """The positions that the stretch is made for."""
        return int(self.factor * self.original_positions) if self.kind == "yarn" else self.original_positions


_HF_FIELDS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_positions",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
}


def scaling_from_hf(raw: Mapping[str, object], max_positions: int) -> RopeScaling | None:
    """The stretch of a `rope_scaling` or `rope_parameters` entry, None for none.

    Raises:
      ValueError: another kind, or none with other fields; a field that is missing, unknown or out of range.
    """
    kind = raw.get("rope_type", raw.get("type", "default"))
    others = {name for name, value in raw.items() if value is not None} - {"rope_type", "type", "rope_theta"}
    if others and "rope_type" not in raw and "type" not in raw:
        raise ValueError(f"rope_scaling: {', '.join(sorted(others))} without a rope_type; 'linear' or 'yarn' is needed")
    if kind == "default":
        return None
    unknown = others - set(_HF_FIELDS)
    given = {ours: raw[theirs] for theirs, ours in _HF_FIELDS.items() if raw.get(theirs) is not None}
    fields = {"original_positions": max_positions, "factor": None} | given
    scaling = RopeScaling(kind=kind, **fields)  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"rope_scaling: {', '.join(sorted(unknown))} not supported; known: {', '.join(_HF_FIELDS)}")
    return scaling


def scaling_to_hf(scaling: RopeScaling) -> dict[str, object]:
    """The `rope_scaling` entry that `scaling_from_hf` reads back."""
    names = _HF_FIELDS if scaling.kind == "yarn" else {"factor": "factor"}
    values = {theirs: getattr(scaling, ours) for theirs, ours in names.items()}
    return {"rope_type": scaling.kind} | {name: value for name, value in values.items() if value is not None}


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[np.ndarray, float]:
    """Radians a position of each pair of dimensions, float32[head_dim / 2], and the factor on cosine and sine."""
    plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return plain.astype(np.float32), 1.0
    stretched = plain / scaling.factor
    if scaling.kind == "linear":
        return stretched.astype(np.float32), 1.0
    low, high = (_dimension_of(turns, head_dim, theta, scaling) for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low or 1e-3), 0, 1)
    factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return (ramp * stretched + (1 - ramp) * plain).astype(np.float32), factor


def rotation(
    head_dim: int, theta: float, scaling: RopeScaling | None, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine float32[N, S, 1, C / 2] of the rotary angles at int32[N, S], the same in every layer."""
    frequency, factor = frequencies(head_dim, theta, scaling)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding of [N, S, heads, C], first half paired with second as in the published checkpoints."""
    half = x.shape[-1] // 2
    cos, sin = turn
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _dimension_of(turns: float, head_dim: int, theta: float, scaling: RopeScaling) -> float:
    """The dimension, not whole, whose pair makes so many turns within the original positions."""
    return head_dim * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))
