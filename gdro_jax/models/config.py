"""The Qwen3 architecture as a frozen configuration, and the one description of its parameters.

Everything that needs to know a parameter (initialisation, sharding, loading, saving, restoring) reads
`param_specs`; nothing else in the package repeats a shape or a checkpoint name.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping

from gdro_jax.models.rope import RopeScaling, scaling_from_hf, scaling_to_hf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """A dense Qwen3 decoder (RMSNorm, per-head q/k norm, grouped-query attention, RoPE, SwiGLU).

    Field names are short forms of the Hugging Face ones; `from_hf` maps them.

    Raises:
      ValueError: naming the field, the value and what is allowed.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True
    attention_bias: bool = False
    max_positions: int = 32_768
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: must be a whole number of at least 1")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r}: must be a finite number above 0")
        for name in ("tie_embeddings", "attention_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be true or false")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads}: must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            raise ValueError(f"rope_scaling={self.rope_scaling!r}: must be a RopeScaling or None")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: must be even, rotary embedding turns pairs")

    @classmethod
    def from_hf(cls, source: str | pathlib.Path | Mapping[str, object]) -> "Qwen3Config":
        """Reads a Hugging Face `config.json` (a folder, the file, or its parsed content).

        Raises:
          FileNotFoundError: no such file.
          ValueError: the file is not a dense Qwen3 configuration, or a field it needs is missing or unsupported.
        """
        raw = source if isinstance(source, Mapping) else _read_config(pathlib.Path(source))
        kind, heads = raw.get("model_type"), raw.get("architectures")
        if kind != "qwen3":
            raise ValueError(f"model_type={kind!r}: only dense 'qwen3' is supported")
        if heads is not None and heads != [_ARCHITECTURE]:
            raise ValueError(f"architectures={heads!r}: only [{_ARCHITECTURE!r}] is supported")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act={raw['hidden_act']!r}: only 'silu' is supported")
        if raw.get("use_sliding_window"):
            raise ValueError("use_sliding_window=True: only full attention is supported")
        layers = raw.get("layer_types") or []
        if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
            raise ValueError(f"layer_types={layers!r}: must be a list, and only 'full_attention' is supported")
        missing = [name for name in _HF_REQUIRED if raw.get(name) is None]
        if missing:
            raise ValueError(f"config.json: missing {', '.join(missing)}")
        fields = _HF_DEFAULTS | {ours: raw[hf] for hf, ours in _HF_FIELDS.items() if raw.get(hf) is not None}
        plain, turn = cls(**fields), _rope(raw)  # type: ignore[arg-type]
        theta = turn["rope_theta"]
        if isinstance(theta, bool) or not isinstance(theta, int | float):
            raise ValueError(f"rope_theta={theta!r}: must be a finite number above 0")
        scaling = scaling_from_hf(turn, plain.max_positions)
        return dataclasses.replace(plain, rope_theta=float(theta), rope_scaling=scaling)

    def to_hf(self) -> dict[str, object]:
        """The `config.json` that `from_hf` reads back to an equal configuration and transformers opens."""
        fields: dict[str, object] = {theirs: getattr(self, ours) for theirs, ours in _HF_FIELDS.items()}
        scaling = None if self.rope_scaling is None else scaling_to_hf(self.rope_scaling)
        return {
            "architectures": [_ARCHITECTURE],
            "model_type": "qwen3",
            "hidden_act": "silu",
            **fields,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
        }

    @property
    def positions(self) -> int:
        """The longest text, prompt and response together, that the model has positions for."""
        return self.max_positions if self.rope_scaling is None else max(self.max_positions, self.rope_scaling.positions)


_ARCHITECTURE = "Qwen3ForCausalLM"
_HF_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "attention_bias": "attention_bias",
    "max_position_embeddings": "max_positions",
}
_HF_DEFAULTS: dict[str, object] = {"head_dim": 128, "tie_embeddings": False}  # transformers' own for absent fields
_HF_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def _read_config(path: pathlib.Path) -> Mapping[str, object]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a folder with config.json and *.safetensors")
    try:
        raw = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(raw).__name__}")
    return raw


def _rope(raw: Mapping[str, object]) -> Mapping[str, object]:
    """RoPE settings from either layout: `rope_theta` and `rope_scaling` (transformers 4), `rope_parameters` (5)."""
    entries = []
    for name in ("rope_parameters", "rope_scaling"):
        if not raw.get(name):
            continue
        entry = raw[name]
        if not isinstance(entry, Mapping):
            raise ValueError(f"{name}={entry!r}: expected an object")
        entries.append(dict(entry))
    if len(entries) == 2 and entries[0] | entries[1] != entries[0]:  # readers differ in which of them they take
        raise ValueError(f"rope_parameters={entries[0]!r}, rope_scaling={entries[1]!r}: differ; keep one of them")
    outside = raw.get("original_max_position_embeddings")
    if outside is not None:
        raise ValueError(f"original_max_position_embeddings={outside!r}: must stand in rope_scaling")
    return {"rope_theta": raw.get("rope_theta", 10_000.0)} | (entries[0] if entries else {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """One parameter of one layer (or of the whole model).

    Its dtype is not part of it: all parameters of a model have one, which is the caller's choice (`model.param_dtype`
    where they are trained, `model.dtype` where not, `--dtype` of an export) and no matter of architecture; a
    checkpoint's own is cast from.

    Attributes:
      shape: as we store it, without the leading layer axis; matrices are [in, out].
      axes: a logical axis name per dimension of `shape`, mapped to mesh axes in one table.
      scale: standard deviation of the normal initialiser, or None for ones (norm scales) and 0.0 for zeros.
      hf_name: tensor name in a Hugging Face checkpoint; `{layer}` stands for the layer number.
      stacked: whether the stored array has a leading [layers] axis.
      transpose: whether the checkpoint holds the transpose ([out, in]).
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    scale: float | None
    hf_name: str
    stacked: bool = True
    transpose: bool = False


def param_specs(config: Qwen3Config) -> dict[str, ParamSpec]:
    """Every parameter of the model, by attribute name, in checkpoint order."""
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def block(name: str, shape: tuple[int, ...], axes: tuple[str, ...], scale: float | None = 0.02) -> ParamSpec:
        return ParamSpec(
            shape=shape, axes=axes, scale=scale, hf_name=f"model.layers.{{layer}}.{name}", transpose=len(shape) == 2
        )

    specs = {
        "embed": ParamSpec(
            shape=(c.vocab_size, c.hidden_size),
            axes=("vocab", "embed"),
            scale=0.02,
            hf_name="model.embed_tokens.weight",
            stacked=False,
        ),
        "input_norm": block("input_layernorm.weight", (c.hidden_size,), ("embed",), None),
        "q_proj": block("self_attn.q_proj.weight", (c.hidden_size, q), ("embed", "heads")),
        "k_proj": block("self_attn.k_proj.weight", (c.hidden_size, kv), ("embed", "kv_heads")),
        "v_proj": block("self_attn.v_proj.weight", (c.hidden_size, kv), ("embed", "kv_heads")),
        "o_proj": block("self_attn.o_proj.weight", (q, c.hidden_size), ("heads", "embed")),
        "q_norm": block("self_attn.q_norm.weight", (c.head_dim,), ("head_dim",), None),
        "k_norm": block("self_attn.k_norm.weight", (c.head_dim,), ("head_dim",), None),
        "post_norm": block("post_attention_layernorm.weight", (c.hidden_size,), ("embed",), None),
        "gate_proj": block("mlp.gate_proj.weight", (c.hidden_size, c.intermediate_size), ("embed", "mlp")),
        "up_proj": block("mlp.up_proj.weight", (c.hidden_size, c.intermediate_size), ("embed", "mlp")),
        "down_proj": block("mlp.down_proj.weight", (c.intermediate_size, c.hidden_size), ("mlp", "embed")),
        "final_norm": ParamSpec(
            shape=(c.hidden_size,), axes=("embed",), scale=None, hf_name="model.norm.weight", stacked=False
        ),
    }
    if c.attention_bias:
        specs |= {
            "q_bias": block("self_attn.q_proj.bias", (q,), ("heads",), 0.0),
            "k_bias": block("self_attn.k_proj.bias", (kv,), ("kv_heads",), 0.0),
            "v_bias": block("self_attn.v_proj.bias", (kv,), ("kv_heads",), 0.0),
            "o_bias": block("self_attn.o_proj.bias", (c.hidden_size,), ("embed",), 0.0),
        }
    if not c.tie_embeddings:
        specs["lm_head"] = ParamSpec(
            shape=(c.vocab_size, c.hidden_size),
            axes=("vocab", "embed"),
            scale=0.02,
            hf_name="lm_head.weight",
            stacked=False,
        )
    return specs


def stored_shape(config: Qwen3Config, spec: ParamSpec) -> tuple[int, ...]:
    """The shape of the stored array: `spec.shape`, behind a layer axis where the parameter is stacked."""
    return (config.num_layers, *spec.shape) if spec.stacked else spec.shape


def work(config: Qwen3Config) -> tuple[float, float]:
    """FLOPs of the blocks' forward pass per token and per query-key pair, two a multiplication; without the head."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = 2 * config.hidden_size * (queries + keys) + 3 * config.hidden_size * config.intermediate_size
    return 2.0 * config.num_layers * layer, 4.0 * config.num_layers * queries


def num_params(config: Qwen3Config) -> int:
    """Number of parameters, a tied head counted once."""
    total = 0
    for spec in param_specs(config).values():
        size = config.num_layers if spec.stacked else 1
        for n in spec.shape:
            size *= n
        total += size
    return total
