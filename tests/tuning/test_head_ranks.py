"""Calibration: ranks by hand, trees by brute force, and replay against real decoding."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.models import TinyModel

from medusa_jax.checkpoints.load import Model
from medusa_jax.decoding.acceptance import Lossless
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.state import outputs
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.medusa_heads import MedusaHeads
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.tuning.head_ranks import UNKNOWN, accuracy, replayed, text_ranks
from medusa_jax.tuning.tree_search import (
    best_tree,
    grow,
    mean_accepted_length,
    replay,
    simulate,
    step_lengths,
)

PROMPTS = [[1, 403, 407, 261, 378], [1, 400], [1, 20, 30, 40]]


@pytest.mark.slow
def test_ranks_are_places_in_the_sorted_logits(tiny: TinyModel):
    from medusa_jax.model.backbone import Backbone, causal_mask

    tokens = jnp.array([[4, 8, 15, 16, 23, 39], [1, 2, 3, 4, 5, 6]])
    found, _ = replayed(tiny.config, tiny.heads, (), tiny.params, tokens)
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    backbone = {"params": tiny.params["backbone"]}
    hidden, _ = Backbone(tiny.config).apply(backbone, tokens, positions, causal_mask(6))
    heads = {"params": tiny.params["heads"]}
    logits = MedusaHeads(tiny.heads).apply(heads, hidden, lambda x: x)
    for k, one in enumerate(logits):
        order = np.argsort(-np.asarray(one), axis=-1, kind="stable")
        for row, position in itertools.product(range(2), range(6 - k - 2)):
            right = int(tokens[row, position + k + 2])
            assert order[row, position, found[row, position, k]] == right


def test_each_head_counts_only_the_positions_it_is_asked_at():
    ranks = text_ranks(np.zeros((5, 3), np.int32), prompt_tokens=2, length=5)
    np.testing.assert_array_equal(ranks, [[0, 0, UNKNOWN], [0, UNKNOWN, UNKNOWN], [UNKNOWN] * 3])
    np.testing.assert_array_equal(accuracy([ranks], 1), [[1.0], [1.0], [0.0]])


def random_table(size: int) -> np.ndarray:
    """Ranks of which the later ones depend on the first."""
    rng = np.random.default_rng(0)
    first = rng.choice(4, size, p=[0.5, 0.3, 0.15, 0.05])
    second = np.where(rng.random(size) < 0.8, first, rng.integers(0, 4, size))
    third = np.where(rng.random(size) < 0.8, second, rng.integers(0, 4, size))
    return np.stack((first, second, third), axis=1).astype(np.int32)


@pytest.mark.parametrize("size", [2, 4, 6])
def test_grown_tree_is_the_best_of_all(size: int):
    """With much data: no prefix-closed tree of that size covers more of it."""
    table = random_table(20_000)
    every = [path for depth in (1, 2, 3) for path in itertools.product(range(4), repeat=depth)]
    likely = sorted(every, key=lambda path: -np.mean((table[:, : len(path)] == path).all(1)))[:14]

    def covered(nodes: tuple) -> float:
        return sum(np.mean((table[:, : len(node)] == node).all(1)) for node in nodes)

    closed = (
        nodes
        for nodes in itertools.combinations(likely, size - 1)
        if all(node[:-1] in ((), *nodes) for node in nodes)
    )
    best = max(map(covered, closed))
    nodes, values = grow(table, size, 4)
    assert covered(tuple(nodes)) == pytest.approx(best)
    assert sum(values) == pytest.approx(best, abs=0.01)  # and it knows how good it is
    assert Tree(tuple(nodes)).size == size


def test_best_tree_keeps_to_its_depth():
    texts = [random_table(20_000)]
    trees = [best_tree(texts, 5, 4, depth) for depth in (1, 2, None)]
    assert [tree.depth for tree in trees] == [1, 2, 3]
    assert {tree.size for tree in trees} == {5}
    lengths = [mean_accepted_length(texts, tree) for tree in trees]
    assert lengths == sorted(lengths) and lengths[0] < lengths[2]


def test_paths_are_counted_not_multiplied():
    """Head 2 is right when head 1 is, or never: independence would put (1,) before (0, 0)."""
    table = np.array([[0, 0]] * 40 + [[1, 9]] * 35 + [[9, 9]] * 25, np.int32)
    assert grow(table, 3, 2)[0] == [(0,), (0, 0)]


def test_replay_of_a_text_by_hand():
    tree = Tree(((0,), (0, 0), (1,)))
    ranks = np.array([[0, 5], [0, 0], [7, 7], [1, 0], [0, 0], [2, UNKNOWN], [UNKNOWN] * 2])
    # Position 0 accepts (0): 2 tokens. Position 2: 1. Position 3 accepts (1): 2. Position 5: 1.
    made, starts, lengths = simulate([ranks], tree)
    assert (made, starts.tolist(), lengths.tolist()) == (6, [0, 2, 3, 5], [2, 2, 0])


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "grown"), [(None, False), (None, True), (Lossless(1.0), True)])
def test_replay_takes_the_very_steps_of_decoding(
    stories: Model, scheme: Lossless | None, grown: bool
):
    tree = DynamicTree(7, 3, 6) if grown else Tree.published("mc_sim_7b_63").cut(20)
    how = {"acceptance": scheme} if scheme else {}
    drafter = drafter_of_heads(stories.heads, tree)
    decoder = Decoder(stories.config, drafter, capacity=128, **how)
    state = decoder.prefill(stories.params, PROMPTS, max_new_tokens=90)
    for one in outputs(decoder.generate(stories.params, state)):
        ids = np.zeros((1, 128), np.int32)
        length = len(one.prompt_ids + one.token_ids)
        ids[0, :length] = one.prompt_ids + one.token_ids
        what = stories.config, stories.heads, (drafter,), stories.params
        table, lengths = (np.asarray(array[0]) for array in replayed(*what, ids))
        if isinstance(tree, Tree):
            ranks = text_ranks(table, len(one.prompt_ids), length)
            by_ranks = step_lengths(ranks, tree)
        else:
            by_ranks = lengths[len(one.prompt_ids) - 1 : length - 1, 0]
        made, starts, counts = replay([by_ranks], drafter.depth + 1)
        steps = one.tokens_per_step[: len(starts)]
        assert len(starts) >= len(one.tokens_per_step) - 1  # all but the one the text ends in
        assert made == sum(steps)
        np.testing.assert_array_equal(counts, np.bincount(steps, minlength=drafter.depth + 2)[1:])


def test_steps_of_a_text():
    """Lengths 2, 1, 1, 3: steps at 0 and 2; that at 3 ends the text and is left out."""
    made, starts, counts = replay([np.array([2, 1, 1, 3])], 3)
    assert (made, starts.tolist(), counts.tolist()) == (3, [0, 2], [1, 1, 0])
    lengths = step_lengths(np.array([[0, 5], [0, 0], [1, 0]]), Tree(((0,), (0, 0), (1,))))
    assert lengths.tolist() == [2, 3, 2]


def test_best_tree_beats_the_published_one_on_its_texts():
    texts = [random_table(300) for _ in range(3)]
    theirs = Tree.published("mc_sim_7b_63").limit_depth(3)
    for size in (4, 8):
        ours = best_tree(texts, size, 4)
        assert ours.size == size
        assert mean_accepted_length(texts, ours) > mean_accepted_length(texts, theirs.cut(size))
