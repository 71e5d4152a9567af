"""Decoding on one device and on eight, as a script: simulated devices need a process of their own.

    JAX_NUM_CPU_DEVICES=8 python tests/helpers/tensor_parallel.py OUT [STORIES HEADS]

Writes OUT, a JSON object: of each case what one device and what several made, and what the
compiled loop of several is made of.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from helpers import hlo
from helpers.head_files import stored
from helpers.models import TINY, random_model
from helpers.played import play
from medusa_jax.checkpoints.load import load_model
from medusa_jax.checkpoints.weight_layout import for_decoding
from medusa_jax.decoding.acceptance import Greedy, Lossless
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.state import outputs
from medusa_jax.decoding.stats import step_bytes
from medusa_jax.distributed.rules import decode_mesh, shardings
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree

PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9, 10, 11], [4]]
NEW_TOKENS = (20, 9, 14)
TREE = Tree.from_lists([[0], [1], [0, 0], [0, 1], [1, 0]])
KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def collectives(text: str) -> list[tuple[str, list[int]]]:
    """Kind and shape of every array that a compiled program exchanges between devices."""
    return [
        (kind, [int(size) for size in shape.split(",") if size])
        for shapes, kind in re.findall(rf"= (.*?) ({KINDS})(?:-start)?\(", text)
        for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)
    ]


def compare(alone: Decoder, params: Any, together: Decoder, split: Any) -> dict[str, Any]:
    """Decodes with one device, and with those of a mesh."""
    found: dict[str, Any] = {"nodes": alone.drafter.size, "layers": alone.config.num_layers}
    found |= {"width": alone.config.hidden_size, "vocab": alone.config.vocab_size}
    found["heads"] = alone.drafter.depth
    for name, decoder, weights in (("one", alone, params), ("several", together, split)):
        state = decoder.prefill(weights, PROMPTS, max_new_tokens=NEW_TOKENS)
        found[f"{name}_bytes"] = step_bytes(decoder, weights, 10)
        generate = Decoder.generate.lower(decoder, weights, state).compile()
        if decoder.mesh is not None:
            shard = jax.tree.leaves(state.cache.keys)[0].addressable_shards[0].data
            program = hlo.Program.of(generate)
            found["collectives"] = collectives(program.text)
            found["kv_heads"] = shard.shape[-3]
            found["copies"] = len(hlo.moved(program, shard.size))  # values are as large as keys
            found["cache_bytes"] = 2 * alone.config.num_layers * shard.nbytes
            found["aliased"] = generate.memory_analysis().alias_size_in_bytes
        done = outputs(generate(weights, state))
        found[name] = [dataclasses.asdict(output) for output in done]
        if isinstance(decoder.acceptance, Lossless):
            how = {"max_new_tokens": NEW_TOKENS, "repetition_penalty": 1.5}
            state = decoder.prefill(weights, PROMPTS, **how)
            done = outputs(decoder.generate(weights, state))
            found[f"{name}_penalized"] = [dataclasses.asdict(output) for output in done]
    return found


def random(
    devices: int, tree: Any, acceptance: Any, capacity: int = 0, **shape: Any
) -> dict[str, Any]:
    """With a tiny random model."""
    config = dataclasses.replace(TINY, **shape)
    model = random_model(config)
    params = for_decoding(model.params, tied=config.tied, joint=False)
    if isinstance(tree, DynamicTree):
        size = config.vocab_size
        scores = jax.random.normal(jax.random.key(0), (size + 1, size + 1))
        params["bigrams"] = {"rows": jnp.arange(size, dtype=jnp.int32), "scores": scores}
    mesh = decode_mesh(f"tensor={devices}", config)
    split = jax.device_put(params, shardings(params, mesh))
    alone = Decoder(config, drafter_of_heads(model.heads, tree), acceptance, capacity)
    return compare(alone, params, dataclasses.replace(alone, mesh=mesh), split)


def stories(model: str, heads: str) -> dict[str, Any]:
    """With a real model, of which each device reads its part."""
    alone = load_model(model, heads, kernels=False)  # a mesh has XLA's products only
    split = load_model(model, heads, mesh="tensor=8")
    assert alone.fingerprint == split.fingerprint
    jax.tree.map(np.testing.assert_array_equal, stored(alone.params), stored(split.params))
    decoder = Decoder(alone.config, drafter_of_heads(alone.heads, TREE))
    together = dataclasses.replace(decoder, mesh=split.mesh)
    return compare(decoder, alone.params, together, split.params)


if __name__ == "__main__":
    out, *real = sys.argv[1:]
    found = {
        "multi_head": random(4, TREE, Greedy(), num_layers=1, windows=(None,), num_kv_heads=4),
        "grouped": random(
            8,
            DynamicTree(7, 2, 4),
            Lossless(0.8),
            num_heads=8,
            head_dim=4,
            tied=True,
            qkv_bias=True,
        ),
    }
    if real:
        found["stories"] = stories(*real)
    play("gpu", setattr)
    found["gpus"] = random(4, TREE, Greedy(), num_layers=1, windows=(3,), capacity=61)
    Path(out).write_text(json.dumps(found))
