"""Counts which tokens follow which in texts of a model, for trees grown at each step.

Best are the model's own answers, as `medusa_jax.distill` writes them: of conversations
the assistant's tokens count, of plain texts all. 20,000 tokens already help, a million
helps more. What is counted, and what for: `drafting/bigrams.py`.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from medusa_jax.cli.start import start

    start("count_bigrams")

import dataclasses
import sys
from pathlib import Path

from medusa_jax.checkpoints import bigram_file
from medusa_jax.checkpoints.hub import resolve, shipped
from medusa_jax.cli import runner
from medusa_jax.data.corpus import Corpus
from medusa_jax.data.encoding import encode
from medusa_jax.data.tokenizer import ChatTokenizer
from medusa_jax.errors import InputError
from medusa_jax.options import option
from medusa_jax.progress import progress
from medusa_jax.tuning import bigram_counts

EXAMPLE = "python -m medusa_jax.count_bigrams --model DIR --data answers.jsonl --output HEADS_DIR"
MOST_TOKENS = 8192  # a table of 134 MB


@dataclasses.dataclass(kw_only=True)
class Options:
    """What to count, and where the table goes."""

    model: str | None = option(None, help="directory or hub id, for its tokenizer (default: the "
        "small model that ships with the project)")  # fmt: skip
    data: list[str] = option(action="append", metavar="SOURCE", help="a file .json, .jsonl, "
        ".parquet or .txt, or a hub dataset owner/name[:split]; may be given again")  # fmt: skip
    output: str = option(metavar="DIR", help="the directory of the heads, where decoding looks for "
        "medusa/bigrams.safetensors")  # fmt: skip
    tokens: int = option(1024, help="how many of the most frequent are listed")
    chat_template: str | None = option(None, help="vicuna, zephyr or a Jinja file (default: the "
        "tokenizer's)")  # fmt: skip
    on_bad: str = option("skip", choices=("skip", "refuse"), help="what becomes of records that "
        "cannot be read")  # fmt: skip


def run(options: Options) -> None:
    """Reads, counts, writes and reports."""
    if not 1 <= options.tokens <= MOST_TOKENS:
        raise InputError(f"--tokens must be 1 to {MOST_TOKENS}, got {options.tokens}")
    directory = Path(options.output)
    if not directory.is_dir():
        raise InputError(f"--output {directory} is no directory; expected that of the heads")
    text = ChatTokenizer(resolve(options.model or shipped()), template=options.chat_template)
    corpus = Corpus(options.data, on_bad=options.on_bad)
    encoded = progress(encode(corpus, text), label="texts", unit="texts")
    texts = [(document.ids, document.learnt) for document in encoded]
    tokens, scores = bigram_counts.count(texts, options.tokens)
    path = bigram_file.save(directory, tokens, scores)
    left_out = f", {len(corpus.skipped)} records left out" if corpus.skipped else ""
    read = sum(int(learnt.sum()) for _, learnt in texts)
    print(f"{read} tokens read{left_out}; wrote pairs of {len(tokens)} to {path}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """The command `medusa-count-bigrams`."""
    runner.command(run, Options, __doc__ or "", EXAMPLE, arguments)
