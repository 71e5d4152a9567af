"""Bring your own drafter: here, the guess is the token that followed the root before.

`draft` reads what was verified, `propose` lays out the guesses, a line of registry names both.

    python examples/05_custom_drafter.py
"""

import dataclasses

import jax.numpy as jnp

from medusa_jax import Generator, Tree
from medusa_jax.drafting.drafter import OfTree, Proposal
from medusa_jax.serving.drafters import DRAFTERS


@dataclasses.dataclass(frozen=True)
class Echo(OfTree):
    """Guesses a single token; so its draft is a token a row."""

    tree: Tree = Tree.chain(1)

    def begin(self, params, backbone, rows, cache_slots):
        return jnp.zeros(rows, jnp.int32)

    def draft(self, params, backbone, draft, seen):
        places = jnp.arange(seen.sequence.shape[1])
        same = (seen.sequence == seen.root[:, None]) & (places < seen.length[:, None] - 1)
        after = jnp.where(same, places + 1, 0).max(axis=1, keepdims=True)
        return jnp.take_along_axis(seen.sequence, after, axis=1)[:, 0]

    def propose(self, params, draft, root):
        return Proposal(jnp.stack((root, draft), axis=1), self.tree.arrange(None)[1])


DRAFTERS["echo"] = lambda recipe: Echo()
for name in ("echo", "ngram", "medusa"):
    output = Generator.load(drafter=name).generate(["Tom had a ball"], 64)[0]
    print(f"{name}: {output.mean_accepted_length:.2f} tokens a step: {output.text!r}")
