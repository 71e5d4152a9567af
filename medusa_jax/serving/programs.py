"""The compiled programs of engines: ahead of time, each shape once a process."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from medusa_jax.decoding.compilation import compiler_options
from medusa_jax.decoding.decoder import SLOTS_MULTIPLE, Decoder
from medusa_jax.decoding.prefill import PREFILL_BLOCK, round_up

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


# By signature of the parameters, method, decoder and shapes: engines of one model share them,
# as the caches of `jax.jit` are shared.
_COMPILED: dict[Any, Any] = {}


class Programs:
    """Compiled methods of decoders that differ in their capacity.

    Attributes:
      compile_seconds: spent on compilation so far.
    """

    def __init__(self, params: Any) -> None:
        """Of programs for parameters of these shapes, types, places and orders in memory."""
        leaves, structure = jax.tree.flatten(params)
        places = tuple((leaf.shape, leaf.dtype, leaf.format) for leaf in leaves)
        self.compile_seconds, self._signature = 0.0, (structure, places)
        self._options = compiler_options(params)

    def get(self, name: str, decoder: Decoder, shape: Any, *inputs: Any, **static: Any) -> Any:
        """The compiled method `name` of a decoder.

        Args:
          shape: what tells the shapes of the inputs apart, beside the decoder.
          inputs: arrays, or their abstract shapes; read only where it must be compiled.
          static: arguments that are compiled in.
        """
        key = self._signature, name, decoder, shape, *static.values()
        if key not in _COMPILED:
            start = time.perf_counter()
            lowered = getattr(Decoder, name).lower(decoder, *inputs, **static)
            _COMPILED[key] = lowered.compile(self._options)
            self.compile_seconds += time.perf_counter() - start
        return _COMPILED[key]

    def prefill(
        self, decoder: Decoder, params: Any, inputs: Any, block: int = PREFILL_BLOCK
    ) -> Any:
        """`Decoder.run_prefill` for prompts of these shapes, in blocks of so many tokens."""
        tokens, _, _, stop_ids, _, penalty, sampling = inputs
        shape = (*tokens.shape, *stop_ids.shape, penalty is None, sampling is None)
        return self.get("run_prefill", decoder, shape, params, *inputs, block=block)

    def run(self, decoder: Decoder, params: Any, state: Any) -> Any:
        """`Decoder.run` for states of this shape."""
        limits = np.int32(1), np.int32(1)
        return self.get("run", decoder, _shape(state), params, state, *limits)

    def insert(self, decoder: Decoder, state: Any, rows: Any) -> Any:
        """`Decoder.insert` of one row of `rows`."""
        shape = _shape(state) + rows.root.shape
        return self.get("insert", decoder, shape, state, rows, np.int32(0), np.int32(0))

    def free(self, decoder: Decoder, state: Any) -> Any:
        """`Decoder.free` for states of this shape."""
        return self.get("free", decoder, _shape(state), state, np.int32(0))

    def resize(self, decoder: Decoder, state: Any) -> Any:
        """`Decoder.resize` to this decoder's capacity."""
        return self.get("resize", decoder, _shape(state) + state.sequence.shape, state)

    def warm_up(self, decoder: Decoder, params: Any, inputs: Any) -> Any:
        """Compiles prefill and loop for prompts of these shapes; the abstract state."""
        self.prefill(decoder, params, inputs)
        state = jax.eval_shape(decoder.run_prefill, params, *inputs)
        state = decoder.network.abstract(state)
        self.run(decoder, params, state)
        return state


def _shape(state: Any) -> tuple[int, ...]:
    """What tells states of one decoder apart: rows B, stop tokens Q, what rows have settings of."""
    has = state.repetition is None, state.sampling is None
    return (*state.stop_ids.shape, *has)
