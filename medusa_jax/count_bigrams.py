"""Counts which tokens follow which in texts of a model, for trees grown at every step.

Best are the model's own answers, as `medusa_jax.distill` writes them: of conversations
the assistant's tokens count, of plain texts all. 20,000 tokens already help, a million
helps more. What is counted, and what for: `bigrams.py`.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from medusa_jax.checkpoints.hub import resolve
from medusa_jax.cli import decoding_flags, runner
from medusa_jax.data.corpus import Corpus
from medusa_jax.data.encoding import encode
from medusa_jax.data.tokenizer import Text
from medusa_jax.drafting import bigrams
from medusa_jax.errors import InputError

EXAMPLE = "python -m medusa_jax.count_bigrams --model DIR --data answers.jsonl --output HEADS_DIR"

MOST_TOKENS = 8192  # a table of 134 MB


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; argparse exits with 2 where they are wrong."""
    parser = runner.parser((__doc__ or "").partition("\n")[0], EXAMPLE)
    add = parser.add_argument
    add("--model", default=str(decoding_flags.shipped("")), help="directory or hub id, for its "
        "tokenizer (default: the small model that comes with the project)")  # fmt: skip
    add("--data", action="append", required=True, metavar="SOURCE", help="a file .json, .jsonl, "
        ".parquet or .txt, or a hub dataset owner/name[:split]; may be given again")  # fmt: skip
    add("--output", required=True, metavar="DIR", help="the directory of the heads, where decoding "
        "looks for bigrams.safetensors")  # fmt: skip
    add("--tokens", type=int, default=1024, help="how many of the most frequent are listed")
    add("--chat_template", help="vicuna, zephyr or a Jinja file (default: the tokenizer's)")
    add("--on_bad", choices=("skip", "refuse"), default="skip", help="what becomes of records that "
        "cannot be read")  # fmt: skip
    return parser.parse_args(arguments)


def main(flags: argparse.Namespace) -> None:
    """Reads, counts, writes and reports."""
    if not 1 <= flags.tokens <= MOST_TOKENS:
        raise InputError(f"--tokens must be 1 to {MOST_TOKENS}, got {flags.tokens}")
    directory = Path(flags.output)
    if not directory.is_dir():
        raise InputError(f"--output {directory} is no directory; expected that of the heads")
    text = Text(resolve(flags.model), template=flags.chat_template)
    corpus = Corpus(flags.data, on_bad=flags.on_bad)
    found = tqdm(encode(corpus, text), desc="texts", unit=" texts")
    texts = [(one.ids, one.learnt) for one in found]
    tokens, scores = bigrams.count(texts, flags.tokens)
    path = bigrams.save(directory, tokens, scores)
    left_out = f", {len(corpus.skipped)} records left out" if corpus.skipped else ""
    read = sum(int(learnt.sum()) for _, learnt in texts)
    print(f"{read} tokens read{left_out}; wrote pairs of {len(tokens)} to {path}", file=sys.stderr)


if __name__ == "__main__":
    runner.run(main, parse())
