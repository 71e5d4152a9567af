"""Finds the tree that decodes fastest: for these heads, this device, batch and acceptance.

1. The model writes texts to the calibration prompts, and every head is asked at
   every position how it ranks the token that came (`head_ranks.py`).
2. For every size the best tree is built, and decoding with it replayed on those
   ranks: its mean accepted length.
3. On this device the trees take turns decoding: the time of a step.
4. The fastest do so again and for longer, beside the best trees of their size that
   are less deep: those ask fewer heads.
5. The highest product, tokens per second, wins; among equals the longest accepted
   length. It is kept where `--tree auto` finds it, with the table and a plot.

Sampled text is less predictable: give the acceptance and temperature you will
decode with. For `typical` the replay only knows the texts that were taken, not
what else would have been accepted, so its lengths are lower bounds.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from medusa_jax.cli import decoding_flags, runner
from medusa_jax.data.prompts import read_requests
from medusa_jax.decoding.acceptance import Typical
from medusa_jax.decoding.decoder import Output, bucket
from medusa_jax.distributed.rules import everywhere
from medusa_jax.drafting.dynamic_tree import Grown
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.serving import tree_store
from medusa_jax.serving.generator import Answerer
from medusa_jax.tuning import head_ranks, report

EXAMPLE = "python -m medusa_jax.tune --model DIR --heads DIR --prompts prompts.jsonl"
SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
PLAIN = "1"  # name of the root alone
GROWN_SIZES = (4, 5, 6, 7, 8, 12, 16, 32, 64)
# On a shared host one timing differs from the next by as much, of tokens per second.
FINAL = 0.05  # so near the fastest in the first rounds, a tree is timed again
EQUAL = 0.02  # so near the fastest in the end, a tree is as fast
FINAL_ROUNDS = 2  # times as many rounds for the fastest
CALIBRATION_BATCH = 8


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; argparse exits with 2 where they are wrong."""
    parser = runner.parser((__doc__ or "").partition("\n")[0], EXAMPLE)
    decoding_flags.add_flags(parser)
    add = parser.add_argument
    add("--prompts", action="append", metavar="FILE", help="JSON Lines to calibrate with, first "
        "turns (default: those that come with the project)")  # fmt: skip
    add("--max_prompts", type=int, default=200, help="of all files together")
    add("--max_new_tokens", type=int, default=128, help="of each text")
    add("--batch_size", type=int, default=1, help="rows that will be decoded together")
    add("--sizes", type=int, nargs="+", default=SIZES, help="tree sizes to time, in tokens")
    add("--grown", action="store_true", help="also time trees grown at every step")
    add("--repeats", type=int, default=25, help="rounds in which the trees take turns")
    add("--output", metavar="FILE", help="JSON (default: where --tree auto looks)")
    add("--plot", metavar="FILE", help="PNG (default: beside the JSON)")
    return parser.parse_args(arguments)


def main(flags: argparse.Namespace) -> None:
    """Calibrates, times, writes and reports."""
    scheme = decoding_flags.acceptance(flags)  # flags first: loading takes long
    for name in ("max_prompts", "max_new_tokens", "batch_size", "repeats"):
        if getattr(flags, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(flags, name)}")
    if min(flags.sizes) < 1:
        raise InputError(f"--sizes: a tree has at least one token, got {min(flags.sizes)}")
    decoding_flags.check_output(flags.output)
    answerer = decoding_flags.build(flags, scheme, max_new_tokens=flags.max_new_tokens)
    prompts = read_prompts(flags, answerer)
    if len(prompts) < flags.batch_size:
        raise InputError(f"{len(prompts)} prompts do not fill a batch of {flags.batch_size}")

    ranks = rank_texts(answerer, write_texts(answerer, prompts))
    lengths: dict[str, float] = {}
    rows: dict[str, dict[str, Any]] = {}

    def measure(some: dict[str, Tree | Grown], rounds: int) -> None:
        found = time_trees(answerer, some, prompts, flags, rounds)
        for name, row in found.items():
            if name not in lengths:
                lengths[name] = accepted_length(answerer, some[name], ranks, prompts)
            row["mean_accepted_length"] = lengths[name]
        rows.update(found)
        predict(rows, flags)

    top_k = decoding_flags.ranks(answerer.model)
    trees: dict[str, Tree | Grown] = {PLAIN: Tree()}
    for size in tqdm(sorted(set(flags.sizes) - {1}), desc="trees", unit=" trees"):
        tree = head_ranks.best_tree(ranks, size, top_k)
        trees[str(tree.size)] = tree
    if flags.grown:
        trees |= {
            f"grow:{size}": decoding_flags.grown(answerer.model, size) for size in GROWN_SIZES
        }
    measure(trees, flags.repeats)
    real_trees = [rows[name] for name in trees if name != PLAIN]
    finalists = [row["tree"] for row in near(real_trees, FINAL)]
    final = {name: trees[name] for name in (PLAIN, *finalists)}
    for name in finalists:
        for depth in range(2, trees[name].depth):
            final[f"{name}:{depth}"] = shallower(trees[name], depth, ranks, top_k)
    measure(final, FINAL_ROUNDS * flags.repeats)
    table, best = list(rows.values()), choose(rows.values())
    tuning = _tuning(answerer, flags, (trees | final)[best["tree"]], best, table)
    tuning["accuracy"] = head_ranks.accuracy(ranks, top_k).round(5).tolist()
    path = (
        Path(flags.output)
        if flags.output
        else tree_store.cache_file(answerer.model, decoding_flags.dtype(flags))
    )
    tree_store.save(path, tuning)
    print(report.markdown(table, best))
    print(f"\nwrote {path}", file=sys.stderr)
    report.plot(table, best, Path(flags.plot) if flags.plot else path.with_suffix(".png"))


def write_texts(answerer: Answerer, prompts: list[list[int]]) -> list[Output]:
    """Continues the prompts as decoding would: plainly, but for `Typical`, which then differs."""
    plain = not isinstance(answerer.acceptance, Typical)
    writer = answerer.with_tree(Tree()) if plain else answerer.with_tree(answerer.tree)
    texts: list[Output] = []
    for start in tqdm(range(0, len(prompts), CALIBRATION_BATCH), desc="texts", unit=" batches"):
        batch = prompts[start : start + CALIBRATION_BATCH]
        names = [(start + row, 0) for row in range(len(batch))]
        texts += writer.run(batch, names, CALIBRATION_BATCH)[0]
    return texts


def accepted_length(
    answerer: Answerer, tree: Tree | Grown, ranks: list[head_ranks.Ranks], prompts: list[list[int]]
) -> float:
    """Mean accepted length: replayed on the ranks or, for what cannot be replayed, decoded."""
    if isinstance(tree, Tree):
        return head_ranks.mean_accepted_length(ranks, tree)
    answerer = answerer.with_tree(tree)
    for start in range(0, len(prompts), CALIBRATION_BATCH):
        batch = prompts[start : start + CALIBRATION_BATCH]
        answerer.run(batch, [(start + row, 0) for row in range(len(batch))], CALIBRATION_BATCH)
    return answerer.figures.mean_accepted_length


def shallower(
    tree: Tree | Grown, depth: int, ranks: list[head_ranks.Ranks], top_k: int
) -> Tree | Grown:
    """The best tree of the same size that is at most `depth` deep."""
    if isinstance(tree, Grown):
        return dataclasses.replace(tree, depth=depth)
    return head_ranks.best_tree(ranks, tree.size, top_k, depth)


def rank_texts(answerer: Answerer, texts: list[Output]) -> list[head_ranks.Ranks]:
    """How the heads rank the tokens of the texts, text by text."""
    model, found = answerer.model, []
    for start in tqdm(range(0, len(texts), CALIBRATION_BATCH), desc="ranks", unit=" batches"):
        batch = texts[start : start + CALIBRATION_BATCH]
        ids = [one.prompt_ids + one.token_ids for one in batch]
        tokens = np.zeros((CALIBRATION_BATCH, bucket(max(map(len, ids)))), np.int32)
        for row, one in enumerate(ids):
            tokens[row, : len(one)] = one
        table = head_ranks.right_ranks(
            model.config, model.heads, model.params, everywhere(tokens, model.mesh)
        )
        for row, one in enumerate(batch):
            mine = np.asarray(table[row])
            found.append(head_ranks.text_ranks(mine, len(one.prompt_ids), len(ids[row])))
    return found


def time_trees(
    answerer: Answerer,
    trees: dict[str, Tree | Grown],
    prompts: list[list[int]],
    flags: argparse.Namespace,
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """A row a tree: its step over a plain step, and seconds of a plain step and of a prefill.

    The trees take turns, in another order each round, and a step is compared with
    those of all trees in its round: a machine whose speed drifts hurts all alike.
    """
    timed = {name: answerer.with_tree(tree, stops=False) for name, tree in trees.items()}
    steps: dict[str, list[float]] = {name: [] for name in trees}
    prefills: dict[str, list[float]] = {name: [] for name in trees}
    order = np.random.default_rng(flags.seed)
    bar = tqdm(total=rounds * len(trees), desc="steps", unit=" runs")
    for repeat in range(rounds):
        first = repeat * flags.batch_size % (len(prompts) - flags.batch_size + 1)
        batch = prompts[first : first + flags.batch_size]
        for name in order.permutation(list(trees)):
            before = dataclasses.replace(timed[name].figures)
            timed[name].run(batch, [(first + row, 0) for row in range(len(batch))])
            spent = timed[name].figures - before
            steps[name].append(spent.decode_seconds / spent.passes)
            prefills[name].append(spent.seconds - spent.decode_seconds)
            bar.update()
    bar.close()
    prefill = statistics.median(one for some in prefills.values() for one in some)
    logs = np.log([steps[name] for name in trees])
    relative = dict(zip(trees, np.median(logs - logs.mean(axis=0), axis=1), strict=True))
    return {
        name: {
            "tree": name,
            "nodes": tree.size,
            "step_over_plain": float(np.exp(relative[name] - relative[PLAIN])),
            "plain_seconds": statistics.median(steps[PLAIN]),
            "step_seconds_spread": [min(steps[name]), max(steps[name])],
            "prefill_seconds": prefill,
        }
        for name, tree in trees.items()
    }


def predict(rows: dict[str, dict[str, Any]], flags: argparse.Namespace) -> None:
    """Sets each row's seconds a step, and tokens per second for texts of `--max_new_tokens`.

    All are as fast as the machine was when it last took plain steps; prefill is included.
    """
    plain = rows[PLAIN]
    for row in rows.values():
        row["step_seconds"] = row["step_over_plain"] * plain["plain_seconds"]
        steps = flags.max_new_tokens / row["mean_accepted_length"]
        seconds = plain["prefill_seconds"] + steps * row["step_seconds"]
        row["tokens_per_second"] = flags.batch_size * flags.max_new_tokens / seconds


def choose(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of the rows as fast as the fastest, the one that accepts most: that is known exactly.

    None is slower than plain decoding, which needs no tie: it is the simplest.
    """
    rows = list(rows)
    plain = max(speed(row) for row in rows if row["tree"] == PLAIN)
    able = [row for row in near(rows, EQUAL) if speed(row) >= plain]
    return max(able, key=lambda row: row["mean_accepted_length"])


def near(rows: list[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """The rows that are slower than the fastest by that share of its speed at most."""
    fastest = max(map(speed, rows), default=0.0)
    return [row for row in rows if speed(row) >= (1 - share) * fastest]


def speed(row: dict[str, Any]) -> float:
    """Predicted tokens per second."""
    return row["tokens_per_second"]


def read_prompts(flags: argparse.Namespace, answerer: Answerer) -> list[list[int]]:
    """Prompt ids of the first turns of `--prompts`."""
    prompts: list[list[int]] = []
    for path in flags.prompts or [decoding_flags.shipped("prompts.jsonl")]:
        for request in read_requests(path):
            if len(prompts) < flags.max_prompts:
                prompts.append(answerer.prompt(request, list(request.history), 0) or [])
    if not prompts:
        raise InputError("--prompts hold no prompt")
    return prompts


def _tuning(
    answerer: Answerer,
    flags: argparse.Namespace,
    tree: Tree | Grown,
    best: dict[str, Any],
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    grown = isinstance(tree, Grown)
    made = vars(tree) if grown else [list(node) for node in tree.nodes]
    return {
        "acceptance": tree_store.describe(answerer.acceptance),
        "batch_size": flags.batch_size,
        "dtype": decoding_flags.dtype(flags),
        "backend": jax.default_backend(),
        "device": tree_store.device(),
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "tree": made,
        "best": best,
        "table": rows,
    }


if __name__ == "__main__":
    runner.run(main, parse())
