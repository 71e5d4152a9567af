"""Typical acceptance: against a reference of the original's rule, and on hand-made logits.

The reference is NumPy over `leaf_paths`, as in `test_acceptance`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.acceptance import (
    CROSS,
    VOCAB,
    all_trees,
    context,
    decide,
    longest_runs,
    random_step,
    run,
)
from helpers.tiers import slow_except

from medusa_jax.decoding.acceptance import Context, Typical
from medusa_jax.drafting.tree import Tree


def original_typical(
    tree: Tree, tokens: np.ndarray, logits: np.ndarray, scheme: Typical
) -> tuple[np.ndarray, np.ndarray, int]:
    """Slots of the last accepted nodes [B], next roots [B], and rows where a tie was broken."""
    scaled = logits.astype(np.float64) / scheme.temperature
    log_p = scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))
    entropy = -(np.exp(log_p) * np.log(np.exp(log_p) + 1e-5)).sum(axis=-1)
    threshold = np.minimum(scheme.epsilon, scheme.alpha * np.exp(-entropy))
    last, ties = np.zeros(len(tokens), int), 0
    for row in range(len(tokens)):
        of_token = log_p[row, tree.parents, tokens[row]]
        passes = np.exp(of_token) > threshold[row, tree.parents]
        runs = longest_runs(tree, passes)
        longest = [slots for length, slots in runs if length == max(runs)[0]]
        best = max(longest, key=lambda slots: of_token[slots[1:]].sum())
        last[row] = best[-1]
        ties += len({slots[-1] for slots in longest}) > 1
    return last, logits[np.arange(len(tokens)), last].argmax(axis=-1), ties


@pytest.mark.parametrize(
    "scheme, spread",
    slow_except(
        [
            (Typical(), 1.5),
            (Typical(temperature=1.0), 2.0),
            (Typical(temperature=0.3, epsilon=0.2, alpha=0.45), 0.5),
            (Typical(temperature=1.3, epsilon=0.0), 1.0),
        ],
        (Typical(), 1.5),
        (Typical(temperature=0.3, epsilon=0.2, alpha=0.45), 0.5),
    ),
    ids=["default", "warm", "cold", "all pass"],
)
@all_trees
def test_typical_equals_the_original(tree: Tree, scheme: Typical, spread: float):
    tokens, logits = random_step(tree, 400, seed=3, spread=spread)
    last, root = run(scheme, tree, tokens, logits, context(400))
    original_last, original_root, ties = original_typical(tree, tokens, logits, scheme)
    np.testing.assert_array_equal(last, original_last)
    np.testing.assert_array_equal(root, original_root)
    if tree.top_k > 1 and scheme.epsilon:  # there is a choice to be made
        assert ties > 20
    if tree.depth:
        assert tree.depths[last].max() == tree.depth
    if tree.depth and scheme.epsilon:
        assert tree.depths[last].min() == 0


def test_typical_keeps_the_likelier_of_two_equally_long_paths():
    """The better first token loses to the better sum."""
    logits = np.full((1, CROSS.size, VOCAB), -50.0, np.float32)
    logits[0, 0, [2, 3]] = np.log([0.6, 0.4])
    logits[0, 1, [4, 5, 9]] = np.log([0.3, 0.2, 0.5])
    logits[0, 2, [6, 9]] = np.log([0.7, 0.3])
    tokens = (1, 2, 3, 4, 5, 6)
    scheme = Typical(temperature=1.0)
    assert decide(scheme, CROSS, tokens, logits)[0] == 5  # .4 * .7 beats .6 * .3
    logits[0, 2, [6, 9]] = np.log([0.4, 0.6])
    assert decide(scheme, CROSS, tokens, logits)[0] == 3  # .6 * .3 beats .4 * .4
    logits[0, 1, [4, 5, 9]] = np.log([0.03, 0.03, 0.94])
    assert decide(scheme, CROSS, tokens, logits)[0] == 5  # longer beats likelier
    # A likely grandchild under a child that does not pass counts for nothing.
    logits[0, 0, [2, 3, 9]] = np.log([0.17, 0.03, 0.8])
    assert decide(scheme, CROSS, tokens, logits)[0] == 1


def test_typical_root_is_the_argmax_whatever_the_temperature():
    logits = np.random.default_rng(5).normal(size=(20, VOCAB)).astype(np.float32)
    for temperature in (0.1, 1.0, 10.0):
        root = Typical(temperature).root(jnp.asarray(logits), context(20))
        np.testing.assert_array_equal(root, logits.argmax(axis=-1))


@pytest.mark.slow
def test_typical_threshold_is_strict():
    """p > threshold to be accepted; a token at the threshold may still be drawn as root."""
    tree = Tree(((0,),))
    logits = np.zeros((1, 2, VOCAB), np.float32)
    logits[0, :, 4] = 2.0
    p = np.asarray(jnp.exp(jax.nn.log_softmax(jnp.asarray(logits))))[0, 0, 0]
    below = np.nextafter(p, np.float32(0))
    for epsilon, accepted in ((p, 0), (below, 1)):
        scheme = Typical(1.0, float(epsilon), alpha=100.0)
        assert decide(scheme, tree, (1, 0), logits)[0] == accepted
    rows = jnp.tile(logits[0, :1], (200, 1))
    above = np.nextafter(p, np.float32(1))
    for epsilon, drawn in ((p, VOCAB), (above, 1)):
        scheme = Typical(1.0, float(epsilon), alpha=100.0, sample_root=True)
        assert len(set(scheme.root(rows, context(200)).tolist())) == drawn


@pytest.mark.slow
def test_typical_threshold_falls_with_entropy():
    """min(epsilon, alpha exp(-H)), on distributions where the other bound decides."""
    tree = Tree(((0,),))
    flat, sharp = np.zeros((2, 1, 2, VOCAB), np.float32)
    sharp[0, 0, :2] = np.log([0.94 * 16, 0.06 * 16])
    sharp[0, 0, 2:] = -50.0
    # Flat: p = 1/16, exp(-H) = 1/16. Sharp: p = .06, exp(-H) = .8.
    assert decide(Typical(1.0, 0.09, 0.3), tree, (7, 1), flat)[0] == 1
    assert decide(Typical(1.0, 0.09, 1.2), tree, (7, 1), flat)[0] == 0
    assert decide(Typical(1.0, 0.05, 1.2), tree, (7, 1), flat)[0] == 1
    assert decide(Typical(1.0, 0.09, 0.3), tree, (7, 1), sharp)[0] == 0
    assert decide(Typical(1.0, 0.05, 0.3), tree, (7, 1), sharp)[0] == 1
    assert decide(Typical(1.0, 0.09, 0.05), tree, (7, 1), sharp)[0] == 1


@pytest.mark.slow
def test_typical_sampled_root_passes_the_threshold():
    p = np.array([0.4, 0.25, 0.12, 0.1, 0.08, 0.05])
    scheme = Typical(temperature=1.0, epsilon=0.09, alpha=1.0, sample_root=True)
    tree = Tree(((0,),))
    rows = 600
    logits = np.full((rows, 2, VOCAB), -50.0, np.float32)
    logits[:, :, : len(p)] = np.log(p)
    where = context(rows)
    first = np.bincount(scheme.root(jnp.asarray(logits[:, 0]), where), minlength=VOCAB)
    # A guess that fails (5), so that the root is drawn at slot 0; and one that passes (0).
    tokens = np.tile(np.where(np.arange(rows) % 2, 5, 0)[:, None], (1, 2)).astype(np.int32)
    last, root = run(scheme, tree, tokens, logits, where)
    np.testing.assert_array_equal(last, np.arange(rows) % 2 == 0)
    for drawn in (first, np.bincount(root, minlength=VOCAB)):
        assert set(np.flatnonzero(drawn)) == {0, 1, 2, 3}
        assert drawn[0] > drawn[1] > drawn[3]


@pytest.mark.slow
def test_typical_sampled_root_is_drawn_at_its_own_position():
    """As `root` draws it: from the last accepted node, one position past it."""
    tree, scheme, rows = CROSS, Typical(sample_root=True), 60
    tokens, logits = random_step(tree, rows, seed=8, spread=1.5)
    where = Context(context(rows).keys, jnp.arange(rows) % 7)
    last, root = run(scheme, tree, tokens, logits, where)
    assert set(tree.depths[last]) == {0, 1, 2}
    after = Context(where.keys, where.position + tree.depths[last] + 1)
    expected = scheme.root(jnp.asarray(logits[np.arange(rows), last]), after)
    np.testing.assert_array_equal(root, expected)


@pytest.mark.slow
def test_typical_sampled_root_always_has_a_token():
    """Where alpha > 1 lets no token pass, the likeliest is left."""
    logits = np.zeros((50, VOCAB), np.float32)
    logits[:, 6] = 0.1
    scheme = Typical(1.0, epsilon=1.0, alpha=9.0, sample_root=True)
    assert set(scheme.root(jnp.asarray(logits), context(50)).tolist()) == {6}
