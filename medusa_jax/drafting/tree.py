"""The tree of guesses: which combinations of the heads' top-k tokens one pass verifies.

A node is written as the ranks that lead to it: `(0, 2)` is head 1's best token
followed by head 2's third best. The root, the token already chosen by the
backbone, is implicit. Everything here is NumPy, built once; inside a compiled
step it is constant. Paper section 2.1.2; buffers as in the original's
`generate_medusa_buffers`.
"""

import dataclasses
import functools
import importlib.resources
import json
from pathlib import Path
from typing import ClassVar

import numpy as np

from medusa_jax import json_files
from medusa_jax.drafting.tree_tables import MOST_TOKENS, PAD, TreeTables
from medusa_jax.errors import InputError
from medusa_jax.json_files import short

Node = tuple[int, ...]
CPU_NODES = 8  # products of up to 8 rows cost a 2-core CPU little more than those of 2


@dataclasses.dataclass(frozen=True)
class Tree:
    """A fixed tree of N = len(nodes) + 1 tokens, root included.

    Slots number the tokens as the backbone sees them: slot 0 is the root, then
    the nodes by depth and, within a depth, in lexicographic order.

    Example, two children of the root and one grandchild:

        Tree(((0,), (0, 0), (1,)))

        slot      0     1     2     3
        node      root  (0,)  (1,)  (0, 0)
        depths    0     1     1     2
        parents   -1    0     0     1
        ranks     0     0     1     0
        mask      1 . . .    ancestors  0 . .
                  1 1 . .               0 1 .
                  1 . 1 .               0 2 .
                  1 1 . 1               0 1 3

    Attributes:
      nodes: rank tuples in the given order, which `cut` relies on.

    Raises:
      InputError: too many nodes, or a node is empty, negative, repeated, or has no parent.
    """

    nodes: tuple[Node, ...] = ()
    scored: ClassVar[bool] = False  # whether `arrange` reads the scores of paths

    def __post_init__(self) -> None:
        _check_nodes(self.nodes)

    @classmethod
    def from_lists(cls, lists: object, origin: str = "") -> "Tree":
        """Builds a tree from JSON-like rank lists, for example `[[0], [1], [0, 0]]`."""
        try:
            if not isinstance(lists, list | tuple):
                raise TypeError
            return cls(tuple(tuple(node) for node in lists))
        except TypeError:
            problem = "a tree is a list of rank lists, for example [[0], [1], [0, 0]]"
        except InputError as error:
            problem = str(error)
        raise InputError(origin + problem)

    @classmethod
    def from_json(cls, path: str | Path) -> "Tree":
        """Reads a file that holds a JSON list of rank lists."""
        return cls.from_lists(json_files.read(Path(path)), f"tree file {path}: ")

    @classmethod
    def published(cls, name: str) -> "Tree":
        """One of the original's nine trees (FasterDecoding/Medusa `medusa_choices.py`)."""
        if name not in _published():
            raise InputError(f"no published tree {name!r}; there are: {', '.join(_published())}")
        return cls.from_lists(_published()[name])

    @classmethod
    def chain(cls, depth: int) -> "Tree":
        """The best guess of each head and nothing else; depth 0 is the root alone."""
        return cls(tuple((0,) * length for length in range(1, depth + 1)))

    def cut(self, size: int) -> "Tree":
        """The first nodes up to `size` tokens, root included.

        Published and tuned trees list their nodes in order of value, so this is
        the best tree of that size. Raises InputError where the order is not
        parents-first, or `size` is no size.
        """
        if size < 1:
            raise InputError(f"a tree has at least one token, the root; got size {size}")
        return Tree(self.nodes[: size - 1])

    def limit_depth(self, depth: int) -> "Tree":
        """Without the nodes deeper than `depth`."""
        return Tree(tuple(node for node in self.nodes if len(node) <= depth))

    def check(self, num_heads: int, vocab_size: int) -> None:
        """Raises InputError, naming the node, if heads or vocabulary are too small for it."""
        _check_fit(self.nodes, num_heads, vocab_size)

    @property
    def size(self) -> int:
        """N, tokens verified in one pass."""
        return len(self.nodes) + 1

    @property
    def depth(self) -> int:
        """Deepest node = heads needed; 0 for the root alone."""
        return max(map(len, self.nodes), default=0)

    @property
    def path_cells(self) -> int:
        """E, tokens of the longest path, root included."""
        return self.depth + 1

    @property
    def top_k(self) -> int:
        """R, ranks needed of each head."""
        return max((max(node) for node in self.nodes), default=-1) + 1

    @functools.cached_property
    def slots(self) -> tuple[Node, ...]:
        """Node of each slot; the root is the empty tuple."""
        return ((), *sorted(self.nodes, key=lambda node: (len(node), node)))

    @functools.cached_property
    def depths(self) -> np.ndarray:
        """Distance from the root [N]; also a token's position past the root's."""
        return np.array([len(node) for node in self.slots], np.int32)

    @functools.cached_property
    def ranks(self) -> np.ndarray:
        """Rank of each node in its head's list [N]; 0 for the root."""
        return np.array([node[-1] if node else 0 for node in self.slots], np.int32)

    @functools.cached_property
    def parents(self) -> np.ndarray:
        """Slot of each node's parent [N]; PAD for the root."""
        slot_of = {node: slot for slot, node in enumerate(self.slots)}
        return np.array([slot_of[node[:-1]] if node else PAD for node in self.slots], np.int32)

    @functools.cached_property
    def ancestors(self) -> np.ndarray:
        """Slots from the root down to each node, itself included, then PAD [N, E]."""
        return _ancestors(self.parents, self.depths)

    @functools.cached_property
    def mask(self) -> np.ndarray:
        """True where a token (row) sees another: itself and its ancestors [N, N]."""
        return (self.ancestors[:, :, None] == np.arange(self.size)).any(axis=1)

    def candidate_indices(self, top_k: int) -> np.ndarray:
        """Where each slot's token stands in [root, head 1's top_k, head 2's top_k, ...] [N].

        The example tree with top_k 10 -> (0, 1, 2, 11).
        """
        indices = 1 + (self.depths - 1) * top_k + self.ranks
        return np.where(self.depths == 0, 0, indices)

    def arrange(self, path_scores: object) -> tuple[np.ndarray, TreeTables]:
        """The cell of each slot's token among the candidates [1, N], and the tables.

        Cells count in [root, head 1's R guesses, head 2's, ...]. A static tree needs no scores.
        """
        inner = tuple(np.unique(self.parents[1:]).tolist())
        arrays = self.parents, self.depths, self.ancestors, self.mask
        tables = TreeTables(*(array[None] for array in arrays), inner=inner)
        return self.candidate_indices(self.top_k)[None], tables


def _ancestors(parents: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """`Tree.ancestors` from parents and depths [N]."""
    table = np.full((len(parents), depths.max() + 1), PAD, np.int32)
    for slot, parent in enumerate(parents):
        table[slot] = table[parent] if slot else PAD
        table[slot, depths[slot]] = slot
    return table


def _check_fit(nodes: tuple[Node, ...], num_heads: int, vocab_size: int) -> None:
    """`Tree.check`."""
    for node in nodes:
        if len(node) > num_heads:
            raise InputError(
                f"tree node {short(list(node))} is {len(node)} deep, but there are "
                f"{num_heads} Medusa heads"
            )
        if max(node) >= vocab_size:
            raise InputError(
                f"tree node {short(list(node))} asks for rank {max(node)} of a vocabulary of "
                f"{vocab_size}"
            )


def _check_nodes(nodes: tuple[Node, ...]) -> None:
    """Raises InputError for too many nodes, and as `Tree` says."""
    if len(nodes) >= MOST_TOKENS:
        raise InputError(
            f"a tree of {len(nodes) + 1:,} tokens is too large: at most {MOST_TOKENS:,}"
        )
    seen = set()
    for node in nodes:
        name = short(list(node))
        if not node or any(type(rank) is not int or not 0 <= rank < 2**31 for rank in node):
            raise InputError(f"tree node {name} is not a non-empty list of ranks counted from 0")
        if node in seen:
            raise InputError(f"tree node {name} is listed twice")
        seen.add(node)
    for node in nodes:
        if len(node) > 1 and node[:-1] not in seen:
            raise InputError(
                f"tree node {short(list(node))} has no parent: {short(list(node[:-1]))} is not "
                "listed (every prefix of a node must be a node too)"
            )


@functools.cache
def _published() -> dict[str, list[list[int]]]:
    source = importlib.resources.files("medusa_jax.drafting") / "published_trees.json"
    return json.loads(source.read_text())


def published_names() -> list[str]:
    """Names that `Tree.published` knows."""
    return list(_published())


def default_tree(num_heads: int, accelerated: bool, name: str = "") -> Tree:
    """A sound tree where no tuned tree exists: the model's published tree, else `mc_sim_7b_63`.

    A GPU or TPU verifies 64 tokens for little more than one. A CPU pays for each token,
    so the tree is cut to CPU_NODES there.
    """
    name = name.lower()
    fitting = (f"vicuna_{size}_stage2" for size in ("7b", "13b", "33b") if size in name)
    published = next(fitting, "mc_sim_7b_63") if "vicuna" in name else "mc_sim_7b_63"
    if "zephyr" in name:
        published = "zephyr_stage2"
    tree = Tree.published(published).limit_depth(num_heads)
    return tree if accelerated else tree.cut(CPU_NODES)
