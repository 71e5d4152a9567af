"""Slots that are refilled from a queue, beside fixed batches that wait for their last row.

    python benchmarks/refill.py --output refill.json

Both decode the same prompts, whose texts end at very different lengths: each prompt gets
its own number of new tokens, drawn evenly between --shortest and --longest, and goes on
past end-of-sequence. Fixed batches take the prompts in the same order, each with the least
capacity that holds its longest row, one prefill, and a single device loop until its last
row ends. The two take turns; compilation is not timed, all else is. On a CPU that other
programs use too, the ratio of CPU seconds varies less than that of tokens/s.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medusa_jax import json_files
from medusa_jax.bench.summary import about
from medusa_jax.checkpoints.hub import shipped
from medusa_jax.cli import runner
from medusa_jax.data.prompts import read_requests
from medusa_jax.decoding.sampling import row_keys
from medusa_jax.decoding.state import Output, outputs
from medusa_jax.errors import InputError
from medusa_jax.files import check_output
from medusa_jax.options import option
from medusa_jax.progress import progress
from medusa_jax.reports import table
from medusa_jax.serving.conversations import Conversation
from medusa_jax.serving.engine import run_jobs
from medusa_jax.serving.generator import Generator, load_generator
from medusa_jax.serving.jobs import Job
from medusa_jax.serving.options import DecodingOptions
from medusa_jax.serving.programs import fitting

EXAMPLE = "python benchmarks/refill.py --output refill.json"


@dataclasses.dataclass(kw_only=True)
class Options(DecodingOptions):
    """What to decode, in how many slots, and how often."""

    prompts: str = option(str(shipped("prompts.jsonl")), metavar="FILE", help="JSON Lines, first "
        "turns (default: those that ship with the project)")  # fmt: skip
    number: int = option(128, least=1, help="prompts of a round; a short file is read again")
    shortest: int = option(4, least=1, help="new tokens")
    longest: int = option(256, least=1, help="new tokens")
    batch_size: int = option(16, least=1, help="slots, and rows of a fixed batch")
    rounds: int = option(3, least=1, help="in each, both decode all prompts")
    output: str | None = option(None, metavar="FILE", help="JSON")


def make_jobs(options: Options, generator: Generator) -> list[Job]:
    """The prompts with their numbers of new tokens, which depend on the seed alone."""
    if options.longest < options.shortest:
        raise InputError(f"--longest {options.longest} is less than --shortest")
    requests = list(read_requests(options.prompts))
    if not requests:
        raise InputError(f"--prompts {options.prompts} holds no prompts")
    requests = list(itertools.islice(itertools.cycle(requests), options.number))
    draw = np.random.default_rng(options.seed)
    lengths = draw.integers(options.shortest, options.longest + 1, len(requests))
    return [
        Job(Conversation(request).ask(generator.text), int(length), (number, 0))
        for number, (request, length) in enumerate(zip(requests, lengths, strict=True))
    ]


def fixed_batches(generator: Generator, jobs: Sequence[Job]) -> tuple[list[Output], int]:
    """Decodes batch after batch, each until its last row ends; also the passes."""
    options, params = generator.options, generator.model.params
    done: list[Output] = []
    passes = 0
    for start in range(0, len(jobs), options.batch_size):
        batch = jobs[start : start + options.batch_size]
        decoder = fitting(generator.engine.decoder, max(job.tokens for job in batch))
        state = decoder.prefill(
            params,
            [job.prompt_ids for job in batch],
            max_new_tokens=[job.max_new_tokens for job in batch],
            keys=row_keys(options.seed, [job.stream for job in batch]),
        )
        ended = outputs(decoder.generate(params, state))
        passes += max(len(output.tokens_per_step) for output in ended)
        done += ended
    return done, passes


def refilled_slots(generator: Generator, jobs: Sequence[Job]) -> tuple[list[Output], int]:
    """Decodes with the engine; also the passes."""
    before = generator.stats.passes
    done = run_jobs(generator.engine, jobs)
    return done, generator.stats.passes - before


def measure(options: Options) -> None:
    """Lets both take turns, and prints tokens/s and their ratio, round by round."""
    check_output(options.output)
    generator = load_generator(dataclasses.replace(options, ignore_eos=True, stop_id=[]))
    jobs = make_jobs(options, generator)
    systems: dict[str, Callable[[Generator, Sequence[Job]], tuple[list[Output], int]]]
    systems = {"fixed": fixed_batches, "refilled": refilled_slots}
    first = {name: system(generator, jobs) for name, system in systems.items()}  # compiles
    texts = [[output.token_ids for output in first[name][0]] for name in systems]
    same = sum(a == b for a, b in zip(*texts, strict=True))
    tokens, compiled = sum(map(len, texts[0])), generator.stats.compile_seconds
    rounds: list[dict[str, Any]] = []
    for number in progress(range(options.rounds), unit="rounds"):
        speeds: dict[str, float] = {}
        busy: dict[str, float] = {}
        for name in sorted(systems, reverse=bool(number % 2)):
            start, cpu_start = time.perf_counter(), time.process_time()
            systems[name](generator, jobs)
            busy[name] = time.process_time() - cpu_start
            speeds[name] = tokens / (time.perf_counter() - start)
        ratios = {
            "ratio": speeds["refilled"] / speeds["fixed"],
            "cpu_ratio": busy["fixed"] / busy["refilled"],
        }
        rounds.append(speeds | ratios)
    assert generator.stats.compile_seconds == compiled, "a program was compiled while timed"
    report = {
        "prompts": len(jobs),
        "tokens": tokens,
        "same_texts": same,
        "passes": {name: first[name][1] for name in systems},
        "rounds": rounds,
    }
    print(markdown(report, options.batch_size))
    if options.output:
        json_files.write(Path(options.output), about() | report)


def markdown(report: dict[str, Any], slots: int) -> str:
    """A row for each round, then the medians."""
    rounds, passes = report["rounds"], report["passes"]
    head = ["round", "fixed batches, tokens/s", "refilled slots, tokens/s", "ratio"]
    cells = [
        [str(number), f"{r['fixed']:.0f}", f"{r['refilled']:.0f}", f"{r['ratio']:.2f}x"]
        for number, r in enumerate(rounds, start=1)
    ]
    if jax.default_backend() == "cpu":
        head.append("of CPU seconds")
        cells = [[*row, f"{r['cpu_ratio']:.2f}x"] for row, r in zip(cells, rounds, strict=True)]
    return (
        f"{table(head, cells)}\n\n"
        f"{report['prompts']} prompts, {report['tokens']} tokens, {slots} slots: median ratio "
        f"{statistics.median(r['ratio'] for r in rounds):.2f}x; passes {passes['fixed']} and "
        f"{passes['refilled']}; {report['same_texts']} of {report['prompts']} texts are the same"
    )


def main() -> None:
    """The command line."""
    runner.command(measure, Options, __doc__ or "", EXAMPLE)


if __name__ == "__main__":
    main()
