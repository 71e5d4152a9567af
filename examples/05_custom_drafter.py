"""Bring your own drafter: here, the guess is the token that followed the root before.

`draft` sees what was verified, `propose` lays out the guesses. A line registers them by a name.

    python examples/05_custom_drafter.py
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from medusa_jax import Generator, ModelConfig, Tree
from medusa_jax.drafting.drafter import Params, Proposal, Verified
from medusa_jax.serving.drafters import DRAFTERS


@dataclasses.dataclass(frozen=True)
class Echo:
    """Guesses a single token; so its draft is a token a row."""

    size: int = 2  # tokens that a step verifies: the root and a guess
    depth: int = 1

    def check(self, model: ModelConfig) -> None: ...

    def prepare(self, params: Params) -> Params:
        return params

    def begin(self, params: Params, backbone, rows: int, cache_slots: int) -> Array:
        return jnp.zeros(rows, jnp.int32)

    def draft(self, params: Params, backbone, draft: Array, seen: Verified) -> Array:
        places = jnp.arange(seen.sequence.shape[1])
        same = (seen.sequence == seen.root[:, None]) & (places < seen.length[:, None] - 1)
        next_place = jnp.where(same, places + 1, 0).max(axis=1, keepdims=True)
        return jnp.take_along_axis(seen.sequence, next_place, axis=1)[:, 0]

    def propose(self, params: Params, draft: Array, root: Array) -> Proposal:
        return Proposal(jnp.stack((root, draft), axis=1), Tree.chain(1).arrange(None)[1])

    def read_bytes(self, params: Params) -> float:
        return 0.0


DRAFTERS["echo"] = lambda recipe: Echo()


def main() -> None:
    """Decodes a prompt with three drafters."""
    texts = set()
    for name in ("echo", "ngram", "medusa"):
        completion = Generator.load(drafter=name).generate(["Tom had a ball"], 64)[0]
        texts.add(completion.text)
        print(f"{name}: {completion.mean_accepted_length:.2f} tokens a step")
    print("the text does not depend on the drafter:", len(texts) == 1)


if __name__ == "__main__":
    main()
