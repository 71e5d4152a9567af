"""Low-rank adapters (LoRA): their parameters, and the weights that hold them.

An adapter of W [out, in] is A [R, in] and B [out, R]; the projection becomes
W x + (alpha / R) B A x, see `model.weight.Weight`. B starts at zero, so the backbone starts as it
was. Without the adapters it is again the backbone: the teacher of self-distillation.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from medusa_jax.model.weight import Adapter, Weight
from medusa_jax.param_paths import flat, nested


def shapes(path: str, weight: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapter of a weight [..., out, in], by path; leading axes stay."""
    *stack, out, into = weight
    return {f"{path}/a": (*stack, rank, into), f"{path}/b": (*stack, out, rank)}


def init(path: str, shape: tuple[int, ...], key: Array) -> Array:
    """One adapter parameter: A uniform within 1/sqrt(in), as its authors do; B zero."""
    if path.endswith("/b"):
        return jnp.zeros(shape)
    limit = shape[-1] ** -0.5
    return jax.random.uniform(path_key(key, path), shape, minval=-limit, maxval=limit)


def path_key(key: Array, path: str) -> Array:
    """A random key of its own for a parameter."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def attached(
    backbone: Mapping[str, Any],
    adapters: Mapping[str, Any],
    scale: float,
    dropout: float = 0.0,
    key: Array | None = None,
) -> dict[str, Any]:
    """The backbone's parameters, in which every adapted weight holds its adapter.

    A tied model gets an "lm_head": the embedding, with the adapter of the logits alone.

    Args:
      backbone: layers stacked, see `scanned_backbone`.
      adapters: nested likewise; {"a", "b"} in place of a projection's parameters.
      scale: alpha / R.
      dropout: probability that a number of an adapter's input is dropped.
      key: of the dropout, which differs between adapters and between layers; None for none.
    """
    leaves, factors = flat(backbone), flat(adapters)
    for path in {path.rpartition("/")[0] for path in factors}:
        a, b = factors[f"{path}/a"], factors[f"{path}/b"]
        noise = None if key is None else path_key(key, path)
        if path == "lm_head":
            name, data = path, leaves.get(path, leaves["embed/embedding"])
        else:
            name, data = f"{path}/weight", leaves[f"{path}/weight"]
            noise = None if noise is None else jax.random.split(noise, data.shape[0])
        leaves[name] = Weight(data, adapter=Adapter(a, b, scale, dropout, noise))
    return nested(leaves)


def folded(weight: Weight) -> Array:
    """W + scale B A of a weight with an adapter, in float32 [..., out, in]."""
    data, adapter = weight.data.astype(jnp.float32), weight.adapter
    if adapter is None:
        return data
    a, b = adapter.a.astype(jnp.float32), adapter.b.astype(jnp.float32)
    return data + adapter.scale * jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
