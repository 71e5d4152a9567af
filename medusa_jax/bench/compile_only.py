"""Prefill and decoding steps through the compiler of a machine that is not here."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from medusa_jax import sharding
from medusa_jax.bench.random_weights import abstract_model, trees
from medusa_jax.compile_only import DoesNotFit, compile_for
from medusa_jax.config import ModelConfig
from medusa_jax.decode import Decoder
from medusa_jax.heads import HeadsConfig
from medusa_jax.sampling import row_keys
from medusa_jax.topology import devices

log = logging.getLogger(__name__)


def compile_decoding(
    config: ModelConfig,
    heads: HeadsConfig,
    dtype: str,
    topology: str,
    mesh: str,
    *,
    sizes: Sequence[int],
    batch_sizes: Sequence[int],
    prompt_tokens: int,
    capacity: int,
) -> None:
    """Compiles a prefill for each batch size, and a step for each tree; prints their memory.

    Args:
      mesh: how many devices of the topology to split over, "tensor=4".
      sizes: tokens of trees.

    Raises:
      InputError: topology, mesh or capacity are wrong.
      DoesNotFit: some of them need more than a chip's memory; after all were tried.
    """
    found = sharding.decode_mesh(mesh, config, devices(topology))
    everywhere = NamedSharding(found, PartitionSpec())
    params = jax.tree.map(
        lambda leaf: leaf.update(dtype=jnp.dtype(dtype)),
        sharding.abstract(abstract_model(config, heads), found),
    )

    def whole(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.update(sharding=everywhere), tree)

    def inputs(batch: int) -> Any:
        rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
        tokens = jax.ShapeDtypeStruct((batch, prompt_tokens), jnp.int32)
        stop_ids = jax.ShapeDtypeStruct((1,), jnp.int32)
        keys = jax.eval_shape(lambda: row_keys(0, [(row, 0) for row in range(batch)]))
        return whole((tokens, rows, rows, stop_ids, keys))

    chosen = [tree for tree in trees(sizes, heads.num_heads) if tree.size in sizes]
    decoders = [Decoder(config, heads, tree, capacity=capacity, mesh=found) for tree in chosen]
    short = []
    for batch in batch_sizes:
        jobs = [(f"prefill {prompt_tokens}", decoders[-1], None)]
        for decoder in decoders:
            state = jax.eval_shape(decoder._prefill, params, *inputs(batch))
            state = jax.tree.map(
                lambda leaf, place: leaf.update(sharding=place), state, decoder.places(state)
            )
            jobs.append((f"step of {decoder.tree.size}", decoder, state))
        for name, decoder, state in jobs:

            def lower(decoder: Decoder = decoder, state: Any = state) -> Any:
                if state is None:
                    return Decoder._prefill.lower(decoder, params, *inputs(batch))
                return Decoder.step.lower(decoder, params, state)

            try:
                compile_for(topology, f"{topology} ({mesh}), {name}, batch {batch}", lower)
            except DoesNotFit as error:
                print(f"{error}", flush=True)
                short.append(name)
    if short:
        raise DoesNotFit(f"{topology}: {len(short)} of them do not fit")
