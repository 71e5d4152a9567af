"""What a backbone is: one frozen, hashable description read from a Hugging Face `config.json`.

The families differ in a handful of switches (bias, qk-norm, window, tying);
the rest of the package never asks for a family's name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from medusa_jax.errors import InputError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pretraining length.

    Attributes:
      factor: how many times longer the context becomes.
      original_context, low_freq_factor, high_freq_factor: Llama-3's smooth ramp:
        frequencies that turn more than `high_freq_factor` times within
        `original_context` tokens stay, those that turn less than
        `low_freq_factor` times are stretched. With original_context 0 none
        turns, and all are stretched alike ("linear").
    """

    factor: float
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and switches of a Llama-family decoder. Letters: see `shapes.py`.

    Attributes:
      vocab_size: V.
      hidden_size: D.
      ffn_size: F.
      num_layers: decoder blocks.
      num_heads: H.
      num_kv_heads: K.
      head_dim: C; not always D / H (Qwen3, some Mistrals).
      context: longest sequence the model was made for, in tokens.
      norm_eps: epsilon of every RMSNorm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None, or how they are stretched.
      windows: sliding window of each layer in tokens (a token sees itself and
        the window - 1 before it), or None where a layer sees everything.
      qkv_bias, out_bias, mlp_bias: which projections carry a bias.
      qk_norm: RMSNorm on each query and key head (Qwen3).
      tied: logits use the embedding table instead of a projection of their own.
    """

    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    windows: tuple[int | None, ...] = ()
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads "
                "evenly: num_attention_heads must be a multiple of num_key_value_heads"
            )
        if self.head_dim % 2:
            raise InputError(f"rotary embeddings need an even head_dim, got {self.head_dim}")


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Reads the content of a Hugging Face `config.json` (transformers 4 or 5 spelling).

    Raises:
      InputError: an unsupported family, activation, rope type or quantisation,
        or a required key is missing; the message names it.
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise InputError(
            f"model_type {family!r} is not supported; supported families: {', '.join(FAMILIES)}"
        )
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method", "unknown")
        raise InputError(f"quantised weights ({method}) are not supported; use the full weights")
    if hf.get("hidden_act", "silu") != "silu":
        raise InputError(f"hidden_act {hf['hidden_act']!r} is not supported; expected 'silu'")

    def need(key: str) -> int:
        value = hf.get(key)
        if value is None:
            raise InputError(f"config.json has no {key!r}, which a {family} model needs")
        if type(value) is not int or value < 1:
            raise InputError(f"config.json: {key!r} must be a positive integer, got {value!r}")
        return value

    hidden_size, num_heads, num_layers = (
        need("hidden_size"),
        need("num_attention_heads"),
        need("num_hidden_layers"),
    )
    # null means one key/value head a query head. Absent, it means that for Llama only.
    one_each = hf.get("num_key_value_heads") is None and (
        family == "llama" or "num_key_value_heads" in hf
    )
    num_kv_heads = num_heads if one_each else need("num_key_value_heads")
    theta, scaling = _rope(hf)
    attention_bias = bool(hf.get("attention_bias", False)) and family in ("llama", "qwen3")
    default_head_dim = 128 if family == "qwen3" else hidden_size // num_heads
    return ModelConfig(
        vocab_size=need("vocab_size"),
        hidden_size=hidden_size,
        ffn_size=need("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hf.get("head_dim") or default_head_dim,
        context=need("max_position_embeddings"),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        windows=_windows(hf, family, num_layers),
        qkv_bias=attention_bias or family == "qwen2",
        out_bias=attention_bias,
        mlp_bias=bool(hf.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        tied=bool(hf.get("tie_word_embeddings", False)),
    )


def _rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from transformers 5's `rope_parameters` or 4's two separate keys."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise InputError("rope settings of their own for some layers are not supported")
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if (rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0) != 1.0:
        raise InputError("partial_rotary_factor other than 1.0 is not supported")
    if kind == "default":
        return theta, None
    try:
        if kind == "linear":
            return theta, RopeScaling(factor=float(rope["factor"]))
        if kind == "llama3":
            return theta, RopeScaling(
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
                original_context=int(rope["original_max_position_embeddings"]),
            )
    except KeyError as missing:
        raise InputError(f"rope type {kind!r} in config.json lacks {missing}") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"rope type {kind!r} in config.json: {error}") from None
    raise InputError(f"rope type {kind!r} is not supported; supported: default, linear, llama3")


def _windows(hf: Mapping[str, Any], family: str, num_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, with Hugging Face's defaults for absent keys."""
    window = hf.get("sliding_window", 4096)
    if family == "mistral":
        return (window,) * num_layers
    if family in ("qwen2", "qwen3") and hf.get("use_sliding_window", False):
        first = hf.get("max_window_layers", 28)
        kinds = hf.get("layer_types") or [
            "sliding_attention" if layer >= first else "full_attention"
            for layer in range(num_layers)
        ]
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return (None,) * num_layers
