"""The best static tree for a table of ranks (`head_ranks.py`).

    grow       builds the best tree: node after node by the probability that its whole path is right
    replay     replays decoding, exactly, without running the model

A path's probability is counted where the table has seen its beginning often, and
falls back on the head's own accuracy where not (the original multiplies
accuracies throughout, and divides those of later heads by too many positions).
"""

import heapq
from collections.abc import Sequence

import numpy as np

from medusa_jax.drafting.tree import Node, Tree
from medusa_jax.tuning.head_ranks import UNKNOWN, Ranks

_PRIOR = 8.0  # how many observations the independent estimate of a path weighs


def grow(table: Ranks, size: int, top_k: int) -> tuple[list[Node], list[float]]:
    """The best nodes of a tree of `size` tokens, in order, and how likely each is all right.

    Nodes are taken by the probability of their path. It falls along a path, so
    every beginning of the result is the best tree of its own size.
    """
    known = np.maximum((table != UNKNOWN).sum(axis=0), 1)
    alone = np.stack([(table == rank).sum(axis=0) / known for rank in range(top_k)], axis=1)
    nodes: list[Node] = []
    values: list[float] = []
    frontier: list[tuple[float, Node]] = []
    seen: dict[Node, np.ndarray] = {(): np.arange(len(table))}  # where a node's path is right

    def expand(node: Node, value: float) -> None:
        depth = len(node)
        if depth == table.shape[1]:
            return
        here = seen[node]
        here = here[table[here, depth] != UNKNOWN]
        counts = np.bincount(table[here, depth], minlength=top_k)[:top_k]
        shares = (counts + _PRIOR * alone[depth]) / (len(here) + _PRIOR)
        for rank in range(top_k):
            heapq.heappush(frontier, (-value * float(shares[rank]), (*node, rank)))

    expand((), 1.0)
    while frontier and len(nodes) < size - 1:
        value, node = heapq.heappop(frontier)
        if value == 0:
            break
        nodes.append(node)
        values.append(-value)
        here = seen[node[:-1]]
        seen[node] = here[table[here, len(node) - 1] == node[-1]]
        expand(node, -value)
    return nodes, values


def step_lengths(ranks: Ranks, tree: Tree) -> np.ndarray:
    """Tokens that a step at each position would accept with a tree [P].

    Example: tree ((0), (0, 0), (1)). At ranks (0, 5) it accepts the root and (0): 2 tokens.
    """
    lengths = np.ones(len(ranks), np.int64)
    for node in tree.nodes:
        right = (ranks[:, : len(node)] == node).all(axis=1)
        lengths[right] = np.maximum(lengths[right], len(node) + 1)
    return lengths


def replay(texts: Sequence[np.ndarray], most: int) -> tuple[int, np.ndarray, np.ndarray]:
    """What decoding these very texts would do, step after step.

    Args:
      texts: of each, what a step at each position accepts [P].
      most: the most that a step can accept.

    Returns:
      tokens made; the positions, in the joined texts, at which steps began; how
      many steps made 1, 2, ... tokens. The steps in which a text ends are left
      out, since what they would have accepted beyond it is not known.

    Example: one text with lengths (2, 1, 1, 3), most 3: steps at 0 and 2 make 2 and 1
    tokens -> 3, (0, 2), (1, 1, 0). The step at 3 is left out.
    """
    made, offset = 0, 0
    starts: list[int] = []
    counts = [0] * (most + 1)
    for each in texts:
        position, lengths = 0, each.tolist()
        while position < len(lengths):
            length = lengths[position]
            if position + length < len(lengths):
                starts.append(offset + position)
                counts[length] += 1
                made += length
            position += length
        offset += len(lengths)
    return made, np.array(starts, np.int64), np.array(counts[1:], np.int64)


def simulate(texts: Sequence[Ranks], tree: Tree) -> tuple[int, np.ndarray, np.ndarray]:
    """`replay` of these texts with a static tree."""
    return replay([step_lengths(ranks, tree) for ranks in texts], tree.path_cells)


def mean_accepted_length(texts: Sequence[Ranks], tree: Tree) -> float:
    """Tokens a step of decoding these texts with a tree."""
    made, starts, _ = simulate(texts, tree)
    return made / max(len(starts), 1)


def best_tree(
    texts: Sequence[Ranks], size: int, top_k: int, depth: int | None = None, rounds: int = 3
) -> Tree:
    """The best tree of `size` tokens for the positions at which steps do begin.

    It is at most `depth` deep, by default as deep as there are heads.

    Steps begin where the last one failed, where guessing is harder than
    elsewhere; and where they begin depends on the tree. So: grow it from all
    positions, see where its steps begin, grow it again from those, and keep
    what replays best.
    """
    texts = [ranks[:, :depth] for ranks in texts]
    table = np.concatenate(texts)
    best, most = Tree(), 0.0
    visited = np.arange(len(table))
    for _ in range(rounds):
        tree = Tree(tuple(grow(table[visited], size, top_k)[0]))
        made, visited, _ = simulate(texts, tree)
        if (length := made / max(len(visited), 1)) > most:
            best, most = tree, length
        if not len(visited):
            break
    return best
