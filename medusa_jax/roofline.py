"""How close decoding comes to the physical limit: bytes a step must read, per second, against the
memory bandwidth of the device."""

import jax

from medusa_jax.decode import Decoder, Params

# Peak memory bandwidth in bytes per second, by a part of JAX's `device_kind`; data sheets.
BANDWIDTH = {
    "H200": 4.8e12,
    "H100": 3.35e12,
    "A100-SXM4-80GB": 2.039e12,
    "A100 80GB": 1.935e12,
    "A100": 1.555e12,
    "B200": 8.0e12,
    "L40S": 0.864e12,
    "TPU v4": 1.228e12,
    "TPU v5 lite": 0.819e12,
    "TPU v5e": 0.819e12,
    "TPU v5": 2.765e12,
    "TPU v6": 1.64e12,
    "TPU7x": 7.38e12,
}


def device_bandwidth(kind: str | None = None) -> float | None:
    """Bytes per second of this process's device, None where it is not known (CPUs)."""
    kind = kind or jax.devices()[0].device_kind
    return next((bytes_s for name, bytes_s in BANDWIDTH.items() if name in kind), None)


def step_bytes(decoder: Decoder, params: Params, cached_tokens: float) -> float:
    """Bytes that one step has to read: weights, the heads in use, and the cached keys and values.

    Args:
      cached_tokens: tokens in the cache, summed over the rows of the batch.
    """
    config, backbone = decoder.config, dict(params["backbone"])
    if not config.tied:
        backbone.pop("embed")  # a step reads a few rows of it, not the table
    heads = {f"head_{i}": params["heads"][f"head_{i}"] for i in range(decoder.tree.depth)}
    leaves = jax.tree.leaves((backbone, heads))
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return sum(leaf.nbytes for leaf in leaves) + cached_tokens * per_token * leaves[0].itemsize
