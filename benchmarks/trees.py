"""The tuned tree beside the published trees, cut to their two best sizes, on held-out prompts.

    python -m medusa_jax.tune --prompts calibration.jsonl
    python benchmarks/trees.py --prompts held_out.jsonl

Each cut of each published tree is replayed on the model's texts to the held-out prompts
(`tree_search.py`), which gives its exact mean accepted length; steps are timed by size. The two
best cuts of each tree, `mc_sim_7b_63` whole, the tuned tree and a grown one of its size then take
turns decoding the prompts; cuts that are the same tree are one. Printed are the predictions, what
was measured, and, of each repeat, how much faster the tuned tree was than each other.
"""

import dataclasses
import statistics
from typing import Any

import numpy as np

from medusa_jax.bench.summary import spread
from medusa_jax.cli import runner
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.tree import Tree, published_names
from medusa_jax.errors import InputError
from medusa_jax.options import option
from medusa_jax.progress import progress
from medusa_jax.reports import spread_cell, table
from medusa_jax.serving import tree_store
from medusa_jax.serving.engine import run_jobs
from medusa_jax.serving.generator import Generator, load_generator
from medusa_jax.serving.jobs import Job
from medusa_jax.serving.options import DecodingOptions, dynamic_tree
from medusa_jax.tuning import tree_search
from medusa_jax.tuning.calibration import Calibration, Prompt, calibrate, read_prompts
from medusa_jax.tuning.head_ranks import Ranks
from medusa_jax.tuning.timing import PLAIN

EXAMPLE = "python benchmarks/trees.py --prompts held_out.jsonl"
Trees = dict[str, Tree | DynamicTree]


@dataclasses.dataclass(kw_only=True)
class Options(DecodingOptions):
    """What to decode, and how often."""

    prompts: list[str] | None = option(None, action="append", metavar="FILE", help="JSON Lines, "
        "first turns (default: those that ship with the project)")  # fmt: skip
    max_prompts: int = option(200, least=1, help="of all files together")
    max_new_tokens: int | None = option(128, least=1, help="of each text")
    repeats: int = option(3, least=1, help="rounds in which the trees take turns")


def candidates(ranks: list[Ranks], heads: int, seconds: dict[int, float]) -> dict[str, Tree]:
    """The two fastest cuts of each published tree by replayed length and time of their size."""
    sizes, times = zip(*sorted(seconds.items()), strict=True)
    named: dict[Tree, list[str]] = {}
    for name in progress(published_names(), label="replay", unit="trees"):
        whole = Tree.published(name).limit_depth(heads)
        cuts = map(whole.cut, range(2, min(whole.size, max(sizes)) + 1))
        speeds = {
            tree: tree_search.mean_accepted_length(ranks, tree)
            / float(np.interp(tree.size, sizes, times))
            for tree in cuts
        }
        for tree in sorted(speeds, key=lambda tree: -speeds[tree])[:2]:
            named.setdefault(tree, []).append(name)
    return {f"{', '.join(names)} cut to {tree.size}": tree for tree, names in named.items()}


def tuning_of(generator: Generator) -> dict[str, Any]:
    """What `medusa_jax.tune` found for this model, device and acceptance.

    Raises:
      InputError: nothing was tuned.
    """
    path = tree_store.cache_file(generator.model, generator.options.precision)
    scheme = tree_store.describe(generator.acceptance)
    for tuning in tree_store.read(path):
        if (tuning["acceptance"], tuning["batch_size"]) == (scheme, 1):
            return tuning
    raise InputError(f"nothing was tuned for this model, device and acceptance ({path})")


def all_trees(generator: Generator, tuning: dict[str, Any], calibration: Calibration) -> Trees:
    """The trees that take turns, by name."""
    heads = generator.model.heads.num_heads
    seconds = {
        row["nodes"]: row["step_seconds"] for row in tuning["table"] if row["tree"].isdigit()
    }
    best = tree_store.tree_of(tuning)
    trees: Trees = {"plain": Tree()}
    if best.size > 1:
        trees[f"grown, {best.size}"] = dynamic_tree(generator.model, best.size)
    trees = {name: tree for name, tree in trees.items() if tree != best} | {"tuned": best}
    trees |= candidates(calibration.ranks, heads, seconds)
    return trees | {"mc_sim_7b_63": Tree.published("mc_sim_7b_63").limit_depth(heads)}


def time_texts(
    timed: dict[str, Generator], prompts: list[Prompt], options: Options
) -> dict[str, list[float]]:
    """Tokens per second of each tree in each repeat; prompt by prompt, in a random order."""
    speeds: dict[str, list[float]] = {name: [] for name in timed}
    order = np.random.default_rng(0)
    for _ in range(options.repeats):
        before = {name: dataclasses.replace(generator.stats) for name, generator in timed.items()}
        for number, prompt in enumerate(progress(prompts, label="decode", unit="prompts")):
            job = Job(prompt.ids, options.max_new_tokens or 1, (number, 0))
            for name in order.permutation(list(timed)):
                run_jobs(timed[name].engine, [job])
        for name, generator in timed.items():
            speeds[name].append((generator.stats - before[name]).tokens_per_second)
    return speeds


def compare(options: Options) -> None:
    """Replays, times and prints."""
    generator = load_generator(options)
    tuning = tuning_of(generator)
    prompts = read_prompts(options.prompts, options.max_prompts, generator)
    calibration = calibrate(generator, prompts, options.max_new_tokens or 1)
    trees = all_trees(generator, tuning, calibration)
    timed = {name: generator.with_tree(tree, ignore_eos=True) for name, tree in trees.items()}
    speeds = time_texts(timed, prompts, options)
    head = ["tree", "tokens", "mean accepted length", "tokens/s (min to max)", "tuned over it"]
    cells = [
        [
            name,
            str(trees[name].size),
            f"{timed[name].stats.mean_accepted_length:.2f}",
            spread_cell(spread(speeds[name]), "{:.0f}"),
            spread_cell(spread(np.divide(speeds["tuned"], speeds[name]).tolist()), "{:.3f}"),
        ]
        for name in sorted(trees, key=lambda name: -statistics.median(speeds[name]))
    ]
    print(table(head, cells))
    predicted = {row["tree"]: row["tokens_per_second"] for row in tuning["table"]}
    chosen = tuning["best"]["tokens_per_second"]
    ratio = chosen / predicted[PLAIN]
    plain = next(name for name, tree in trees.items() if tree.size == 1)  # or the tuned tree
    now = ratio * statistics.median(speeds[plain])
    print(
        f"\ntuned tree, predicted: {chosen:.0f} tokens/s, {ratio:.3f} times plain decoding: "
        f"{now:.0f} tokens/s as fast as plain decoding is now"
    )


def main() -> None:
    """The command line."""
    runner.command(compare, Options, __doc__ or "", EXAMPLE)


if __name__ == "__main__":
    main()
