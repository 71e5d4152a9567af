"""Small GGUF files of each architecture, whose tensors take turns with all types."""

import itertools
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

WIDTH, FFN, LAYERS, HEADS, KV_HEADS = 256, 512, 2, 4, 2
# transformers does not read the width of Qwen 3's heads, and takes 128.
HEAD_DIM = {"qwen3": 128}
TYPES = (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q4_K, Type.Q6_K)
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level tokenizer that has seen a little text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the lamb and the ram ran to the barn, then there"] * 9, trainer)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return tokens, [" ".join(pair) for pair in merges]


def raw(rng: np.random.Generator, shape: tuple[int, int], kind: Type) -> np.ndarray:
    """Numbers of a type, as the file holds them; of types without a quantizer, random blocks."""
    if kind not in (Type.Q4_K, Type.Q6_K):
        return gguf.quants.quantize(rng.normal(0, 0.05, shape).astype(np.float32), kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // block, size), np.uint8)
    scale = np.frombuffer(np.float16(2e-4 if kind == Type.Q4_K else 5e-5).tobytes(), np.uint8)
    places = (0, 2) if kind == Type.Q4_K else (size - 2,)
    for place in places:
        blocks[..., place : place + 2] = scale
    return blocks.reshape(shape[0], -1)


def write(path: Path, architecture: str = "llama", *, tied: bool = True, **fields: Any) -> Path:
    """A file with random weights; `fields` are further settings of the architecture."""
    rng, head_dim = np.random.default_rng(0), HEAD_DIM.get(architecture, 64)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    for name, value in fields.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"{architecture}.{name.replace('__', '.')}", value)
    tokens, merges = vocabulary()
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if architecture.startswith("qwen") else "default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    _tensors(writer, rng, architecture, len(tokens), tied)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(
    writer: gguf.GGUFWriter, rng: np.random.Generator, architecture: str, vocab: int, tied: bool
) -> None:
    kinds, head_dim = itertools.cycle(TYPES), HEAD_DIM.get(architecture, 64)
    width, kv_width = HEADS * head_dim, KV_HEADS * head_dim

    def add(name: str, *shape: int) -> None:
        if len(shape) == 1:
            center = 1.0 if "norm" in name else 0.0
            writer.add_tensor(name, rng.normal(center, 0.1, shape).astype(np.float32))
            return
        kind = next(kinds)
        writer.add_tensor(name, raw(rng, shape, kind), raw_dtype=kind)

    add("token_embd.weight", vocab, WIDTH)
    if not tied:
        add("output.weight", vocab, WIDTH)
    add("output_norm.weight", WIDTH)
    for i in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{name}.weight", WIDTH)
        for name, out in (("q", width), ("k", kv_width), ("v", kv_width)):
            add(f"blk.{i}.attn_{name}.weight", out, WIDTH)
            if architecture == "qwen2":
                add(f"blk.{i}.attn_{name}.bias", out)
            if architecture == "qwen3" and name != "v":
                add(f"blk.{i}.attn_{name}_norm.weight", head_dim)
        add(f"blk.{i}.attn_output.weight", WIDTH, width)
        add(f"blk.{i}.ffn_gate.weight", FFN, WIDTH)
        add(f"blk.{i}.ffn_up.weight", FFN, WIDTH)
        add(f"blk.{i}.ffn_down.weight", WIDTH, FFN)
