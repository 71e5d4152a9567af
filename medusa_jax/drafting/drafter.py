"""What a decode step asks of a drafter, and the drafter of plain decoding.

A drafter guesses the tokens after the root, which the backbone has already chosen. It
works in two halves, since the next root is not known before a tree is verified:

    draft     after a verified token: from its hidden state, all that the guesses need
    propose   at the start of a step: the tree of tokens that this step verifies

A drafter is a frozen dataclass, static under `jax.jit`; its parameters are passed in.
"""

import dataclasses
from typing import Any, Protocol

import numpy as np
from jaxtyping import Array, Float, Int

from medusa_jax.drafting.tree_tables import PAD, TreeTables
from medusa_jax.model.backbone import Backbone
from medusa_jax.model.config import ModelConfig

# {"backbone": ..., "heads": ..., "bigrams": ...}, a selector among the heads; each drafter knows
# its own.
Params = dict[str, Any]
Draft = Any  # a pytree of arrays with a leading dimension B


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

    def draft(self, params: Params, backbone: Backbone, hidden: Float[Array, "B D"]) -> Draft:
        """What the guesses after the next root need.

        Args:
          backbone: the bound backbone, for its projection and its embedding.
          hidden: hidden state of the last accepted token of each row.
        """
        ...

    def propose(
        self, params: Params, draft: Draft, root: Int[Array, " B"]
    ) -> tuple[Int[Array, "B N"], TreeTables]:
        """The tokens of each slot, the root in slot 0, and the tree that they form."""
        ...

    def read_bytes(self, params: Params) -> float:
        """Bytes of parameters that drafting reads in a step, on each device."""
        ...


@dataclasses.dataclass(frozen=True)
class NoDraft:
    """Plain decoding: a step verifies the root alone."""

    size: int = dataclasses.field(default=1, init=False)
    depth: int = dataclasses.field(default=0, init=False)

    def check(self, model: ModelConfig) -> None:
        pass

    def prepare(self, params: Params) -> Params:
        return params

    def draft(self, params: Params, backbone: Backbone, hidden: Float[Array, "B D"]) -> Draft:
        return ()

    def propose(
        self, params: Params, draft: Draft, root: Int[Array, " B"]
    ) -> tuple[Int[Array, "B N"], TreeTables]:
        return root[:, None], ROOT_ALONE

    def read_bytes(self, params: Params) -> float:
        return 0.0


ROOT_ALONE = TreeTables(
    parents=np.full((1, 1), PAD, np.int32),
    depths=np.zeros((1, 1), np.int32),
    ancestors=np.zeros((1, 1, 1), np.int32),
    mask=np.ones((1, 1, 1), bool),
    inner=(0,),
)
