"""The compiled programs of an engine: ahead of time, each shape once."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from medusa_jax.decoding.decoder import SLOTS_MULTIPLE, Decoder
from medusa_jax.decoding.prefill import round_up

SMALLEST_CAPACITY = 128
FINE_CAPACITY = 512


def fitting(decoder: Decoder, tokens: int) -> Decoder:
    """The decoder with a capacity for so many tokens, at most its own.

    Attention reads each slot of the cache, so there are hardly more than needed. Long texts
    get a power of two, so that few capacities are compiled.
    """
    capacity = max(SMALLEST_CAPACITY, 1 << (tokens - 1).bit_length())
    if capacity <= FINE_CAPACITY:
        tail = decoder.drafter.depth + 1
        capacity = max(SMALLEST_CAPACITY, round_up(tokens + tail, SLOTS_MULTIPLE) - tail)
    return dataclasses.replace(decoder, capacity=min(capacity, decoder.capacity))


class Programs:
    """Compiled methods of decoders that differ in their capacity.

    Attributes:
      compile_seconds: spent on compilation so far.
    """

    def __init__(self) -> None:
        self.compile_seconds = 0.0
        self._compiled: dict[Any, Any] = {}

    def get(self, name: str, decoder: Decoder, shape: Any, *inputs: Any) -> Any:
        """The compiled method `name` of a decoder.

        Args:
          shape: what tells the shapes of the inputs apart, beside the decoder.
          inputs: arrays, or their abstract shapes; read only where it must be compiled.
        """
        key = name, decoder, shape
        if key not in self._compiled:
            start = time.perf_counter()
            lowered = getattr(Decoder, name).lower(decoder, *inputs)
            self._compiled[key] = lowered.compile()
            self.compile_seconds += time.perf_counter() - start
        return self._compiled[key]

    def prefill(self, decoder: Decoder, params: Any, inputs: Any) -> Any:
        """`Decoder.run_prefill` for prompts of these shapes."""
        return self.get("run_prefill", decoder, inputs[0].shape, params, *inputs)

    def run(self, decoder: Decoder, params: Any, state: Any) -> Any:
        """`Decoder.run` for states of this shape."""
        limits = np.int32(1), np.int32(1)
        return self.get("run", decoder, state.root.shape, params, state, *limits)

    def insert(self, decoder: Decoder, state: Any, rows: Any) -> Any:
        """`Decoder.insert` of one row of `rows`."""
        shape = state.root.shape + rows.root.shape
        return self.get("insert", decoder, shape, state, rows, np.int32(0), np.int32(0))

    def free(self, decoder: Decoder, state: Any) -> Any:
        """`Decoder.free` for states of this shape."""
        return self.get("free", decoder, state.root.shape, state, np.int32(0))

    def resize(self, decoder: Decoder, state: Any) -> Any:
        """`Decoder.resize` to this decoder's capacity."""
        return self.get("resize", decoder, state.sequence.shape, state)

    def warm_up(self, decoder: Decoder, params: Any, inputs: Any) -> Any:
        """Compiles prefill and loop for prompts of these shapes; the abstract state."""
        self.prefill(decoder, params, inputs)
        state = jax.eval_shape(decoder.run_prefill, params, *inputs)
        if decoder.mesh is not None:
            places = decoder.network.places(state)
            state = jax.tree.map(lambda leaf, to: leaf.update(sharding=to), state, places)
        self.run(decoder, params, state)
        return state
