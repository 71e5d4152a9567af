"""Acceptance: which path of a verified tree becomes text, and which token is the next root.

An acceptance scheme is a frozen dataclass with two methods,

    root(logits, context)          the first root, after the prompt
    accept(tree, tokens, logits, context)   the rest, one call a step

so that research code can bring its own. Node n's logits are the backbone's
prediction of the token after n; the root is never checked, it was chosen
before. Paths are walked node by node: there are no padded path cells that could
be accepted by accident.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from medusa_jax.decoding import rejection
from medusa_jax.decoding.sampling import (
    Sampling,
    argmax,
    best,
    draw,
    scaled,
    scaled_rows,
    warp,
    warp_rows,
)
from medusa_jax.drafting.tree_tables import TreeTables
from medusa_jax.errors import InputError
from medusa_jax.shapes import typed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a random choice may depend on.

    Attributes:
      keys: one PRNG key a row [B].
      position: place of the root in each row's sequence [B].
      sampling: settings of the rows, or None where the scheme has those of all.
      drawn: how the tree's children were drawn, see `drafting.drafter.Proposal`.
    """

    keys: Array
    position: Array
    sampling: Sampling | None = None
    drawn: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Accepted:
    """A step's decision.

    Attributes:
      last: slot of the last accepted node [B]; 0 accepts the root alone.
      root: token that follows it, the next step's root [B].
      largest: logit of each node [B, N], where the scheme knows it.
    """

    last: Array
    root: Array
    largest: Array | None = None


class Acceptance(Protocol):
    """What `decode.Decoder` asks of a scheme; it must be hashable."""

    def root(self, logits: Array, context: Context) -> Array:
        """First root [B] from the logits after the prompt [B, V]."""
        ...

    def accept(self, tree: TreeTables, tokens: Array, logits: Array, context: Context) -> Accepted:
        """Decides on tree tokens [B, N] with logits [B, N, V]."""
        ...


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Accepts what the backbone's argmax would have written: exactly greedy decoding."""

    def root(self, logits: Array, context: Context) -> Array:
        return argmax(logits)

    def accept(self, tree: TreeTables, tokens: Array, logits: Array, context: Context) -> Accepted:
        largest, likeliest = best(logits)
        rows = jnp.arange(tokens.shape[0])
        accepted = walk(tree, tokens, lambda slots, _: likeliest[rows, slots])
        return dataclasses.replace(accepted, largest=largest)


@dataclasses.dataclass(frozen=True)
class Lossless:
    """Draws from the target distribution at each visited node and follows the draw.

    If a child equals the draw it is accepted, else the draw is the next root:
    either way it is one exact sample, so the text is distributed as the
    backbone's own whatever the tree, the heads and the other rows are.
    Children that were drawn themselves are accepted more often by `rejection.walk`,
    which keeps the distribution as well.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        if self.top_k < 0:
            raise InputError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must lie in (0, 1], got {self.top_p}")

    def target(self, logits: Float[Array, "*dims V"]) -> Float[Array, "*dims V"]:
        """The logits of what is drawn from."""
        return warp(logits, self.temperature, self.top_k, self.top_p)

    def root(self, logits: Array, context: Context) -> Array:
        return draw(context.keys, context.position, self.target(logits))

    def accept(self, tree: TreeTables, tokens: Array, logits: Array, context: Context) -> Accepted:
        if context.drawn is None:
            return _followed(self, tree, tokens, logits, context)
        rows, where = jnp.arange(tokens.shape[0]), (context.keys, context.position)

        def target(slots: Array) -> Array:
            return self.target(logits[rows, slots])

        return Accepted(*rejection.walk(tree, tokens, target, context.drawn, *where))


@dataclasses.dataclass(frozen=True)
class Typical:
    """Typical acceptance (paper section 2.3.1): a guess passes if it is likely enough.

    Token x after node n passes if p(x) > min(epsilon, alpha * exp(-H)), p being
    softmax(logits / temperature) at n and H its entropy. The longest passing
    path wins, among equals the likeliest. It does not keep the target
    distribution. The next root is the argmax, which makes it deterministic (the
    original's default), or, with `sample_root`, a draw among the tokens that pass.
    """

    temperature: float = 0.7
    epsilon: float = 0.09
    alpha: float = 0.3
    sample_root: bool = False

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        if not (self.epsilon >= 0 and self.alpha >= 0):
            raise InputError(
                f"epsilon and alpha must not be negative, got {self.epsilon} and {self.alpha}"
            )

    def root(self, logits: Array, context: Context) -> Array:
        if not self.sample_root:
            return argmax(logits)
        log_p, threshold = self._threshold(logits)
        # With alpha > 1 no token may reach the threshold: the likeliest always stays.
        threshold = jnp.minimum(threshold, jnp.exp(log_p).max(axis=-1, keepdims=True))
        passes = jnp.exp(log_p) >= threshold
        return draw(context.keys, context.position, jnp.where(passes, log_p, -jnp.inf))

    def accept(self, tree: TreeTables, tokens: Array, logits: Array, context: Context) -> Accepted:
        last = jnp.zeros(tokens.shape[0], jnp.int32)
        if tree.depth:
            # Only nodes with children are asked for their distribution.
            inner = np.array(tree.inner)
            log_p, threshold = self._threshold(logits[:, inner])
            rows = jnp.arange(tokens.shape[0])[:, None]
            parent = jnp.searchsorted(inner, tree.parents[..., 1:])
            log_p = log_p[rows, parent, tokens[:, 1:]]
            passes = jnp.exp(log_p) > threshold[rows, parent, 0]
            last = longest_path(tree, passes, log_p)
        next_logits = jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]
        position = context.position + tree.depth_of(last) + 1
        return Accepted(last, self.root(next_logits, Context(context.keys, position)))

    def _threshold(self, logits: Array) -> tuple[Array, Array]:
        """log p [..., V] and the probability a token must exceed [..., 1]."""
        log_p = jax.nn.log_softmax(scaled(logits, self.temperature))
        p = jnp.exp(log_p)
        entropy = -jnp.sum(p * jnp.log(p + 1e-5), axis=-1, keepdims=True)
        return log_p, jnp.minimum(self.epsilon, self.alpha * jnp.exp(-entropy))


@dataclasses.dataclass(frozen=True)
class PerRow:
    """Each row by its own `Sampling`: `Greedy` at temperature 0, else `Lossless` or `Typical`.

    A row's text is that of the same scheme alone, whatever the other rows ask for. Noise is drawn
    only where a row is sampled, and entropies are computed only where a row is typical.
    """

    def root(self, logits: Array, context: Context) -> Array:
        how = context.sampling
        assert how is not None, "PerRow needs the rows' sampling"
        likeliest = argmax(logits)

        def sampled() -> Array:
            return draw(context.keys, context.position, warp_rows(logits, how))

        drawn = jax.lax.cond(how.drawn.any(), sampled, lambda: likeliest)
        return jnp.where(how.drawn, drawn, likeliest)

    def accept(self, tree: TreeTables, tokens: Array, logits: Array, context: Context) -> Accepted:
        how = context.sampling
        assert how is not None, "PerRow needs the rows' sampling"

        def typical() -> Accepted:
            warm = scaled_rows(logits, how.temperature)
            return Typical(temperature=1.0).accept(tree, tokens, warm, context)

        followed = _followed(self, tree, tokens, logits, context)
        passed = jax.lax.cond(how.typical.any(), typical, lambda: followed)
        choose = functools.partial(jnp.where, how.typical)
        return jax.tree.map(choose, passed, followed)


SCHEMES = {"greedy": Greedy, "typical": Typical, "lossless": Lossless}


@typed
def walk(
    tree: TreeTables,
    tokens: Int[Array, "B N"],
    choose: Callable[[Array, int], Array],
) -> Accepted:
    """Follows from the root the child that equals the token chosen at each node.

    Example: root 7 with children 3 and 5, and under 5 the child 9. If the
    choices are 5 at the root and 2 at node 5, the path is (7, 5), `last` the
    slot of 5, and 2 is the next root.

    Args:
      choose: (slots of the nodes visited [B], their depth) -> tokens that follow them [B].
    """
    last = jnp.zeros(tokens.shape[0], jnp.int32)
    going = jnp.ones(tokens.shape[0], bool)
    chosen = choose(last, 0)
    for depth in range(1, tree.depth + 1):
        child = (tree.parents == last[:, None]) & (tokens == chosen[:, None])
        going &= child.any(axis=1)
        last = jnp.where(going, child.argmax(axis=1), last)
        chosen = jnp.where(going, choose(last, depth), chosen)
    return Accepted(last, chosen)


def _followed(
    scheme: Lossless | PerRow, tree: TreeTables, tokens: Array, logits: Array, context: Context
) -> Accepted:
    """The path of the tokens that a scheme chooses as it would without a tree."""
    rows = jnp.arange(tokens.shape[0])

    def choose(slots: Array, depth: int) -> Array:
        after = dataclasses.replace(context, position=context.position + depth + 1)
        return scheme.root(logits[rows, slots], after)

    return walk(tree, tokens, choose)


@typed
def longest_path(
    tree: TreeTables, passes: Bool[Array, "B n"], log_p: Float[Array, "B n"]
) -> Int[Array, " B"]:
    """Slot of the deepest node reached through passing nodes only; 0 if none passes.

    Among the deepest, the path of highest summed log-probability.

    Args:
      passes, log_p: for every node but the root, n = N - 1.
    """
    padded = tree.ancestors < 1  # the root and unused cells pass for nothing
    rows = jnp.arange(passes.shape[0])[:, None, None]
    cells = (rows, jnp.where(padded, 0, tree.ancestors - 1))
    reached = (passes[cells] | padded).all(axis=-1)
    score = jnp.where(padded, 0.0, log_p[cells]).sum(axis=-1)
    depth = jnp.where(reached, tree.depths, -1)
    deepest = depth == depth.max(axis=1, keepdims=True)
    return jnp.where(deepest, score, -jnp.inf).argmax(axis=1).astype(jnp.int32)


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise InputError(
            f"temperature must be > 0 and finite, got {temperature}; "
            "for temperature 0 use greedy acceptance"
        )
