"""Low-rank adapters (LoRA) beside every projection of a layer, which does not know of them.

An adapter of W [out, in] is A [R, in] and B [out, R]; the projection becomes
W x + (alpha / R) B A x. B starts at zero, so the backbone starts as it was, and
leaving the adapters out gives it back: the teacher of self-distillation.
"""

import contextlib
import functools
import operator
import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from medusa_jax.model.backbone import Linear
from medusa_jax.model.linear import project

# One adapter: {"a": A, "b": B}; all of them, by the path of what they adapt.
Adapters = Mapping[str, Any]


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
    """A random key of its own for a parameter or module."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def adapted(
    adapters: Adapters | None, scale: float, dropout: float = 0.0, key: Array | None = None
) -> contextlib.AbstractContextManager:
    """Within this context a `backbone.Layer` applies its adapters.

    Args:
      adapters: nested like the layer's parameters, {"a", "b"} where a
        projection has its weight; None for none.
      scale: alpha / R.
      dropout: share of an adapter's input that is dropped; needs `key`.
    """
    if adapters is None:
        return contextlib.nullcontext()

    def add(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        if not isinstance(context.module, Linear):
            return out
        adapter = functools.reduce(operator.getitem, context.module.path, adapters)
        x, path = args[0], "/".join(context.module.path)
        x = dropped(x, dropout, None if key is None else path_key(key, path))
        return out + (scale * low_rank(x, adapter)).astype(out.dtype)

    return nn.intercept_methods(add)


def dropped(x: Array, rate: float, key: Array | None) -> Array:
    """x with a share of its numbers zero and the rest scaled up; x itself without a key."""
    if key is None or not rate:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def low_rank(x: Array, adapter: Adapters) -> Array:
    """B A x, float32 [..., out]."""
    low = project(x, adapter["a"].astype(x.dtype)).astype(x.dtype)
    return project(low, adapter["b"].astype(x.dtype))


def folded(weight: Array, adapter: Adapters, scale: float) -> Array:
    """W + scale B A, in float32 [out, in]."""
    return weight.astype(jnp.float32) + scale * jnp.matmul(
        adapter["b"].astype(jnp.float32),
        adapter["a"].astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
