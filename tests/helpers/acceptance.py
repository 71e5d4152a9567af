"""Trees, tokens and logits on which tests accept, and runs of them by brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.trees import leaf_paths, tables
from medusa_jax.decoding.acceptance import Context
from medusa_jax.drafting.tree import Tree
from medusa_jax.drafting.tree_tables import PAD

VOCAB = 16
TREES = {
    "root alone": Tree(),
    "chain": Tree.chain(4),
    "two levels": Tree.from_lists([[0], [1], [2], [3], [0, 0], [0, 1], [1, 0], [3, 0], [3, 1]]),
    "uneven": Tree.from_lists([[0], [1], [2], [1, 0], [1, 0, 0], [1, 0, 1], [1, 0, 1, 0]]),
    "published": Tree.published("mc_sim_7b_63"),
}
CROSS = Tree(((0,), (1,), (0, 0), (0, 1), (1, 0)))  # slots: 1, 2 | 3, 4 under 1 | 5 under 2
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


def longest_runs(tree: Tree, passes: np.ndarray) -> list[tuple[int, list[int]]]:
    """(length, accepted slots) of each leaf path of one row, `passes` [N] a node's own test."""
    runs = []
    for path in leaf_paths(tree):
        path = path[path != PAD]
        length = int(np.cumprod(passes[path[1:]]).sum())
        runs.append((length, path[: length + 1].tolist()))
    return runs
