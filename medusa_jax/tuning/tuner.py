"""Finds the tree that decodes fastest: for these heads, this device, batch and acceptance.

1. The model writes texts to the calibration prompts, and each head is asked at
   each position how it ranks the token that came (`head_ranks.py`).
2. For each size the best tree is built, and decoding with it replayed on those
   ranks (`tree_search.py`): its mean accepted length.
3. On this device the trees take turns decoding (`timing.py`): the time of a step.
4. The fastest do so again and for longer, beside the best trees of their size that
   are less deep: those ask fewer heads.
5. The highest product, tokens per second, wins; among equals the longest accepted
   length. It is kept where `--tree auto` looks, with the table and a plot.

Sampled text is less predictable: give the acceptance and temperature you will
decode with. For `typical` the replay only knows the texts that were taken, not
what else would have been accepted, so its lengths are lower bounds.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from medusa_jax.checkpoints.hub import shipped
from medusa_jax.data.prompts import read_requests
from medusa_jax.data.text_files import check_readable
from medusa_jax.decoding.acceptance import Typical
from medusa_jax.decoding.prefill import bucket
from medusa_jax.decoding.state import Output
from medusa_jax.distributed.rules import everywhere
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.files import check_output, writing
from medusa_jax.options import option
from medusa_jax.progress import progress
from medusa_jax.serving import tree_store
from medusa_jax.serving.conversations import Conversation
from medusa_jax.serving.engine import run_jobs
from medusa_jax.serving.generator import Generator, load_generator
from medusa_jax.serving.jobs import Job
from medusa_jax.serving.options import DecodingOptions, acceptance_of, dynamic_tree, usable_ranks
from medusa_jax.tuning import head_ranks, report, tree_search
from medusa_jax.tuning.timing import PLAIN, Row, choose, near, predict, time_trees

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
DYNAMIC_SIZES = (4, 5, 6, 7, 8, 12, 16, 32, 64)
FINAL = 0.05  # so near the fastest in the first rounds, a tree is timed again
FINAL_ROUNDS = 2  # times as many rounds for the fastest
CALIBRATION_BATCH = 8


@dataclasses.dataclass(kw_only=True)
class TuneOptions(DecodingOptions):
    """What to tune for, and how long to measure."""

    prompts: list[str] | None = option(None, action="append", metavar="FILE", help="JSON Lines to "
        "calibrate with, first turns (default: those that ship with the project)")  # fmt: skip
    max_prompts: int = option(200, least=1, help="of all files together")
    max_new_tokens: int | None = option(128, least=1, help="of each text")
    sizes: list[int] = option(list(SIZES), nargs="+", help="tree sizes to time, in tokens")
    grown: bool = option(False, help="also time trees grown at each step")
    repeats: int = option(25, least=1, help="rounds in which the trees take turns")
    output: str | None = option(
        None, metavar="FILE", help="JSON (default: where --tree auto looks)"
    )
    plot: str | None = option(None, metavar="FILE", help="PNG (default: beside the JSON)")

    @property
    def new_tokens(self) -> int:
        """Tokens of each text."""
        return self.max_new_tokens or 1


def tune(options: TuneOptions) -> None:
    """Calibrates, times, writes and reports.

    Raises:
      InputError: an option is wrong, or there are too few prompts.
    """
    acceptance_of(options)
    if min(options.sizes) < 1:
        raise InputError(f"--sizes: a tree has at least one token, got {min(options.sizes)}")
    for path in options.prompts or ():  # loading takes long
        check_readable(path, "--prompts")
    generator = load_generator(options)
    path = destination(options, generator)
    prompts = read_prompts(options.prompts, options.max_prompts, generator)
    if len(prompts) < options.batch_size:
        raise InputError(f"{len(prompts)} prompts do not fill a batch of {options.batch_size}")
    ranks = rank_texts(generator, write_texts(generator, prompts))
    bench = Measurements(options, generator, prompts, ranks)
    trees = candidates(options, generator, ranks)
    bench.measure(trees, options.repeats)
    fast = near([bench.rows[name] for name in trees if name != PLAIN], FINAL)
    final = {name: trees[name] for name in (PLAIN, *(row["tree"] for row in fast))}
    final |= less_deep(final, ranks, usable_ranks(generator.model))
    bench.measure(final, FINAL_ROUNDS * options.repeats)
    best = choose(bench.rows.values())
    rows = list(bench.rows.values())
    print(report.markdown(rows, best))
    save(path, options, generator, (trees | final)[best["tree"]], best, rows, ranks)
    print(f"\nwrote {path}", file=sys.stderr)
    report.plot(rows, best, Path(options.plot) if options.plot else path.with_suffix(".png"))


def destination(options: TuneOptions, generator: Generator) -> Path:
    """The file that takes the tuning; its directory is made.

    Raises:
      InputError, OutputError: it cannot be written.
    """
    kept = tree_store.cache_file(generator.model, generator.model.precision)
    path = Path(options.output) if options.output else kept
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    check_output(path)
    check_output(options.plot, flag="--plot")
    return path


def candidates(
    options: TuneOptions, generator: Generator, ranks: Sequence[head_ranks.Ranks]
) -> dict[str, Tree | DynamicTree]:
    """The trees of the first rounds by name: the root alone, static trees, dynamic trees."""
    top_k = usable_ranks(generator.model)
    trees: dict[str, Tree | DynamicTree] = {PLAIN: Tree()}
    for size in progress(sorted(set(options.sizes) - {1}), label="trees", unit="trees"):
        tree = tree_search.best_tree(ranks, size, top_k)
        trees[str(tree.size)] = tree
    if options.grown:
        trees |= {f"grow:{size}": dynamic_tree(generator.model, size) for size in DYNAMIC_SIZES}
    return trees


def less_deep(
    trees: dict[str, Tree | DynamicTree], ranks: Sequence[head_ranks.Ranks], top_k: int
) -> dict[str, Tree | DynamicTree]:
    """The best trees of the same sizes at each smaller depth, named "8:2"."""
    found: dict[str, Tree | DynamicTree] = {}
    for name, tree in trees.items():
        for depth in range(2, tree.depth):
            if isinstance(tree, DynamicTree):
                found[f"{name}:{depth}"] = dataclasses.replace(tree, depth=depth)
            else:
                found[f"{name}:{depth}"] = tree_search.best_tree(ranks, tree.size, top_k, depth)
    return found


@dataclasses.dataclass
class Measurements:
    """The rows of the trees that were timed.

    Attributes:
      rows: by the name of the tree; `timing.Row` has the keys.
    """

    options: TuneOptions
    generator: Generator
    prompts: list[list[int]]
    ranks: list[head_ranks.Ranks]
    rows: dict[str, Row] = dataclasses.field(default_factory=dict)

    def measure(self, trees: dict[str, Tree | DynamicTree], rounds: int) -> None:
        """Times some trees, and predicts the speed of all that were timed so far."""
        options = self.options
        lengths = {name: row["mean_accepted_length"] for name, row in self.rows.items()}
        rows = time_trees(self.generator, trees, self.prompts, options.new_tokens, rounds)
        for name, row in rows.items():
            known = lengths.get(name)
            row["mean_accepted_length"] = known or self.accepted_length(trees[name])
            row["shape"] = tree_store.shape(trees[name])
        self.rows |= rows
        predict(self.rows, options.batch_size, options.new_tokens)

    def accepted_length(self, tree: Tree | DynamicTree) -> float:
        """Mean accepted length: replayed on the ranks or, where the tree is dynamic, decoded."""
        if isinstance(tree, Tree):
            return tree_search.mean_accepted_length(self.ranks, tree)
        generator = self.generator.with_tree(tree, batch_size=CALIBRATION_BATCH)
        run_jobs(generator.engine, jobs(self.prompts, self.options.new_tokens))
        return generator.stats.mean_accepted_length


def jobs(prompts: list[list[int]], new_tokens: int) -> list[Job]:
    """The prompts as jobs, each with a random stream of its own."""
    return [Job(prompt, new_tokens, (number, 0)) for number, prompt in enumerate(prompts)]


def write_texts(generator: Generator, prompts: list[list[int]]) -> list[Output]:
    """Continues the prompts as decoding would: plainly, but for `Typical`, which then differs."""
    plain = not isinstance(generator.acceptance, Typical)
    tree = Tree() if plain else generator.tree
    writer = generator.with_tree(tree, batch_size=CALIBRATION_BATCH)
    new_tokens = generator.options.max_new_tokens or 1
    outputs: dict[Job, Output] = {}
    todo = jobs(prompts, new_tokens)
    for job in todo:
        writer.engine.submit(job)
    with progress(total=len(todo), label="texts", unit="texts") as bar:
        while not writer.engine.idle:
            done = {p.job: p.output for p in writer.engine.advance() if p.output is not None}
            for output in done.values():
                output.check("a calibration text")
            outputs |= done
            bar.update(len(done))
    return [outputs[job] for job in todo]


def rank_texts(generator: Generator, texts: list[Output]) -> list[head_ranks.Ranks]:
    """How the heads rank the tokens of the texts, text by text."""
    model, ranks = generator.model, []
    for start in progress(range(0, len(texts), CALIBRATION_BATCH), label="ranks", unit="batches"):
        batch = texts[start : start + CALIBRATION_BATCH]
        ids = [text.prompt_ids + text.token_ids for text in batch]
        tokens = np.zeros((CALIBRATION_BATCH, bucket(max(map(len, ids)))), np.int32)
        for row, text_ids in enumerate(ids):
            tokens[row, : len(text_ids)] = text_ids
        table = head_ranks.right_ranks(
            model.config, model.heads, model.params, everywhere(tokens, model.mesh)
        )
        for row, text in enumerate(batch):
            own = np.asarray(table[row])
            ranks.append(head_ranks.text_ranks(own, len(text.prompt_ids), len(ids[row])))
    return ranks


def read_prompts(files: Sequence[str] | None, most: int, generator: Generator) -> list[list[int]]:
    """Prompt ids of the first turns of prompt files (default: those that ship), `most` together."""
    prompts: list[list[int]] = []
    for path in files or [str(shipped("prompts.jsonl"))]:
        for request in read_requests(path):
            if len(prompts) < most:
                prompts.append(Conversation(request).ask(generator.text))
    if not prompts:
        raise InputError("--prompts hold no prompt")
    return prompts


def save(
    path: Path,
    options: TuneOptions,
    generator: Generator,
    tree: Tree | DynamicTree,
    best: Row,
    rows: list[Row],
    ranks: list[head_ranks.Ranks],
) -> None:
    """Adds the tuning to a file, where `--tree auto` looks."""
    top_k = usable_ranks(generator.model)
    tuning = {
        "acceptance": tree_store.describe(generator.acceptance),
        "batch_size": options.batch_size,
        **tree_store.conditions(generator.model, generator.model.precision),
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "tree": tree_store.shape(tree),
        "best": best,
        "table": rows,
        "accuracy": head_ranks.accuracy(ranks, top_k).round(5).tolist(),
    }
    tree_store.save(path, tuning)
