"""Heads with less to read: truncated and shared projections beside full ones.

    python benchmarks/experiments/cheap_heads.py --config configs/stories_medusa1.py \\
        --truncated 128 --raw --calibration valid.jsonl --prompts test.jsonl \\
        --workdir runs/cheap_stories

Trains the same Medusa-1 recipe four times. Of each: the bytes that its heads add to a step, and
the mean accepted length on the prompts (greedy; replayed exactly on the model's own texts,
`tree_search.py`) of the published tree and of the best tree of each size for these very heads,
which is built on the calibration prompts. Runs that are there already are not repeated.
"""

import dataclasses
import sys
from pathlib import Path

from medusa_jax.cli import flags, runner
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.stats import step_bytes
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.options import option
from medusa_jax.reports import table
from medusa_jax.serving.generator import Generator, load_generator
from medusa_jax.serving.options import DecodingOptions, usable_ranks
from medusa_jax.training.config_file import read_config
from medusa_jax.training.trainer import train
from medusa_jax.tuning import tree_search
from medusa_jax.tuning.calibration import calibrate, read_prompts
from medusa_jax.tuning.head_ranks import Ranks

EXAMPLE = "python benchmarks/experiments/cheap_heads.py --config configs/stories_medusa1.py ..."
PUBLISHED = "mc_sim_7b_63"


@dataclasses.dataclass(kw_only=True)
class Options(DecodingOptions):
    """What to train and to measure; `model` and `heads` come from the runs."""

    config: str = option(help="a Medusa-1 recipe; --config.name=value as for train.py")
    workdir: str = option(help="the runs go under it, a directory each")
    truncated: int = option(least=1, help="tokens of the truncated heads")
    calibration: list[str] = option(action="append", metavar="FILE", help="JSON Lines")
    prompts: list[str] = option(action="append", metavar="FILE", help="JSON Lines")
    max_prompts: int = option(100, least=1, help="of all files of calibration, and of prompts")
    max_new_tokens: int | None = option(128, least=1, help="of each text")
    sizes: list[int] = option([8, 16, 64], nargs="+", least=2, help="tokens of a tree")


def bytes_of_heads(generator: Generator) -> tuple[float, float]:
    """Bytes that heads add to a step, and those of the backbone, without a cache."""
    model = generator.model
    tree = Tree.published(PUBLISHED).limit_depth(model.heads.num_heads)
    plain, medusa = (
        step_bytes(Decoder(model.config, drafter_of_heads(model.heads, shape)), model.params, 0)
        for shape in (Tree(), tree)
    )
    return medusa - plain, plain


def ranks(options: Options, generator: Generator, files: list[str]) -> list[Ranks]:
    """How the heads rank the tokens of the model's own texts to these prompts."""
    prompts = read_prompts(files, options.max_prompts, generator)
    return calibrate(generator, prompts, options.max_new_tokens or 1).ranks


def lengths(options: Options, generator: Generator) -> dict[str, float]:
    """Mean accepted length on the held-out prompts, by tree."""
    seen = ranks(options, generator, options.calibration)
    held_out = ranks(options, generator, options.prompts)
    model = generator.model
    trees = {PUBLISHED: Tree.published(PUBLISHED).limit_depth(model.heads.num_heads)}
    for size in options.sizes:
        trees[f"best of {size}"] = tree_search.best_tree(seen, size, usable_ranks(model))
    return {name: tree_search.mean_accepted_length(held_out, tree) for name, tree in trees.items()}


def compare(options: Options, overrides: list[str]) -> None:
    """Trains, measures and prints the table."""
    variants = {
        "full": (False, 0),
        f"truncated to {options.truncated}": (False, options.truncated),
        "shared": (True, 0),
        f"shared, truncated to {options.truncated}": (True, options.truncated),
    }
    head: list[str] = []
    cells: list[list[str]] = []
    for number, (name, (shared, truncated)) in enumerate(variants.items()):
        config = read_config(options.config, overrides)
        config.heads.shared, config.heads.truncated = shared, truncated
        workdir = Path(options.workdir) / str(number)
        if not (workdir / "heads").is_dir():
            train(config, workdir)
        paths = {"model": config.model.path, "heads": str(workdir / "heads")}
        generator = load_generator(dataclasses.replace(options, **paths))
        heads, backbone = bytes_of_heads(generator)
        by_tree = lengths(options, generator)
        head = ["heads", "MB a step", "of the backbone's", *by_tree]
        figures = [f"{length:.2f}" for length in by_tree.values()]
        cells.append([name, f"{heads / 1e6:.2f}", f"{heads / backbone:.0%}", *figures])
    print(table(head, cells))


def main() -> None:
    """The command line, whose unknown flags are overrides of the recipe."""
    parser = flags.parser(__doc__ or "", EXAMPLE)
    flags.add_flags(parser, Options)
    namespace, overrides = parser.parse_known_args(sys.argv[1:])
    runner.run(lambda known: compare(flags.read(known, Options), overrides), namespace)


if __name__ == "__main__":
    main()
