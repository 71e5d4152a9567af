"""Prompt lookup: guesses are what followed the same words earlier in prompt and text.

It has no parameters. It guesses well where an answer repeats its prompt: summaries, questions
about a document, edits of code (Saxena, 2023, "Prompt Lookup Decoding").
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from medusa_jax.drafting.drafter import OfTree, Params, Proposal, Verified
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.model.backbone import Backbone
from medusa_jax.model.config import ModelConfig
from medusa_jax.shapes import typed

LONGEST = 4  # tokens of a match that count; a longer match hardly guesses better


@dataclasses.dataclass(frozen=True)
class NgramDrafter(OfTree):
    """Guesses a chain: the tokens after the latest of the longest matches.

    Its draft is the guesses [B, depth].

    Attributes:
      tree: a chain.
      longest: most tokens of a match that count.
    """

    tree: Tree
    longest: int = LONGEST

    def check(self, model: ModelConfig) -> None:
        if self.tree != Tree.chain(self.depth):
            raise InputError(
                "n-grams guess a chain, and this tree is none: give --tree chain:DEPTH"
            )

    def begin(self, params: Params, backbone: Backbone, rows: int, cache_slots: int) -> Array:
        return jnp.zeros((rows, self.depth), jnp.int32)

    def draft(self, params: Params, backbone: Backbone, draft: Array, seen: Verified) -> Array:
        return followed(seen, self.longest, self.depth)[0]

    def propose(self, params: Params, draft: Array, root: Int[Array, " B"]) -> Proposal:
        tokens = jnp.concatenate((root[:, None], draft), axis=1)
        return Proposal(tokens, self.tree.arrange(None)[1])


def followed(seen: Verified, longest: int, count: int) -> tuple[Array, Array]:
    """What followed the longest match of the text and its root [B, count], and its length [B]."""
    rows = jnp.arange(seen.root.shape[0])
    text = seen.sequence.at[rows, seen.length].set(seen.root)
    place, matched = longest_match(text, seen.length, longest)
    return continued(text, place, seen.length, count), matched


@typed
def longest_match(
    text: Int[Array, "B S"], last: Int[Array, " B"], longest: int
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Where the tokens up to `last` occurred before: the place of their last token, and how many.

    Most tokens in agreement win, then the latest place. A single token is enough. Without any, the
    place is -1.

    Text 5 6 7 8 6 7 9 7 6 7, last 9: "6 7" ends at the places 2 and 5 too, and 5 is later. The 7
    at place 7 is later still, but follows a 9. So the place is 5, and 2 tokens agree.

    Args:
      last: place of the last token.
      longest: agreement beyond so many tokens does not count.
    """
    places, slots = jnp.arange(text.shape[1]), text.shape[1]
    agrees, length = places < last[:, None], jnp.zeros(text.shape, jnp.int32)
    # Slices of a padded text: XLA fuses them, where it would write out each `jnp.roll`. Before the
    # text is -1, which is no token.
    padded = jnp.pad(text, ((0, 0), (longest - 1, 0)), constant_values=-1)
    ending = last[:, None] + longest - 1 - jnp.arange(longest)
    ending = jnp.take_along_axis(padded, ending, axis=1)  # the latest token first
    for back in range(longest):
        start = longest - 1 - back
        agrees &= padded[:, start : start + slots] == ending[:, back, None]
        length += agrees
    best = jnp.where(length > 0, length * text.shape[1] + places, -1)
    most = length.max(axis=1)
    return jnp.where(most > 0, best.argmax(axis=1), -1).astype(jnp.int32), most


@typed
def continued(
    text: Int[Array, "B S"], match: Int[Array, " B"], last: Int[Array, " B"], count: int
) -> Int[Array, "B count"]:
    """The `count` tokens after each match; behind `last` they repeat, as they have begun to.

    Text 5 6 7 5, match 0, last 3, count 4 -> 6 7 5 6. Without a match (-1), the last token again.
    """
    period = jnp.where(match < 0, 1, last - match)
    start = jnp.where(match < 0, last, match + 1)
    places = start[:, None] + jnp.arange(count) % period[:, None]
    return jnp.take_along_axis(text, places, axis=1)
