"""A draft model's trees, and that it sees the text as the model itself would."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.models import TINY, TinyModel

from medusa_jax.decoding.acceptance import Greedy, Lossless
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.state import outputs
from medusa_jax.drafting import draft_model
from medusa_jax.drafting.draft_model import DraftModel, best, levels
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError

EXAMPLE = Tree.from_lists([[0], [0, 0], [1]])  # that of `Tree`
BUSHY = Tree.from_lists([[0], [2], [0, 0], [0, 1], [2, 0], [0, 0, 0], [2, 0, 0]])


def test_levels_of_the_example():
    first, second = levels(EXAMPLE)
    assert (first.nodes.tolist(), first.own, first.rank.tolist()) == ([], 1, [0, 1])
    assert (second.nodes.tolist(), second.own, second.rank.tolist()) == ([1], 1, [0])


def test_levels_run_the_nodes_above_again():
    """Slots of `BUSHY`: (0) 1, (2) 2, (0, 0) 3, (0, 1) 4, (2, 0) 5, then the deepest two."""
    deepest = levels(BUSHY)[2]
    assert deepest.nodes.tolist() == [1, 2, 3, 5] and deepest.own == 2
    assert deepest.depths.tolist() == [1, 1, 2, 2]
    assert deepest.mask.astype(int).tolist() == [
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [1, 0, 1, 0],
        [0, 1, 0, 1],
    ]
    assert deepest.parent.tolist() == [0, 1]
    assert levels(BUSHY)[0].rank.tolist() == [0, 2] and levels(BUSHY)[0].order.tolist() == [0, 1]


def test_children_are_the_best_of_their_rank_or_in_order():
    level, scores = levels(BUSHY)[0], jnp.array([[[1.0, 3.0, 2.0]]])
    assert best(scores, level, in_order=False).tolist() == [[1, 0]]
    assert best(scores, level, in_order=True).tolist() == [[1, 2]]


def test_another_vocabulary_is_refused():
    other = dataclasses.replace(TINY, vocab_size=41)
    with pytest.raises(InputError, match=r"vocabulary of 41 tokens, and .* for one of 40"):
        Decoder(TINY, DraftModel(other, EXAMPLE))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [Greedy(), Lossless(0.9, top_k=12)], ids=str)
def test_a_model_that_drafts_for_itself_is_always_right(tiny: TinyModel, scheme, monkeypatch):
    """So its cache, places and mask are those of the model: each step accepts a whole path."""
    monkeypatch.setattr(draft_model, "READ_BLOCK", 5)  # the longer prompt needs two passes
    target = scheme if isinstance(scheme, Lossless) else None
    decoder = Decoder(TINY, DraftModel(TINY, BUSHY, target), scheme, capacity=64)
    params = tiny.params | {"draft": tiny.params["backbone"]}
    prompts = [[1, 5], [3, 9, 2, 30, 4, 11, 6]]
    state = decoder.prefill(params, prompts, max_new_tokens=40)
    for output in outputs(decoder.generate(params, state)):
        # A draw may be a sibling that has no children: p = q is then what is left of p.
        steps = np.array(output.tokens_per_step)
        assert (steps >= 3).all() and (steps == 4).any()
        assert target or (steps == 4).all()
