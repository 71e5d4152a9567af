"""Acceptance on hand-made logits, and against path-by-path references of the original's rules.

The references are NumPy over `leaf_paths`, one leaf path after another, as
the original does it; the library walks nodes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiers import slow_except
from helpers.trees import leaf_paths, tables

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
from medusa_jax.drafting.tree_tables import PAD
from medusa_jax.errors import InputError

VOCAB = 16
TREES = {
    "root alone": Tree(),
    "chain": Tree.chain(4),
    "two levels": Tree.from_lists([[0], [1], [2], [3], [0, 0], [0, 1], [1, 0], [3, 0], [3, 1]]),
    "uneven": Tree.from_lists([[0], [1], [2], [1, 0], [1, 0, 0], [1, 0, 1], [1, 0, 1, 0]]),
    "published": Tree.published("mc_sim_7b_63"),
}
all_trees = pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())


def context(rows: int) -> Context:
    return Context(jax.random.split(jax.random.key(0), rows), jnp.zeros(rows, jnp.int32))


def peaks(*tokens: int) -> np.ndarray:
    """Logits [1, N, V] with nearly all probability on one token a node."""
    logits = np.zeros((1, len(tokens), VOCAB), np.float32)
    logits[0, np.arange(len(tokens)), tokens] = 50.0
    return logits


def decide(scheme, tree: Tree, tokens, logits) -> tuple[int, int]:
    """(last, root) of one row."""
    tokens = jnp.asarray([tokens], jnp.int32)
    accepted = scheme.accept(tables(tree), tokens, jnp.asarray(logits), context(1))
    return accepted.last.item(), accepted.root.item()


def random_step(
    tree: Tree, rows: int, seed: int, spread: float, hit: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, N] as heads guess them (siblings differ), and logits, `hit` higher for them."""
    rng = np.random.default_rng(seed)
    heads = rng.permuted(np.tile(np.arange(VOCAB), (rows, tree.depth, 1)), axis=2)
    guesses = heads[:, :, : tree.top_k].reshape(rows, -1)
    candidates = np.concatenate((rng.integers(VOCAB, size=(rows, 1)), guesses), axis=1)
    tokens = candidates[:, tree.candidate_indices(tree.top_k)].astype(np.int32)
    logits = rng.normal(0, spread, (rows, tree.size, VOCAB)).astype(np.float32)
    for slot in range(1, tree.size):
        logits[np.arange(rows), tree.parents[slot], tokens[:, slot]] += hit
    return tokens, logits


def run(scheme, tree: Tree, tokens, logits, where: Context) -> tuple[np.ndarray, np.ndarray]:
    accept = jax.jit(lambda *inputs: scheme.accept(tables(tree), *inputs))
    accepted = accept(jnp.asarray(tokens), jnp.asarray(logits), where)
    return np.asarray(accepted.last), np.asarray(accepted.root)


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


CROSS = Tree(((0,), (1,), (0, 0), (0, 1), (1, 0)))  # slots: 1, 2 | 3, 4 under 1 | 5 under 2


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


def longest_runs(tree: Tree, passes: np.ndarray) -> list[tuple[int, list[int]]]:
    """(length, accepted slots) of each leaf path of one row, `passes` [N] a node's own test."""
    runs = []
    for path in leaf_paths(tree):
        path = path[path != PAD]
        length = int(np.cumprod(passes[path[1:]]).sum())
        runs.append((length, path[: length + 1].tolist()))
    return runs


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


# --- typical, by hand


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
