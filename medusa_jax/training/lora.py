"""Low-rank adapters (LoRA) beside every projection of a backbone, which does not know of them.

An adapter of W [out, in] is A [R, in] and B [out, R]; the projection becomes
W x + (alpha / R) B A x. B starts at zero, so the backbone starts as it was, and
leaving the adapters out gives it back: the teacher of self-distillation.
"""

import contextlib
import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from medusa_jax.backbone import Backbone, Linear
from medusa_jax.layers import project

# One adapter: {"a": A, "b": B}; all of them, by the path of what they adapt.
Adapters = Mapping[str, Any]


def init_shapes(linears: Mapping[str, tuple[int, ...]], rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all adapter parameters, by path, for weights [out, in] by path."""
    shapes = {}
    for path, (out, into) in linears.items():
        shapes[f"{path}/a"] = (rank, into)
        shapes[f"{path}/b"] = (out, rank)
    return shapes


def init(path: str, shape: tuple[int, ...], key: Array) -> Array:
    """One adapter parameter: A uniform within 1/sqrt(in), as its authors do; B zero."""
    if path.endswith("/b"):
        return jnp.zeros(shape)
    limit = shape[1] ** -0.5
    return jax.random.uniform(path_key(key, path), shape, minval=-limit, maxval=limit)


def path_key(key: Array, path: str) -> Array:
    """A random key of its own for a parameter or module."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def adapted(
    adapters: Adapters | None, scale: float, dropout: float = 0.0, key: Array | None = None
) -> contextlib.AbstractContextManager:
    """Within this context every `Backbone` applies the adapters.

    Args:
      adapters: nested like the backbone's parameters, each weight's place
        holding {"a", "b"}; None for none.
      scale: alpha / R.
      dropout: share of an adapter's input that is dropped; needs `key`.
    """
    if adapters is None:
        return contextlib.nullcontext()

    def add(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        path = _adapted_path(context)
        if path is None or (adapter := _find(adapters, path)) is None:
            return out
        x = args[0]
        if dropout and key is not None:
            kept = jax.random.bernoulli(path_key(key, "/".join(path)), 1 - dropout, x.shape)
            x = jnp.where(kept, x / (1 - dropout), 0).astype(x.dtype)
        low = project(x, adapter["a"].astype(x.dtype)).astype(x.dtype)
        return out + (scale * project(low, adapter["b"].astype(x.dtype))).astype(out.dtype)

    return nn.intercept_methods(add)


def _adapted_path(context: Any) -> tuple[str, ...] | None:
    module, method = context.module, context.method_name
    if isinstance(module, Linear) and method == "__call__":
        return module.path
    if isinstance(module, Backbone) and method == "unembed":
        return ("lm_head",)
    return None


def _find(adapters: Adapters, path: tuple[str, ...]) -> Any:
    for key in path:
        if key not in adapters:
            return None
        adapters = adapters[key]
    return adapters


def folded(weight: Array, adapter: Adapters, scale: float) -> Array:
    """W + scale B A, in float32 [out, in]."""
    return weight.astype(jnp.float32) + scale * jnp.matmul(
        adapter["b"].astype(jnp.float32),
        adapter["a"].astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
