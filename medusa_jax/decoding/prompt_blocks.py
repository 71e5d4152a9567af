"""Prompts of a running batch: read into their rows block by block, between steps of other rows.

So nobody waits for another's long prompt, and a block's program serves prompts of each length.
A row whose prompt is not complete has ended as far as steps are concerned.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from medusa_jax.decoding.acceptance import Acceptance, Context
from medusa_jax.decoding.logprobs import Logprobs
from medusa_jax.decoding.network import Network
from medusa_jax.decoding.prefill import PREFILL_BLOCK, bucket
from medusa_jax.decoding.repetition import Repetition, marked
from medusa_jax.decoding.sampling import RowSampling, Sampling
from medusa_jax.decoding.state import FAILED, LENGTH, RUNNING, STOP, State, map_rows
from medusa_jax.decoding.step import finite
from medusa_jax.drafting.drafter import Draft, Drafter, Params, Verified
from medusa_jax.model.backbone import causal_mask
from medusa_jax.model.kv_cache import Block, KVCache, Layers, write_block

# A CPU takes about as long for so many tokens as for a call of some steps.
CPU_BLOCK = 128
SHORT = 32  # tokens of a prompt to which those of a whole block are many, even if they are free


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptBlock:
    """Tokens that a pass reads, and what their row is decoded with.

    Attributes:
      tokens: padded on the right [T].
      start: tokens of the prompt before them.
      count: tokens that are no padding, 1 or more.
      length: tokens of the whole prompt.
      limit: length of prompt and text at which the row ends.
      stop_ids: tokens that end it; -1 ends none [1, Q].
      keys: its PRNG key [1].
      penalty: its repetition penalty [1], or None where no row has any.
      sampling: its settings [1], or None where the acceptance scheme has those of all.
    """

    tokens: Any
    start: Any
    count: Any
    length: Any
    limit: Any
    stop_ids: Any
    keys: Array
    penalty: Any
    sampling: Sampling | None


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """What the rows of a batch may have settings of.

    Attributes:
      stop_ids: Q, most tokens that may end a row.
      penalized: repetition penalties.
      sampled: temperature, top-k and top-p.
    """

    stop_ids: int = 1
    penalized: bool = False
    sampled: bool = False


def longest_block() -> int:
    """Most tokens of a block on this machine."""
    return CPU_BLOCK if jax.default_backend() == "cpu" else PREFILL_BLOCK


def next_block(left: int, room: int, most: int, *, padding_is_free: bool) -> int:
    """Padded length of the next block, of a prompt of which so many tokens are left.

    (left, room, most): (300, 640, 128) -> 128, (44, 384, 128) -> 64, (200, 128, 512) -> 128;
    if padding is free, (44, 384, 128) -> 128: a program serves nearly all lengths.

    Args:
      room: slots that the row has left; blocks of whole buckets may need more than there are.
    """
    size = bucket(left)
    if padding_is_free:
        size = most if left > SHORT else SHORT
    return min(size, most, room)


def prompt_block(
    prompt: Sequence[int], limit: int, start: int, most: int, size: int, *settings: Any
) -> PromptBlock:
    """At most so many tokens of a prompt from `start` on, padded to `size`.

    Of prompt (5, 6, 7), start 1, most 1, size 2: tokens (6, 0), count 1.

    Args:
      settings: stop_ids, keys, penalty and sampling of `PromptBlock`.
    """
    tokens, new = np.zeros(size, np.int32), prompt[start : start + min(most, size)]
    tokens[: len(new)] = new
    first, count, length, end = map(np.int32, (start, len(new), len(prompt), limit))
    return PromptBlock(tokens, first, count, length, end, *settings)


def read_block(
    network: Network,
    drafter: Drafter,
    acceptance: Acceptance,
    params: Params,
    state: State,
    slot: Array,
    block: PromptBlock,
) -> State:
    """The state whose row `slot` has read a block; after its last block, the row runs.

    Args:
      params: as `drafter.prepare` returns them.
    """
    cache, size = state.cache, block.tokens.shape[0]
    own = functools.partial(_row, slot=slot)
    last, read = _run(network, params, cache, slot, block)
    # Zero, but XLA does not know: so all layers read the cache before it is written.
    zero = jnp.minimum(jnp.argmax(last[0]), 0)

    length = (block.start + block.count)[None]
    model_logits, repetition = network.logits(params, last), None
    logits = network.allowed(model_logits)
    if state.repetition is not None:
        before = own(state.repetition.seen) & (block.start > 0)
        marks = marked(before, block.tokens[None], block.count[None])
        repetition = Repetition(block.penalty, marks)
        logits = repetition.at_end(logits)
    begun = jnp.where(finite(logits), RUNNING, FAILED)
    begun = jnp.where(block.limit > length, begun, LENGTH)
    root, logprobs = acceptance.root(logits, Context(block.keys, length, block.sampling)), None
    if state.logprobs is not None:
        asked = jnp.ones(1, bool) if block.sampling is None else block.sampling.logprobs
        logprobs = dataclasses.replace(jax.tree.map(own, state.logprobs), asked=asked)
        logprobs = logprobs.with_text(model_logits[:, None], root[:, None], length - 1, asked)
    sequence = jax.lax.dynamic_update_slice(state.sequence, block.tokens[None], (slot, block.start))
    seen = Verified(last, root, own(sequence), length, block.keys, most=size)
    row: dict[str, Any] = {
        "root": root,
        "draft": _drafted(network, drafter, params, state.draft, slot, block, seen),
        "keys": block.keys,
        "prompt_length": block.length[None],
        "limit": block.limit[None],
        "stop_ids": block.stop_ids,
        "finish": jnp.where(length < block.length, STOP, begun).astype(jnp.int32),
        "steps": jnp.zeros(1, jnp.int32),
        "drafts": jnp.zeros(1, jnp.int32),
        "drafted": jnp.zeros(1, jnp.int32),
        "repetition": repetition,
        "sampling": block.sampling,
        "logprobs": logprobs,
    }
    put = functools.partial(_put, slot=slot)
    rows = {name: map_rows(put, getattr(state, name), new) for name, new in row.items()}
    cache = dataclasses.replace(cache, values=_fresh(cache.values, slot, block.start + zero))
    cache = write_block(cache, read, block.start + zero, slot)
    cache = dataclasses.replace(cache, length=put(cache.length, length))
    return network.placed(dataclasses.replace(state, cache=cache, sequence=sequence, **rows))


def _run(
    network: Network, params: Params, cache: KVCache, slot: Array, block: PromptBlock
) -> tuple[Array, Block]:
    """The hidden state of the block's last token [1, D], and the block's keys and values."""
    size = block.tokens.shape[0]
    past = dataclasses.replace(cache, length=block.start[None], row=slot)
    positions = (block.start + jnp.arange(size))[None]
    inputs = block.tokens[None], positions, causal_mask(size), past, block.length[None]
    places = jnp.arange(size)[None]
    live, wanted = places < block.count, places == block.count - 1
    hidden, read = network.hidden(params, *inputs, live, wanted)
    return _row(hidden[0], block.count - 1), read


def _drafted(
    network: Network,
    drafter: Drafter,
    params: Params,
    draft: Draft,
    slot: Array,
    block: PromptBlock,
    seen: Verified,
) -> Draft:
    """The draft of row `slot` after a block; a new prompt begins with an empty draft."""

    def before(empty: Array, old: Array) -> Array:
        return jnp.where(block.start == 0, empty, _row(old, slot))

    backbone = network.bound(params)
    empty = drafter.begin(params, backbone, 1, seen.sequence.shape[1])
    return drafter.draft(params, backbone, map_rows(before, empty, draft), seen)


def empty_rows(
    network: Network,
    drafter: Drafter,
    cache_slots: int,
    most_logprobs: int | None,
    params: Params,
    rows: int,
    settings: RowSettings,
) -> State:
    """So many ended rows without a prompt.

    Args:
      most_logprobs: see `Decoder`.
    """
    numbers = jnp.zeros(rows, jnp.int32)
    sampling = Sampling.of([RowSampling()] * rows) if settings.sampled else None
    seen = jnp.zeros((rows, network.config.vocab_size), bool)
    logprobs = None
    if most_logprobs is not None:
        most = min(most_logprobs, network.config.vocab_size)
        logprobs = Logprobs.empty(jnp.zeros(rows, bool), most, cache_slots)
    state = State(
        cache=network.empty_cache(params, rows, cache_slots),
        sequence=jnp.zeros((rows, cache_slots), jnp.int32),
        root=numbers,
        draft=drafter.begin(drafter.prepare(params), network.bound(params), rows, cache_slots),
        keys=jax.random.wrap_key_data(jnp.zeros((rows, 2), jnp.uint32), impl="threefry2x32"),
        prompt_length=numbers,
        limit=numbers,
        stop_ids=jnp.full((rows, settings.stop_ids), -1, jnp.int32),
        finish=numbers + STOP,
        steps=numbers,
        drafts=numbers,
        drafted=numbers,
        tokens_per_step=jnp.zeros((rows, cache_slots), jnp.int32),
        repetition=Repetition(jnp.ones(rows), seen) if settings.penalized else None,
        sampling=sampling,
        logprobs=logprobs,
    )
    return network.placed(state)


def _row(array: Array, slot: Array) -> Array:
    """Row `slot`, whose dimension stays; a batch of a single row is that row, without a copy."""
    return array if len(array) == 1 else jax.lax.dynamic_slice_in_dim(array, slot, 1)


def _put(whole: Array, row: Array, slot: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, row, slot, 0)


def _fresh(values: Layers, slot: Array, start: Array) -> Layers:
    """The values, without those that an earlier prompt has left in the row of a new prompt.

    A slot beyond a row's length has weight 0, but 0 times NaN is NaN.
    """

    def cleared(values: Layers) -> Layers:
        def row(one: Array) -> Array:
            return _put(one, jnp.zeros((1, *one.shape[1:]), one.dtype), slot)

        return jax.tree.map(row, values)

    return jax.lax.cond(start == 0, cleared, lambda same: same, values)
