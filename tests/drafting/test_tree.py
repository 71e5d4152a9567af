"""Trees: the buffers, the published trees against their recording, and errors people can act on."""

import json
import pathlib
import re

import numpy as np
import pytest
from helpers.trees import leaf_paths, tables

from medusa_jax.drafting.tree import Tree, published_names
from medusa_jax.drafting.tree_tables import PAD
from medusa_jax.errors import InputError

EXAMPLE = Tree(((0,), (0, 0), (1,)))  # the one in the docstring of `Tree`


def test_docstring_example():
    assert EXAMPLE.slots == ((), (0,), (1,), (0, 0))
    assert (EXAMPLE.size, EXAMPLE.depth, EXAMPLE.path_cells, EXAMPLE.top_k) == (4, 2, 3, 2)
    np.testing.assert_array_equal(EXAMPLE.depths, [0, 1, 1, 2])
    np.testing.assert_array_equal(EXAMPLE.parents, [-1, 0, 0, 1])
    np.testing.assert_array_equal(EXAMPLE.ranks, [0, 0, 1, 0])
    np.testing.assert_array_equal(
        EXAMPLE.mask, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    )
    np.testing.assert_array_equal(
        EXAMPLE.ancestors, [[0, PAD, PAD], [0, 1, PAD], [0, 2, PAD], [0, 1, 3]]
    )
    np.testing.assert_array_equal(EXAMPLE.candidate_indices(10), [0, 1, 2, 11])
    np.testing.assert_array_equal(leaf_paths(EXAMPLE), [[0, 1, 3], [0, 2, PAD]])


def test_the_first_slots_of_the_example():
    first = tables(EXAMPLE).first(3)
    assert first.parents.tolist() == [[-1, 0, 0]] and first.depths.tolist() == [[0, 1, 1]]
    assert first.mask.astype(int).tolist() == [[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]
    assert first.ancestors.tolist() == [[[0, PAD, PAD], [0, 1, PAD], [0, 2, PAD]]]


def test_root_alone():
    tree = Tree()
    assert (tree.size, tree.depth, tree.path_cells, tree.top_k) == (1, 0, 1, 0)
    np.testing.assert_array_equal(tree.parents, [PAD])
    np.testing.assert_array_equal(tree.ancestors, [[0]])
    np.testing.assert_array_equal(tree.mask, [[True]])
    np.testing.assert_array_equal(tree.candidate_indices(0), [0])
    np.testing.assert_array_equal(leaf_paths(tree), [[0]])


def check_recorded(tree: Tree, recorded: dict) -> None:
    np.testing.assert_array_equal(tree.candidate_indices(10), recorded["tree_indices"])
    np.testing.assert_array_equal(tree.depths, recorded["position_ids"])
    np.testing.assert_array_equal(leaf_paths(tree), recorded["retrieve_indices"])
    assert tree.mask.sum() == recorded["mask_ones"]


@pytest.mark.parametrize("name", published_names())
def test_published_trees_match_the_recording(shared: pathlib.Path, name: str):
    choices = json.loads((shared / "golden/medusa_choices.json").read_text())["trees"]
    buffers = json.loads((shared / "golden/medusa_buffers.json").read_text())
    assert sorted(choices) == sorted(buffers) == sorted(published_names())
    assert Tree.published(name) == Tree.from_lists(choices[name])
    assert Tree.published(name).size == 64
    check_recorded(Tree.published(name), buffers[name])


def test_demo_tree_matches_the_recording(shared: pathlib.Path):
    golden = json.loads((shared / "golden/medusa_choices.json").read_text())
    check_recorded(Tree.from_lists(golden["demo_tree"]), golden["demo_tree_buffers"])


@pytest.mark.parametrize("name", published_names())
def test_every_cut_is_a_valid_tree(name: str):
    tree = Tree.published(name)
    for size in range(1, tree.size + 1):
        cut = tree.cut(size)
        assert cut.size == size
        assert cut.nodes == tree.nodes[: size - 1]
    assert tree.cut(tree.size) == tree
    assert tree.cut(1000) == tree


@pytest.mark.parametrize("name", published_names())
def test_tables_agree_with_prefixes_of_the_nodes(name: str):
    """Mask, ancestors and parents say the same as comparing rank tuples."""
    tree = Tree.published(name)
    slots = tree.slots
    sees = [[row[: len(column)] == column for column in slots] for row in slots]
    np.testing.assert_array_equal(tree.mask, sees)
    for slot, node in enumerate(slots):
        path = [slots.index(node[:length]) for length in range(len(node) + 1)]
        assert tree.ancestors[slot].tolist() == path + [PAD] * (tree.depth - len(node))
        assert tree.parents[slot] == (path[-2] if node else PAD)
        assert tree.ranks[slot] == (node[-1] if node else 0)


def test_slots_do_not_depend_on_the_order_of_the_nodes():
    tree = Tree.published("mc_sim_7b_63")
    assert Tree(tree.nodes[::-1]).slots == tree.slots


def test_limit_depth():
    assert EXAMPLE.limit_depth(0) == Tree()
    assert EXAMPLE.limit_depth(1) == Tree(((0,), (1,)))
    assert EXAMPLE.limit_depth(2) == EXAMPLE.limit_depth(9) == EXAMPLE


def test_chain():
    assert Tree.chain(0) == Tree()
    assert Tree.chain(3) == Tree(((0,), (0, 0), (0, 0, 0)))
    np.testing.assert_array_equal(Tree.chain(2).parents, [PAD, 0, 1])


def test_equal_trees_are_one_key():
    same = Tree.from_lists([[0], [0, 0], [1]])
    _ = EXAMPLE.mask  # a cached table is no part of a tree's identity
    assert same == EXAMPLE
    assert hash(same) == hash(EXAMPLE)
    assert {EXAMPLE: "one"}[same] == "one"
    assert Tree.chain(2) != EXAMPLE


@pytest.mark.parametrize(
    "nodes, named",
    [
        ([[0], [1, 2]], ["[1, 2]", "[1]"]),
        ([[0], [0, 0, 3]], ["[0, 0, 3]", "[0, 0]"]),
        ([[0], []], ["[]"]),
        ([[0], [-1]], ["[-1]"]),
        ([[0], [0, -2]], ["[0, -2]"]),
        ([[0], [1.5]], ["[1.5]"]),
        ([[0], ["a"]], ["['a']"]),
        ([[0], [1], [0]], ["[0]", "twice"]),
        ([0, 1], ["list of rank lists"]),
        (7, ["list of rank lists"]),
    ],
)
def test_broken_trees_are_named(nodes: list, named: list[str]):
    with pytest.raises(InputError) as error:
        Tree.from_lists(nodes)
    for text in named:
        assert text in str(error.value)


def test_cut_of_an_unordered_tree_is_an_error():
    with pytest.raises(InputError, match=re.escape("[0, 0] has no parent: [0]")):
        Tree(((1,), (0, 0), (0,))).cut(3)


def test_check_names_the_node_that_does_not_fit():
    tree = Tree(((0,), (0, 0), (4,)))
    tree.check(num_heads=2, vocab_size=5)
    with pytest.raises(InputError, match=re.escape("[0, 0] is 2 deep, but there are 1")):
        tree.check(num_heads=1, vocab_size=5)
    with pytest.raises(InputError, match=re.escape("[4] asks for rank 4 of a vocabulary of 4")):
        tree.check(num_heads=2, vocab_size=4)


def test_unknown_published_tree_lists_the_known():
    with pytest.raises(InputError) as error:
        Tree.published("mc_sim_8b")
    assert "mc_sim_8b" in str(error.value)
    assert all(name in str(error.value) for name in published_names())


def test_json_file(tmp_path: pathlib.Path):
    path = tmp_path / "tree.json"
    path.write_text("[[0], [0, 0], [1]]")
    assert Tree.from_json(path) == Tree.from_json(str(path)) == EXAMPLE


@pytest.mark.parametrize(
    "content",
    [
        b"[[0], [1]",  # malformed
        b"",
        b"\xff\xfe",  # no text
        b"7",
        b"[0, 1]",
        b'["ab"]',
        b'{"tree": [[0]]}',
        b"[[1, 0]]",  # a tree without the parent
        b"[[0], [[1]]]",
    ],
)
def test_broken_json_file_is_named(tmp_path: pathlib.Path, content: bytes):
    path = tmp_path / "broken-tree.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="broken-tree"):
        Tree.from_json(path)


def test_missing_json_file_is_named(tmp_path: pathlib.Path):
    with pytest.raises(InputError, match="nowhere"):
        Tree.from_json(tmp_path / "nowhere.json")


@pytest.mark.parametrize("size", [0, -1])
def test_cut_needs_a_size(size: int):
    with pytest.raises(InputError, match=f"at least one token, the root; got size {size}"):
        Tree.chain(3).cut(size)


@pytest.mark.slow
def test_trees_are_bounded_before_their_tables(tmp_path: pathlib.Path):
    """The mask of 100,000 nodes would take 10 GB."""
    nodes = [[i] for i in range(400)] + [[i, j] for i in range(400) for j in range(250)]
    file = tmp_path / "large.json"
    file.write_text(json.dumps(nodes))
    with pytest.raises(InputError, match=r"large\.json: a tree of 100,401 tokens is too large"):
        Tree.from_json(file)
    assert Tree.from_lists(nodes[:400]).size == 401
    assert Tree.from_lists([[i] for i in range(4095)]).mask.sum() == 2 * 4095 + 1


@pytest.mark.parametrize("rank", [10**30, 2**31, float("nan"), 0.5, "0", None])
def test_ranks_that_are_none(rank):
    with pytest.raises(InputError, match=r"tree node \[.*ranks counted from 0"):
        Tree.from_lists([[rank]])


@pytest.mark.parametrize("lists", [{}, "", [[True]]])
def test_what_is_no_list_of_ranks_is_refused(lists):
    with pytest.raises(InputError, match="list"):
        Tree.from_lists(lists)
