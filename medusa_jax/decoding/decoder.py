"""Decoding on token ids: prefill a batch, then step it on the device until its rows end.

    Decoder         what is compiled: backbone, drafter, acceptance, capacity
      .prefill      prompts -> State
      .step         State -> State and the tokens it accepted
      .generate     steps until all rows have ended, in one device loop
      .run          the same loop, bounded: until a row ends, or some number of steps
      .stream       step after step, yielding tokens as they are accepted
      .empty, .read, .free, .regroup    rows of a running batch come and go
    outputs         State -> one `Output` a row

This package knows nothing about text or files. Letters: see `shapes.py`.
"""

import dataclasses
import functools
from collections.abc import Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from medusa_jax.decoding.acceptance import Acceptance, Greedy
from medusa_jax.decoding.network import Network, precision
from medusa_jax.decoding.prefill import PREFILL_BLOCK, bucket, prefill_rows, round_up
from medusa_jax.decoding.prompt_blocks import PromptBlock, RowSettings, empty_rows, read_block
from medusa_jax.decoding.repetition import penalties
from medusa_jax.decoding.sampling import Sampling, row_keys
from medusa_jax.decoding.state import RUNNING, Emitted, State, free, regrouped
from medusa_jax.decoding.step import advance
from medusa_jax.distributed.hardware import memory_bytes
from medusa_jax.distributed.rules import everywhere
from medusa_jax.drafting.drafter import Draft, Drafter, NoDraft, Params
from medusa_jax.errors import InputError
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.kernel_choice import KERNELS

# A row of a TPU's registers: keys of another number of slots would lie in another order.
SLOTS_MULTIPLE = 128
DEFAULT_CAPACITY = 4096


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoding recipe. Hashable and static under `jax.jit`; parameters are passed in.

    Attributes:
      config: shape of the backbone.
      drafter: what guesses the tokens that a step verifies; `NoDraft()` decodes plainly.
      acceptance: `Greedy()`, `Typical(...)`, `Lossless(...)` or your own.
      capacity: most tokens a row may hold, prompt and text; default: the
        model's context, at most 4096.
      suppress: token ids that are never produced.
      mesh: devices of `rules.decode_mesh` that share the work; parameters must be placed
        as `load_model` places them. One device by default.
      kernels: what kernels compute where there are any, of `KERNELS`.
      most_logprobs: likeliest tokens of each place whose log-probabilities are kept, beside those
        of the text, for rows that ask for them; None keeps none.

    Raises:
      InputError: the drafter does not fit the backbone, the capacity exceeds the
        model's context, or a suppressed token is not in the vocabulary.
    """

    config: ModelConfig
    drafter: Drafter = NoDraft()
    acceptance: Acceptance = Greedy()
    capacity: int = 0
    suppress: tuple[int, ...] = ()
    mesh: Mesh | None = None
    kernels: tuple[str, ...] = KERNELS
    most_logprobs: int | None = None

    def __post_init__(self) -> None:
        if not self.capacity:
            object.__setattr__(self, "capacity", min(self.config.context, DEFAULT_CAPACITY))
        _check(self)

    @property
    def network(self) -> Network:
        """The backbone as each pass calls it."""
        return Network(self.config, self.suppress, self.mesh, self.kernels)

    @property
    def cache_slots(self) -> int:
        """S: capacity plus room for the unread tail of the last accepted path."""
        return round_up(self.capacity + self.drafter.depth + 1, SLOTS_MULTIPLE)

    def prefill(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        stop_ids: Sequence[int] = (),
        repetition_penalty: float | Sequence[float] = 1.0,
        keys: Array | None = None,
        sampling: Sampling | None = None,
    ) -> State:
        """Runs the prompts, padded to a common bucket, and chooses each row's first root.

        Args:
          prompts: token ids of each row, of unequal lengths.
          max_new_tokens: of all rows or of each; never a reason to recompile.
          stop_ids: end-of-sequence and other tokens that end a row.
          repetition_penalty: of all rows or of each, as transformers applies it; 1 for none.
          keys: one PRNG key a row (`sampling.row_keys`); default: seed 0, row number.
          sampling: settings of each row, for the scheme `acceptance.PerRow`.

        Raises:
          InputError: as `check_prompt` and `check_memory` say, or a penalty is not positive.
        """
        check_memory(self, params, len(prompts))
        if isinstance(max_new_tokens, int):
            max_new_tokens = [max_new_tokens] * len(prompts)
        for row, (prompt, new) in enumerate(zip(prompts, max_new_tokens, strict=True)):
            check_prompt(self, prompt, new, f"prompt {row}")
        if keys is None:
            keys = row_keys(0, [(row, 0) for row in range(len(prompts))])
        penalty = penalties(repetition_penalty, len(prompts))
        arrays = padded(self, prompts, max_new_tokens, [stop_ids] * len(prompts))
        inputs = (*arrays, keys, penalty, sampling)
        return self.run_prefill(params, *everywhere(inputs, self.mesh))

    @functools.partial(jax.jit, static_argnames=("self", "block"))
    def run_prefill(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        limit: Int[Array, " B"],
        stop_ids: Int[Array, "B Q"],
        keys: Array,
        penalty: Float[Array, " B"] | None = None,
        sampling: Sampling | None = None,
        block: int = PREFILL_BLOCK,
    ) -> State:
        """The compiled part of `prefill`, on arrays of `padded`; see `prefill.prefill_rows`."""
        recipe = self.network, self.drafter, self.acceptance, self.cache_slots
        inputs = tokens, lengths, limit, stop_ids, keys, penalty, sampling
        return prefill_rows(*recipe, self.most_logprobs, params, *inputs, block)

    @functools.partial(jax.jit, static_argnames="self", donate_argnames="state")
    def step(self, params: Params, state: State) -> tuple[State, Emitted]:
        """Verifies one tree a row and appends the accepted path. Finished rows stay as they are."""
        return _advance(self, self.drafter.prepare(params), state)

    @functools.partial(jax.jit, static_argnames="self", donate_argnames="state")
    def generate(self, params: Params, state: State) -> State:
        """Steps until every row has ended, without returning to the host."""
        return _loop(self, params, state, jnp.iinfo(jnp.int32).max, 1)[0]

    @functools.partial(jax.jit, static_argnames="self", donate_argnames="state")
    def run(
        self, params: Params, state: State, max_steps: Int[Array, ""], least: Int[Array, ""]
    ) -> tuple[State, Int[Array, ""]]:
        """Steps while `least` rows run, 1 or more, at most `max_steps` times; also the steps."""
        return _loop(self, params, state, max_steps, least)

    @functools.partial(jax.jit, static_argnames=("self", "rows", "settings"))
    def empty(self, params: Params, rows: int, settings: RowSettings) -> State:
        """`prompt_blocks.empty_rows`: a batch that prompts are read into."""
        recipe = self.network, self.drafter, self.cache_slots, self.most_logprobs
        return empty_rows(*recipe, params, rows, settings)

    @functools.partial(jax.jit, static_argnames="self", donate_argnames="state")
    def read(self, params: Params, state: State, slot: Array, block: PromptBlock) -> State:
        """`prompt_blocks.read_block`: a block of a prompt goes into the row of its slot."""
        recipe = self.network, self.drafter, self.acceptance, self.drafter.prepare(params)
        return read_block(*recipe, state, slot, block)

    @functools.partial(jax.jit, static_argnames="self", donate_argnames="state")
    def free(self, state: State, slot: Array) -> State:
        """`state.free`: a row ends before its time."""
        return self.network.placed(free(state, slot))

    @functools.partial(jax.jit, static_argnames="self")
    def regroup(self, params: Params, state: State, rows: Int[Array, " B"]) -> State:
        """`state.regrouped`: a batch with other rows, or with this decoder's larger capacity."""
        has = state.repetition is not None, state.sampling is not None
        empty = self.empty(params, len(rows), RowSettings(state.stop_ids.shape[1], *has))
        return self.network.placed(regrouped(state, rows, empty))

    def stream(self, params: Params, state: State) -> Generator[Emitted, None, State]:
        """Yields what each step added, as NumPy; returns the final state."""
        pending = None  # the host reads a step while the device already runs the next step
        while pending is None or (np.asarray(pending.finish) == RUNNING).any():
            state, emitted = self.step(params, state)
            if pending is not None:
                yield jax.tree.map(np.asarray, pending)
            pending = emitted
        yield jax.tree.map(np.asarray, pending)
        return state


def _loop(
    decoder: Decoder, params: Params, state: State, max_steps: Array | int, least: Array | int
) -> tuple[State, Array]:
    """Steps while `least` rows run, at most `max_steps` times; also how many steps."""
    params = decoder.drafter.prepare(params)

    def going(carry: tuple[State, Array]) -> Array:
        state, steps = carry
        return ((state.finish == RUNNING).sum() >= least) & (steps < max_steps)

    def body(carry: tuple[State, Array]) -> tuple[State, Array]:
        state, steps = carry
        return _advance(decoder, params, state)[0], steps + 1

    return jax.lax.while_loop(going, body, (state, jnp.zeros((), jnp.int32)))


def _advance(decoder: Decoder, params: Params, state: State) -> tuple[State, Emitted]:
    return advance(decoder.network, decoder.drafter, decoder.acceptance, params, state)


def _check(decoder: Decoder) -> None:
    """Raises InputError where the parts of a decoder do not fit each other."""
    config = decoder.config
    if decoder.capacity > config.context:
        raise InputError(
            f"capacity {decoder.capacity} exceeds the model's context of {config.context} tokens"
        )
    if any(not 0 <= token < config.vocab_size for token in decoder.suppress):
        raise InputError(
            f"suppress names token ids {list(decoder.suppress)}, but the vocabulary is "
            f"0..{config.vocab_size - 1}"
        )
    if len(set(decoder.suppress)) >= config.vocab_size:
        raise InputError(
            f"suppress names all {config.vocab_size} tokens of the vocabulary: none could be chosen"
        )
    decoder.drafter.check(config)


def check_memory(decoder: Decoder, params: Params, rows: int) -> None:
    """Raises InputError where the cache of so many rows exceeds the memory by itself."""
    needed, memory = rows * row_bytes(decoder, params), memory_bytes()
    if needed > memory:
        raise InputError(
            f"a cache of {rows} rows of {decoder.capacity} tokens needs {needed / 2**30:,.1f} GiB, "
            f"but there are {memory / 2**30:,.1f} GiB: give a smaller batch or a smaller maximum "
            "of tokens"
        )


def row_bytes(decoder: Decoder, params: Params) -> int:
    """Bytes of each device for the keys and values of a row, and for what its drafter knows."""
    config = decoder.config
    itemsize = precision(params).itemsize
    heads = config.num_kv_heads // (decoder.mesh.shape["tensor"] if decoder.mesh else 1)
    cache = 2 * config.num_layers * heads * config.head_dim * itemsize * decoder.cache_slots
    leaves, structure = jax.tree.flatten(params)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    return cache + _draft_bytes(decoder, structure, shapes)


@functools.lru_cache(maxsize=64)
def _draft_bytes(decoder: Decoder, structure: Any, shapes: tuple[Any, ...]) -> int:
    """Bytes of a row's draft: a second row adds them, and no tables that rows share.

    Args:
      structure, shapes: of the parameters, whose drafter would be traced anew each time.
    """
    drafter, slots = decoder.drafter, decoder.cache_slots

    def of(rows: int) -> int:
        def begin(params: Params) -> Draft:
            backbone = decoder.network.bound(params)
            return drafter.begin(drafter.prepare(params), backbone, rows, slots)

        draft = jax.eval_shape(begin, structure.unflatten(shapes))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(draft))

    return of(2) - of(1)


def padded_length(decoder: Decoder, length: int) -> int:
    """Tokens that a prompt is padded to; prompts padded alike share one compilation."""
    return min(bucket(length), decoder.cache_slots)


def padded(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    stop_ids: Sequence[Sequence[int]],
    width: int | None = None,
) -> tuple[np.ndarray, ...]:
    """Prompts as the arrays of `Decoder.run_prefill`: tokens, lengths, limits, stop ids.

    Args:
      stop_ids: of each row; -1 fills up those of fewer.
      width: length of all prompts with their padding; default: that of the longest's bucket.
    """
    lengths = [len(prompt) for prompt in prompts]
    width = width or padded_length(decoder, max(lengths))
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    limit = np.array(np.add(lengths, max_new_tokens), np.int32)
    stops = np.full((len(prompts), max(1, *map(len, stop_ids))), -1, np.int32)
    for row, ids in enumerate(stop_ids):
        stops[row, : len(ids)] = ids
    return tokens, np.array(lengths, np.int32), limit, stops


def check_prompt(
    decoder: Decoder, prompt: Sequence[int], max_new_tokens: int, name: str = "the prompt"
) -> None:
    """Raises InputError unless these are token ids that fit with their new tokens."""
    if not len(prompt):
        raise InputError(f"{name} is empty: it needs at least one token")
    if min(prompt) < 0 or max(prompt) >= decoder.config.vocab_size:
        raise InputError(
            f"{name}: token ids must lie in 0..{decoder.config.vocab_size - 1}, the model's "
            f"vocabulary, got {min(prompt)}..{max(prompt)}"
        )
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    total = len(prompt) + max_new_tokens
    if total > decoder.capacity:
        whole = decoder.capacity == decoder.config.context
        bound = "the model's context" if whole else "a capacity"
        raise InputError(
            f"{name} has {len(prompt)} tokens and {max_new_tokens} new ones were asked for: "
            f"{total} exceed {bound} of {decoder.capacity} tokens"
        )
