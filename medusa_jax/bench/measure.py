"""What a benchmark decodes, with which systems, and the timing of it."""

import collections
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
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
from medusa_jax.tuning.journal import Journal, Record

log = logging.getLogger(__name__)

PLAIN, MEDUSA = "plain", "medusa"

# By acceptance and by the name of the system; the first of each acceptance answers the prompts.
Generators = dict[str, dict[str, Generator]]


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


def groups_of(requests: Sequence[Request], batch_size: int) -> list[list[tuple[int, Request]]]:
    """Numbered requests that are asked together.

    At batch size 1 each by itself, the categories in turn, so that a part of them has all
    categories. At larger batch sizes those of a category.

    Example: requests 0 and 1 of a, 2 of b: (0), (2), (1) at batch size 1, else (0, 1), (2).
    """
    categories = collections.defaultdict[str, list[tuple[int, Request]]](list)
    for number, request in enumerate(requests):
        categories[request.category].append((number, request))
    if batch_size > 1:
        return list(categories.values())
    rounds = itertools.zip_longest(*categories.values())
    return [[one] for turn in rounds for one in turn if one is not None]


def make_tasks(
    generators: Generators, members: list[tuple[int, Request]], problems: set[str]
) -> Iterator[Task]:
    """Answers requests of a category, which is a warm-up; yields the prompts of all turns.

    Args:
      problems: of requests that were left out, which are told once.
    """
    for name, own in generators.items():
        generator = next(iter(own.values()))
        conversations = [Conversation(request, number) for number, request in members]
        for update in generator.converse(conversations):
            problem = str(update.conversation.problem or "")
            if problem and problem not in problems:
                log.warning("left out: %s", problem)
                problems.add(problem)
        category = members[0][1].category
        yield from split(name, category, conversations, generator.options.batch_size)


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


Systems = dict[str, dict[str, System]]  # by acceptance and name


def make_systems(
    generators: Generators, reference: HuggingFace | None, peers: list[str]
) -> Systems:
    """All systems; peers have no typical acceptance."""
    systems: Systems = {}
    for acceptance, own in generators.items():
        first = next(iter(own.values()))
        systems[acceptance] = {PLAIN: ours(first.with_tree(Tree()))}
        drafting = {name: one for name, one in own.items() if one.engine.decoder.drafter.size > 1}
        systems[acceptance] |= {name: ours(one) for name, one in drafting.items()}
        if reference and isinstance(first.acceptance, Greedy | Lossless):
            systems[acceptance] |= {peer: theirs(reference, peer, first) for peer in peers}
    return systems


def ours(generator: Generator) -> System:
    """Decoding with a drafter, or plainly."""

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


class Measurement:
    """Tasks timed with each system, repeat by repeat; the journal keeps what was timed.

    Attributes:
      tasks: all so far.
      runs: of all tasks, so far.
    """

    def __init__(
        self,
        generators: Generators,
        requests: Sequence[Request],
        systems: Callable[[Task], Systems],
        journal: Journal,
    ) -> None:
        """Args: systems: makes all systems, when the first task is known."""
        (first, *_), *_ = (list(own.values()) for own in generators.values())
        batch_size = first.options.batch_size
        self._generators, self._make, self._journal = generators, systems, journal
        self._groups = groups_of(requests, batch_size)
        self._asked: dict[int, list[Task]] = {}
        self._timed: dict[tuple[int, int], Record] = {}  # by task and repeat
        for line in journal.records:
            if "group" in line:
                self._asked[line["group"]] = [task_of(one) for one in line["tasks"]]
            else:
                self._timed[line["task"], line["repeat"]] = line["runs"]
        self._systems: Systems = {}
        self._warm: set[str] = set()  # acceptances whose systems have had their first pass
        self._problems: set[str] = set()
        self.tasks: list[Task] = []
        self.runs: list[Run] = []

    @property
    def whole_repeats(self) -> int:
        """Repeats in which each task so far has its runs."""
        counts = collections.Counter(
            repeat for task, repeat in {(r.task, r.repeat) for r in self.runs}
        )
        return sum(count == len(self.tasks) for count in counts.values())

    def complete(self, repeats: int) -> bool:
        """Whether all requests were timed so often."""
        return len(self._asked) == len(self._groups) and self.whole_repeats == repeats

    def run(self, repeats: int, over: Callable[[], bool]) -> Iterator[int]:
        """Yields the repeat that is under way, after each task.

        Args:
          over: whether the time is over; the first task is timed all the same.

        Raises:
          InputError: no request can be answered.
        """
        turns = sum(request.num_turns for group in self._groups for _, request in group)
        total = repeats * turns * len(self._generators)
        with progress(total=total, label="timing", unit="turns", average=True) as bar:
            for repeat in range(repeats):
                tasks = enumerate(self.tasks) if repeat else self._ask()
                for number, task in tasks:
                    self.runs += self._time(number, task, repeat)
                    bar.set_postfix_str(speeds(self.runs), False)
                    bar.update(len(task.prompts))
                    yield repeat
                    if over():
                        return
                if not self.tasks:
                    raise InputError("none of the prompts can be decoded (see the warnings)")

    def _ask(self) -> Iterator[tuple[int, Task]]:
        """The tasks of all groups, which are asked where no earlier run did."""
        for number, group in enumerate(self._groups):
            if number not in self._asked:
                made = list(make_tasks(self._generators, group, self._problems))
                tasks = [dataclasses.asdict(task) for task in made]
                self._journal.add({"group": number, "tasks": tasks})
                self._asked[number] = made
            for task in self._asked[number]:
                self.tasks.append(task)
                yield len(self.tasks) - 1, task

    def _time(self, number: int, task: Task, repeat: int) -> list[Run]:
        """The runs of a task; each system leads in its turn."""
        if (number, repeat) in self._timed:
            kept = self._timed[number, repeat].items()
            return [run_of(number, repeat, system, line) for system, line in kept]
        self._systems = self._systems or self._make(task)
        systems = self._systems[task.acceptance]
        if task.acceptance not in self._warm:
            self._warm.add(task.acceptance)
            for system in systems.values():
                system(task)
        names = list(systems)
        shift = (number + repeat) % len(names)
        order = names[shift:] + names[:shift]
        runs = [Run(number, name, repeat, *systems[name](task)) for name in order]
        lines = {run.system: line_of(run) for run in runs}
        self._journal.add({"task": number, "repeat": repeat, "runs": lines})
        return runs


def speeds(runs: Sequence[Run]) -> str:
    """Of each system, over all runs: "plain 30.1, medusa 45.2 tokens/s"."""
    sums = collections.defaultdict[str, Stats](Stats)
    for run in runs:
        sums[run.system] += run.stats
    parts = [f"{name} {stats.tokens_per_second:.1f}" for name, stats in sums.items()]
    return f"{', '.join(parts)} tokens/s"


def task_of(line: Record) -> Task:
    """A task as the journal has it."""
    streams = [(number, sample) for number, sample in line["streams"]]
    return Task(line["acceptance"], line["category"], line["prompts"], streams)


def line_of(run: Run) -> Record:
    """What the journal has of a run, beside its task, repeat and system."""
    stats = dataclasses.asdict(run.stats)
    return {"texts": run.texts, "lengths": run.lengths, "stats": stats}


def run_of(number: int, repeat: int, system: str, line: Record) -> Run:
    """A run as the journal has it."""
    stats = Stats(**line["stats"])
    return Run(number, system, repeat, line["texts"], line["lengths"], stats)
