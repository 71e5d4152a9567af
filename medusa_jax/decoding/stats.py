"""What decoding cost, and how close it came to the memory-bandwidth limit.

A step must read each weight it uses, and each cached key and value, once. Bytes per second
against the device's memory bandwidth say which share of the limit decoding reached.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.network import precision
from medusa_jax.decoding.state import Output
from medusa_jax.distributed.hardware import device_bandwidth
from medusa_jax.drafting.drafter import Params
from medusa_jax.param_paths import device_bytes


@dataclasses.dataclass
class Stats:
    """What decoding cost; compilation is counted apart.

    Attributes:
      tokens: new tokens that were kept.
      steps: steps of all rows; made: the tokens that they accepted, before any cut.
      passes: forward passes, each over all rows of a batch.
      prompts: prompts that were prefilled.
      seconds: wall time of prefill, passes and all between; decode_seconds: of the passes alone.
      compile_seconds: ahead-of-time compilation and reading parameters, not part of `seconds`.
      bytes: bytes that the passes had to read.
    """

    tokens: int = 0
    steps: int = 0
    made: int = 0
    passes: int = 0
    prompts: int = 0
    seconds: float = 0.0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0
    bytes: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def mean_accepted_length(self) -> float:
        return self.made / max(self.steps, 1)

    def add_passes(self, passes: int, seconds: float) -> None:
        """Counts a call of the device loop."""
        self.passes += passes
        self.decode_seconds += seconds

    def add_output(self, output: Output) -> None:
        """Counts a row that has ended."""
        self.tokens += len(output.token_ids)
        self.steps += len(output.tokens_per_step)
        self.made += sum(output.tokens_per_step)

    def __str__(self) -> str:
        line = (
            f"{self.tokens} tokens in {self.seconds:.2f} s: {self.tokens_per_second:.1f} tokens/s, "
            f"mean accepted length {self.mean_accepted_length:.2f}, {self.steps} steps"
        )
        if bandwidth := device_bandwidth():
            share = self.bytes / max(self.decode_seconds, 1e-9) / bandwidth
            line += f", {share:.0%} of the memory-bandwidth limit"
        return line

    def __add__(self, other: "Stats") -> "Stats":
        return self._each(operator.add, other)

    def __sub__(self, other: "Stats") -> "Stats":
        """What came on top of an earlier copy (`dataclasses.replace`) of these stats."""
        return self._each(operator.sub, other)

    def _each(self, operation: Callable[[Any, Any], Any], other: "Stats") -> "Stats":
        names = [field.name for field in dataclasses.fields(self)]
        return Stats(*(operation(getattr(self, n), getattr(other, n)) for n in names))


def step_bytes(decoder: Decoder, params: Params, cached_tokens: float) -> float:
    """Bytes that a step has to read: weights, the heads in use, cached keys and values.

    Over a mesh, the bytes that each device reads of its own part.

    Args:
      cached_tokens: tokens in the cache, summed over the rows of the batch.
    """
    config, backbone = decoder.config, dict(params["backbone"])
    if not config.tied or "lm_head" in backbone:
        backbone.pop("embed")  # a step reads a few rows of it, not the table
    weights = device_bytes(backbone) + decoder.drafter.read_bytes(params)
    kv_heads = config.num_kv_heads // (decoder.mesh.shape["tensor"] if decoder.mesh else 1)
    itemsize = precision(params).itemsize
    per_token = 2 * config.num_layers * kv_heads * config.head_dim * itemsize
    return weights + cached_tokens * per_token
