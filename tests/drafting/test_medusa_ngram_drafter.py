"""Grown trees of the guesses of heads and of n-grams: what is among them, and what they accept."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.models import TINY, TinyModel

from medusa_jax.decoding.acceptance import Lossless
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.state import outputs
from medusa_jax.drafting.drafter import NoDraft
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.medusa_drafter import MedusaDraft, MedusaDrafter
from medusa_jax.drafting.medusa_heads import HeadsConfig
from medusa_jax.drafting.medusa_ngram_drafter import (
    NEVER,
    MedusaNgramDraft,
    MedusaNgramDrafter,
    among,
    chance,
    with_chain,
)
from medusa_jax.drafting.of_heads import drafter_of_heads

PROMPTS = [[3, 1, 4, 1, 5], [2, 7], [9, 9, 8]]


@pytest.mark.slow
def test_docstring_examples():
    guesses, chain, yes = jnp.array([[[4, 5, 6]]]), jnp.array([[5, 7]]), jnp.array([True])
    levels, ranks = among(guesses, chain, yes)
    assert levels.tolist() == [[[4, 5, 6, 0], [0, 0, 0, 7]]] and ranks.tolist() == [[1, 3]]
    np.testing.assert_allclose(chance(jnp.array([2, 0]), 3), [[0.27, 0.48, 0.6], [0, 0, 0]])
    scores = jnp.log(jnp.broadcast_to(jnp.array([0.5, 0.2]), (1, 1, 2, 2)))
    got = with_chain(scores, jnp.array([[1]]), jnp.array([[0.5]]))
    np.testing.assert_allclose(jnp.exp(got[0, 0]), [[0.25, 0.6]] * 2, rtol=1e-6)


def test_without_a_match_nothing_changes():
    rng = np.random.default_rng(0)
    guesses, chain = jnp.array([[[4, 5, 6], [1, 2, 3]]]), jnp.array([[5, 9]])
    levels, ranks = among(guesses, chain, jnp.array([False]))
    np.testing.assert_array_equal(levels[:, :, :3], guesses)
    scores = -jnp.asarray(rng.random((1, 2, 4, 4)))
    np.testing.assert_array_equal(with_chain(scores, ranks, jnp.zeros((1, 2))), scores)


@pytest.mark.slow
def test_only_the_chain_leads_to_what_no_head_has_guessed():
    scores = jnp.log(jnp.full((1, 2, 3, 3), 0.2)).at[..., 2].set(NEVER)
    got = with_chain(scores, jnp.array([[0, 2, 2]]), jnp.array([[0.5, 0.75, 0.8]]))
    likely = jnp.exp(got[0, 1])
    np.testing.assert_allclose(likely[0], [0.05, 0.05, 0.75], rtol=1e-5)
    np.testing.assert_allclose(likely[1:], [[0.2, 0.2, 0]] * 2, rtol=1e-5)
    below = got[0, 2]
    np.testing.assert_allclose(jnp.exp(below[2]), [0, 0, 0.8], rtol=1e-5)
    assert (below[:2] <= NEVER / 2).all()


def proposal(followed: list[int], matched: int, size: int = 6) -> tuple[list[int], list[int]]:
    """Tokens and parents of a tree of two heads whose guesses are (11 12) and (21 22)."""
    heads = HeadsConfig(num_heads=2, num_layers=1, hidden_size=8, vocab_size=50)
    drafter = MedusaNgramDrafter(heads, DynamicTree(size, 2, top_k=2), reach=4)
    scores = jnp.log(jnp.array([[[0.6, 0.2], [0.5, 0.1]]]))
    guessed = MedusaDraft(jnp.array([[[11, 12], [21, 22]]]), scores, jnp.zeros((1, 0, 0)))
    draft = MedusaNgramDraft(guessed, jnp.array([followed]), jnp.array([matched]))
    tokens, tree, _ = drafter.propose({"heads": {}}, draft, jnp.array([1]))
    return tokens[0].tolist(), np.asarray(tree.parents)[0].tolist()


@pytest.mark.slow
def test_a_long_match_takes_the_tree_and_a_short_match_a_branch():
    assert proposal([31, 32, 33, 34], 12) == ([1, 31, 32, 33, 34, 11], [-1, 0, 1, 2, 3, 0])
    tokens, parents = proposal([31, 32, 33, 34], 1)
    assert tokens[1] == 11 and parents[tokens.index(31)] == 0
    # The heads agree with a chain: it shares their nodes.
    tokens, parents = proposal([11, 21, 33, 34], 2)
    assert tokens[:4] == [1, 11, 21, 33] and parents[:4] == [-1, 0, 1, 2]
    assert len(set(tokens[1:3])) == 2 and tokens.count(11) == 1


@pytest.fixture
def decoders(tiny: TinyModel):
    """Plain, and trees of three sizes."""
    drafters = [NoDraft()] + [
        drafter_of_heads(tiny.heads, DynamicTree(size, depth, top_k=3))
        for size, depth in ((3, 2), (8, 3), (13, 3))
    ]
    assert all(isinstance(drafter, MedusaNgramDrafter) for drafter in drafters[1:])
    return [Decoder(TINY, drafter, capacity=96) for drafter in drafters]


@pytest.mark.slow
def test_greedy_texts_are_those_of_plain_decoding(tiny: TinyModel, decoders):
    """Batched and single; a random model soon repeats itself, so chains are accepted whole."""
    plain, *others = decoders
    state = plain.prefill(tiny.params, PROMPTS, max_new_tokens=70)
    texts = outputs(plain.generate(tiny.params, state))
    for decoder in others:
        state = decoder.prefill(tiny.params, PROMPTS, max_new_tokens=70)
        done = outputs(decoder.generate(tiny.params, state))
        assert [one.token_ids for one in done] == [one.token_ids for one in texts]
        alone = decoder.prefill(tiny.params, PROMPTS[1:2], max_new_tokens=70)
        assert outputs(decoder.generate(tiny.params, alone)) == done[1:2]
    longest = max(int(np.max(one.tokens_per_step)) for one in done)
    assert longest > tiny.heads.num_heads + 1  # more than heads alone can give


@pytest.mark.slow
def test_drawn_texts_do_not_depend_on_n_grams(tiny: TinyModel):
    tree, texts = DynamicTree(8, 3, top_k=3), []
    for drafter in (MedusaDrafter(tiny.heads, tree), MedusaNgramDrafter(tiny.heads, tree)):
        decoder = Decoder(TINY, drafter, Lossless(0.7), capacity=64)
        state = decoder.prefill(tiny.params, PROMPTS, max_new_tokens=40)
        texts.append([one.token_ids for one in outputs(decoder.generate(tiny.params, state))])
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_weak_match_does_not_take_the_place_of_a_sure_guess():
    """Where the tree has room for a single guess."""
    heads = HeadsConfig(num_heads=1, num_layers=1, hidden_size=8, vocab_size=50)
    drafter = MedusaNgramDrafter(heads, DynamicTree(2, 1, top_k=1))
    guessed = MedusaDraft(jnp.array([[[11]]]), jnp.log(jnp.array([[[0.6]]])), jnp.zeros((1, 0, 0)))
    for matched, token in ((1, 11), (16, 31)):
        draft = MedusaNgramDraft(guessed, jnp.array([[31]]), jnp.array([matched]))
        tokens, _, _ = drafter.propose({"heads": {}}, draft, jnp.array([1]))
        assert tokens.tolist() == [[1, token]]


def test_smaller_trees_read_the_same_drafts(tiny: TinyModel):
    whole = MedusaNgramDrafter(tiny.heads, DynamicTree(12, 3, top_k=3))
    small = whole.smaller(DynamicTree(4, 3, top_k=3))
    assert (whole.depth, small.depth, small.size) == (11, 11, 4)
    assert MedusaNgramDrafter(tiny.heads, DynamicTree(4, 3, top_k=3)).depth == 3
