"""The compiled programs of engines: ahead of time, each shape once a process."""

import collections
import dataclasses
import threading
import time
from typing import Any

import jax
import numpy as np

from medusa_jax.checkpoints.parameters import Parameters
from medusa_jax.decoding.compilation import compiler_options
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.prompt_blocks import RowSettings
from medusa_jax.drafting.drafter import Drafter
from medusa_jax.freed_memory import give_back

SMALLEST_CAPACITY = 512
# A program has some 300 maps of memory on a CPU, and Linux gives a process 65,530.
MOST_PROGRAMS = 128


def fitting(decoder: Decoder, tokens: int) -> Decoder:
    """The decoder with a capacity for so many tokens, at most its own.

    Attention reads filled slots only, so room costs no time. Capacities are powers of two, so that
    few are compiled.
    """
    capacity = max(SMALLEST_CAPACITY, 1 << (tokens - 1).bit_length())
    return dataclasses.replace(decoder, capacity=min(capacity, decoder.capacity))


# By signature of the parameters, method, decoder and shapes: engines of one model share them,
# as the caches of `jax.jit` are shared. Those not used for longest are forgotten.
_COMPILED: collections.OrderedDict[Any, Any] = collections.OrderedDict()
# Signatures have numbers: that of a model has hundreds of leaves, which each look-up would hash.
_NUMBERS: dict[Any, int] = {}
_LOCK = threading.Lock()


class Programs:
    """Compiled methods of decoders that differ in their capacity.

    Attributes:
      parameters: that they are compiled for.
      compile_seconds: spent on compilation so far, and on reading the parameters.
    """

    def __init__(self, parameters: Parameters, drafter: Drafter) -> None:
        """Of programs for parameters of these shapes, types, places and orders in memory.

        Args:
          drafter: whose drafts are in states; it may be another that runs.
        """
        self.parameters, self._shapes = parameters, parameters.shapes
        leaves, structure = jax.tree.flatten(self._shapes)
        places = tuple((leaf.shape, leaf.dtype, leaf.format) for leaf in leaves)
        with _LOCK:
            self._model = _NUMBERS.setdefault((structure, places, drafter), len(_NUMBERS))
        self.compile_seconds = 0.0

    def read_parameters(self) -> None:
        """Reads the parameters, where they are still in files."""
        start = time.perf_counter()
        if self.parameters.unread:
            _ = self.parameters.arrays
            self.compile_seconds += time.perf_counter() - start

    def get(
        self, name: str, decoder: Decoder, shape: Any, *inputs: Any, rows_of_step: int = 1,
        **static: Any,
    ) -> Any:  # fmt: skip
        """The compiled method `name` of a decoder.

        Args:
          shape: what tells the shapes of the inputs apart, beside the decoder.
          inputs: arrays, or their abstract shapes; read only where it must be compiled.
          rows_of_step: of the products of a step, where it takes steps.
          static: arguments that are compiled in.
        """
        key = self._model, name, decoder, shape, *static.values()
        with _LOCK:
            program = _COMPILED.get(key)
        if program is None:
            start = time.perf_counter()
            lowered = getattr(Decoder, name).lower(decoder, *inputs, **static)
            give_back()
            program = lowered.compile(compiler_options(self._shapes, rows_of_step))
            give_back()
            self.compile_seconds += time.perf_counter() - start
        with _LOCK:  # of engines in threads of their own, and what compiles for them
            _COMPILED[key] = program
            _COMPILED.move_to_end(key)
            while len(_COMPILED) > MOST_PROGRAMS:
                _COMPILED.popitem(last=False)
        return program

    def empty(self, decoder: Decoder, rows: int, settings: RowSettings) -> Any:
        """`Decoder.empty` for so many rows."""
        return self.get("empty", decoder, (), self._shapes, rows=rows, settings=settings)

    def read(self, decoder: Decoder, state: Any, block: Any) -> Any:
        """`Decoder.read` of blocks of this shape into states of this shape."""
        shape = _shape(state) + block.tokens.shape
        return self.get("read", decoder, shape, self._shapes, state, np.int32(0), block)

    def run(self, decoder: Decoder, state: Any) -> Any:
        """`Decoder.run` for states of this shape."""
        inputs = self._shapes, state, np.int32(1), np.int32(1)
        rows = len(state.root) * decoder.drafter.size
        return self.get("run", decoder, _shape(state), *inputs, rows_of_step=rows)

    def can_run(self, decoder: Decoder, slots: int, rows: int, settings: RowSettings) -> bool:
        """Whether `run` has its program for so many rows of so many cache slots already."""
        has = not settings.penalized, not settings.sampled
        shape = rows, slots, settings.stop_ids, *has
        return (self._model, "run", decoder, shape) in _COMPILED

    def free(self, decoder: Decoder, state: Any) -> Any:
        """`Decoder.free` for states of this shape."""
        return self.get("free", decoder, _shape(state), state, np.int32(0))

    def regroup(self, decoder: Decoder, state: Any, rows: Any) -> Any:
        """`Decoder.regroup` to so many rows, with this decoder's capacity."""
        shape = _shape(state) + rows.shape
        return self.get("regroup", decoder, shape, self._shapes, state, rows)

    def abstract_state(self, decoder: Decoder, rows: int, settings: RowSettings) -> Any:
        """The abstract state of so many rows."""
        shapes = decoder.empty.eval_shape(decoder, self._shapes, rows, settings)
        return decoder.network.abstract(shapes)


def _shape(state: Any) -> tuple[int, ...]:
    """What tells states apart: B, S, stop tokens Q, and what rows have settings of."""
    has = state.repetition is None, state.sampling is None
    return (*state.sequence.shape, state.stop_ids.shape[1], *has)
