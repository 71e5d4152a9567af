"""Which tree tuning takes: the one that a fake clock finds fastest."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.tree import Tree
from medusa_jax.tuning import candidates, timing
from medusa_jax.tuning.calibration import Calibration, Text


@dataclasses.dataclass(frozen=True)
class Machine:
    """Times of one device for one model: seconds of a prefill and of a step of each tree."""

    prefill: float
    steps: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Trees:
    """How many tokens each tree's steps accept, over and over: (1, 3) makes 2 on average."""

    accepted: dict[str, tuple[int, ...]]


def seconds_to_write(machine: Machine, trees: Trees, tree: str, tokens: int) -> float:
    """The time until one text is there, step after step."""
    clock, made = machine.prefill, 0
    for length in itertools.cycle(trees.accepted[tree]):
        if made >= tokens:
            return clock
        clock += machine.steps[tree]
        made += length
    raise AssertionError


def predicted(machine: Machine, trees: Trees, tokens: int, batch_size: int = 1) -> list[dict]:
    """Rows as tuning has them after its timing; the "1" is plain decoding."""
    rows = {
        tree: {
            "tree": tree,
            "step_over_plain": step / machine.steps["1"],
            "step_over_plain_spread": [0.9 * step / machine.steps["1"], step / machine.steps["1"]],
            "plain_seconds": machine.steps["1"],
            "prefill_seconds": machine.prefill,
            "mean_accepted_length": sum(trees.accepted[tree]) / len(trees.accepted[tree]),
        }
        for tree, step in machine.steps.items()
    }
    timing.predict(rows, batch_size, tokens)
    return list(rows.values())


TREES = Trees({"1": (1,), "4": (2, 2, 3, 1), "16": (3, 2, 4, 3), "64": (4, 3, 5, 4)})
# As measured: on a CPU the step grows with the tree, on an accelerator hardly, and with large
# batches the accelerator is like a CPU.
CPU = Machine(0.05, {"1": 0.015, "4": 0.0216, "16": 0.031, "64": 0.080})
ACCELERATOR = Machine(0.02, {"1": 0.010, "4": 0.0101, "16": 0.0105, "64": 0.0118})
COMPUTE_BOUND = Machine(0.05, {"1": 0.015, "4": 0.045, "16": 0.120, "64": 0.400})


@pytest.mark.parametrize(
    ("machine", "fastest"), [(CPU, "16"), (ACCELERATOR, "64"), (COMPUTE_BOUND, "1")]
)
def test_the_tree_that_writes_a_text_first_is_taken(machine: Machine, fastest: str):
    times = {tree: seconds_to_write(machine, TREES, tree, 240) for tree in machine.steps}
    assert min(times, key=lambda tree: times[tree]) == fastest
    assert timing.choose(predicted(machine, TREES, 240))["tree"] == fastest


@pytest.mark.parametrize("machine", [CPU, ACCELERATOR, COMPUTE_BOUND])
def test_speeds_are_those_of_the_clock(machine: Machine):
    """240 tokens are whole cycles of every tree, so no step is cut."""
    for row in predicted(machine, TREES, 240, batch_size=4):
        seconds = seconds_to_write(machine, TREES, row["tree"], 240)
        assert row["tokens_per_second"] == pytest.approx(4 * 240 / seconds)


def test_a_machine_that_is_slower_today_takes_the_same_tree():
    """All trees were timed against plain steps, so only the speeds change."""
    slower = dataclasses.replace(
        CPU, prefill=3 * CPU.prefill, steps={tree: 3 * step for tree, step in CPU.steps.items()}
    )
    usual, slow = predicted(CPU, TREES, 240), predicted(slower, TREES, 240)
    assert timing.choose(slow)["tree"] == timing.choose(usual)["tree"] == "16"
    for one, other in zip(usual, slow, strict=True):
        assert one["tokens_per_second"] == pytest.approx(3 * other["tokens_per_second"])


def test_later_rounds_replace_the_speed_of_the_machine():
    """Rows timed when the machine was slow are compared at the speed of the last plain steps."""
    rows = {row["tree"]: row for row in predicted(CPU, TREES, 240)}
    before = {tree: row["tokens_per_second"] for tree, row in rows.items()}
    rows["1"] |= {"plain_seconds": 0.030, "prefill_seconds": 0.10}  # twice as slow as before
    timing.predict(rows, 1, 240)
    for tree, row in rows.items():
        assert row["tokens_per_second"] == pytest.approx(before[tree] / 2)
    assert rows["4"]["step_seconds"] == pytest.approx(0.0432)


def row(tree: str, speed: float, accepted: float = 1.0) -> dict[str, Any]:
    return {"tree": tree, "tokens_per_second": speed, "mean_accepted_length": accepted}


def test_rows_within_a_share_of_the_fastest():
    """Of 200 tokens/s five percent are 10: 190 is near, 189.9 is not."""
    rows = [row("1", 100), row("4", 190), row("8", 200), row("16", 189.9)]
    assert timing.near(rows, 0.05) == [rows[1], rows[2]]
    assert timing.near(rows, 0) == [rows[2]]
    assert timing.near([], 0.05) == []


def test_plain_decoding_wins_a_tie_with_trees_that_are_slower():
    """Within the noise of timing a tree may accept more, but none slower than plain is taken."""
    assert timing.choose([row("1", 200), row("4", 199, 1.5), row("8", 198, 2)])["tree"] == "1"
    assert timing.choose([row("1", 200), row("4", 200, 1.5), row("8", 198, 2)])["tree"] == "4"
    assert timing.choose([row("1", 200)])["tree"] == "1"


def test_the_order_of_rows_does_not_matter():
    rows = [row("1", 100), row("4", 200, 2.4), row("8", 197, 2.9), row("16", 190, 3.3)]
    for some in itertools.permutations(rows):
        assert timing.choose(list(some))["tree"] == "8"


def test_a_median_lies_within_its_own_extremes_on_a_machine_that_drifts():
    """Rounds at a third and at half of the speed slow all trees alike, and so change nothing."""
    assert timing.over_plain({"1": [1.0, 2.0], "4": [2.0, 4.0]}) == {
        "1": pytest.approx([1.0, 1.0, 1.0]),
        "4": pytest.approx([2.0, 2.0, 2.0]),
    }
    found = timing.over_plain({"1": [1.0, 3.1, 2.0], "4": [2.2, 6.0, 4.4], "8": [3.0, 9.0, 5.0]})
    assert all(least <= median <= most for median, least, most in found.values())
    rows = predicted(CPU, TREES, 240)
    for row in rows:
        low, high = row["step_seconds_spread"]
        assert low <= row["step_seconds"] <= high


def tree_row(name: str, nodes: int, accepted: float, over: float | None = None) -> dict[str, Any]:
    """A row that was timed where there is `over`, its step over a plain step."""
    shape: Any = {} if name.startswith("grow") else []
    found = {"tree": name, "nodes": nodes, "shape": shape, "mean_accepted_length": accepted}
    return found | ({} if over is None else {"step_over_plain": over})


def test_a_size_that_cannot_win_is_not_timed():
    """12 tokens would accept 2 in at least 2 plain steps, where 2 tokens accept 1.5 in 1.1."""
    timed = [tree_row("1", 1, 1, 1), tree_row("2", 2, 1.5, 1.1), tree_row("8", 8, 1.9, 2)]
    untimed = [tree_row("12", 12, 2.0), tree_row("5", 5, 1.7), tree_row("3", 3, 1.2)]
    assert [one["tree"] for one in timing.may_win(timed, untimed, 0.05)] == ["5"]
    assert len(timing.may_win(timed, untimed, 1.0)) == 3
    # Static trees say nothing of grown trees, whose step may be no slower than a plain step.
    grown = [tree_row("grow:12", 12, 2.0)]
    assert timing.may_win(timed, grown, 0.05) == grown


def test_some_sizes_of_each_sort_are_timed_first():
    static = {str(size): Tree(tuple((rank,) for rank in range(size - 1))) for size in range(1, 7)}
    grown = {f"grow:{size}": DynamicTree(size, 2) for size in (4, 5, 6, 7)}
    assert list(candidates.first_trees(static | grown)) == ["1", "2", "5", "grow:4", "grow:7"]


def test_acceptance_by_position_and_by_category():
    """Text a makes 2 and 1 tokens, text b 3 and 1; what ends a text is left out."""

    def text(category: str, *ranks: list[int]) -> Text:
        return Text(category, np.array(ranks), np.zeros((len(ranks), 0), np.int32), 0.1)

    texts = [
        text("a", [0, 5], [9, 9], [9, 9], [9, 9]),
        text("b", [0, 0], [9, 9], [9, 9], [9, 9], [9, 9]),
    ]
    found = Calibration(texts, ()).acceptance(Tree(((0,), (0, 0))))
    assert found == {
        "mean_accepted_length": 7 / 4,
        "accepted_share_per_pos": [0.5, 0.25],
        "mean_accepted_length_by_category": {"a": 1.5, "b": 2},
    }
