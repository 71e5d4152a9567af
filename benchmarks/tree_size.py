"""Step time, mean accepted length and tokens/s over the size of the tree, beside Hugging Face.

    python benchmarks/tree_size.py --model DIR --heads DIR --prompt "Once upon a time"
    python benchmarks/tree_size.py --random 110m
    python benchmarks/tree_size.py --random llama2-7b --dtype bfloat16 --no_hf

Sizes take turns, repeat by repeat, so that a machine whose speed drifts hurts
all alike; figures are medians. Random weights (and random heads, for a model
without any) time the step; their acceptance means nothing and is not printed.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from medusa_jax import cli
from medusa_jax.backbone import Backbone, causal_mask
from medusa_jax.config import ModelConfig
from medusa_jax.decode import Decoder, outputs
from medusa_jax.figures import device_bandwidth, step_bytes
from medusa_jax.heads import NO_HEADS, HeadsConfig, MedusaHeads
from medusa_jax.hf import load_model
from medusa_jax.presets import PRESETS
from medusa_jax.text import Text
from medusa_jax.tree import Tree

SIZES = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)


def random_params(abstract: Any, dtype: str) -> Any:
    """Small random numbers in the shape of a module's abstract parameters, made on the device."""
    make = jax.jit(
        lambda key, shape: (0.02 * jax.random.normal(key, shape)).astype(dtype), static_argnums=1
    )
    leaves, structure = jax.tree.flatten(abstract)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return structure.unflatten(
        [make(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    )


def random_backbone(config: ModelConfig, dtype: str) -> Any:
    """Backbone parameters of a shape."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    init = jax.eval_shape(
        lambda: Backbone(config).init(jax.random.key(0), tokens, tokens, causal_mask(2))
    )
    return random_params(init["params"], dtype)


def random_heads(config: ModelConfig, dtype: str) -> tuple[HeadsConfig, Any]:
    """Four heads of one block for a backbone."""
    heads = HeadsConfig(4, 1, config.hidden_size, config.vocab_size)
    hidden = jnp.zeros((1, config.hidden_size))
    init = jax.eval_shape(lambda: MedusaHeads(heads).init(jax.random.key(0), hidden, lambda x: x))
    return heads, random_params(init["params"], dtype)


class HuggingFace:
    """transformers' greedy `generate` of the same model, or of random weights of its shape."""

    def __init__(self, directory: str | None, config: ModelConfig, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

        self.torch, kind = torch, getattr(torch, dtype)
        self.model: Any
        if directory:
            self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=kind)
        else:
            shape = LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.ffn_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                max_position_embeddings=config.context,
            )
            self.model = LlamaForCausalLM(shape).to(kind)

    def seconds_per_token(self, prompt: list[int], new_tokens: int) -> float:
        """Wall time of a token, prefill left out by the difference to one token."""
        ids = self.torch.tensor([prompt])
        mask = self.torch.ones_like(ids)

        def run(count: int) -> float:
            start = time.perf_counter()
            self.model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
                pad_token_id=0,
            )
            return time.perf_counter() - start

        first = run(1)
        return (run(new_tokens) - first) / (new_tokens - 1)


def measure(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a tree size, and one for Hugging Face."""
    if flags.random:
        config = PRESETS[flags.random]
        params = {"backbone": random_backbone(config, flags.dtype)}
        heads, prompt = NO_HEADS, list(range(1, 17))
    else:
        model = load_model(flags.model, flags.heads, flags.dtype)
        config, params, heads = model.config, model.params, model.heads
        text = Text(model.directory, raw=True)
        prompt = text.encode([{"role": "user", "content": flags.prompt}])
    trained = heads.num_heads > 0
    if not trained:
        heads, params["heads"] = random_heads(config, flags.dtype)
    new_tokens = min(flags.new_tokens, config.context - len(prompt))
    capacity = min(config.context, flags.capacity or len(prompt) + new_tokens)
    tree = Tree.published("mc_sim_7b_63").limit_depth(heads.num_heads)
    decoders = {
        size: Decoder(config, heads, tree.cut(size), capacity=capacity) for size in flags.sizes
    }
    reference = None if flags.no_hf else HuggingFace(flags.model, config, flags.dtype)
    step_ms: dict[Any, list[float]] = {size: [] for size in [*flags.sizes, "hf"]}
    accepted: dict[int, float] = {}
    for repeat in range(flags.repeats + 1):  # the first compiles
        for size, decoder in decoders.items():
            state = decoder.prefill(params, [prompt], max_new_tokens=new_tokens)
            start = time.perf_counter()
            state = jax.block_until_ready(decoder.generate(params, jax.block_until_ready(state)))
            seconds = time.perf_counter() - start
            (output,) = outputs(state)
            accepted[size] = output.mean_accepted_length
            if repeat:
                step_ms[size].append(1e3 * seconds / len(output.tokens_per_step))
        if reference and repeat:
            step_ms["hf"].append(1e3 * reference.seconds_per_token(prompt, new_tokens))
    rows = []
    for size, decoder in decoders.items():
        median = statistics.median(step_ms[size])
        row = {
            "nodes": size,
            "step_ms": median,
            "step_ms_min": min(step_ms[size]),
            "step_ms_max": max(step_ms[size]),
            "mean_accepted_length": accepted[size] if trained else None,
            "tokens_per_s": 1e3 * (accepted[size] if trained else 1.0) / median,
        }
        if bandwidth := device_bandwidth():
            read = step_bytes(decoder, params, len(prompt) + new_tokens / 2)
            row["bandwidth_share"] = read / (median * 1e-3) / bandwidth
        rows.append(row)
    if reference:
        median = statistics.median(step_ms["hf"])
        spread = {"step_ms_min": min(step_ms["hf"]), "step_ms_max": max(step_ms["hf"])}
        rows.append({"nodes": "HF generate", "step_ms": median, "tokens_per_s": 1e3 / median})
        rows[-1] |= spread
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = [
        "| nodes | step ms (min to max) | mean accepted length | tokens/s | bandwidth |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        accepted, share = row.get("mean_accepted_length"), row.get("bandwidth_share")
        lines.append(
            f"| {row['nodes']} | {row['step_ms']:.2f} ({row['step_ms_min']:.2f} to "
            f"{row['step_ms_max']:.2f}) | {f'{accepted:.2f}' if accepted else '-'} | "
            f"{row['tokens_per_s']:.0f} | {f'{share:.0%}' if share else '-'} |"
        )
    return "\n".join(lines)


def main(flags: argparse.Namespace) -> None:
    """Measures and prints; `--json` keeps the figures."""
    rows = measure(flags)
    about = {
        "model": flags.random or flags.model,
        "dtype": flags.dtype,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(markdown(rows))
    if flags.json:
        Path(flags.json).write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    parser = cli.parser(__doc__ or "", "python benchmarks/tree_size.py --random 110m")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="directory or hub id")
    which.add_argument("--random", choices=PRESETS, help="random weights of this shape")
    parser.add_argument("--heads")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--new_tokens", type=int, default=100)
    parser.add_argument("--capacity", type=int, help="cache slots (default: what is needed)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no_hf", action="store_true", help="leave Hugging Face out")
    parser.add_argument("--json", help="file for the figures")
    cli.run(main, parser.parse_args())
