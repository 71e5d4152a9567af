"""From runs to the rows of a report: runs written by hand, numbers computed by hand.

Two prompts, one about maths and one of qa, decoded twice. The second time the machine was half as
fast. Plain steps take 0.2 s, Medusa's 0.25 s, and 1 s or 0.5 s of both prompts is prefill.
"""

from typing import Any

import pytest

from medusa_jax.bench.measure import Run, Task
from medusa_jax.bench.summary import counters, spread, summarise
from medusa_jax.decoding.stats import Stats
from medusa_jax.drafting.medusa_heads import NO_HEADS
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree

TASKS = [
    Task("greedy", "maths", [[1, 2]], [(0, 0)]),
    Task("greedy", "qa", [[3]], [(1, 0)]),
]
MATHS, QA = list(range(12)), list(range(8))
TREE = Tree.from_lists([[0], [1], [0, 0], [0, 1], [0, 0, 0]])  # six nodes, three deep
DRAFTER = drafter_of_heads(NO_HEADS, TREE)


def run(
    task: int, system: str, slower: int, text: list[int], lengths: list[int], **cost: float
) -> Run:
    """One run; in the repeat of number 1 all times are twice as long."""
    stats = Stats(tokens=len(text), passes=len(lengths), steps=len(lengths), made=sum(lengths))
    stats.bytes = cost["read"]
    stats.seconds = cost["seconds"] * (1 + slower)
    stats.decode_seconds = cost["decode"] * (1 + slower)
    return Run(task, system, slower, [text], lengths, stats)


def runs() -> list[Run]:
    made = []
    for repeat in (0, 1):
        made += [
            run(0, "plain", repeat, MATHS, [1] * 12, seconds=3, decode=2.4, read=1200),
            run(1, "plain", repeat, QA, [1] * 8, seconds=2, decode=1.6, read=1200),
            run(0, "medusa", repeat, MATHS, [3, 3, 3, 3], seconds=1.25, decode=1, read=600),
            # The last step makes four, one more than is kept; another token than plain wrote.
            run(1, "medusa", repeat, [*QA[:7], 9], [1, 3, 1, 4], seconds=1.25, decode=1, read=400),
            # A peer says neither how many passes it took nor what they made.
            run(0, "hf", repeat, MATHS, [], seconds=6, decode=5, read=0),
            run(1, "hf", repeat, QA, [], seconds=4, decode=3, read=0),
        ]
    return made


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], dict[str, Any]]:
    found = summarise(TASKS, runs(), {"greedy": {"medusa": DRAFTER}}, bandwidth=2000.0)
    assert all(row["acceptance"] == "greedy" for row in found)
    return {(row["category"], row["system"]): row for row in found}


def test_rows_stand_as_the_runs_came_and_overall_last(rows):
    assert list(rows) == [
        (category, system)
        for category in ("maths", "qa", "overall")
        for system in ("plain", "medusa", "hf")
    ]


def of(median: float, least: float, most: float) -> Any:
    return pytest.approx({"median": median, "min": least, "max": most})


def test_speed_is_that_of_all_texts_together(rows):
    """20 tokens in 5 s and 10 s, in 2.5 s and 5 s, in 10 s and 20 s."""
    overall = {system: rows["overall", system] for system in ("plain", "medusa", "hf")}
    assert overall["plain"]["tokens_per_second"] == of(3, 2, 4)
    assert overall["medusa"]["tokens_per_second"] == of(6, 4, 8)
    assert overall["hf"]["tokens_per_second"] == of(1.5, 1, 2)
    assert all((row["texts"], row["tokens"]) == (2, 20) for row in overall.values())


def test_speedups_compare_within_a_repeat(rows):
    """The slower repeat slows plain decoding as well, so the speedup stays."""
    assert rows["overall", "medusa"]["speedup"] == of(2, 2, 2)
    assert rows["maths", "medusa"]["speedup"] == of(2.4, 2.4, 2.4)  # 1.25 s for 3 s
    assert rows["qa", "medusa"]["speedup"] == of(1.6, 1.6, 1.6)  # 1.25 s for 2 s
    assert rows["overall", "hf"]["speedup"] == of(0.5, 0.5, 0.5)
    assert rows["overall", "plain"]["speedup"] == of(1, 1, 1)


def test_steps(rows):
    assert rows["overall", "plain"]["step_seconds"] == of(0.3, 0.2, 0.4)
    assert rows["overall", "medusa"]["step_seconds"] == of(0.375, 0.25, 0.5)
    assert rows["overall", "medusa"]["step_overhead"] == of(1.25, 1.25, 1.25)
    # 2400 bytes in 4 s are 600 a second, 30% of 2000; 1000 bytes in 2 s are 25%.
    assert rows["overall", "plain"]["bandwidth_share"] == of(0.225, 0.15, 0.3)
    assert rows["overall", "medusa"]["bandwidth_share"] == of(0.1875, 0.125, 0.25)


def test_time_to_the_first_token_is_a_mean_over_prompts(rows):
    """Of 5 s and 2.5 s, 4 s and 2 s are steps: 0.5 s and 0.25 s a prompt."""
    assert rows["overall", "plain"]["time_to_first_token_seconds"] == of(0.75, 0.5, 1)
    assert rows["overall", "medusa"]["time_to_first_token_seconds"] == of(0.375, 0.25, 0.5)
    assert rows["overall", "hf"]["time_to_first_token_seconds"] == of(1.5, 1, 2)


def test_texts_are_compared_with_those_of_plain_decoding(rows):
    assert rows["maths", "medusa"]["same_texts"] == {"same": 1, "of": 1}
    assert rows["qa", "medusa"]["same_texts"] == {"same": 0, "of": 1}
    assert rows["overall", "medusa"]["same_texts"] == {"same": 1, "of": 2}
    assert rows["overall", "hf"]["same_texts"] == {"same": 2, "of": 2}
    assert "same_texts" not in rows["overall", "plain"]


def test_acceptance_counts_the_first_repeat(rows):
    """Lengths 3, 3, 3, 3 and 1, 3, 1, 4: eight steps that made 21 tokens."""
    row = rows["overall", "medusa"]
    expected = {
        "tree_size": 6,
        "tree_grown": False,
        "num_drafts": 8,
        "num_draft_tokens": 40,
        "num_accepted_tokens": 13,
        "num_accepted_tokens_per_pos": [6, 6, 1],
        "accepted_share_per_pos": [6 / 8, 6 / 8, 1 / 8],
        "accepted_length_histogram": [2, 0, 5, 1],
        "mean_accepted_length": 2.625,
    }
    assert {name: row[name] for name in expected} == expected


def test_plain_decoding_accepts_nothing(rows):
    row = rows["overall", "plain"]
    assert (row["tree_size"], row["num_drafts"], row["mean_accepted_length"]) == (1, 20, 1)
    assert row["num_draft_tokens"] == row["num_accepted_tokens"] == 0
    assert row["accepted_length_histogram"] == [20]


def test_what_a_peer_does_not_tell_is_left_out(rows):
    missing = ("step_seconds", "step_overhead", "bandwidth_share", "num_drafts", "tree_size")
    assert not set(missing) & rows["overall", "hf"].keys()


def test_counters_of_a_tree_that_is_never_accepted():
    assert counters([1, 1, 1], tree_size=5, depth=2) == {
        "mean_accepted_length": 1,
        "num_drafts": 3,
        "num_draft_tokens": 12,
        "num_accepted_tokens": 0,
        "num_accepted_tokens_per_pos": [0, 0],
        "accepted_length_histogram": [3, 0, 0],
    }


def test_a_spread():
    assert spread([5, 1, 3]) == {"median": 3, "min": 1, "max": 5}
    assert spread([1, 2]) == {"median": 1.5, "min": 1, "max": 2}
