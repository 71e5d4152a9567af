"""Names of tensors in checkpoint files, and where each goes in our parameters.

One table serves both ways, reading and writing: shapes are the same on both
sides, so a tensor is only ever renamed.
"""

import dataclasses

from medusa_jax.config import ModelConfig
from medusa_jax.heads import HeadsConfig

MERGED = "medusa_head."  # prefix of head tensors that lie among a backbone's (v1.0)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a stored tensor goes.

    Attributes:
      path: keys in the nested parameter dict.
      shape: the same there and here.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]


def backbone_places(config: ModelConfig) -> dict[str, Place]:
    """Hugging Face's names of a Llama-family backbone's tensors."""
    width, ffn = config.hidden_size, config.ffn_size
    query_width = config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    places = {
        "model.embed_tokens.weight": Place(("embed", "embedding"), (config.vocab_size, width)),
        "model.norm.weight": Place(("final_norm", "scale"), (width,)),
    }
    if not config.tied:
        places["lm_head.weight"] = Place(("lm_head",), (config.vocab_size, width))
    linears = {
        "self_attn.q_proj": ("attention", "query", query_width, width, config.qkv_bias),
        "self_attn.k_proj": ("attention", "key", kv_width, width, config.qkv_bias),
        "self_attn.v_proj": ("attention", "value", kv_width, width, config.qkv_bias),
        "self_attn.o_proj": ("attention", "out", width, query_width, config.out_bias),
        "mlp.gate_proj": ("mlp", "gate", ffn, width, config.mlp_bias),
        "mlp.up_proj": ("mlp", "up", ffn, width, config.mlp_bias),
        "mlp.down_proj": ("mlp", "down", width, ffn, config.mlp_bias),
    }
    norms: dict[str, tuple[tuple[str, ...], int]] = {
        "input_layernorm": (("attention_norm",), width),
        "post_attention_layernorm": (("mlp_norm",), width),
    }
    if config.qk_norm:
        norms["self_attn.q_norm"] = (("attention", "query_norm"), config.head_dim)
        norms["self_attn.k_norm"] = (("attention", "key_norm"), config.head_dim)
    for i in range(config.num_layers):
        stored, layer = f"model.layers.{i}", f"layer_{i}"
        for name, (group, ours, out, into, bias) in linears.items():
            path = (layer, group, ours)
            places[f"{stored}.{name}.weight"] = Place((*path, "weight"), (out, into))
            if bias:
                places[f"{stored}.{name}.bias"] = Place((*path, "bias"), (out,))
        for name, (path, size) in norms.items():
            places[f"{stored}.{name}.weight"] = Place((layer, *path, "scale"), (size,))
    return places


def head_places(config: HeadsConfig, prefix: str = "") -> dict[str, Place]:
    """The original's names of head tensors: "0.0.linear.weight"; `prefix` "medusa_head." merged.

    Truncated heads, which the original has not, also have a "token_map" (vLLM's name).
    """
    width = config.hidden_size
    places = {}
    if config.truncated:
        places[f"{prefix}token_map"] = Place(("token_map",), (config.truncated,))
    for i in range(config.num_heads):
        stored, head = f"{prefix}{i}", f"head_{i}"
        for j in range(config.num_layers):
            linear, path = f"{stored}.{j}.linear", (head, f"block_{j}")
            places[f"{linear}.weight"] = Place((*path, "weight"), (width, width))
            places[f"{linear}.bias"] = Place((*path, "bias"), (width,))
        if not config.shared:
            shape = (config.truncated or config.vocab_size, width)
            places[f"{stored}.{config.num_layers}.weight"] = Place((head, "vocab"), shape)
    return places
