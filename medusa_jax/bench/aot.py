"""Prefill and decoding steps through the compiler of a machine that is not here."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from medusa_jax.bench.synthetic import abstract_model, trees
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.sampling import row_keys
from medusa_jax.distributed.aot import DoesNotFit, Memory, compile_for
from medusa_jax.distributed.rules import decode_mesh
from medusa_jax.distributed.topology import devices
from medusa_jax.drafting.medusa_drafter import medusa_drafter
from medusa_jax.drafting.medusa_heads import HeadsConfig
from medusa_jax.model.config import ModelConfig


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
) -> dict[str, Memory]:
    """Memory of each batch size's prefill and of the step of each tree; printed as they come.

    Args:
      mesh: how many devices of the topology to split over, "tensor=4".
      sizes: tokens of trees.

    Raises:
      InputError: topology, mesh, or capacity are wrong.
      DoesNotFit: some need more than a chip's memory; raised after all were tried.
    """
    over = decode_mesh(mesh, config, devices(topology))
    chosen = [tree for tree in trees(sizes, heads.num_heads) if tree.size in sizes]
    decoders = [
        Decoder(config, medusa_drafter(heads, tree), capacity=capacity, mesh=over)
        for tree in chosen
    ]
    found, short = {}, 0
    for batch in batch_sizes:
        for name, lower in lowerings(decoders, dtype, batch, prompt_tokens):
            name = f"{name}, batch {batch}"
            try:
                found[name] = compile_for(topology, f"{topology} ({mesh}), {name}", lower)
            except DoesNotFit as error:
                print(error, flush=True)
                short += 1
    if short:
        raise DoesNotFit(f"{short} of these do not fit {topology}")
    return found


def lowerings(
    decoders: Sequence[Decoder], dtype: str, batch: int, prompt_tokens: int
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names, and what lowers: the prefill for the last decoder, then the step of each."""
    for decoder in reversed(decoders):
        shapes = abstract_model(decoder.config, decoder.heads, decoder.mesh)
        params = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.dtype(dtype)), shapes)
        keys = jax.eval_shape(lambda: row_keys(0, [(row, 0) for row in range(batch)]))
        numbers = [(batch, prompt_tokens), (batch,), (batch,), (1,)]  # tokens to stop ids
        inputs = (*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in numbers), keys)
        inputs = jax.tree.map(_placed, inputs, decoder.places(inputs))
        if decoder is decoders[-1]:
            prefill = functools.partial(Decoder._prefill.lower, decoder, params, *inputs)
            yield f"prefill of {prompt_tokens}", prefill
        state = jax.eval_shape(functools.partial(Decoder._prefill, decoder), params, *inputs)
        state = jax.tree.map(_placed, state, decoder.places(state))
        step = functools.partial(Decoder.step.lower, decoder, params, state)
        yield f"step of {decoder.tree.size}", step


def _placed(leaf: jax.ShapeDtypeStruct, where: Any) -> jax.ShapeDtypeStruct:
    return leaf.update(sharding=where)
