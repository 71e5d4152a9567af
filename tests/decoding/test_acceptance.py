"""Acceptance on hand-made logits, and against path-by-path references of the original's rules.

The references are NumPy over `leaf_paths`, one leaf path after another, as
the original does it; the library walks nodes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.acceptance import (
    CROSS,
    TREES,
    VOCAB,
    all_trees,
    context,
    decide,
    longest_runs,
    peaks,
    random_step,
    run,
)
from helpers.tiers import slow_except
from helpers.trees import tables

from medusa_jax.decoding.acceptance import (
    SCHEMES,
    Accepted,
    Context,
    Greedy,
    Lossless,
    Typical,
    walk,
)
from medusa_jax.decoding.sampling import draw, warp
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError

# --- walk and greedy, by hand


def test_walk_docstring_example():
    tree = Tree(((0,), (1,), (1, 0)))  # root 7; children 3 and 5; under 5, 9
    asked = []

    def choose(slots, depth):
        asked.append(depth)
        return jnp.array([5, 0, 2, 0])[slots]

    accepted = walk(tables(tree), jnp.array([[7, 3, 5, 9]]), choose)
    assert (accepted.last.item(), accepted.root.item()) == (2, 2)
    assert asked == [0, 1, 2]  # once a depth, not once a node


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices, last, root",
    [
        ((9, 2, 3, 4, 5, 6), 0, 9),  # no child equals the root's choice
        ((2, 8, 3, 4, 5, 6), 1, 8),  # the first child, then none of its children
        ((3, 8, 9, 4, 5, 6), 2, 9),  # the first child is rejected, its sibling is not
        ((3, 8, 6, 4, 5, 1), 5, 1),  # ... and a full path
        ((2, 5, 3, 4, 7, 1), 4, 7),  # a full path through a second grandchild
        ((2, 6, 3, 4, 5, 1), 1, 6),  # 6 hangs under the other child
    ],
)
@pytest.mark.parametrize(
    "scheme", [Greedy(), Typical(), Lossless()], ids=lambda s: type(s).__name__
)
def test_accepted_path(scheme, choices, last, root):
    """With all probability on one token, all schemes agree."""
    assert decide(scheme, CROSS, (1, 2, 3, 4, 5, 6), peaks(*choices)) == (last, root)


@pytest.mark.parametrize(
    "scheme", [Greedy(), Typical(), Lossless()], ids=lambda s: type(s).__name__
)
def test_root_alone(scheme):
    assert decide(scheme, Tree(), (3,), peaks(11)) == (0, 11)
    assert scheme.root(jnp.asarray(peaks(11)[:, 0]), context(1)).tolist() == [11]


@pytest.mark.parametrize(
    "scheme", [Greedy(), Typical(), Lossless()], ids=lambda s: type(s).__name__
)
def test_padded_cells_are_never_accepted(scheme):
    """The original pads short paths with token 0, which a choice of 0 then "accepts"."""
    tree = Tree(((0,), (1,), (1, 0), (1, 0, 0)))
    tokens = (7, 3, 5, 9, 11)
    assert decide(scheme, tree, tokens, peaks(3, 0, 12, 13, 14)) == (1, 0)
    assert decide(scheme, tree, tokens, peaks(3, 0, 0, 0, 0)) == (1, 0)
    assert decide(scheme, tree, tokens, peaks(0, 0, 0, 0, 0)) == (0, 0)
    # A guess that is token 0 is accepted like any other.
    assert decide(scheme, tree, (7, 3, 0, 9, 0), peaks(0, 1, 9, 0, 6)) == (4, 6)


def test_greedy_takes_the_first_among_equals():
    logits = np.zeros((1, 3, VOCAB), np.float32)
    logits[0, 0, [4, 6]] = 1.0
    tree = Tree(((0,), (1,)))
    assert decide(Greedy(), tree, (7, 6, 4), logits) == (2, 0)
    assert decide(Greedy(), tree, (7, 6, 5), logits) == (0, 4)


# --- against references, path by path


@all_trees
def test_greedy_equals_the_longest_run_of_argmaxes(tree: Tree):
    tokens, logits = random_step(tree, 600, seed=1, spread=1.0, hit=2.0)
    last, root = run(Greedy(), tree, tokens, logits, context(600))
    best = logits.argmax(axis=-1)
    lengths = set()
    for row in range(600):
        passes = tokens[row] == best[row, tree.parents]
        length, _ = max(longest_runs(tree, passes))
        assert tree.depths[last[row]] == length
        assert passes[tree.ancestors[last[row], 1 : length + 1]].all()
        assert root[row] == best[row, last[row]]
        lengths.add(length)
    assert len(lengths) >= min(tree.depth + 1, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme", slow_except([Lossless(), Lossless(0.8, 10, 0.9)], Lossless()), ids=str
)
@pytest.mark.parametrize("tree", [TREES["chain"], TREES["uneven"]], ids=["chain", "uneven"])
def test_lossless_follows_one_draw_a_node(tree: Tree, scheme: Lossless):
    """The draw at a node is that of its position; a child that equals it is accepted."""
    tokens, logits = random_step(tree, 300, seed=4, spread=1.5, hit=3.0)
    where = Context(context(300).keys, jnp.arange(300) % 7)
    last, root = run(scheme, tree, tokens, logits, where)
    target = warp(jnp.asarray(logits), scheme.temperature, scheme.top_k, scheme.top_p)
    draws = np.stack(
        [
            np.asarray(draw(where.keys, where.position + int(depth) + 1, target[:, slot]))
            for slot, depth in enumerate(tree.depths)
        ],
        axis=1,
    )
    for row in range(300):
        _, slots = max(longest_runs(tree, tokens[row] == draws[row, tree.parents]))
        assert last[row] == slots[-1]
        assert root[row] == draws[row, slots[-1]]
    if tree.depth > 1:
        assert tree.depths[last].max() > 1


# --- all schemes


@pytest.mark.parametrize(
    "scheme",
    slow_except(
        [Greedy(), Typical(), Typical(sample_root=True), Lossless(), Lossless(0.8, 10, 0.9)],
        Greedy(),
        Typical(),
    ),
    ids=["greedy", "typical", "typical, sampled root", "lossless", "lossless, cut"],
)
def test_rows_are_independent(scheme):
    tree, rows = TREES["uneven"], 24
    tokens, logits = random_step(tree, rows, seed=6, spread=1.5, hit=1.5)
    where = Context(context(rows).keys, jnp.arange(rows) * 3)
    accept = jax.jit(lambda *inputs: scheme.accept(tables(tree), *inputs))
    whole = accept(jnp.asarray(tokens), jnp.asarray(logits), where)
    assert len(set(whole.last.tolist())) > 1
    for row in range(rows):
        at = slice(row, row + 1)
        alone: Accepted = accept(
            jnp.asarray(tokens[at]),
            jnp.asarray(logits[at]),
            Context(where.keys[at], where.position[at]),
        )
        assert alone.last.item() == whole.last[row]
        assert alone.root.item() == whole.root[row]


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: Lossless(temperature=0), "temperature"),
        (lambda: Lossless(temperature=-1.0), "temperature"),
        (lambda: Lossless(temperature=float("nan")), "temperature"),
        (lambda: Typical(temperature=0), "temperature"),
        (lambda: Lossless(top_k=-1), "top_k"),
        (lambda: Lossless(top_p=0), "top_p"),
        (lambda: Lossless(top_p=-0.1), "top_p"),
        (lambda: Lossless(top_p=1.5), "top_p"),
        (lambda: Typical(epsilon=-0.1), "epsilon"),
        (lambda: Typical(alpha=-0.1), "alpha"),
    ],
)
def test_settings_out_of_range(make, named):
    with pytest.raises(InputError, match=named):
        make()


def test_schemes_are_hashable_and_named():
    for scheme in SCHEMES.values():
        assert hash(scheme()) == hash(scheme())
        assert scheme() == scheme()
    assert (SCHEMES["greedy"], SCHEMES["typical"], SCHEMES["lossless"]) == (
        Greedy,
        Typical,
        Lossless,
    )
