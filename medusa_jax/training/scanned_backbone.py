"""The backbone for training: all layers as one, whose weights are stacked, in a loop.

Decoding keeps layers apart, since slicing a stack would copy weights in every
step. Here that is little beside the arithmetic, and one compiled layer instead
of sixty compiles in minutes what would take hours, with one layer's weights
gathered and one layer's activations recomputed at a time.

Parameters: as the backbone's, with `layers/...` [L, ...] in place of
`layer_0/...`, `layer_1/...`.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from medusa_jax.model.backbone import Layer
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.layers import rms_norm, rope_tables, within_window
from medusa_jax.model.linear import project
from medusa_jax.training.lora import Adapters, adapted, dropped, low_rank, path_key

_LAYER = re.compile(r"layer_(\d+)/")


def place(path: str) -> tuple[str, int | None]:
    """Where a parameter of a single layer lies in the stack.

    "layer_3/mlp/up/weight" -> ("layers/mlp/up/weight", 3); "lm_head" -> ("lm_head", None).
    """
    match = _LAYER.match(path)
    return (path, None) if match is None else ("layers/" + path[match.end() :], int(match[1]))


def shapes(single: dict[str, tuple[int, ...]], layers: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the stacked parameters, from those of the backbone's, by path."""
    stacked = {}
    for path, shape in single.items():
        name, layer = place(path)
        stacked[name] = shape if layer is None else (layers, *shape)
    return stacked


def members(path: str, layers: int) -> list[str]:
    """The single parameters in a stacked one, in order; of another one, itself."""
    if not path.startswith("layers/"):
        return [path]
    return [f"layer_{i}/{path.removeprefix('layers/')}" for i in range(layers)]


def hidden_states(
    config: ModelConfig,
    params: dict[str, Any],
    batch: dict[str, Array],
    *,
    adapters: Adapters | None = None,
    scale: float = 0.0,
    dropout: float = 0.0,
    key: Array | None = None,
    remat: bool = False,
    constrain: Callable[[Array], Array] = lambda x: x,
) -> Array:
    """Hidden states after the final norm [B, T, D], as `Backbone` gives them.

    Args:
      params: stacked.
      batch: `tokens`, `segments`, `positions` [B, T]: a token sees those before
        it of its own segment.
      adapters: stacked like the parameters, or None; see `lora.adapted` for
        `scale`, `dropout` and `key`.
      remat: keep each layer's input only, and recompute the rest in the backward pass.
      constrain: puts hidden states [B, T, D] where they shall lie.
    """
    tokens, segments, positions = (batch[name] for name in ("tokens", "segments", "positions"))
    order = jnp.arange(tokens.shape[1])
    mask = (segments[:, :, None] == segments[:, None, :]) & (order[:, None] >= order)
    rope = rope_tables(config, positions)
    kinds = sorted(set(config.windows), key=lambda window: window or 0)
    masks = [mask & within_window(positions, positions, window) for window in kinds]
    layer = Layer(config)

    def one(x: Array, stacked: tuple[Any, ...]) -> tuple[Array, None]:
        weights, adapter, noise, kind = stacked
        seen = masks[0] if len(masks) == 1 else jax.lax.select_n(kind, *masks)
        with adapted(adapter, scale, dropout, noise):
            out: Any = layer.apply({"params": weights}, x, rope, seen, [])
        return constrain(out[0]), None

    count = config.num_layers
    noises = None if key is None else jax.random.split(key, count)
    adapter = None if adapters is None else adapters.get("layers")
    kind = jnp.asarray([kinds.index(window) for window in config.windows])
    x = constrain(jnp.take(params["embed"]["embedding"], tokens, axis=0))
    body = jax.checkpoint(one, prevent_cse=False) if remat else one
    x, _ = jax.lax.scan(body, x, (params["layers"], adapter, noises, kind))
    return rms_norm(x, params["final_norm"]["scale"], config.norm_eps)


def logits(
    config: ModelConfig,
    params: dict[str, Any],
    hidden: Array,
    adapters: Adapters | None = None,
    scale: float = 0.0,
    dropout: float = 0.0,
    key: Array | None = None,
    rows: Array | None = None,
) -> Array:
    """Next-token logits, float32 [..., V], as `Backbone.unembed` gives them.

    Adapters as in `hidden_states`. With `rows` [W], logits of these tokens only.
    """
    weight = params["embed"]["embedding"] if config.tied else params["lm_head"]
    adapter = None if adapters is None else adapters["lm_head"]
    if rows is not None:
        weight = weight[rows]
        adapter = adapter and adapter | {"b": adapter["b"][rows]}
    out = project(hidden, weight)
    if adapter is None:
        return out
    noise = None if key is None else path_key(key, "lm_head")
    return out + scale * low_rank(dropped(hidden, dropout, noise), adapter)
