"""What decoding cost, and how close it came to the physical limit.

A step must read every weight it uses and every cached key and value once; bytes
a second against the device's memory bandwidth say how much of the limit is had.
"""

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

import jax

from medusa_jax.decoding.decoder import Decoder, Output, Params
from medusa_jax.param_paths import flat

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


@dataclasses.dataclass
class Figures:
    """What decoding cost, summed over batches; compilation is not in it.

    Attributes:
      tokens: new tokens kept.
      steps: steps of all rows; made: tokens they made before any cut.
      passes: forward passes, each over a whole batch.
      seconds: wall time, prefill included; decode_seconds: without it.
      bytes: what the passes had to read, for the share of the bandwidth limit.
    """

    tokens: int = 0
    steps: int = 0
    made: int = 0
    passes: int = 0
    seconds: float = 0.0
    decode_seconds: float = 0.0
    bytes: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def mean_accepted_length(self) -> float:
        return self.made / max(self.steps, 1)

    def __str__(self) -> str:
        line = (
            f"{self.tokens} tokens in {self.seconds:.2f} s: {self.tokens_per_second:.1f} tokens/s, "
            f"mean accepted length {self.mean_accepted_length:.2f}, {self.steps} steps"
        )
        if bandwidth := device_bandwidth():
            share = self.bytes / max(self.decode_seconds, 1e-9) / bandwidth
            line += f", {share:.0%} of the memory-bandwidth limit"
        return line

    def __add__(self, other: "Figures") -> "Figures":
        return self._each(operator.add, other)

    def __sub__(self, other: "Figures") -> "Figures":
        """What came on top of an earlier copy (`dataclasses.replace`) of these figures."""
        return self._each(operator.sub, other)

    def _each(self, operation: Callable[[Any, Any], Any], other: "Figures") -> "Figures":
        names = [field.name for field in dataclasses.fields(self)]
        return Figures(*(operation(getattr(self, n), getattr(other, n)) for n in names))

    def add(
        self,
        decoder: Decoder,
        params: Params,
        outputs: list[Output],
        seconds: float,
        decode_seconds: float,
    ) -> None:
        """Adds one batch."""
        passes = max(len(output.tokens_per_step) for output in outputs)
        cached = sum(len(output.prompt_ids) + len(output.token_ids) / 2 for output in outputs)
        self.tokens += sum(len(output.token_ids) for output in outputs)
        self.steps += sum(len(output.tokens_per_step) for output in outputs)
        self.made += sum(sum(output.tokens_per_step) for output in outputs)
        self.passes += passes
        self.seconds += seconds
        self.decode_seconds += decode_seconds
        self.bytes += passes * step_bytes(decoder, params, cached)


def device_bandwidth(kind: str | None = None) -> float | None:
    """Bytes per second of this process's device, None where it is not known (CPUs)."""
    kind = kind or jax.devices()[0].device_kind
    return next((bytes_s for name, bytes_s in BANDWIDTH.items() if name in kind), None)


def step_bytes(decoder: Decoder, params: Params, cached_tokens: float) -> float:
    """Bytes that one step has to read: weights, the heads in use, cached keys and values.

    Over a mesh, those that each device reads of its own.

    Args:
      cached_tokens: tokens in the cache, summed over the rows of the batch.
    """
    config, backbone = decoder.config, dict(params["backbone"])
    if not config.tied or "lm_head" in backbone:
        backbone.pop("embed")  # a step reads a few rows of it, not the table
    depth, heads = decoder.tree.depth, decoder.heads
    weights = float(_bytes(backbone))
    for path, leaf in flat(params["heads"] if depth else {}).items():
        if path.startswith("block_"):  # of all heads
            weights += _bytes(leaf) * depth / heads.num_heads
        elif path.startswith(tuple(f"head_{i}/" for i in range(depth))):
            weights += _bytes(leaf)
    if depth and heads.shared:
        # Heads wait for the accepted node, so a projection of the backbone's is read once more.
        unembedding = backbone["lm_head"] if "lm_head" in backbone else backbone["embed"]
        weights += _bytes(params["heads"].get("vocab", unembedding))
    kv_heads = config.num_kv_heads // (decoder.mesh.shape["tensor"] if decoder.mesh else 1)
    itemsize = jax.tree.leaves(backbone)[0].dtype.itemsize
    per_token = 2 * config.num_layers * kv_heads * config.head_dim * itemsize
    return weights + cached_tokens * per_token


def _bytes(tree: Any) -> int:
    """Of the parts that one device has."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
