"""One decode step: propose a tree, verify it in one pass, commit the accepted path."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from medusa_jax.decoding.acceptance import Acceptance, Accepted, Context
from medusa_jax.decoding.network import Network
from medusa_jax.decoding.state import FAILED, LENGTH, RUNNING, STOP, Emitted, State
from medusa_jax.drafting.drafter import Drafter, Params, Verified
from medusa_jax.model.kv_cache import commit
from medusa_jax.shapes import typed


def advance(
    network: Network, drafter: Drafter, acceptance: Acceptance, params: Params, state: State
) -> tuple[State, Emitted]:
    """Verifies one tree a row and appends the accepted path; finished rows stay as they are.

    Args:
      params: as `drafter.prepare` returns them.
    """
    length = state.cache.length
    rows = jnp.arange(length.shape[0])

    # 1. Propose the tree's tokens and verify them in one pass.
    tokens, tree, drawn = drafter.propose(params, state.draft, state.root)
    running = state.finish == RUNNING
    inputs = tokens, length[:, None] + tree.depths, jnp.asarray(tree.mask), state.cache
    hidden, block = network.hidden(params, *inputs, live=running[:, None])
    own = network.logits(params, hidden)
    logits = network.allowed(own)
    if state.repetition is not None:
        logits = state.repetition.in_tree(tree, tokens, logits)

    # 2. Accept a path; cut it at the first stop token and at the row's limit.
    context = Context(state.keys, length, state.sampling, drawn)
    accepted = acceptance.accept(tree, tokens, logits, context)
    # A token is never negative, but XLA does not know: so the path waits for the logits even
    # where it is constant (the root alone), the cache is read before it is written, and XLA
    # makes no copy of it.
    never = (accepted.root < 0).astype(jnp.int32)
    path = jnp.maximum(tree.path_to(accepted.last), never[:, None])
    # Numbers that are not finite spoil a whole tree: what its root's logits chose is no text.
    sound = _sound(logits, accepted, jnp.zeros_like(accepted.last))
    made = jnp.where(sound, tree.depth_of(accepted.last) + 1, 1)
    path_tokens = jnp.take_along_axis(tokens, path, axis=1)
    count, finish = cut(path_tokens, made, state.limit - length, state.stop_ids)
    sound &= _sound(logits, accepted, accepted.last)
    finish = jnp.where(sound | (finish != RUNNING), finish, FAILED)
    count = jnp.where(running, count, 0)
    finish = jnp.where(running, finish, state.finish)

    # 3. Commit the path, and draft again from its last token.
    cache = commit(state.cache, block, path, count)
    sequence = _append(state.sequence, path_tokens, length)
    where = accepted.root, sequence, cache.length, state.keys
    seen = Verified(hidden[rows, accepted.last], *where, most=path.shape[1])
    said = path, path_tokens, made, accepted.root, length, running
    state = dataclasses.replace(
        state,
        cache=cache,
        sequence=sequence,
        root=accepted.root,
        draft=drafter.draft(params, network.bound(params), state.draft, seen),
        finish=finish,
        steps=state.steps + running,
        drafts=state.drafts + running * (drafter.size > 1),
        drafted=state.drafted + running * (drafter.size - 1),
        tokens_per_step=state.tokens_per_step.at[rows, state.steps].set(running * made),
        repetition=state.repetition and state.repetition.after(path_tokens, count),
        logprobs=state.logprobs and state.logprobs.after(own, *said),
    )
    return network.placed((state, Emitted(path_tokens, count, finish)))


@typed
def cut(
    tokens: Int[Array, "B E"], made: Int[Array, " B"], room: Int[Array, " B"],
    stop_ids: Int[Array, "B Q"],
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:  # fmt: skip
    """How many tokens of a path to keep, and whether the row ends with them.

    tokens (5, 2, 9), made 3, stop ids (2, -1) -> keep 2, STOP; without it and with
    room 3 -> keep 3, LENGTH; with more room -> keep 3, RUNNING.
    """
    cells = jnp.arange(tokens.shape[1])
    kept = jnp.minimum(made, room)
    stops = (tokens[:, :, None] == stop_ids[:, None]).any(axis=-1) & (cells < kept[:, None])
    stopped = stops.any(axis=1)
    finish = jnp.where(stopped, STOP, jnp.where(kept >= room, LENGTH, RUNNING))
    count = jnp.where(stopped, stops.argmax(axis=1) + 1, kept)
    return count.astype(jnp.int32), finish.astype(jnp.int32)


@typed
def finite(logits: Float[Array, "B V"]) -> Bool[Array, " B"]:
    """Whether a token can be chosen: (1, -inf) -> True, (1, NaN) and (1, inf) -> False."""
    return jnp.isfinite(logits.max(axis=-1))


def _sound(logits: Array, accepted: Accepted, slots: Array) -> Array:
    """Whether the logits of a slot of each row [B] are finite [B]."""
    rows = jnp.arange(len(slots))
    if accepted.largest is None:
        return finite(logits[rows, slots])
    return jnp.isfinite(accepted.largest[rows, slots])


def _append(sequence: Array, tokens: Array, length: Array) -> Array:
    """Writes all path cells after each row's length; later steps overwrite those not kept."""
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    return jax.vmap(write)(sequence, tokens, length)
