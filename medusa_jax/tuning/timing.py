"""The time of a step with each of several trees, and which tree is fastest."""

import dataclasses
import statistics
from collections.abc import Iterable
from typing import Any

import numpy as np

from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.tree import Tree
from medusa_jax.progress import progress
from medusa_jax.serving.engine import run_jobs
from medusa_jax.serving.generator import Generator
from medusa_jax.serving.jobs import Job

PLAIN = "1"  # name of the root alone
EQUAL = 0.02  # so near the fastest in the end, a tree is as fast

# Of a tree: "tree" (its name), "nodes", "step_over_plain", "step_over_plain_spread",
# "plain_seconds", "prefill_seconds"; later "mean_accepted_length", "step_seconds",
# "step_seconds_spread", "tokens_per_second".
Row = dict[str, Any]


def time_trees(
    generator: Generator,
    trees: dict[str, Tree | DynamicTree],
    prompts: list[list[int]],
    new_tokens: int,
    rounds: int,
) -> dict[str, Row]:
    """A row a tree: its step over a plain step, and seconds of a plain step and of a prefill.

    The trees take turns, in another order each round, and a step is compared with
    those of all trees in its round: a machine whose speed drifts hurts all alike.
    """
    timed = {name: generator.with_tree(tree, ignore_eos=True) for name, tree in trees.items()}
    steps: dict[str, list[float]] = {name: [] for name in trees}
    prefills: list[float] = []
    rows, order = generator.options.batch_size, np.random.default_rng(generator.options.seed)
    bar = progress(total=rounds * len(trees), label="steps", unit="runs")
    for repeat in range(rounds):
        first = repeat * rows % (len(prompts) - rows + 1)
        batch = prompts[first : first + rows]
        for name in order.permutation(list(trees)):
            before = dataclasses.replace(timed[name].stats)
            jobs = [Job(prompt, new_tokens, (first + i, 0)) for i, prompt in enumerate(batch)]
            run_jobs(timed[name].engine, jobs)
            spent = timed[name].stats - before
            steps[name].append(spent.decode_seconds / spent.passes)
            prefills.append(spent.seconds - spent.decode_seconds)
            bar.update()
    bar.close()
    relative = over_plain(steps)
    return {
        name: {
            "tree": name,
            "nodes": tree.size,
            "step_over_plain": relative[name][0],
            "step_over_plain_spread": relative[name][1:],
            "plain_seconds": statistics.median(steps[PLAIN]),
            "prefill_seconds": statistics.median(prefills),
        }
        for name, tree in trees.items()
    }


def over_plain(steps: dict[str, list[float]]) -> dict[str, list[float]]:
    """Of each tree's seconds by round: median, least and most, as multiples of a plain step.

    Each is compared with the mean of its round first. So in a second round at half the speed,
    {"1": [1.0, 2.0], "4": [2.0, 4.0]} -> {"1": [1, 1, 1], "4": [2, 2, 2]}.
    """
    logs = np.log(list(steps.values()))
    logs -= logs.mean(axis=0)
    found = np.stack([np.median(logs, axis=1), logs.min(axis=1), logs.max(axis=1)], axis=1)
    found = np.exp(found - found[list(steps).index(PLAIN), 0])
    return dict(zip(steps, found.tolist(), strict=True))


def predict(rows: dict[str, Row], batch_size: int, new_tokens: int) -> None:
    """Sets each row's seconds a step, and tokens per second for texts of `new_tokens`.

    All are as fast as the machine was when it last took plain steps; prefill is included.
    """
    plain = rows[PLAIN]
    for row in rows.values():
        second = plain["plain_seconds"]
        row["step_seconds"] = row["step_over_plain"] * second
        row["step_seconds_spread"] = [over * second for over in row["step_over_plain_spread"]]
        steps = new_tokens / row["mean_accepted_length"]
        seconds = plain["prefill_seconds"] + steps * row["step_seconds"]
        row["tokens_per_second"] = batch_size * new_tokens / seconds


def choose(rows: Iterable[Row]) -> Row:
    """Of the rows as fast as the fastest, the one that accepts most: that is known exactly.

    None is slower than plain decoding, which needs no tie: it is the simplest.
    """
    rows = list(rows)
    plain = max(speed(row) for row in rows if row["tree"] == PLAIN)
    able = [row for row in near(rows, EQUAL) if speed(row) >= plain]
    return max(able, key=lambda row: row["mean_accepted_length"])


def near(rows: list[Row], share: float) -> list[Row]:
    """The rows that are slower than the fastest by that share of its speed at most."""
    fastest = max(map(speed, rows), default=0.0)
    return [row for row in rows if speed(row) >= (1 - share) * fastest]


def speed(row: Row) -> float:
    """Predicted tokens per second."""
    return row["tokens_per_second"]
