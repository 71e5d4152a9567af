"""The backbone for training: one compiled layer in a loop over the stacked weights of all layers.

On most devices decoding keeps layers apart, since slicing a stack copies weights in each step. In
training that cost is small beside the arithmetic. One layer compiles in minutes where sixty would
take hours; its weights are gathered, and its activations recomputed, one layer at a time.

Parameters: as the backbone's, those of the layers as a stack (`layer_stack.py`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from medusa_jax.model.backbone import Backbone
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.decoder_layer import Layer
from medusa_jax.model.layer_stack import place
from medusa_jax.model.layers import rope_tables
from medusa_jax.training import packed_attention
from medusa_jax.training.remat import INPUT, Remat


def shapes(single: dict[str, tuple[int, ...]], layers: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the stacked parameters, from those of the backbone's, by path."""
    stacked = {}
    for path, shape in single.items():
        name, layer = place(path)
        stacked[name] = shape if layer is None else (layers, *shape)
    return stacked


def hidden_states(
    config: ModelConfig,
    params: dict[str, Any],
    batch: dict[str, Array],
    *,
    remat: Remat | None = None,
    sharding: NamedSharding | None = None,
) -> Array:
    """Hidden states after the final norm [B, T, D], as `Backbone` gives them.

    Args:
      params: stacked; weights may hold adapters (`lora.attached`).
      batch: `tokens`, `segments`, `positions` [B, T]: a token sees those before
        it of its own segment.
      remat: what the backward pass recomputes; None: nothing.
      sharding: of hidden states [B, T, D], or None.
    """

    def constrain(x: Array) -> Array:
        return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)

    rope = rope_tables(config, batch["positions"])
    windows = tuple(sorted(set(config.windows), key=lambda window: window or 0))
    mesh: Any = None if sharding is None else sharding.mesh
    layer = Layer(config, packed_attention.attend)

    def run_layer(x: Array, stacked: tuple[Any, Array]) -> tuple[Array, None]:
        weights, window = stacked
        x = checkpoint_name(x, INPUT)
        documents = packed_attention.Documents(batch["segments"], window, windows, mesh)
        out: Any = layer.apply({"params": weights}, x, rope, documents, None)
        return constrain(out[0]), None

    which = jnp.asarray([windows.index(window) for window in config.windows])
    x = constrain(jnp.take(params["embed"]["embedding"], batch["tokens"], axis=0))
    run = run_layer if remat is None else remat.applied(run_layer)
    x, _ = jax.lax.scan(run, x, (params["layers"], which))
    hidden: Any = Backbone(config).apply({"params": params}, x, method="finish")
    return hidden
