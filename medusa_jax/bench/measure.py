"""What a benchmark decodes, with which systems, and the timing of it."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from medusa_jax.bench.peers import PEERS, HuggingFace
from medusa_jax.data.prompts import Request
from medusa_jax.decoding.acceptance import Greedy, Lossless
from medusa_jax.decoding.stats import Figures
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.progress import progress
from medusa_jax.serving.generator import Answerer

log = logging.getLogger(__name__)

PLAIN, MEDUSA = "plain", "medusa"


@dataclasses.dataclass(frozen=True)
class Job:
    """One batch to decode: prompts of one category, and the random row of each."""

    acceptance: str
    category: str
    prompts: list[list[int]]
    rows: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Run:
    """A job timed once.

    Attributes:
      job: its number.
      texts: new token ids of each row.
      lengths: tokens that each step made; empty for systems that do not tell.
    """

    job: int
    system: str
    repeat: int
    texts: list[list[int]]
    lengths: list[int]
    figures: Figures


# Decodes a job: its texts, the tokens that each step made, and what it cost.
System = Callable[[Job], tuple[list[list[int]], list[int], Figures]]


def make_jobs(
    medusa: dict[str, Answerer], requests: list[Request], batch_size: int
) -> Iterator[Job]:
    """What to decode: batches within a category, turn after turn with Medusa's own answers.

    Answers everything once, which is the warm-up of the tree.
    """
    some = next(iter(medusa.values()))
    fitting: dict[str, list[tuple[int, Request]]] = {}
    for number, request in enumerate(requests):
        try:
            some.prompt(request, list(request.history), 0)
        except InputError as error:
            log.warning("left out: %s", error)
        else:
            fitting.setdefault(request.category, []).append((number, request))
    if not fitting:
        raise InputError("none of the prompts can be decoded (see the warnings)")
    total = len(medusa) * sum(map(len, fitting.values()))
    with progress(total=total, label="warm-up", unit="prompts") as bar:
        for (name, answerer), (category, members) in itertools.product(
            medusa.items(), fitting.items()
        ):
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                rows = [(number, 0) for number, _ in batch]
                records = answerer.answer([one for _, one in batch], rows, batch_size)
                for turn in range(max(map(len, records))):
                    live = [i for i, turns in enumerate(records) if turn < len(turns)]
                    prompts = [records[i][turn]["prompt_ids"] for i in live]
                    yield Job(name, category, prompts, [rows[i] for i in live])
                bar.update(len(batch))


def make_systems(
    medusa: dict[str, Answerer], reference: HuggingFace | None, peers: list[str], batch_size: int
) -> dict[str, dict[str, System]]:
    """By acceptance and name; peers have no typical acceptance."""
    systems: dict[str, dict[str, System]] = {}
    for name, answerer in medusa.items():
        systems[name] = {PLAIN: ours(answerer.with_tree(Tree()), batch_size)}
        if answerer.tree.size > 1:
            systems[name][MEDUSA] = ours(answerer, batch_size)
        if reference and isinstance(answerer.acceptance, Greedy | Lossless):
            systems[name] |= {peer: theirs(reference, peer, answerer) for peer in peers}
    return systems


def ours(answerer: Answerer, batch_size: int) -> System:
    """Medusa or plain decoding."""

    def run(job: Job) -> tuple[list[list[int]], list[int], Figures]:
        answerer.figures = Figures()
        done, _ = answerer.run(job.prompts, job.rows, batch_size)
        lengths = [made for output in done for made in output.tokens_per_step]
        return [output.token_ids for output in done], lengths, answerer.figures

    return run


def theirs(peer: HuggingFace, name: str, answerer: Answerer) -> System:
    """Hugging Face's decoding, sampling and ending as an answerer does."""
    scheme, limits = answerer.acceptance, answerer.limits
    room = limits.max_length or answerer.model.config.context
    sampling: dict[str, Any] = {}
    if isinstance(scheme, Lossless):
        sampling = {key: getattr(scheme, key) for key in ("temperature", "top_k", "top_p")}

    def run(job: Job) -> tuple[list[list[int]], list[int], Figures]:
        (prompt,), ((number, _),) = job.prompts, job.rows
        new = min(limits.at_most, room - len(prompt))
        done = peer.generate(prompt, new, sampling=sampling, extra=PEERS[name], seed=number)
        figures = Figures(
            tokens=len(done.token_ids),
            seconds=done.seconds,
            decode_seconds=done.seconds - done.first_seconds,
        )
        return [done.token_ids], [], figures

    return run


def measure(jobs: list[Job], systems: dict[str, dict[str, System]], repeats: int) -> Iterator[Run]:
    """Times every job with every system, repeat by repeat; a first pass of each is left out."""
    warm = {job.acceptance: job for job in reversed(jobs)}
    for name, some in systems.items():
        for system in some.values():
            system(warm[name])
    total = repeats * sum(len(systems[job.acceptance]) for job in jobs)
    with progress(total=total, label="timing", unit="runs") as bar:
        for repeat, (number, job) in itertools.product(range(repeats), enumerate(jobs)):
            names = list(systems[job.acceptance])
            shift = (number + repeat) % len(names)
            for name in names[shift:] + names[:shift]:
                yield Run(number, name, repeat, *systems[job.acceptance][name](job))
                bar.update()
