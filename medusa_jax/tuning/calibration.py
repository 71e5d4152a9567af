"""Texts that the model writes, and what each tree would accept in them.

How much a tree accepts does not depend on the machine. So it is found once, by replay, and no tree
is decoded with for it.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from medusa_jax.checkpoints.hub import shipped
from medusa_jax.data.prompts import read_requests
from medusa_jax.decoding.acceptance import Typical
from medusa_jax.decoding.prefill import bucket
from medusa_jax.decoding.state import Output
from medusa_jax.decoding.stats import Stats
from medusa_jax.distributed.rules import everywhere
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.progress import progress
from medusa_jax.serving.conversations import Conversation
from medusa_jax.serving.generator import Generator, decoder_of
from medusa_jax.serving.jobs import Job
from medusa_jax.tuning import head_ranks, tree_search
from medusa_jax.tuning.journal import Journal, Record

BATCH = 8  # texts that are written, and replayed, together


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids, and which prompts they belong to."""

    ids: list[int]
    category: str = ""


@dataclasses.dataclass(frozen=True)
class Text:
    """A calibration text.

    Attributes:
      category: of its prompt.
      ranks: `head_ranks.text_ranks` [P, M].
      lengths: tokens of a step at each position with each grown tree [P, G].
      prefill_seconds: that its prompt took to read.
    """

    category: str
    ranks: np.ndarray
    lengths: np.ndarray
    prefill_seconds: float

    def record(self, number: int) -> Record:
        """A line of the journal: the text of prompt `number`."""
        arrays = {"ranks": self.ranks.tolist(), "lengths": self.lengths.tolist()}
        how = {"category": self.category, "prefill_seconds": self.prefill_seconds}
        return {"text": number} | how | arrays

    @classmethod
    def of(cls, record: Record) -> "Text":
        """The text of a line."""
        ranks = np.array(record["ranks"], np.int32)
        lengths = np.array(record["lengths"], np.int32).reshape(len(ranks), -1)
        return cls(record["category"], ranks, lengths, record["prefill_seconds"])


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What trees accept in all texts.

    Attributes:
      grown: the grown trees of `Text.lengths`.
    """

    texts: list[Text]
    grown: tuple[DynamicTree, ...]

    @property
    def ranks(self) -> list[head_ranks.Ranks]:
        """Of each text."""
        return [text.ranks for text in self.texts]

    @property
    def prefill_seconds(self) -> float:
        """To read a prompt."""
        return float(np.median([text.prefill_seconds for text in self.texts]))

    def acceptance(self, tree: Tree | DynamicTree) -> dict[str, Any]:
        """Mean accepted length, in all texts and by category, and by position.

        "accepted_share_per_pos" says of each depth in how many steps a guess was accepted there:
        a half of the steps that accept 1 and 3 guesses have a second guess.
        """
        by_category = collections.defaultdict[str, list[np.ndarray]](list)
        for text in self.texts:
            by_category[text.category].append(self._lengths(text, tree))
        made = (int(each.max(initial=1)) for own in by_category.values() for each in own)
        most = max(tree.path_cells, *made)  # n-grams reach further than the heads
        counts = {
            name: tree_search.replay(lengths, most)[2] for name, lengths in by_category.items()
        }
        total = np.sum(list(counts.values()), axis=0)
        beyond = total[::-1].cumsum()[::-1]  # steps that make 1 token or more, 2 or more, ...
        return {
            "mean_accepted_length": _mean(total),
            "accepted_share_per_pos": (beyond[1:] / max(total.sum(), 1)).round(5).tolist(),
            "mean_accepted_length_by_category": {
                name: _mean(own) for name, own in counts.items() if name
            },
        }

    def _lengths(self, text: Text, tree: Tree | DynamicTree) -> np.ndarray:
        if isinstance(tree, Tree):
            return tree_search.step_lengths(text.ranks, tree)
        return text.lengths[:, self.grown.index(tree)]


def _mean(counts: np.ndarray) -> float:
    """Mean length of steps, of which so many made 1, 2, ... tokens; 1 where there are none."""
    made = counts @ np.arange(1, len(counts) + 1)
    return float(made / counts.sum()) if counts.any() else 1.0


def read_prompts(files: Sequence[str] | None, most: int, generator: Generator) -> list[Prompt]:
    """The first turns of prompt files (default: those that ship), `most` together."""
    prompts: list[Prompt] = []
    for path in files or [str(shipped("prompts.jsonl"))]:
        for request in read_requests(path):
            if len(prompts) < most:
                ids = Conversation(request).ask(generator.text)
                prompts.append(Prompt(ids, request.category))
    if not prompts:
        raise InputError("--prompts hold no prompt")
    return prompts


def calibrate(
    generator: Generator,
    prompts: Sequence[Prompt],
    new_tokens: int,
    grown: tuple[DynamicTree, ...] = (),
    journal: Journal | None = None,
    over: Callable[[], bool] = lambda: False,
) -> Calibration:
    """Writes a text after each prompt, as decoding would, and replays all of them.

    Typical acceptance writes other texts with a tree, so it has the generator's; the others are
    written plainly.

    Args:
      grown: trees that are replayed too, beside all static trees.
      journal: keeps each text; those of earlier runs are not written again.
      over: whether the time for new texts is over. Those of the trees that were timed stay.
    """
    records = journal.records if journal else []
    texts = {line["text"]: Text.of(line) for line in records if "text" in line}
    left = [number for number in range(len(prompts)) if number not in texts]
    if left and not any("steps" in line for line in records):
        tree = generator.tree if isinstance(generator.acceptance, Typical) else Tree()
        writer = _Writer(generator.with_tree(tree, batch_size=BATCH), grown)
        jobs = [Job(prompts[number].ids, new_tokens, (number, 0)) for number in left]
        with progress(total=len(prompts), done=len(texts), label="texts", unit="texts") as bar:
            for outputs in writer.write(jobs, over):
                seconds = writer.prefill_seconds
                for (number, _), replayed in zip(outputs, writer.replay(outputs), strict=True):
                    texts[number] = Text(prompts[number].category, *replayed, seconds)
                    if journal:
                        journal.add(texts[number].record(number))
                    bar.update()
    return Calibration([texts[number] for number in sorted(texts)], grown)


Outputs = list[tuple[int, Output]]  # with the number of each prompt


class _Writer:
    """Writes texts, and replays them.

    Attributes:
      prefill_seconds: to read a prompt, lately.
    """

    def __init__(self, generator: Generator, grown: tuple[DynamicTree, ...]) -> None:
        self._generator, self.prefill_seconds = generator, 0.0
        self._before = Stats()
        self._drafters = tuple(decoder_of(generator.with_tree(tree)).drafter for tree in grown)

    def write(self, jobs: list[Job], over: Callable[[], bool]) -> Iterator[Outputs]:
        """Yields what has ended, `BATCH` at a time; begins nothing more once the time is over."""
        engine, coming, ended = self._generator.engine, collections.deque(jobs), []
        while coming or not engine.idle or ended:
            while coming and engine.hungry:
                engine.submit(coming.popleft())
            if over():
                coming.clear()
            for row in engine.advance(more=bool(coming)):
                if row.output is not None:
                    row.output.check("a calibration text")
                    ended.append((row.job.stream[0], row.output))
            self._look_at_prefill()
            while len(ended) >= BATCH or (ended and not coming and engine.idle):
                yield ended[:BATCH]
                del ended[:BATCH]

    def _look_at_prefill(self) -> None:
        """Takes the time of the last few prompts: the first calls of programs take longer."""
        spent = self._generator.stats - self._before
        if spent.prompts >= BATCH or not self.prefill_seconds:
            self.prefill_seconds = (spent.seconds - spent.decode_seconds) / max(spent.prompts, 1)
            self._before = dataclasses.replace(self._generator.stats)

    def replay(self, outputs: Outputs) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ranks and lengths of steps of each text, as `Text` has them."""
        model, texts = self._generator.model, [output for _, output in outputs]
        ids = [text.prompt_ids + text.token_ids for text in texts]
        tokens = np.zeros((BATCH, bucket(max(map(len, ids)))), np.int32)
        for row, text_ids in enumerate(ids):
            tokens[row, : len(text_ids)] = text_ids
        what = model.config, model.heads, self._drafters, model.params
        tables = head_ranks.replayed(*what, everywhere(tokens, model.mesh))
        ranks, lengths = (np.asarray(table) for table in tables)
        made = []
        for row, text in enumerate(texts):
            first, last = len(text.prompt_ids) - 1, len(ids[row]) - 1
            own = head_ranks.text_ranks(ranks[row], len(text.prompt_ids), len(ids[row]))
            made.append((own, lengths[row, first:last]))
        return made
