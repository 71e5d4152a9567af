"""Sets of heads of one backbone beside each other: the same prompts, the same trees.

    python benchmarks/heads.py --model smollm2 --heads runs/smollm2_medusa1/heads \\
        --heads runs/smollm2_hydra1/heads --prompts held_out.jsonl --trees grow:8 grow:16

Medusa and Hydra heads, or heads of different recipes. Each set decodes all first turns with each
tree, in rounds in which they take turns. Printed are the mean accepted length, tokens per second,
and both over those of the first heads with the same tree. Greedy texts are those of plain
decoding, so all sets must write the same; the run fails if they do not.
"""

import dataclasses
import statistics
from typing import Any

from medusa_jax.checkpoints.hub import shipped
from medusa_jax.cli import runner
from medusa_jax.data.prompts import read_requests
from medusa_jax.errors import InputError
from medusa_jax.options import option
from medusa_jax.progress import progress
from medusa_jax.reports import table
from medusa_jax.serving.generator import Generator, load_generator
from medusa_jax.serving.options import DecodingOptions, tree_of

EXAMPLE = "python benchmarks/heads.py --heads runs/a/heads --heads runs/b/heads"
Case = tuple[str, str]  # heads, tree


@dataclasses.dataclass(kw_only=True)
class Options(DecodingOptions):
    """What to decode, with which heads and trees."""

    heads: Any = option([], action="append", metavar="DIR", help="give it for each set of heads")
    trees: list[str] = option(["grow:8"], nargs="+", help="what --tree takes, for all heads")
    prompts: str = option(str(shipped("prompts.jsonl")), metavar="FILE", help="JSON Lines, first "
        "turns (default: those that ship with the project)")  # fmt: skip
    max_prompts: int = option(100, least=1, help="of the file")
    max_new_tokens: int | None = option(128, least=1, help="of each text")
    repeats: int = option(1, least=1, help="rounds in which the cases take turns")


def cases_of(options: Options) -> dict[Case, Generator]:
    """A generator for each set of heads and each tree.

    Raises:
      InputError: no heads are given, or they are none of this backbone.
    """
    if not options.heads:
        raise InputError("no --heads: give it once for each set of heads")
    made = {}
    for heads in options.heads:
        generator = load_generator(dataclasses.replace(options, heads=heads))
        for tree in options.trees:
            named = dataclasses.replace(options, heads=heads, tree=tree)
            shape = tree_of(named, generator.model, generator.acceptance)
            made[heads, tree] = generator.with_tree(shape)
    return made


def compare(options: Options) -> None:
    """Decodes and prints."""
    requests = [one for one in read_requests(options.prompts) if one.turns]
    prompts = [one.turns[0] for one in requests[: options.max_prompts]]
    cases = cases_of(options)
    speeds: dict[Case, list[float]] = {case: [] for case in cases}
    texts: set[tuple[str, ...]] = set()
    for _ in range(options.repeats):
        for case in progress(list(cases), label="decode", unit="cases"):
            generator = cases[case]
            before = dataclasses.replace(generator.stats)
            written = generator.generate(prompts)
            speeds[case].append((generator.stats - before).tokens_per_second)
            texts.add(tuple(one.text for one in written))
    if options.acceptance == "greedy" and len(texts) > 1:
        raise FloatingPointError("the sets of heads wrote different texts: greedy decoding may not")
    print(table(["heads", "tree", "accepted length", "over", "tokens/s", "over"], [
        row(case, cases, speeds, options.heads[0]) for case in cases
    ]))  # fmt: skip


def row(
    case: Case, cases: dict[Case, Generator], speeds: dict[Case, list[float]], first: str
) -> list[str]:
    """The cells of a case."""
    heads, tree = case
    length, base = (cases[one].stats.mean_accepted_length for one in (case, (first, tree)))
    speed, slow = (statistics.median(speeds[one]) for one in (case, (first, tree)))
    kind = cases[case].model.heads.architecture
    figures = f"{length:.3f}", f"{length / base:.3f}", f"{speed:.1f}", f"{speed / slow:.3f}"
    return [f"{kind}: {heads}", tree, *figures]


def main() -> None:
    """The command line."""
    runner.command(compare, Options, __doc__ or "", EXAMPLE)


if __name__ == "__main__":
    main()
