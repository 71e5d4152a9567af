"""Converts Medusa heads, alone or merged with their backbone, from one dialect to another.

    python -m medusa_jax.convert --input runs/vicuna/heads --to vllm --output vicuna-medusa-vllm

Tensors are only renamed: each keeps its numbers and its type. They are read one
at a time, and compared with what was written before it takes its place.
"""

import argparse
import sys
from pathlib import Path

from medusa_jax.checkpoints.conversion import WRITABLE, convert
from medusa_jax.checkpoints.dialects import DIALECTS
from medusa_jax.cli import runner


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags."""
    description, example = (__doc__ or "").split("\n\n")[:2]
    parser = runner.parser(description, example.strip())
    add = parser.add_argument
    add("--input", required=True, help="directory, file or hub id of heads, or of a merged model")
    add("--from", dest="dialect", choices=DIALECTS, default="", help="default: recognised")
    add("--to", required=True, choices=WRITABLE, help="the dialect to write")
    add("--output", required=True, help="directory to write; must not exist")
    add("--base", default="", help="directory or hub id of the backbone, where it is needed")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="",
        help="round to this type (default: each tensor keeps its own)")  # fmt: skip
    return parser.parse_args(arguments)


def main(flags: argparse.Namespace) -> None:
    """Converts, and says what was found and what was written."""
    convert(
        flags.input,
        flags.to,
        Path(flags.output),
        dialect=flags.dialect,
        base=flags.base,
        dtype=flags.dtype,
    )


if __name__ == "__main__":
    runner.run(main, parse(sys.argv[1:]))
