"""Heads with less to read: truncated and shared projections beside full ones.

    python benchmarks/cheap_heads.py --config configs/stories_medusa1.py --truncated 128 --raw \\
        --calibration valid.jsonl --prompts test.jsonl --workdir runs/cheap_stories

Trains the same Medusa-1 recipe four times. Of each: the bytes that its heads add to a step, and
the mean accepted length on the prompts (greedy; replayed exactly on the model's own texts,
`head_ranks.py`) of the published tree and of the best tree of each size for these very heads,
which is built on the calibration prompts. Runs that are there already are not repeated.
"""

import argparse
import copy
import sys
from pathlib import Path

from medusa_jax import tune
from medusa_jax.bench.report import table
from medusa_jax.cli import decoding_flags, runner
from medusa_jax.decoding.acceptance import Greedy
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.stats import step_bytes
from medusa_jax.drafting.medusa_drafter import medusa_drafter
from medusa_jax.drafting.tree import Tree
from medusa_jax.serving.generator import Answerer
from medusa_jax.training.config_file import read_config
from medusa_jax.training.trainer import train
from medusa_jax.tuning import head_ranks

PUBLISHED = "mc_sim_7b_63"


def bytes_of_heads(answerer: Answerer) -> tuple[float, float]:
    """Bytes that heads add to a step, and those of the backbone, without a cache."""
    model = answerer.model
    tree = Tree.published(PUBLISHED).limit_depth(model.heads.num_heads)
    plain, medusa = (
        step_bytes(Decoder(model.config, medusa_drafter(model.heads, one)), model.params, 0)
        for one in (Tree(), tree)
    )
    return medusa - plain, plain


def lengths(answerer: Answerer, flags: argparse.Namespace) -> dict[str, float]:
    """Mean accepted length on the held-out prompts, by tree."""

    def ranks(files: list[str]) -> list[head_ranks.Ranks]:
        some = copy.copy(flags)
        some.prompts = files
        prompts = tune.read_prompts(some, answerer)
        return tune.rank_texts(answerer, tune.write_texts(answerer, prompts))

    seen, held_out = ranks(flags.calibration), ranks(flags.prompts)
    top_k = decoding_flags.ranks(answerer.model)
    trees = {PUBLISHED: Tree.published(PUBLISHED).limit_depth(answerer.model.heads.num_heads)}
    trees |= {f"best of {n}": head_ranks.best_tree(seen, n, top_k) for n in flags.sizes}
    return {name: head_ranks.mean_accepted_length(held_out, tree) for name, tree in trees.items()}


def main(flags: argparse.Namespace) -> None:
    """Trains, measures and prints the table."""
    kinds = {
        "full": (False, 0),
        f"truncated to {flags.truncated}": (False, flags.truncated),
        "shared": (True, 0),
        f"shared, truncated to {flags.truncated}": (True, flags.truncated),
    }
    head: list[str] = []
    cells: list[list[str]] = []
    for number, (name, (shared, truncated)) in enumerate(kinds.items()):
        config = read_config(flags.config, flags.overrides)
        config.heads.shared, config.heads.truncated = shared, truncated
        workdir = Path(flags.workdir) / str(number)
        if not (workdir / "heads").is_dir():
            train(config, workdir)
        some = copy.copy(flags)
        some.model, some.heads = config.model.path, str(workdir / "heads")
        answerer = decoding_flags.build(
            some, Greedy(), raw=flags.raw, max_new_tokens=flags.max_new_tokens
        )
        heads, backbone = bytes_of_heads(answerer)
        found = lengths(answerer, flags)
        head = ["heads", "MB a step", "of the backbone's", *found]
        figures = [f"{length:.2f}" for length in found.values()]
        cells.append([name, f"{heads / 1e6:.2f}", f"{heads / backbone:.0%}", *figures])
    print(table(head, cells))


if __name__ == "__main__":
    parser = runner.parser(
        __doc__ or "", "python benchmarks/cheap_heads.py --config configs/stories_medusa1.py ..."
    )
    decoding_flags.add_flags(parser)  # of which --model and --heads come from the runs
    add = parser.add_argument
    add("--config", required=True, help="a Medusa-1 recipe; --config.name=value as for train.py")
    add("--workdir", required=True, help="a run a kind of heads goes under it")
    add("--truncated", type=int, required=True, help="tokens of the truncated heads")
    add("--calibration", action="append", required=True, metavar="FILE", help="JSON Lines")
    add("--prompts", action="append", required=True, metavar="FILE", help="JSON Lines")
    add("--max_prompts", type=int, default=100, help="of each")
    add("--max_new_tokens", type=int, default=128)
    add("--sizes", type=int, nargs="+", default=(8, 16, 64))
    add("--raw", action="store_true", help="no chat template")
    flags, flags.overrides = parser.parse_known_args(sys.argv[1:])
    runner.run(main, flags)
