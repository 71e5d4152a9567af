"""Compiles whole decoding loops to the HLO that users have, as a script.

    JAX_NUM_CPU_DEVICES=2 python tests/helpers/compiled_step.py OUT

Writes OUT, a JSON object: what `hlo.faults` says of each loop.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from helpers import hlo
from helpers.models import TINY, random_model
from medusa_jax.checkpoints.weight_layout import for_decoding
from medusa_jax.decoding.acceptance import Acceptance, Accepted, Greedy, Lossless
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.distributed.rules import decode_mesh, shardings
from medusa_jax.drafting.draft_model import DraftModel
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree

PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9, 10, 11], [4]]
# Seven nodes: with eight, as many as a head is wide, the tree's mask has the size of the cache.
# Three deep: a tree less deep than there are heads slices the weights of the heads, once a call.
TREES = {
    "root": Tree(),
    "static": Tree.from_lists([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]]),
    "dynamic": DynamicTree(7, 3, 4),
}


@dataclasses.dataclass(frozen=True)
class Blind:
    """An acceptance that never looks at the logits: its step may write before it reads."""

    def root(self, logits: Any, context: Any) -> Any:
        return jnp.zeros_like(context.position)

    def accept(self, tree: Any, tokens: Any, logits: Any, context: Any) -> Accepted:
        return Accepted(jnp.zeros_like(context.position), tokens[:, 0])


def decoder_of(heads: Any, tree: Any, acceptance: Acceptance, mesh: Any) -> Decoder:
    """A decoder of the tiny model."""
    return Decoder(TINY, drafter_of_heads(heads, tree), acceptance, mesh=mesh)


def draft_faults() -> list[str]:
    """What moves the backbone's cache or that of a draft model, which is larger.

    The draft model reads its weights at each depth of the tree.
    """
    model, scheme = random_model(TINY), Lossless(0.8)
    params = for_decoding(model.params | {"draft": model.params["backbone"]}, joint=True)
    decoder = Decoder(TINY, DraftModel(TINY, TREES["static"], scheme), scheme)
    state = decoder.prefill(params, PROMPTS, max_new_tokens=8)
    compiled = Decoder.generate.lower(decoder, params, state).compile()
    caches = [(*cache.keys, *cache.values) for cache in (state.cache, state.draft.cache)]
    found = [fault for cache in caches for fault in hlo.faults(compiled, cache)]
    return [fault for fault in found if not fault.startswith("not one read")]


def loop_faults(tree: Any, acceptance: Acceptance, devices: int) -> list[str]:
    """What is wrong with `generate` for one tree, on one device or several."""
    model = random_model(TINY)
    params, mesh = for_decoding(model.params, joint=devices == 1), None
    if devices > 1:
        mesh = decode_mesh(f"tensor={devices}", TINY)
        params = jax.device_put(params, shardings(params, mesh))
    decoder = decoder_of(model.heads, tree, acceptance, mesh)
    state = decoder.prefill(params, PROMPTS, max_new_tokens=8)
    compiled = Decoder.generate.lower(decoder, params, state).compile()
    return hlo.faults(compiled, (*state.cache.keys, *state.cache.values))


if __name__ == "__main__":
    # Every tree on one device and on two, with one acceptance and the other.
    found = {
        "root 1": loop_faults(TREES["root"], Greedy(), 1),
        "root 2": loop_faults(TREES["root"], Lossless(0.8), 2),
        "static 1": loop_faults(TREES["static"], Lossless(0.8), 1),
        "static 2": loop_faults(TREES["static"], Greedy(), 2),
        "dynamic 1": loop_faults(TREES["dynamic"], Greedy(), 1),
        "dynamic 2": loop_faults(TREES["dynamic"], Lossless(0.8), 2),
        "draft": draft_faults(),
        "blind": loop_faults(TREES["root"], Blind(), 1),
    }
    Path(sys.argv[1]).write_text(json.dumps(found))
