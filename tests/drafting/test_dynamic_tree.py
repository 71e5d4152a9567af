"""Trees grown from probabilities: what they hold, and that decoding with them changes no text."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.models import TinyModel
from jaxtyping import Array

from medusa_jax.decoding.acceptance import Acceptance, Greedy, Lossless, Typical
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.state import outputs
from medusa_jax.drafting.dynamic_tree import DynamicTree, grow
from medusa_jax.drafting.medusa_drafter import MedusaDrafter
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.drafting.tree_tables import PAD, TreeTables
from medusa_jax.errors import InputError

PROMPTS = [[1, 5, 9], [3], [7, 2, 11, 30, 4]]


def paths(made: tuple[Array, TreeTables], row: int, ranks: int) -> list[tuple[int, ...]]:
    """The rank list of every slot of one row."""
    found: list[tuple[int, ...]] = []
    cells, tables = made
    for cell, parent in zip(cells[row].tolist(), tables.parents[row].tolist(), strict=True):
        found.append(() if parent == PAD else (*found[parent], (cell - 1) % ranks))
    return found


def random_scores(batch: int, heads: int, ranks: int) -> Array:
    logits = 3 * jax.random.normal(jax.random.key(0), (batch, heads, 3 * ranks))
    return jax.lax.top_k(jax.nn.log_softmax(logits), ranks)[0]


def alone(scores: Array) -> Array:
    """Scores [B, M, R] of guesses that do not depend on the one before them [B, M, R, R]."""
    return jnp.broadcast_to(scores[:, :, None, :], (*scores.shape, scores.shape[-1]))


@pytest.mark.slow
def test_worked_example():
    cells, tables = grow(alone(jnp.log(jnp.array([[[0.6, 0.3], [0.9, 0.1]]]))), 4)
    np.testing.assert_array_equal(tables.parents, [[-1, 0, 1, 0]])
    np.testing.assert_array_equal(tables.depths, [[0, 1, 2, 1]])
    np.testing.assert_array_equal(cells, [[0, 1, 3, 2]])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 7, 24])
def test_the_likeliest_paths_of_all_are_taken(size: int):
    """Where a guess is likelier after one guess than after another."""
    scores = alone(random_scores(4, 3, 4)) - jax.random.uniform(jax.random.key(1), (4, 3, 4, 4))
    made = grow(scores, size)
    for row, heads in enumerate(np.asarray(scores)):
        every = {
            path: sum(heads[k, (0, *path)[k], rank] for k, rank in enumerate(path))
            for depth in (1, 2, 3)
            for path in itertools.product(range(4), repeat=depth)
        }
        best = sorted(every, key=lambda path: (-every[path], len(path)))[: size - 1]
        assert set(paths(made, row, 4)) == {(), *best}


@pytest.mark.slow
def test_tables_are_those_of_the_same_static_tree():
    made = grow(alone(random_scores(3, 3, 4)), 12)
    tables = made[1]
    for row in range(3):
        nodes = paths(made, row, 4)
        tree = Tree(tuple(nodes[1:]))
        slots = [tree.slots.index(node) for node in nodes]
        np.testing.assert_array_equal(tables.depths[row], tree.depths[slots])
        np.testing.assert_array_equal(tables.mask[row], tree.mask[slots][:, slots])
        for slot, node in enumerate(nodes):
            line = [cell for cell in tables.ancestors[row, slot].tolist() if cell != PAD]
            assert [nodes[cell] for cell in line] == [node[:d] for d in range(len(node) + 1)]


def test_certain_guesses_keep_parents_first():
    """Probability 1 makes a child as likely as its parent: it must still come after it."""
    _, tables = grow(alone(jnp.log(jnp.array([[[1.0, 1e-9]] * 3]))), 4)
    np.testing.assert_array_equal(tables.parents, [[-1, 0, 1, 2]])


@pytest.mark.slow
def test_ranks_beyond_the_tree_change_nothing():
    """A tree of N tokens has no place for a guess of rank N - 1: `dynamic_tree` leaves it out."""
    scores = random_scores(4, 3, 10)
    wide, narrow = grow(alone(scores), 5), grow(alone(scores[:, :, :4]), 5)
    for row in range(4):
        assert paths(wide, row, 10) == paths(narrow, row, 4)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [Greedy(), Lossless(0.8)], ids=["greedy", "lossless"])
def test_text_is_that_of_plain_decoding(tiny: TinyModel, scheme: Acceptance):
    """The lossless scheme draws by position, so it too writes the very same text."""

    def decode(tree: Tree | DynamicTree) -> list:
        drafter = drafter_of_heads(tiny.heads, tree)
        decoder = Decoder(tiny.config, drafter, scheme, capacity=64)
        state = decoder.prefill(tiny.params, PROMPTS, max_new_tokens=40)
        return outputs(decoder.generate(tiny.params, state))

    plain, grown = decode(Tree()), decode(DynamicTree(9, 3, 5))
    assert [one.token_ids for one in grown] == [one.token_ids for one in plain]
    assert max(one.mean_accepted_length for one in grown) > 1


@pytest.mark.slow
def test_every_path_grown_accepts_as_the_full_tree(tiny: TinyModel):
    """With room for all paths, growing only renumbers them; typical acceptance must not care."""
    nodes = [path for depth in (1, 2) for path in itertools.product(range(3), repeat=depth)]

    def decode(tree: Tree | DynamicTree) -> list:
        decoder = Decoder(tiny.config, MedusaDrafter(tiny.heads, tree), Typical(1.5), capacity=64)
        state = decoder.prefill(tiny.params, PROMPTS, max_new_tokens=40)
        return outputs(decoder.generate(tiny.params, state))

    static, grown = decode(Tree(tuple(nodes))), decode(DynamicTree(13, 2, 3))
    assert [one.token_ids for one in grown] == [one.token_ids for one in static]
    assert [one.tokens_per_step for one in grown] == [one.tokens_per_step for one in static]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (DynamicTree(1, 1), "2 tokens or more, got size 1"),
        (DynamicTree(6, 0), "1 deep or more, got depth 0"),
        (DynamicTree(8, 4), "4 deep was asked for, but there are 3 Medusa heads"),
        (DynamicTree(8, 2, 99), "top_k 99 exceeds the vocabulary of 40"),
        (DynamicTree(1_000_000, 3), "1,000,000 tokens is too large: at most 4,096"),
        (DynamicTree(10**20, 3), "too large: at most 4,096"),
        (DynamicTree(9, 2, 2), "there are 7 nodes at most, and 9 were asked for"),
    ],
)
def test_bad_recipes_are_refused(tiny: TinyModel, tree: DynamicTree, message: str):
    with pytest.raises(InputError, match=message):
        Decoder(tiny.config, MedusaDrafter(tiny.heads, tree))


@pytest.mark.slow
def test_scores_are_log_probabilities(tiny: TinyModel):
    decoder = Decoder(tiny.config, MedusaDrafter(tiny.heads, DynamicTree(9, 3, 40)), capacity=64)
    state = decoder.prefill(tiny.params, PROMPTS, max_new_tokens=4)
    assert state.draft.scores.shape == (3, 3, 40)
    np.testing.assert_allclose(jnp.exp(state.draft.scores).sum(-1), 1.0, atol=1e-5)
    assert math.isclose(float(state.draft.scores[0, 0].max()), float(state.draft.scores[0, 0, 0]))
