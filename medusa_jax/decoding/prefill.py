"""Prompts to the first state: run in padded blocks, the first root chosen, the first draft made."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from medusa_jax.decoding.acceptance import Acceptance, Context
from medusa_jax.decoding.logprobs import Logprobs
from medusa_jax.decoding.network import Network, precision
from medusa_jax.decoding.repetition import Repetition
from medusa_jax.decoding.sampling import Sampling
from medusa_jax.decoding.state import FAILED, LENGTH, RUNNING, State
from medusa_jax.decoding.step import finite
from medusa_jax.drafting.drafter import Drafter, Params, Verified
from medusa_jax.model.backbone import causal_mask
from medusa_jax.model.kv_cache import KVCache, write_block
from medusa_jax.model.weight import leaves_out_zeros

# Longer prompts run in blocks of this many tokens, which bounds the memory of attention.
PREFILL_BLOCK = 512
# Small blocks waste little on a short prompt, so that a single program may serve all lengths.
SMALL_BLOCK = 64
SMALLEST_BUCKET = 16


def bucket(length: int) -> int:
    """Padded length of a prompt: a power of two up to PREFILL_BLOCK, then a multiple of it.

    (5, 17, 512, 700) -> (16, 32, 512, 1024).
    """
    if length > PREFILL_BLOCK:
        return round_up(length, PREFILL_BLOCK)
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not less: (149, 64) -> 192."""
    return -(-value // multiple) * multiple


def prefill_rows(
    network: Network,
    drafter: Drafter,
    acceptance: Acceptance,
    cache_slots: int,
    most_logprobs: int | None,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    limit: Int[Array, " B"],
    stop_ids: Int[Array, "B Q"],
    keys: Array,
    penalty: Float[Array, " B"] | None,
    sampling: Sampling | None,
    block: int,
) -> State:
    """The state after the prompts, whose first roots are chosen.

    Args:
      most_logprobs: see `Decoder`.
      tokens: prompts, padded on the right.
      lengths: tokens of each prompt.
      limit: length of prompt and text at which a row ends; a row without room ends at once.
      penalty: repetition penalty of each row, or None.
      sampling: settings of each row, or None.
      block: most tokens of a pass.
    """
    cache, last_hidden = _run_prompts(network, cache_slots, params, tokens, lengths, block)
    own, repetition = network.logits(params, last_hidden), None
    logits = network.allowed(own)
    batch, padded = tokens.shape
    if penalty is not None:
        repetition = Repetition.of_prompts(penalty, tokens, lengths, logits.shape[-1])
        logits = repetition.at_end(logits)
    begun = jnp.where(finite(logits), RUNNING, FAILED)
    root, logprobs = acceptance.root(logits, Context(keys, lengths, sampling)), None
    if most_logprobs is not None:
        asked = jnp.ones(batch, bool) if sampling is None else sampling.logprobs
        logprobs = Logprobs.of_prompts(asked, most_logprobs, cache_slots, own, root, lengths)
    sequence = jnp.zeros((batch, cache_slots), jnp.int32).at[:, :padded].set(tokens)
    seen = Verified(last_hidden, root, sequence, lengths, keys, most=padded)
    known = drafter.prepare(params), network.bound(params)
    state = State(
        cache=dataclasses.replace(cache, length=lengths),
        sequence=sequence,
        root=root,
        draft=drafter.draft(*known, drafter.begin(*known, batch, cache_slots), seen),
        keys=keys,
        prompt_length=lengths,
        limit=limit,
        stop_ids=stop_ids,
        finish=jnp.where(limit > lengths, begun, LENGTH).astype(jnp.int32),
        **dict.fromkeys(("steps", "drafts", "drafted"), jnp.zeros(batch, jnp.int32)),
        tokens_per_step=jnp.zeros((batch, cache_slots), jnp.int32),
        repetition=repetition,
        sampling=sampling,
        logprobs=logprobs,
    )
    return network.placed(state)


def _run_prompts(
    network: Network, cache_slots: int, params: Params, tokens: Array, lengths: Array, block: int
) -> tuple[KVCache, Array]:
    """The cache of the prompts, and the hidden state of each prompt's last token [B, D]."""
    batch, padded = tokens.shape
    size = min(padded, block)
    dtype = precision(params)
    # As zeros that XLA knows to be zeros, each layer of the loop would make a cache of its own.
    cache = jax.lax.optimization_barrier(network.empty_cache(params, batch, cache_slots))
    last_hidden = jnp.zeros((batch, network.config.hidden_size), dtype)

    def run(
        cache: KVCache, last_hidden: Array, start: int | Array, past: KVCache | None
    ) -> tuple[KVCache, Array]:
        block_tokens = jax.lax.dynamic_slice_in_dim(tokens, start, size, axis=1)
        positions = jnp.broadcast_to(start + jnp.arange(size), (batch, size))
        inputs = block_tokens, positions, causal_mask(size), past, lengths
        live, wanted = positions < lengths[:, None], positions == lengths[:, None] - 1
        hidden, block = network.hidden(params, *inputs, live, wanted)
        # The block that holds a row's last token sets that row's hidden state.
        index = lengths - 1 - start
        inside = (index >= 0) & (index < size)
        last = hidden[jnp.arange(batch), jnp.clip(index, 0, size - 1)]
        # Zero, but XLA does not know: so all layers read the cache before the block is written,
        # and XLA makes no copy of it.
        zero = jnp.minimum(jnp.argmax(hidden[0, 0]), 0)
        cache = write_block(cache, block, start + zero)
        return cache, jnp.where(inside[:, None], last, last_hidden)

    # Padding is left out beside a cache alone (`Backbone`), be it an empty cache.
    empty = dataclasses.replace(cache, length=jnp.zeros_like(lengths))
    before = empty if leaves_out_zeros(params["backbone"]) else None
    cache, last_hidden = run(cache, last_hidden, 0, before)
    if padded == size:
        return cache, last_hidden

    def run_block(number: Array, carry: tuple[KVCache, Array]) -> tuple[KVCache, Array]:
        # The last block is moved back to end with the padding; the tokens that it repeats are
        # written again with the same values.
        start = jnp.minimum(number * size, padded - size)
        cache, last_hidden = carry
        past = dataclasses.replace(cache, length=jnp.full_like(lengths, start))
        return run(cache, last_hidden, start, past)

    # Blocks of padding alone are not run.
    blocks = (lengths.max() + size - 1) // size
    return jax.lax.fori_loop(1, blocks, run_block, (cache, last_hidden))
