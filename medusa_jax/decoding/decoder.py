"""Medusa decoding on token ids: prefill a batch, then step it, on the device, until every row ends.

    Decoder         what is compiled: model shape, tree, acceptance, capacity
      .prefill      prompts -> State
      .step         State -> State and the tokens it accepted
      .generate     steps until all rows are done, in one device loop
      .stream       the same steps, yielding tokens as they are accepted
    outputs         State -> one `Output` a row

This module knows nothing about text or files. Plain autoregressive decoding is
the same code with `Tree()`, the root alone. Letters: see `shapes.py`.
"""

import dataclasses
import functools
import re
from collections.abc import Generator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from medusa_jax.decoding.acceptance import Acceptance, Context, Greedy
from medusa_jax.decoding.sampling import row_keys
from medusa_jax.decoding.state import LENGTH, RUNNING, STOP, Emitted, Output, State, outputs
from medusa_jax.distributed.rules import CACHE, everywhere
from medusa_jax.drafting import bigrams
from medusa_jax.drafting.dynamic_tree import Grown
from medusa_jax.drafting.medusa_heads import (
    NO_HEADS,
    HeadsConfig,
    MedusaHeads,
    first_heads,
    top_guesses,
)
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.model.backbone import Backbone, causal_mask
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.kv_cache import KVCache, commit, init_cache, write_block
from medusa_jax.param_paths import map_with_path

__all__ = ["Decoder", "Emitted", "Output", "Params", "State", "bucket", "outputs"]

Params = dict[str, Any]  # {"backbone": ..., "heads": ...}, "bigrams" too where they were counted

# Prompts longer than this are prefilled in blocks of it, which bounds the memory of attention.
PREFILL_BLOCK = 512
SMALLEST_BUCKET = 16
SLOTS_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoding recipe. Hashable and static under `jax.jit`; parameters are passed in.

    Attributes:
      config: the backbone's shape.
      heads: the heads' shape; `NO_HEADS` does for a tree of the root alone.
      tree: the guesses to verify in one pass, always the same or `Grown` at every step.
      acceptance: `Greedy()`, `Typical(...)`, `Lossless(...)` or your own.
      capacity: most tokens a row may hold, prompt and text; default: the
        model's context, at most 4096.
      suppress: token ids that are never produced.
      mesh: devices of `sharding.decode_mesh` to split the work over; parameters must lie as
        `hf.load_model` brings them there. One device by default.

    Raises:
      InputError: the tree is deeper than the heads, the capacity exceeds the
        model's context, or a suppressed token is none of the vocabulary's.
    """

    config: ModelConfig
    heads: HeadsConfig = NO_HEADS
    tree: Tree | Grown = Tree()
    acceptance: Acceptance = Greedy()
    capacity: int = 0
    suppress: tuple[int, ...] = ()
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        if not self.capacity:
            object.__setattr__(self, "capacity", min(self.config.context, 4096))
        if self.capacity > self.config.context:
            raise InputError(
                f"capacity {self.capacity} exceeds the model's context of "
                f"{self.config.context} tokens"
            )
        if any(not 0 <= token < self.config.vocab_size for token in self.suppress):
            raise InputError(
                f"suppress names token ids {list(self.suppress)}, but the vocabulary is "
                f"0..{self.config.vocab_size - 1}"
            )
        self.tree.check(self.heads.num_heads, self.heads.truncated or self.config.vocab_size)

    @property
    def slots(self) -> int:
        """S: capacity plus room for the unread tail of the last accepted path."""
        return round_up(self.capacity + self.tree.path_cells, SLOTS_MULTIPLE)

    def prefill(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        stop_ids: Sequence[int] = (),
        keys: Array | None = None,
    ) -> State:
        """Runs the prompts, padded to a common bucket, and chooses each row's first root.

        Args:
          prompts: token ids of each row, of any unequal lengths.
          max_new_tokens: of all rows or of each; never a reason to recompile.
          stop_ids: end-of-sequence and other tokens that end a row.
          keys: one PRNG key a row (`sampling.row_keys`); default: seed 0, row number.

        Raises:
          InputError: a prompt is empty, holds ids beyond the vocabulary, or does
            not fit the capacity with its new tokens; the message names the row.
        """
        if isinstance(max_new_tokens, int):
            max_new_tokens = [max_new_tokens] * len(prompts)
        for row, (prompt, new) in enumerate(zip(prompts, max_new_tokens, strict=True)):
            self.check_prompt(prompt, new, f"prompt {row}")
        lengths = [len(prompt) for prompt in prompts]
        tokens = np.zeros((len(prompts), self.padded_length(max(lengths))), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        if keys is None:
            keys = row_keys(0, [(row, 0) for row in range(len(prompts))])
        inputs = (
            tokens,
            np.array(lengths, np.int32),
            np.array(np.add(lengths, max_new_tokens), np.int32),
            np.array(list(stop_ids) or [-1], np.int32),
            keys,
        )
        return self._prefill(params, *everywhere(inputs, self.mesh))

    def padded_length(self, length: int) -> int:
        """Tokens that a prompt is padded to; prompts padded alike share one compilation."""
        return min(bucket(length), self.slots)

    def check_prompt(
        self, prompt: Sequence[int], max_new_tokens: int, name: str = "the prompt"
    ) -> None:
        """Raises InputError unless the prompt is one, and fits with its new tokens."""
        if not len(prompt):
            raise InputError(f"{name} is empty: it needs at least one token")
        if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
            raise InputError(
                f"{name}: token ids must lie in 0..{self.config.vocab_size - 1}, the model's "
                f"vocabulary, got {min(prompt)}..{max(prompt)}"
            )
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        total = len(prompt) + max_new_tokens
        if total > self.capacity:
            whose = "the model's context" if self.capacity == self.config.context else "a capacity"
            raise InputError(
                f"{name} has {len(prompt)} tokens and {max_new_tokens} new ones were asked for: "
                f"{total} exceed {whose} of {self.capacity} tokens"
            )

    @functools.partial(jax.jit, static_argnames="self")
    def _prefill(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        limit: Int[Array, " B"],
        stop_ids: Int[Array, " Q"],
        keys: Array,
    ) -> State:
        batch, padded = tokens.shape
        size = min(padded, PREFILL_BLOCK)
        cache = init_cache(self.config, batch, self.slots, _dtype(params))
        last_hidden = jnp.zeros((batch, self.config.hidden_size), _dtype(params))

        def run(
            cache: KVCache, last_hidden: Array, start: int | Array, past: KVCache | None
        ) -> tuple[KVCache, Array]:
            block_tokens = jax.lax.dynamic_slice_in_dim(tokens, start, size, axis=1)
            positions = jnp.broadcast_to(start + jnp.arange(size), (batch, size))
            hidden, block = self._backbone(params, block_tokens, positions, causal_mask(size), past)
            # The block that holds a row's last token sets that row's hidden state.
            index = lengths - 1 - start
            inside = (index >= 0) & (index < size)
            found = hidden[jnp.arange(batch), jnp.clip(index, 0, size - 1)]
            return write_block(cache, block, start), jnp.where(inside[:, None], found, last_hidden)

        cache, last_hidden = run(cache, last_hidden, 0, None)
        if padded > size:
            # The last block is moved back to end with the padding; what it overlaps is rewritten
            # with the same values.
            starts = jnp.minimum(jnp.arange(size, padded, size), padded - size)

            def run_block(carry: tuple[KVCache, Array], start: Array) -> tuple[Any, None]:
                cache, last_hidden = carry
                past = dataclasses.replace(cache, length=jnp.full_like(lengths, start))
                return run(cache, last_hidden, start, past), None

            (cache, last_hidden), _ = jax.lax.scan(run_block, (cache, last_hidden), starts)

        logits = self._logits(params, last_hidden)
        guesses, scores = self._guesses(self._asked(params), last_hidden)
        state = State(
            cache=dataclasses.replace(cache, length=lengths),
            sequence=jnp.zeros((batch, self.slots), jnp.int32).at[:, :padded].set(tokens),
            root=self.acceptance.root(logits, Context(keys, lengths)),
            guesses=guesses,
            scores=scores,
            keys=keys,
            prompt_length=lengths,
            limit=limit,
            stop_ids=stop_ids,
            finish=jnp.full(batch, RUNNING, jnp.int32),
            steps=jnp.zeros(batch, jnp.int32),
            tokens_per_step=jnp.zeros((batch, self.slots), jnp.int32),
        )
        return self._placed(state)

    @functools.partial(jax.jit, static_argnames="self", donate_argnames="state")
    def step(self, params: Params, state: State) -> tuple[State, Emitted]:
        """Verifies one tree a row and appends the accepted path. Finished rows stay as they are."""
        return self._step(self._asked(params), state)

    @functools.partial(jax.jit, static_argnames="self", donate_argnames="state")
    def generate(self, params: Params, state: State) -> State:
        """Steps until every row is finished, without returning to the host."""
        params = self._asked(params)
        return jax.lax.while_loop(
            lambda state: (state.finish == RUNNING).any(),
            lambda state: self._step(params, state)[0],
            state,
        )

    def stream(self, params: Params, state: State) -> Generator[Emitted, None, State]:
        """Yields what each step added, as NumPy; returns the final state.

        The host reads a step while the device already runs the next one.
        """
        pending = None
        while pending is None or (np.asarray(pending.finish) == RUNNING).any():
            state, emitted = self.step(params, state)
            if pending is not None:
                yield jax.tree.map(np.asarray, pending)
            pending = emitted
        yield jax.tree.map(np.asarray, pending)
        return state

    def _step(self, params: Params, state: State) -> tuple[State, Emitted]:
        length = state.cache.length
        tree = self.tree
        if isinstance(tree, Grown):
            tree = tree.branches(_path_scores(params, state))
        rows = jnp.arange(length.shape[0])

        # 1. Assemble the tree's tokens and verify them in one pass.
        candidates = jnp.concatenate(
            (state.root[:, None], state.guesses.reshape(len(rows), -1)), axis=1
        )
        cells = jnp.broadcast_to(tree.cells, (len(rows), self.tree.size))
        tokens = jnp.take_along_axis(candidates, cells, axis=1)
        positions = length[:, None] + tree.depths
        hidden, block = self._backbone(params, tokens, positions, _rowwise(tree.mask), state.cache)
        logits = self._logits(params, hidden)

        # 2. Accept a path; cut it at the first stop token and at the row's limit.
        accepted = self.acceptance.accept(tree, tokens, logits, Context(state.keys, length))
        # A token is never negative. But now the path waits for the logits even where it is
        # constant (the root alone), so XLA sees the cache read before it is written and makes
        # no copy of it.
        never = (accepted.root < 0).astype(jnp.int32)
        path = jnp.maximum(tree.path_of(accepted.last), never[:, None])
        made = tree.depth_of(accepted.last) + 1
        path_tokens = jnp.take_along_axis(tokens, path, axis=1)
        running = state.finish == RUNNING
        count, finish = _cut(path_tokens, made, state.limit - length, state.stop_ids)
        count = jnp.where(running, count, 0)
        finish = jnp.where(running, finish, state.finish)

        # 3. Commit it, and guess again from the last accepted node alone.
        guesses, scores = self._guesses(params, hidden[rows, accepted.last])
        state = dataclasses.replace(
            state,
            cache=commit(state.cache, block, path, count),
            sequence=_append(state.sequence, path_tokens, length),
            root=accepted.root,
            guesses=guesses,
            scores=scores,
            finish=finish,
            steps=state.steps + running,
            tokens_per_step=state.tokens_per_step.at[rows, state.steps].set(
                jnp.where(running, made, 0)
            ),
        )
        return self._placed((state, Emitted(path_tokens, count, finish)))

    def places(self, tree: Any) -> Any:
        """Shardings of a `State` or `Emitted`: keys and values by heads, the rest everywhere."""
        assert self.mesh is not None
        heads, whole = NamedSharding(self.mesh, CACHE), NamedSharding(self.mesh, P())
        return map_with_path(
            lambda path, _: heads if re.search("cache/(keys|values)/", path) else whole, tree
        )

    def _placed(self, tree: Any) -> Any:
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.places(tree))

    def _backbone(self, params: Params, *inputs: Any) -> Any:
        hidden, block = _apply(Backbone(self.config), params["backbone"], *inputs)
        # Whole on every device, or the compiler would hand the heads' split of D on to all layers
        # before them, with two collectives more for each.
        return self._placed(hidden), block

    def _logits(self, params: Params, hidden: Float[Array, "*dims D"]) -> Float[Array, "*dims V"]:
        logits = self._unembed(params, hidden)
        if self.suppress:
            logits = logits.at[..., np.array(self.suppress)].set(-jnp.inf)
        return logits

    def _unembed(self, params: Params, hidden: Array) -> Array:
        return _apply(Backbone(self.config), params["backbone"], hidden, method="unembed")

    def _asked(self, params: Params) -> Params:
        """Without the heads that the tree has no use for."""
        return params | {"heads": first_heads(params.get("heads", {}), self.tree.depth)}

    def _guesses(
        self, params: Params, hidden: Float[Array, "B D"]
    ) -> tuple[Int[Array, "B M R"], Float[Array, "B _ _"]]:
        """Top-k tokens of the heads the tree uses, no others; for grown trees, how likely."""
        nothing = jnp.zeros((hidden.shape[0], 0, 0))
        if not self.tree.depth:
            return nothing.astype(jnp.int32), nothing
        unembed = functools.partial(self._unembed, params)
        asked = dataclasses.replace(self.heads, num_heads=self.tree.depth)
        logits = _apply(MedusaHeads(asked), params["heads"], hidden, unembed)
        token_map = params["heads"].get("token_map")
        guesses, values = top_guesses(logits, self.tree.top_k, token_map)
        if not isinstance(self.tree, Grown):
            return guesses, nothing
        every = jnp.stack(logits, axis=1)
        likely = jnp.exp(every - values[..., :1])
        # A product, since a sum would be split among a CPU's threads, which takes longer to begin.
        total = likely @ jnp.ones(every.shape[-1])
        return guesses, values - values[..., :1] - jnp.log(total)[..., None]


def bucket(length: int) -> int:
    """Padded prompt length: a power of two up to PREFILL_BLOCK, then a multiple of it.

    (5, 17, 512, 700) -> (16, 32, 512, 1024).
    """
    if length > PREFILL_BLOCK:
        return round_up(length, PREFILL_BLOCK)
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def _path_scores(params: Params, state: State) -> Float[Array, "B M R R"]:
    """Log-probability of each guess after each of the head before it, or after the root."""
    scores, guesses = state.scores[:, :, None, :], state.guesses
    if bigrams.NAME not in params:
        return jnp.broadcast_to(scores, (*guesses.shape, guesses.shape[-1]))
    roots = jnp.broadcast_to(state.root[:, None, None], guesses[:, :1].shape)
    before = jnp.concatenate((roots, guesses[:, :-1]), axis=1)
    return jnp.minimum(scores + bigrams.links(params[bigrams.NAME], before, guesses), 0)


def _cut(tokens: Array, made: Array, room: Array, stop_ids: Array) -> tuple[Array, Array]:
    """How much of a path to keep, and whether that ends the row.

    tokens (5, 2, 9), made 3, stop id 2 -> keep 2, STOP; without it and with
    room 3 -> keep 3, LENGTH; with more room -> keep 3, RUNNING.
    """
    cells = jnp.arange(tokens.shape[1])
    kept = jnp.minimum(made, room)
    stops = jnp.isin(tokens, stop_ids) & (cells < kept[:, None])
    stopped = stops.any(axis=1)
    finish = jnp.where(stopped, STOP, jnp.where(kept >= room, LENGTH, RUNNING))
    return jnp.where(stopped, stops.argmax(axis=1) + 1, kept).astype(jnp.int32), finish


def _rowwise(mask: Array | np.ndarray) -> Array:
    """A tree's mask [N, N] for all rows [1, N, N]; one of each row as it is."""
    mask = jnp.asarray(mask)
    return mask if mask.ndim == 3 else mask[None]


def _append(sequence: Array, tokens: Array, length: Array) -> Array:
    """Writes all path cells after each row's length; cells beyond the count are overwritten."""
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    return jax.vmap(write)(sequence, tokens, length)


def _apply(module: nn.Module, params: Params, *inputs: Any, method: str | None = None) -> Any:
    return module.apply({"params": params}, *inputs, method=method)


def _dtype(params: Params) -> Any:
    return params["backbone"]["embed"]["embedding"].dtype


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not less: (149, 64) -> 192."""
    return -(-value // multiple) * multiple
