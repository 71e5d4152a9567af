"""Random weights of real shapes, and how long a decoding step takes with them.

A step's time depends on shapes alone, so models that are not at hand can be
timed. What their heads guess means nothing: acceptance cannot be had this way.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from medusa_jax.bench.summary import spread
from medusa_jax.checkpoints.names import backbone_places, head_places
from medusa_jax.checkpoints.weight_layout import for_decoding
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.state import outputs
from medusa_jax.decoding.stats import step_bytes
from medusa_jax.distributed.hardware import device_bandwidth
from medusa_jax.distributed.rules import abstract, decode_mesh
from medusa_jax.drafting.medusa_drafter import medusa_drafter
from medusa_jax.drafting.medusa_heads import HeadsConfig
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.model.config import ModelConfig
from medusa_jax.param_paths import nested

TREE = "mc_sim_7b_63"
PROMPT_TOKENS = 16


def random_params(abstract: Any, dtype: str) -> Any:
    """Small random numbers in the shape of abstract parameters, made on their devices."""

    def make(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        draw = jax.jit(_normal, static_argnums=(1, 2), out_shardings=leaf.sharding)
        return draw(key, leaf.shape, dtype)

    leaves, structure = jax.tree.flatten(abstract)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return structure.unflatten([make(key, leaf) for key, leaf in zip(keys, leaves, strict=True)])


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return (0.02 * jax.random.normal(key, shape)).astype(dtype)


def random_model(
    config: ModelConfig, heads: HeadsConfig, dtype: str, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Random {"backbone", "heads"} laid out for decoding: a model is never held twice."""
    return random_params(abstract_model(config, heads, mesh), dtype)


def abstract_model(
    config: ModelConfig, heads: HeadsConfig, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Abstract {"backbone", "heads"} laid out for decoding, and over a mesh where there is one."""
    tables = {"backbone": backbone_places(config), "heads": head_places(heads)}
    leaves = {
        "/".join((part, *place.path)): jax.ShapeDtypeStruct(place.shape, jnp.float32)
        for part, table in tables.items()
        for place in table.values()
    }
    shapes = jax.eval_shape(functools.partial(for_decoding, tied=config.tied), nested(leaves))
    return abstract(shapes, mesh) if mesh else shapes


def trees(sizes: Sequence[int], num_heads: int) -> list[Tree]:
    """The root alone, for plain decoding, then the published tree cut to each size, once each."""
    whole = Tree.published(TREE).limit_depth(num_heads)
    return [Tree(), *(tree for tree in map(whole.cut, sorted({*sizes} - {1})) if tree.nodes)]


def time_steps(
    config: ModelConfig,
    heads: HeadsConfig,
    dtype: str,
    *,
    sizes: Sequence[int],
    batch_sizes: Sequence[int],
    new_tokens: int,
    repeats: int,
    copy_bandwidth: float,
    mesh: str | None = None,
    tick: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """One row a batch size and tree: ms a step, its ratio to the plain step, bandwidth shares.

    Sizes and batch sizes take turns, repeat by repeat, so that a machine whose
    speed drifts hurts all alike.

    Args:
      copy_bandwidth: measured on this device, bytes a second.
      mesh: devices to split over, see `decode_mesh`; one by default.
      tick: called after each of the (repeats + 1) x batch sizes x trees runs; the first compile.
    """
    capacity = PROMPT_TOKENS + new_tokens
    if capacity > config.context:
        raise InputError(
            f"{PROMPT_TOKENS} prompt tokens and {new_tokens} new ones exceed the context of "
            f"{config.context}"
        )
    devices = decode_mesh(mesh, config) if mesh else None
    params = random_model(config, heads, dtype, devices)
    decoders = {
        tree.size: Decoder(config, medusa_drafter(heads, tree), capacity=capacity, mesh=devices)
        for tree in trees(sizes, heads.num_heads)
    }
    times: dict[tuple[int, int], list[float]] = {
        (batch, size): [] for batch in batch_sizes for size in decoders
    }
    prompt = _prompt(config, PROMPT_TOKENS)
    for repeat in range(repeats + 1):
        for batch, size in times:
            seconds = _step_seconds(decoders[size], params, [prompt] * batch, new_tokens)
            if repeat:
                times[batch, size].append(seconds)
            tick()
    rows = []
    for (batch, size), seconds in times.items():
        plain = times[batch, 1]
        read = step_bytes(decoders[size], params, batch * (PROMPT_TOKENS + new_tokens / 2))
        row = {
            "batch_size": batch,
            "nodes": size,
            "depth": decoders[size].tree.depth,
            "step_ms": spread([1e3 * one for one in seconds]),
            "step_overhead": spread([a / b for a, b in zip(seconds, plain, strict=True)]),
            "bandwidth_share": spread([read / one / copy_bandwidth for one in seconds]),
        }
        if peak := device_bandwidth():
            row["bandwidth_share_datasheet"] = spread([read / one / peak for one in seconds])
        rows.append(row)
    return rows


def time_prefill(
    config: ModelConfig,
    heads: HeadsConfig,
    dtype: str,
    *,
    prompt_tokens: int,
    batch_sizes: Sequence[int],
    repeats: int,
) -> list[dict[str, Any]]:
    """One row a batch size: ms until the prompts are read and the first guesses are made."""
    params = random_model(config, heads, dtype)
    tree = trees((config.vocab_size,), heads.num_heads)[-1]
    decoder = Decoder(config, medusa_drafter(heads, tree), capacity=prompt_tokens + 1)
    rows = []
    for batch in batch_sizes:
        prompts, times = [_prompt(config, prompt_tokens)] * batch, []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            jax.block_until_ready(decoder.prefill(params, prompts, max_new_tokens=1))
            times.append(1e3 * (time.perf_counter() - start))
        rows.append({"batch_size": batch, "tokens": prompt_tokens, "ms": spread(times[1:])})
    return rows


def _prompt(config: ModelConfig, length: int) -> list[int]:
    return [1 + token % (config.vocab_size - 1) for token in range(length)]


def _step_seconds(
    decoder: Decoder, params: Any, prompts: list[list[int]], new_tokens: int
) -> float:
    state = decoder.prefill(params, prompts, max_new_tokens=new_tokens)
    state = jax.block_until_ready(state)
    start = time.perf_counter()
    state = jax.block_until_ready(decoder.generate(params, state))
    seconds = time.perf_counter() - start
    return seconds / max(len(output.tokens_per_step) for output in outputs(state))
