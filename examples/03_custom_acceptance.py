"""Bring your own acceptance scheme: here, a guess passes if the backbone ranks it among its best.

A scheme is a frozen dataclass with two methods. `root` chooses the first token after the prompt.
`accept` gets a verified tree, and chooses the last accepted slot and the next root.

    python examples/03_custom_acceptance.py
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from medusa_jax import Generator, Greedy
from medusa_jax.decoding.acceptance import Accepted, Context, longest_path
from medusa_jax.drafting.tree_tables import TreeTables


@dataclasses.dataclass(frozen=True)
class AmongBest:
    """Accepts a guess that is among the `k` likeliest tokens after its parent; k = 1 is greedy."""

    k: int = 2

    def root(self, logits: Array, context: Context) -> Array:
        return jnp.argmax(logits, axis=-1)

    def accept(self, tree: TreeTables, tokens: Array, logits: Array, context: Context) -> Accepted:
        log_p = jax.nn.log_softmax(logits)  # of the token after each slot [B, N, V]
        rows = jnp.arange(tokens.shape[0])[:, None]
        after_parent = log_p[rows, tree.parents[:, 1:]]  # of each slot but the root [B, N - 1, V]
        own = jnp.take_along_axis(after_parent, tokens[:, 1:, None], axis=2)
        passes = (after_parent > own).sum(axis=2) < self.k
        last = longest_path(tree, passes, own[..., 0])
        next_logits = jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]
        return Accepted(last, self.root(next_logits, context))


def main() -> None:
    """Decodes one prompt with three schemes."""
    for name, scheme in {
        "Greedy()": Greedy(),
        "AmongBest(1), the same": AmongBest(1),
        "AmongBest(3)": AmongBest(3),
    }.items():
        generator = Generator.load(tree="grow:8", acceptance=scheme)
        completion = generator.generate(["One day, Tom found a box"], max_new_tokens=64)[0]
        print(f"{name}: {completion.mean_accepted_length:.2f} tokens a step\n{completion.text}\n")


if __name__ == "__main__":
    main()
