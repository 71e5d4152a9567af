"""What a benchmark decodes, with which systems, and the timing of it."""

import collections
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from medusa_jax.bench.peers import PEERS, HuggingFace
from medusa_jax.data.prompts import Request
from medusa_jax.decoding.acceptance import Greedy, Lossless
from medusa_jax.decoding.stats import Stats
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.progress import progress
from medusa_jax.serving.conversations import Conversation
from medusa_jax.serving.engine import run_jobs
from medusa_jax.serving.generator import Generator
from medusa_jax.serving.jobs import Job

log = logging.getLogger(__name__)

PLAIN, MEDUSA = "plain", "medusa"


@dataclasses.dataclass(frozen=True)
class Task:
    """What a system decodes before the next system has its turn.

    With one slot a task is a single prompt. With more slots it is a turn of all
    conversations of a category, whose prompts refill the slots from a queue.

    Attributes:
      prompts: token ids of each.
      streams: the random stream of each prompt, as `engine.Job` has it.
    """

    acceptance: str
    category: str
    prompts: list[list[int]]
    streams: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Run:
    """A task timed once.

    Attributes:
      task: its number.
      texts: new token ids of each prompt.
      lengths: tokens that each step accepted; empty for systems that do not tell.
      stats: what it cost; compilation is not part of it.
    """

    task: int
    system: str
    repeat: int
    texts: list[list[int]]
    lengths: list[int]
    stats: Stats


# Decodes a task: its texts, the tokens that each step accepted, and what it cost.
System = Callable[[Task], tuple[list[list[int]], list[int], Stats]]


def make_tasks(medusa: dict[str, Generator], requests: list[Request]) -> Iterator[Task]:
    """Answers all requests once, which is Medusa's warm-up; yields the prompts of all turns.

    Raises:
      InputError: no request can be answered.
    """
    categories: dict[str, list[tuple[int, Request]]] = collections.defaultdict(list)
    for number, request in enumerate(requests):
        categories[request.category].append((number, request))
    answered, problems = 0, set()
    total = len(medusa) * sum(request.num_turns for request in requests)
    with progress(total=total, label="warm-up", unit="turns") as bar:
        for (name, generator), (category, members) in itertools.product(
            medusa.items(), categories.items()
        ):
            conversations = [Conversation(request, number) for number, request in members]
            for update in generator.converse(conversations):
                bar.update(update.completion is not None)
                problem = str(update.conversation.problem or "")
                if problem and problem not in problems:
                    log.warning("left out: %s", problem)
                    problems.add(problem)
            answered += sum(len(talk.completions) for talk in conversations)
            yield from split(name, category, conversations, generator.options.batch_size)
    if not answered:
        raise InputError("none of the prompts can be decoded (see the warnings)")


def split(
    acceptance: str, category: str, conversations: list[Conversation], batch_size: int
) -> Iterator[Task]:
    """The turns of answered conversations as tasks: each alone, or with those beside it.

    Conversations a of two turns and b of one: at batch size 1 the tasks a0, a1, b0;
    at larger batch sizes (a0, b0) and (a1).
    """
    turns = [(talk, turn) for talk in conversations for turn in range(len(talk.completions))]
    if batch_size == 1:
        groups = [[turn] for turn in turns]
    else:
        groups = [
            [(talk, turn) for talk, turn in turns if turn == number]
            for number in sorted({turn for _, turn in turns})
        ]
    for group in groups:
        prompts = [talk.completions[turn].prompt_ids for talk, turn in group]
        streams = [(talk.number, talk.sample) for talk, _ in group]
        yield Task(acceptance, category, prompts, streams)


def make_systems(
    medusa: dict[str, Generator], reference: HuggingFace | None, peers: list[str]
) -> dict[str, dict[str, System]]:
    """By acceptance and name; peers have no typical acceptance."""
    systems: dict[str, dict[str, System]] = {}
    for name, generator in medusa.items():
        systems[name] = {PLAIN: ours(generator.with_tree(Tree()))}
        if generator.tree.size > 1:
            systems[name][MEDUSA] = ours(generator)
        if reference and isinstance(generator.acceptance, Greedy | Lossless):
            systems[name] |= {peer: theirs(reference, peer, generator) for peer in peers}
    return systems


def ours(generator: Generator) -> System:
    """Medusa or plain decoding."""

    def run(task: Task) -> tuple[list[list[int]], list[int], Stats]:
        jobs = [
            Job(prompt, generator.new_tokens(len(prompt)), stream)
            for prompt, stream in zip(task.prompts, task.streams, strict=True)
        ]
        before = dataclasses.replace(generator.stats)
        outputs = run_jobs(generator.engine, jobs)
        lengths = [length for output in outputs for length in output.tokens_per_step]
        return [output.token_ids for output in outputs], lengths, generator.stats - before

    return run


def theirs(peer: HuggingFace, name: str, generator: Generator) -> System:
    """Hugging Face's decoding, which samples and ends as a generator does."""
    scheme = generator.acceptance
    sampling: dict[str, Any] = {}
    if isinstance(scheme, Lossless):
        sampling = {key: getattr(scheme, key) for key in ("temperature", "top_k", "top_p")}

    def run(task: Task) -> tuple[list[list[int]], list[int], Stats]:
        (prompt,), ((number, _),) = task.prompts, task.streams
        limit = generator.new_tokens(len(prompt))
        done = peer.generate(prompt, limit, sampling=sampling, extra=PEERS[name], seed=number)
        stats = Stats(
            tokens=len(done.token_ids),
            prompts=1,
            seconds=done.seconds,
            decode_seconds=done.seconds - done.first_seconds,
        )
        return [done.token_ids], [], stats

    return run


def measure(
    tasks: list[Task], systems: dict[str, dict[str, System]], repeats: int
) -> Iterator[Run]:
    """Times each task with each system, repeat by repeat; a first pass of each is left out."""
    warm = {task.acceptance: task for task in reversed(tasks)}
    for name, own in systems.items():
        for system in own.values():
            system(warm[name])
    total = repeats * sum(len(systems[task.acceptance]) for task in tasks)
    with progress(total=total, label="timing", unit="runs") as bar:
        for repeat, (number, task) in itertools.product(range(repeats), enumerate(tasks)):
            names = list(systems[task.acceptance])
            shift = (number + repeat) % len(names)
            for name in names[shift:] + names[:shift]:
                yield Run(number, name, repeat, *systems[task.acceptance][name](task))
                bar.update()
