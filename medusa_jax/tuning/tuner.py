"""Finds the tree that decodes fastest: for these heads, this device, batch and acceptance.

1. The model writes texts to the calibration prompts, and each head is asked at
   each position how it ranks the token that came (`calibration.py`).
2. For each size the best tree is built (`tree_search.py`), and decoding with it
   replayed on those ranks: its mean accepted length.
3. On this device some of the trees take turns (`timing.py`): the time of a step. Then
   those of the sizes between do, where they may be the fastest.
4. The fastest do so again and for longer, beside the best trees of their size that
   are less deep: those ask fewer heads.
5. The highest product, tokens per second, wins; among equals the longest accepted
   length. It is kept where `--tree auto` looks, with the table and a plot.

The time is bounded. Each measurement is kept beside the output (`journal.py`), and
a run that was stopped goes on with them.

Sampled text is less predictable: give the acceptance and temperature you will
decode with. For `typical` the replay only knows the texts that were taken, not
what else would have been accepted, so its lengths are lower bounds.
"""

import dataclasses
import functools
import hashlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from medusa_jax.data.text_files import check_readable
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.files import check_output, writing
from medusa_jax.options import option
from medusa_jax.progress import say
from medusa_jax.serving import tree_store
from medusa_jax.serving.drafters import from_heads
from medusa_jax.serving.generator import Generator, load_generator
from medusa_jax.serving.options import DecodingOptions, acceptance_of, usable_ranks
from medusa_jax.tuning import head_ranks, report
from medusa_jax.tuning.calibration import Calibration, Prompt, calibrate, read_prompts
from medusa_jax.tuning.candidates import first_trees, grown_trees, less_deep, static_trees
from medusa_jax.tuning.clock import Over, clock
from medusa_jax.tuning.journal import Journal
from medusa_jax.tuning.timing import (
    LEAST_ROUNDS,
    PLAIN,
    Row,
    Stopwatch,
    Trees,
    choose,
    may_win,
    near,
    predict,
    take_turns,
    timed,
)

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
FINAL = 0.05  # so near the fastest in the first rounds, a tree is timed again
FINAL_ROUNDS = 2  # times as many rounds for the fastest
# Parts of the time that are over when the texts end, and the rounds of each stage.
TEXTS, STAGES = 0.25, {"coarse": 0.55, "fine": 0.75, "final": 1.0}
# What may differ between a run and the run that goes on with it.
FREE = ("minutes", "output", "plot", "debug", "repeats", "sizes", "acceptance")


@dataclasses.dataclass(kw_only=True)
class TuneOptions(DecodingOptions):
    """What to tune for, and how long to measure."""

    prompts: list[str] | None = option(None, action="append", metavar="FILE", help="JSON Lines to "
        "calibrate with, first turns (default: those that ship with the project)")  # fmt: skip
    max_prompts: int = option(200, least=1, help="of all files together")
    max_new_tokens: int | None = option(128, least=1, help="of each text")
    sizes: list[int] = option(list(SIZES), nargs="+", help="tree sizes to choose from, in tokens")
    grown: bool = option(False, help="also choose from trees grown at each step")
    repeats: int = option(25, least=1, help="rounds in which the trees take turns")
    minutes: float = option(10.0, least=0, help="to measure, loading left out: then the best so "
        "far is taken, and a later run goes on")  # fmt: skip
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
      FloatingPointError: the model's numbers are not finite.
    """
    acceptance_of(options)
    if min(options.sizes) < 1:
        raise InputError(f"--sizes: a tree has at least one token, got {min(options.sizes)}")
    if not from_heads(options.drafter):
        raise InputError(f"--drafter {options.drafter}: trees are tuned for heads, and it has none")
    for path in options.prompts or ():  # loading takes long
        check_readable(path, "--prompts")
    generator = load_generator(options)
    path = destination(options, generator)
    prompts = read_prompts(options.prompts, options.max_prompts, generator)
    if len(prompts) < options.batch_size:
        raise InputError(f"{len(prompts)} prompts do not fill a batch of {options.batch_size}")
    over = clock(options.minutes)
    kept = path.with_name(f"{path.name}.measured.jsonl")
    with Journal(kept, purpose(options, generator, prompts)) as journal:
        grown = grown_trees(generator) if options.grown else {}
        what = generator, prompts, options.new_tokens, tuple(grown.values()), journal
        calibration = calibrate(*what, lambda: over(TEXTS))
        tuning = Tuning(options, generator, calibration, path)
        whole = tuning.run(grown, stopwatch(options, generator, prompts), journal, over)
        tuning.save(whole)
        if whole:
            journal.remove()
    rows, best = tuning.table(), tuning.best
    print(report.markdown(rows, best))
    print(f"\nwrote {path}", file=sys.stderr)
    if not whole:
        message = "minutes are over: the best so far is taken, and the same command goes on"
        print(f"{options.minutes:g} {message}", file=sys.stderr)
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


def purpose(
    options: TuneOptions, generator: Generator, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """What measurements depend on: model, heads, device, precision, options and prompts."""
    model = generator.model
    chosen = {name: str(value) for name, value in vars(options).items() if name not in FREE}
    return {
        **chosen,
        **tree_store.conditions(model, model.precision),
        "fingerprint": model.fingerprint,
        "acceptance": tree_store.describe(generator.acceptance),
        "contents": hashlib.sha256(repr(prompts).encode()).hexdigest()[:16],
        "backend": jax.default_backend(),
        "jax": jax.__version__,
    }


def stopwatch(options: TuneOptions, generator: Generator, prompts: Sequence[Prompt]) -> Stopwatch:
    """Times steps in the middle of a text that is as long as they usually are."""
    prompt = int(statistics.median(len(prompt.ids) for prompt in prompts))
    return Stopwatch(generator, prompt + options.new_tokens // 2, prompt + options.new_tokens)


class Tuning:
    """The trees, what they accept and how long their steps take.

    Attributes:
      trees: all of them, by name.
      rows: of each, by name; `timing.Row` has the keys. Some were not timed.
    """

    def __init__(
        self, options: TuneOptions, generator: Generator, calibration: Calibration, path: Path
    ) -> None:
        self._options, self._generator = options, generator
        self._calibration, self._path = calibration, path
        self._top_k = usable_ranks(generator.model)
        self.trees: Trees = {}
        self.rows: dict[str, Row] = {}

    @property
    def best(self) -> Row:
        """The row of the tree that wins so far."""
        return choose(self.table())

    def table(self) -> list[Row]:
        """The rows that were timed: static trees by size, then grown trees."""
        rows = [row for row in self.rows.values() if "tokens_per_second" in row]
        return sorted(
            rows, key=lambda r: (isinstance(r["shape"], dict), r["nodes"], len(r["tree"]))
        )

    def run(
        self,
        grown: Mapping[str, DynamicTree],
        watch: Stopwatch,
        journal: Journal,
        over: Over,
    ) -> bool:
        """Times the trees, stage by stage; whether the time was enough for all rounds.

        Args:
          grown: those that are grown at each step.
          over: whether a part of the time is over.
        """
        repeats, whole = self._options.repeats, True
        self._add(static_trees(self._options.sizes, self._calibration, self._top_k))
        self._add({name: tree for name, tree in grown.items() if name.count(":") == 1})

        def stage(name: str, trees: Trees, rounds: int) -> bool:
            if len(trees) == 1 and self.table():  # nothing but the root is left
                return True
            end = functools.partial(over, STAGES[name])
            what = name, trees, rounds, watch, journal
            times = take_turns(*what, over=end, tell=self._learn, seed=self._options.seed)
            self._learn(times)
            for row in self.table():
                if row["tree"] in trees:
                    say(report.line(row, self.rows[PLAIN]))
            return len(times[PLAIN]) >= rounds

        whole &= stage("coarse", first_trees(self.trees), repeats)
        untimed = [row for row in self.rows.values() if "tokens_per_second" not in row]
        names = [row["tree"] for row in may_win(self.table(), untimed, FINAL)]
        whole &= stage("fine", self._named(names), repeats)
        fast = near([row for row in self.table() if row["tree"] != PLAIN], FINAL)
        final = self._named([row["tree"] for row in fast])
        self._add(shallow := less_deep(final, self._calibration, self._top_k))
        whole &= stage("final", final | shallow, FINAL_ROUNDS * repeats)
        return whole

    def save(self, whole: bool) -> None:
        """Adds the tuning to a file, where `--tree auto` looks."""
        model, options = self._generator.model, self._options
        untimed = [row for row in self.rows.values() if "tokens_per_second" not in row]
        tree_store.save(
            self._path,
            {
                "acceptance": tree_store.describe(self._generator.acceptance),
                "batch_size": options.batch_size,
                **tree_store.conditions(model, model.precision),
                "backend": jax.default_backend(),
                "jax": jax.__version__,
                "date": time.strftime("%Y-%m-%d"),
                "complete": whole,
                "texts": len(self._calibration.texts),
                "tree": self.best["shape"],
                "best": self.best,
                "table": self.table(),
                "untimed": untimed,
                "accuracy": head_ranks.accuracy(self._calibration.ranks, self._top_k)
                .round(5)
                .tolist(),
            },
        )

    def _named(self, names: Sequence[str]) -> Trees:
        """Trees by their names, after the root alone."""
        return {name: self.trees[name] for name in (PLAIN, *names)}

    def _add(self, trees: Mapping[str, Tree | DynamicTree]) -> None:
        """Finds what trees accept."""
        for name, tree in trees.items():
            if name not in self.trees:
                self.trees[name] = tree
                row = {"tree": name, "nodes": tree.size, "shape": tree_store.shape(tree)}
                self.rows[name] = row | self._calibration.acceptance(tree)

    def _learn(self, times: dict[str, list[float]]) -> None:
        """Takes the times of some trees; shows the first of each, and saves the best so far."""
        options = self._options
        prefill = {"prefill_seconds": self._calibration.prefill_seconds * options.batch_size}
        for name, found in timed(times).items():
            self.rows[name] |= found | prefill
        rows = {name: row for name, row in self.rows.items() if "step_over_plain" in row}
        predict(rows, options.batch_size, options.new_tokens)
        latest = list(times)[-1]
        if len(times[latest]) == 1:
            say(report.line(self.rows[latest], self.rows[PLAIN]))
        elif len(times[latest]) >= LEAST_ROUNDS:
            self.save(False)
