"""Log-probabilities of a text's tokens in the model's own distribution, for rows that ask for them.

They are those of the backbone's logits as they are: before temperature, penalties, suppressed
tokens and the cuts of top-k and top-p. Where no row asks, a step computes nothing of them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from medusa_jax.model.largest import largest
from medusa_jax.shapes import typed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logprobs:
    """The log-probabilities of a batch.

    Cell s belongs to the token at place s + 1 of a row's sequence: the logits at s predict it.

    Attributes:
      asked: whether a row wants them [B].
      chosen: of the tokens of the sequence [B, S].
      top_ids: the K likeliest tokens of each place, likeliest first [B, S, K].
      top: theirs [B, S, K].
    """

    asked: Array
    chosen: Array
    top_ids: Array
    top: Array

    @classmethod
    def empty(cls, asked: Bool[Array, " B"], most: int, slots: int) -> "Logprobs":
        """Those of no token yet, with room for the `most` likeliest of each place."""
        ids = jnp.zeros((*asked.shape, slots, most), jnp.int32)
        return cls(asked, jnp.zeros(ids.shape[:2]), ids, jnp.zeros(ids.shape))

    @classmethod
    def of_prompts(
        cls,
        asked: Bool[Array, " B"],
        most: int,
        slots: int,
        logits: Float[Array, "B V"],
        root: Int[Array, " B"],
        lengths: Int[Array, " B"],
    ) -> "Logprobs":
        """Those of the first roots, which these logits predict.

        Args:
          most: K.
          slots: S.
        """
        empty = cls.empty(asked, min(most, logits.shape[-1]), slots)
        return empty.with_text(logits[:, None], root[:, None], lengths - 1, asked)

    def after(
        self,
        logits: Float[Array, "B N V"],
        path: Int[Array, "B E"],
        tokens: Int[Array, "B E"],
        made: Int[Array, " B"],
        root: Int[Array, " B"],
        length: Int[Array, " B"],
        running: Bool[Array, " B"],
    ) -> "Logprobs":
        """Also those of a step's path and of the root after it.

        Args:
          logits: of all slots of the tree.
          path, tokens: the accepted slots and their tokens, of which the first `made` count.
          length: place of the first of them in the sequence.
        """
        last = jnp.arange(path.shape[1]) == made[:, None] - 1
        follows = jnp.where(last, root[:, None], jnp.roll(tokens, -1, axis=1))
        return self.with_text(logits, follows, length, running, path)

    def with_text(
        self,
        logits: Array,
        tokens: Int[Array, "B E"],
        place: Int[Array, " B"],
        running: Bool[Array, " B"],
        path: Array | None = None,
    ) -> "Logprobs":
        """With tokens [B, E] that logits predict, in the cells from `place` on.

        Args:
          path: slots of these logits; by default all.
        """

        def write(chosen: Array, top_ids: Array, top: Array) -> tuple[Array, ...]:
            rows = jnp.arange(tokens.shape[0])[:, None]
            new = token_logprobs(logits if path is None else logits[rows, path], tokens, k)
            cells = rows, place[:, None] + jnp.arange(tokens.shape[1])
            old = chosen, top_ids, top
            return tuple(o.at[cells].set(n, mode="drop") for o, n in zip(old, new, strict=True))

        k = self.top.shape[-1]
        kept = self.chosen, self.top_ids, self.top
        wanted = (self.asked & running).any()
        chosen, top_ids, top = jax.lax.cond(wanted, write, lambda *same: same, *kept)
        return Logprobs(self.asked, chosen, top_ids, top)


@typed
def token_logprobs(
    logits: Float[Array, "B E V"], tokens: Int[Array, "B E"], k: int
) -> tuple[Float[Array, "B E"], Int[Array, "B E k"], Float[Array, "B E k"]]:
    """Log-probabilities of tokens; the k likeliest tokens, and theirs.

    Probabilities (.5, .3, .2), token 1, k 1 -> log .3; token 0; log .5.
    """
    logits = logits.astype(jnp.float32)
    whole = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    top, top_ids = largest(logits, k)
    return (chosen - whole)[..., 0], top_ids, top - whole


@dataclasses.dataclass(frozen=True)
class TextLogprobs:
    """The log-probabilities of a row's text, on the host.

    Attributes:
      chosen: of each token [n].
      top_ids, top: the likeliest tokens at each, likeliest first, and theirs [n, K].
    """

    chosen: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray

    def __getitem__(self, cells: slice) -> "TextLogprobs":
        """Those of some of its tokens."""
        return TextLogprobs(self.chosen[cells], self.top_ids[cells], self.top[cells])


def text_logprobs(
    logprobs: Logprobs, prompt: np.ndarray, length: np.ndarray
) -> list[TextLogprobs | None]:
    """Brings those of rows that ask to the host, and nothing of the others.

    Args:
      prompt, length: tokens of each row's prompt, and of prompt and text.
    """
    found: list[TextLogprobs | None] = []
    for row, asked in enumerate(jax.device_get(logprobs.asked)):
        kept = logprobs.chosen, logprobs.top_ids, logprobs.top
        # Whole rows: their shape does not change, so nothing is compiled again.
        whole = jax.device_get([one[row] for one in kept]) if asked else None
        cells = slice(prompt[row] - 1, length[row] - 1)
        found.append(whole and TextLogprobs(*(one[cells] for one in whole)))
    return found
