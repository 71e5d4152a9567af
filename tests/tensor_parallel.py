"""Decoding on one device and on several, as a script: simulated devices need a process of their own.

    JAX_NUM_CPU_DEVICES=8 python tests/tensor_parallel.py OUT

Writes OUT, a JSON object: of each case what one device and what several made, and for each step
compiled for several how many collectives there are, by kind and shape.
"""

import collections
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
from conftest import TINY, random_model

from medusa_jax.acceptance import Acceptance, Greedy, Lossless
from medusa_jax.config import ModelConfig
from medusa_jax.decode import Decoder, outputs
from medusa_jax.figures import step_bytes
from medusa_jax.grow import Grown
from medusa_jax.layout import for_decoding
from medusa_jax.sharding import decode_mesh, shardings
from medusa_jax.tree import Tree

PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9, 10, 11], [4]]
TREE = Tree.from_lists([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
ONE_LAYER = dataclasses.replace(TINY, num_layers=1, windows=(None,))
MULTI_HEAD = dataclasses.replace(ONE_LAYER, num_kv_heads=4)
EIGHT_HEADS = dataclasses.replace(TINY, num_heads=8, head_dim=4, tied=True, qkv_bias=True)

CASES: dict[str, tuple[ModelConfig, int, Tree | Grown, Acceptance]] = {
    "as many key/value heads as devices": (MULTI_HEAD, 4, TREE, Greedy()),
    "fewer key/value heads than devices": (TINY, 4, TREE, Greedy()),
    "grown, sampled, tied": (EIGHT_HEADS, 8, Grown(7, 2, 4), Lossless(0.8, top_p=0.9)),
}


def collectives(text: str) -> dict[str, int]:
    """How many there are in a compiled program: {"all-reduce f32[3,7,32]": 5, ...}."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (\S+?)(?:\{{\S*)? ({kinds})(?:-start)?\(", text)
    return dict(collections.Counter(f"{kind} {shape}" for shape, kind in found))


def compare(config: ModelConfig, devices: int, tree: Any, acceptance: Acceptance) -> dict[str, Any]:
    """Decodes with one device and with several."""
    model = random_model(config)
    params = for_decoding(model.params, tied=config.tied)
    alone = Decoder(config, model.heads, tree, acceptance)
    found: dict[str, Any] = {}
    mesh = decode_mesh(f"tensor={devices}", config)
    split = jax.device_put(params, shardings(params, mesh))
    together = dataclasses.replace(alone, mesh=mesh)
    for name, decoder, weights in (("one", alone, params), ("several", together, split)):
        state = decoder.prefill(weights, PROMPTS, max_new_tokens=(20, 9, 14))
        found[f"{name}_bytes"] = step_bytes(decoder, weights, 10)
        if decoder.mesh:
            compiled = Decoder.step.lower(decoder, weights, state).compile()
            found["collectives"] = collectives(compiled.as_text())
            found["cache"] = state.cache.keys[0].sharding.shard_shape(state.cache.keys[0].shape)
            kept = jax.tree.leaves(dataclasses.replace(state.cache, length=None))
            found["cache_bytes"] = sum(leaf.addressable_shards[0].data.nbytes for leaf in kept)
            found["aliased"] = compiled.memory_analysis().alias_size_in_bytes
        done = outputs(decoder.generate(weights, state))
        found[name] = [dataclasses.asdict(output) for output in done]
    return found


if __name__ == "__main__":
    found = {name: compare(*case) for name, case in CASES.items()}
    Path(sys.argv[1]).write_text(json.dumps(found))
