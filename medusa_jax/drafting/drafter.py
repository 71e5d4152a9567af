"""What a decode step asks of a drafter, and the drafter of plain decoding.

A drafter guesses the tokens after the root, which the backbone has already chosen. It
works in two halves:

    draft     after each step and each block of a prompt: all that costs time
    propose   at the start of a step: the tree of tokens that this step verifies

What it knows between them is its draft, a part of the decoder's state. A drafter is a frozen
dataclass, static under `jax.jit`; its parameters are passed in.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array, Int

from medusa_jax.drafting.tree_tables import PAD, TreeTables
from medusa_jax.model.backbone import Backbone
from medusa_jax.model.config import ModelConfig

# {"backbone": ..., "heads": ..., "bigrams": ..., "draft": ...}, a selector among the heads; each
# drafter knows its own.
Params = dict[str, Any]
# A pytree of arrays with a leading dimension B; "rope" tables of a cache have none.
Draft = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verified:
    """What a drafter is told after each step, and after each block of a prompt.

    Attributes:
      hidden: hidden state of the last verified token [B, D].
      root: the token after it, chosen and not yet in `sequence` [B].
      sequence: prompt and text; the cells after `length` mean nothing [B, S].
      length: verified tokens of `sequence`, the last of them that of `hidden` [B].
      keys: one PRNG key a row [B].
      most: at most so many of the tokens are new.
    """

    hidden: Array
    root: Array
    sequence: Array
    length: Array
    keys: Array
    most: int = dataclasses.field(metadata={"static": True})


class Proposal(NamedTuple):
    """What a step verifies.

    Attributes:
      tokens: of each slot, the root in slot 0 [B, N].
      tree: the tree that they form.
      drawn: log-probabilities with which the children of each of the slots `tree.inner` were drawn,
        without replacement, in the order of their slots [B, I, V]; None where they were not drawn.
    """

    tokens: Array
    tree: TreeTables
    drawn: Array | None = None


class Drafter(Protocol):
    """What `decoding.decoder.Decoder` asks of a drafter; it must be hashable.

    Attributes:
      size: N, tokens that a step verifies, the root included.
      depth: most guesses that a step can accept; a path has E = depth + 1 cells.
    """

    @property
    def size(self) -> int: ...

    @property
    def depth(self) -> int: ...

    def check(self, model: ModelConfig) -> None:
        """Raises InputError unless the drafter fits this backbone."""
        ...

    def prepare(self, params: Params) -> Params:
        """The parameters as a loop of steps should hold them; called outside of the loop."""
        ...

    def begin(self, params: Params, backbone: Backbone, rows: int, cache_slots: int) -> Draft:
        """The draft of so many rows that have no prompt yet.

        Args:
          backbone: the bound backbone.
          cache_slots: S, room of each row for prompt and text.
        """
        ...

    def draft(self, params: Params, backbone: Backbone, draft: Draft, seen: Verified) -> Draft:
        """What the guesses after the root need.

        Args:
          backbone: the bound backbone, for its projection and its embedding.
          draft: what it knew before. Steps of another drafter may lie between.
        """
        ...

    def propose(self, params: Params, draft: Draft, root: Int[Array, " B"]) -> Proposal:
        """The tokens of a step, and the tree that they form."""
        ...

    def read_bytes(self, params: Params) -> float:
        """Bytes of parameters that drafting reads in a step, on each device."""
        ...


class HasTree(Protocol):
    """Anything with a tree."""

    @property
    def tree(self) -> Any: ...


class OfTree:
    """What drafters share whose field `tree` is what a step verifies."""

    @property
    def size(self: HasTree) -> int:
        """N, tokens that a step verifies."""
        return self.tree.size

    @property
    def depth(self: HasTree) -> int:
        """Most guesses that a step can accept: the heads or the passes that the tree asks."""
        return self.tree.depth

    def check(self: HasTree, model: ModelConfig) -> None:
        """Raises InputError where the vocabulary has fewer tokens than the tree has ranks."""
        self.tree.check(self.tree.depth, model.vocab_size)

    def prepare(self, params: Params) -> Params:
        """The parameters as they are."""
        return params

    def read_bytes(self, params: Params) -> float:
        """Of a drafter without parameters."""
        return 0.0


@dataclasses.dataclass(frozen=True)
class NoDraft:
    """Plain decoding: a step verifies the root alone."""

    size: int = dataclasses.field(default=1, init=False)
    depth: int = dataclasses.field(default=0, init=False)

    def check(self, model: ModelConfig) -> None:
        pass

    def prepare(self, params: Params) -> Params:
        return params

    def begin(self, params: Params, backbone: Backbone, rows: int, cache_slots: int) -> Draft:
        return ()

    def draft(self, params: Params, backbone: Backbone, draft: Draft, seen: Verified) -> Draft:
        return draft

    def propose(self, params: Params, draft: Draft, root: Int[Array, " B"]) -> Proposal:
        return Proposal(root[:, None], ROOT_ALONE)

    def read_bytes(self, params: Params) -> float:
        return 0.0


ROOT_ALONE = TreeTables(
    parents=np.full((1, 1), PAD, np.int32),
    depths=np.zeros((1, 1), np.int32),
    ancestors=np.zeros((1, 1, 1), np.int32),
    mask=np.ones((1, 1, 1), bool),
    inner=(0,),
)
