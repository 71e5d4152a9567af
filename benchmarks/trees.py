"""The tuned tree beside every published one, each cut to its two best sizes, on held-out prompts.

    python -m medusa_jax.tune --prompts head_ranks.jsonl
    python benchmarks/trees.py --prompts held_out.jsonl

Every cut of every published tree is replayed on the model's texts to the held-out prompts
(`head_ranks.py`), which gives its exact mean accepted length; steps are timed by size. The two
best cuts of each tree, `mc_sim_7b_63` whole, the tuned tree and a grown one of its size then take
turns decoding the prompts; cuts that are the same tree are one. Printed are the predictions, what
was measured, and, of each repeat, how much faster the tuned tree was than each other.
"""

import argparse
import dataclasses
import statistics

import numpy as np
from tqdm import tqdm

from medusa_jax import tune
from medusa_jax.bench.report import spread_cell, table
from medusa_jax.bench.summary import spread
from medusa_jax.cli import decoding_flags, runner
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.tree import Tree, published_names
from medusa_jax.errors import InputError
from medusa_jax.serving import tree_store
from medusa_jax.tuning import head_ranks


def candidates(
    ranks: list[head_ranks.Ranks], heads: int, seconds: dict[int, float]
) -> dict[str, Tree]:
    """The two fastest cuts of every published tree by replayed length and time of their size."""
    sizes, times = zip(*sorted(seconds.items()), strict=True)
    named: dict[Tree, list[str]] = {}
    for name in tqdm(published_names(), desc="replay", unit=" trees"):
        whole = Tree.published(name).limit_depth(heads)
        cuts = map(whole.cut, range(2, min(whole.size, max(sizes)) + 1))
        speeds = {
            tree: head_ranks.mean_accepted_length(ranks, tree)
            / float(np.interp(tree.size, sizes, times))
            for tree in cuts
        }
        for tree in sorted(speeds, key=lambda tree: -speeds[tree])[:2]:
            named.setdefault(tree, []).append(name)
    return {f"{', '.join(names)} cut to {tree.size}": tree for tree, names in named.items()}


def main(flags: argparse.Namespace) -> None:
    """Replays, times and prints."""
    scheme = decoding_flags.acceptance(flags)
    answerer = decoding_flags.build(flags, scheme, max_new_tokens=flags.max_new_tokens)
    heads = answerer.model.heads.num_heads
    path = tree_store.cache_file(answerer.model, decoding_flags.dtype(flags))
    found = [
        one for one in tree_store.read(path) if one["acceptance"] == tree_store.describe(scheme)
    ]
    if not found:
        raise InputError(f"nothing was tuned for this model, device and acceptance ({path})")
    seconds = {
        row["nodes"]: row["step_seconds"] for row in found[0]["table"] if row["tree"].isdigit()
    }
    best = tree_store.tree_of(found[0])
    prompts = tune.read_prompts(flags, answerer)
    ranks = tune.rank_texts(answerer, tune.write_texts(answerer, prompts))
    trees: dict[str, Tree | DynamicTree] = {"plain": Tree()}
    if best.size > 1:
        trees[f"grown, {best.size}"] = decoding_flags.grown(answerer.model, best.size)
    trees = {name: tree for name, tree in trees.items() if tree != best} | {"tuned": best}
    trees |= candidates(ranks, heads, seconds)
    trees["mc_sim_7b_63"] = Tree.published("mc_sim_7b_63").limit_depth(heads)

    timed = {name: answerer.with_tree(tree, stops=False) for name, tree in trees.items()}
    speeds: dict[str, list[float]] = {name: [] for name in trees}
    order = np.random.default_rng(0)
    for _ in range(flags.repeats):
        before = {name: dataclasses.replace(one.figures) for name, one in timed.items()}
        for number, prompt in enumerate(tqdm(prompts, desc="decode", unit=" prompts")):
            for name in order.permutation(list(trees)):
                timed[name].run([prompt], [(number, 0)])
        for name, one in timed.items():
            speeds[name].append((one.figures - before[name]).tokens_per_second)
    head = ["tree", "tokens", "mean accepted length", "tokens/s (min to max)", "tuned over it"]
    cells = []
    for name in sorted(trees, key=lambda name: -statistics.median(speeds[name])):
        ratios = np.divide(speeds["tuned"], speeds[name]).tolist()
        cells.append(
            [
                name,
                str(trees[name].size),
                f"{timed[name].figures.mean_accepted_length:.2f}",
                spread_cell(spread(speeds[name]), "{:.0f}"),
                spread_cell(spread(ratios), "{:.3f}"),
            ]
        )
    print(table(head, cells))
    predicted = {row["tree"]: row["tokens_per_second"] for row in found[0]["table"]}
    chosen = found[0]["best"]["tokens_per_second"]
    ratio = chosen / predicted[tune.PLAIN]
    now = ratio * statistics.median(speeds["plain"])
    print(
        f"\ntuned tree, predicted: {chosen:.0f} tokens/s, {ratio:.3f} times plain decoding: "
        f"{now:.0f} tokens/s as fast as plain decoding is now"
    )


if __name__ == "__main__":
    parser = runner.parser(__doc__ or "", "python benchmarks/trees.py --prompts held_out.jsonl")
    decoding_flags.add_flags(parser)
    parser.add_argument("--prompts", action="append", metavar="FILE")
    parser.add_argument("--max_prompts", type=int, default=200)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    runner.run(main, parser.parse_args())
