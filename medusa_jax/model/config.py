"""What a backbone is: one frozen, hashable description read from a Hugging Face `config.json`.

The families differ in a handful of switches (bias, qk-norm, window, tying);
the rest of the package never asks for a family's name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from medusa_jax.errors import InputError
from medusa_jax.json_files import Fields, short
from medusa_jax.model.rope import RopeScaling, read_rope, stretched_context

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
QUANTIZED = ("compressed-tensors", "gptq", "awq")  # methods whose directories are read
MOST_LAYERS = 10_000  # no model has as many; more would take long to count
_KINDS = ("full_attention", "sliding_attention")


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
      context: longest sequence the model was made for, in tokens; with YaRN and dynamic NTK,
        what they stretch it to.
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


def from_hf(hf: Mapping[str, Any], origin: str = "config.json") -> ModelConfig:
    """Reads the content of a Hugging Face `config.json` (transformers 4 or 5 spelling).

    Raises:
      InputError: an unsupported family, activation, rope type or quantization, a required
        key is missing, or a value is of another type or out of bounds; the message begins
        with `origin` and names the field.
    """
    fields = Fields(hf, origin)
    family = _family(fields)
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_layers = fields.integer("num_hidden_layers", most=MOST_LAYERS)
    # null means one key/value head a query head. Absent, it means that for Llama only.
    one_each = family == "llama" or "num_key_value_heads" in hf
    default = {"default": num_heads} if one_each else {}
    num_kv_heads = fields.integer("num_key_value_heads", **default)
    head_dim = fields.integer("head_dim", 128 if family == "qwen3" else hidden_size // num_heads)
    trained = fields.integer("max_position_embeddings")
    theta, scaling = read_rope(fields, head_dim, trained)
    attention_bias = family in ("llama", "qwen3") and fields.flag("attention_bias")
    if head_dim < 2 or head_dim % 2:
        raise InputError(f"{origin}: rotary embeddings need an even 'head_dim', got {head_dim}")
    if num_heads % num_kv_heads:
        raise InputError(
            f"{origin}: {num_heads} query heads cannot share {num_kv_heads} key/value heads "
            "evenly: 'num_attention_heads' must be a multiple of 'num_key_value_heads'"
        )
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        ffn_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        context=stretched_context(trained, scaling),
        norm_eps=fields.number("rms_norm_eps", 1e-6, above=0, most=1),
        rope_theta=theta,
        rope_scaling=scaling,
        windows=_windows(fields, family, num_layers),
        qkv_bias=attention_bias or family == "qwen2",
        out_bias=attention_bias,
        mlp_bias=family == "llama" and fields.flag("mlp_bias"),
        qk_norm=family == "qwen3",
        tied=fields.flag("tie_word_embeddings"),
    )


def _family(fields: Fields) -> str:
    """The family. Raises InputError where it, its activation or its weights are not supported."""
    family = fields.content.get("model_type")
    if family not in FAMILIES:
        raise InputError(
            f"{fields.origin}: model_type {short(family)} is not supported; supported families: "
            f"{', '.join(FAMILIES)}"
        )
    if (quantization := fields.inner("quantization_config")).content:
        method = quantization.text("quant_method", "unknown")
        if method not in QUANTIZED:
            raise InputError(
                f"{fields.origin}: quantized weights ({method}) are not supported; expected the "
                f"full weights, which --quantize makes narrow, or {', '.join(QUANTIZED)}"
            )
    if (activation := fields.text("hidden_act", "silu")) != "silu":
        raise InputError(
            f"{fields.origin}: hidden_act {short(activation)} is not supported; expected 'silu'"
        )
    return family


def _windows(fields: Fields, family: str, num_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, with Hugging Face's defaults for absent keys."""
    qwen = family in ("qwen2", "qwen3") and fields.flag("use_sliding_window")
    if not (qwen or family == "mistral"):
        return (None,) * num_layers
    # null means no window; absent, it has a default.
    none = "sliding_window" in fields.content and fields.content["sliding_window"] is None
    window = None if none else fields.integer("sliding_window", 4096)
    if family == "mistral":
        return (window,) * num_layers
    first = fields.integer("max_window_layers", 28, least=0)
    kinds = fields.content.get("layer_types") or [
        _KINDS[layer >= first] for layer in range(num_layers)
    ]
    known = isinstance(kinds, list) and all(kind in _KINDS for kind in kinds)
    if not known or len(kinds) != num_layers:
        raise InputError(
            f"{fields.origin}: 'layer_types' must be a list of {num_layers} of "
            f"{', '.join(_KINDS)}, got {short(kinds)}"
        )
    return tuple(window if kind == _KINDS[True] else None for kind in kinds)
