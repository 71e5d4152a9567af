"""The time of a step with each of several trees, and which tree is fastest."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from medusa_jax.decoding.decoder import Decoder
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.tree import Tree
from medusa_jax.progress import progress
from medusa_jax.serving.generator import Generator, decoder_of
from medusa_jax.serving.programs import Programs, fitting
from medusa_jax.serving.quick_tree import empty_state
from medusa_jax.tuning.journal import Journal

PLAIN = "1"  # name of the root alone
EQUAL = 0.02  # so near the fastest in the end, a tree is as fast
LEAST_ROUNDS = 3  # however little time there is
TURN_SECONDS = 0.25  # of steps, while a tree has its turn
FIRST_STEPS, MOST_STEPS = 2, 256

# Of a tree: "tree" (its name), "nodes", "shape" and its acceptance (`calibration.py`); once it was
# timed "step_over_plain", "step_over_plain_spread", "plain_seconds"; later "prefill_seconds",
# "step_seconds", "step_seconds_spread", "tokens_per_second".
Row = dict[str, Any]
Trees = dict[str, Tree | DynamicTree]  # by name


class Stopwatch:
    """Times steps on this device, in rows that have some tokens in their cache.

    Nothing is read into the rows: the time of a step depends on lengths alone. So a tree needs a
    single program, the very loop that decodes with it.
    """

    def __init__(self, generator: Generator, tokens: int, most: int) -> None:
        """Args: tokens: in the cache of each row; most: that decoding makes room for."""
        self._generator, self._tokens, self._most = generator, tokens, most
        self._steps: dict[str, int] = {}  # of a turn

    def seconds(self, name: str, tree: Tree | DynamicTree) -> float:
        """Of a step, the mean over a turn. The first turn of a tree compiles its step."""
        if name not in self._steps:
            first = self._run(tree, FIRST_STEPS)
            room = (self._decoder(tree).capacity - self._tokens) // (tree.depth + 1)
            fitting_steps = int(TURN_SECONDS / max(first, 1e-6))
            self._steps[name] = max(min(fitting_steps, room, MOST_STEPS), FIRST_STEPS)
        return self._run(tree, self._steps[name])

    def _decoder(self, tree: Tree | DynamicTree) -> Decoder:
        generator = self._generator.with_tree(tree, ignore_eos=True)
        return fitting(decoder_of(generator), self._most)

    def _run(self, tree: Tree | DynamicTree, steps: int) -> float:
        """Seconds of each of so many steps, after a step that is not timed."""
        decoder, model = self._decoder(tree), self._generator.model
        params = model.params
        state = empty_state(decoder, params, self._generator.options.batch_size, self._tokens)
        run = Programs(model.parameters, decoder.drafter).run(decoder, state)
        state, _ = run(params, state, np.int32(1), np.int32(1))
        state.root.block_until_ready()
        start = time.perf_counter()
        state, taken = run(params, state, np.int32(steps), np.int32(1))
        count = int(taken)
        if not count:
            raise FloatingPointError("the logits of a step are not finite: nothing can be timed")
        return (time.perf_counter() - start) / count


def take_turns(
    stage: str,
    trees: Trees,
    rounds: int,
    watch: Stopwatch,
    journal: Journal,
    *,
    over: Callable[[], bool],
    tell: Callable[[dict[str, list[float]]], None],
    seed: int = 0,
) -> dict[str, list[float]]:
    """Seconds of a step of each tree, round by round.

    The trees take turns, in another order each round, and a step is compared with
    those of all trees in its round: a machine whose speed drifts hurts all alike.

    Args:
      journal: keeps each round; those of earlier runs count.
      over: whether the time is over; a few rounds are always made.
      tell: hears of the rounds so far after each turn of the first round and after each round.
    """
    kept = [
        line["steps"]
        for line in journal.records
        if line.get("stage") == stage and trees.keys() <= line.get("steps", {}).keys()
    ]
    times = {name: [steps[name] for steps in kept] for name in trees}
    done = len(kept)
    order = np.random.default_rng((seed, done))
    names = [PLAIN, *(name for name in trees if name != PLAIN)]
    total = max(rounds, done) * len(trees)
    with progress(
        total=total, done=done * len(trees), label=f"steps, {stage}", unit="turns", average=True
    ) as bar:
        while done < rounds and not (done >= LEAST_ROUNDS and over()):
            steps: dict[str, float] = {}
            for name in order.permutation(names) if done else names:
                steps[str(name)] = watch.seconds(str(name), trees[str(name)])
                bar.update()
                if not done:
                    tell({key: [value] for key, value in steps.items()})
            journal.add({"stage": stage, "steps": steps})
            for name, value in steps.items():
                times[name].append(value)
            done += 1
            if done > 1:
                tell(times)
    return times


def timed(steps: dict[str, list[float]]) -> dict[str, Row]:
    """What rows say of the times of `take_turns`."""
    plain = statistics.median(steps[PLAIN])
    return {
        name: {
            "step_over_plain": relative[0],
            "step_over_plain_spread": relative[1:],
            "plain_seconds": plain,
        }
        for name, relative in over_plain(steps).items()
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


def may_win(rows: list[Row], untimed: list[Row], share: float) -> list[Row]:
    """The untimed rows that may be `near` the fastest of the timed.

    A step takes no less than that of the next smaller tree of its sort, static or grown. With that
    time, the row would have to be near.

    Example: trees of 2 and 8 tokens take 1.1 and 2 plain steps, and accept 1.5 and 1.9. A
    tree of 12 that accepts 2 has no more than 2 / 2 tokens a plain step: it cannot win.
    """

    def size(row: Row) -> int:
        return row["nodes"]

    best = max(row["mean_accepted_length"] / row["step_over_plain"] for row in rows)
    found = []
    for row in untimed:
        sort = type(row["shape"])
        smaller = [one for one in rows if one["nodes"] == 1 or isinstance(one["shape"], sort)]
        below = max((one for one in smaller if size(one) <= size(row)), key=size)
        most = row["mean_accepted_length"] / below["step_over_plain"]
        if most >= (1 - share) * best:
            found.append(row)
    return found


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
