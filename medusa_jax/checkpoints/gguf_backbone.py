"""A backbone in a GGUF file: its settings and tensors under Hugging Face's names."""

from typing import Any

import numpy as np

from medusa_jax.checkpoints.stored_tensor import StoredTensor, Tensors
from medusa_jax.errors import InputError
from medusa_jax.gguf_file import GgufFile, GgufTensor
from medusa_jax.json_files import Fields
from medusa_jax.model.rope import Llama3, plain_frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3")
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
# Settings of a file and their names in config.json.
_SETTINGS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_OF_LAYERS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE = "rope_freqs.weight"


def settings(file: GgufFile) -> dict[str, Any]:
    """The file's settings as a `config.json` spells them.

    Raises:
      InputError: another architecture, or positions that no rope type here describes.
    """
    if file.architecture not in ARCHITECTURES:
        raise InputError(
            f"{file.path}: architecture {file.architecture!r} is not supported; expected "
            f"{', '.join(ARCHITECTURES)}"
        )
    made: dict[str, Any] = {"model_type": file.architecture}
    made |= {ours: file.setting(name) for name, ours in _SETTINGS.items()}
    # Only where all of a head's width is turned do the two say the same.
    width = file.setting("attention.key_length") or file.setting("rope.dimension_count")
    if width is not None:
        made["head_dim"] = width
    made["tie_word_embeddings"] = "output.weight" not in file.tensors
    if (embedding := file.tensors.get("token_embd.weight")) is not None:
        made["vocab_size"] = embedding.shape[0]
    ends = [file.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    made["eos_token_id"] = list(dict.fromkeys(end for end in ends if end is not None)) or None
    made["bos_token_id"] = file.fields.get("tokenizer.ggml.bos_token_id")
    made["rope_scaling"] = _rope_scaling(file)
    return {name: value for name, value in made.items() if value is not None}


def tensors(file: GgufFile) -> Tensors:
    """The file's tensors under Hugging Face's names; those of a name unknown here keep it.

    Raises:
      InputError: a tensor is of a type that is not supported.
    """
    fields = Fields(settings(file), str(file.path))
    heads = {
        "attn_q": fields.integer("num_attention_heads"),
        "attn_k": fields.integer("num_key_value_heads"),
    }
    made = {}
    for name, tensor in file.tensors.items():
        if name == _ROPE:  # `settings` has read it
            continue
        if tensor.kind not in TYPES:
            raise InputError(
                f"{file.path}: {name} is of type {tensor.kind}, which is not supported; expected "
                f"{', '.join(TYPES)}"
            )
        part = name.split(".")[-2] if "." in name else name
        stored = StoredTensor(tensor.shape, "float32", _reader(tensor))
        if file.architecture == "llama" and part in heads:
            stored = stored.rows(half_split(tensor.shape[0], heads[part]))
        made[hugging_face_name(name)] = stored
    return made


def hugging_face_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    stem, _, suffix = name.rpartition(".")
    block, _, part = stem.rpartition(".")
    if block.startswith("blk.") and part in _OF_LAYERS:
        return f"model.layers.{block.removeprefix('blk.')}.{_OF_LAYERS[part]}.{suffix}"
    return f"{_TENSORS[stem]}.{suffix}" if stem in _TENSORS else name


def half_split(rows: int, heads: int) -> np.ndarray:
    """The rows of a query or key weight in Hugging Face's order.

    llama.cpp keeps the two numbers that a rotation turns side by side, Hugging Face half a head
    apart. Of one head of 6 rows: (0, 2, 4, 1, 3, 5).
    """
    if heads < 1 or rows % (2 * heads):
        return np.arange(rows)  # misshapen: whoever matches the shapes says so
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).ravel()


def _reader(tensor: GgufTensor) -> Any:
    def read(index: Any = ...) -> np.ndarray:
        if index is ... or not isinstance(index, tuple):
            return tensor.read()[index]
        rows, *inner = index
        return tensor.read(rows)[(slice(None), *inner)] if inner else tensor.read(rows)

    return read


def _rope_scaling(file: GgufFile) -> dict[str, Any] | None:
    """What `config.json` would say of stretched positions."""
    if _ROPE in file.tensors:
        return _llama3(file)
    kind = file.setting("rope.scaling.type")
    if kind in (None, "none"):
        return None
    return {
        "rope_type": kind,
        "factor": file.setting("rope.scaling.factor"),
        "original_max_position_embeddings": file.setting("rope.scaling.original_context_length"),
    }


def _llama3(file: GgufFile) -> dict[str, Any]:
    """The scaling of Llama 3.1, of which the file holds what each frequency is divided by."""
    divisors = file.tensors[_ROPE].read()
    fields = Fields(dict(file.fields), str(file.path))
    theta = fields.number(f"{file.architecture}.rope.freq_base", 10000.0, above=0)
    scaling = Llama3(float(divisors.max()), 8192)
    plain = np.asarray(plain_frequencies(theta, 2 * divisors.size))
    ours = plain / np.asarray(scaling.frequencies(theta, 2 * divisors.size))
    if not np.allclose(ours, divisors, rtol=1e-3):
        raise InputError(
            f"{file.path}: {_ROPE} holds other numbers than Llama 3.1's, which are not supported"
        )
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }
