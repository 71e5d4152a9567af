"""Converts heads, alone or merged with their backbone, from one dialect to another.

Tensors are renamed: each keeps its numbers and its type. They are read one at a time, and
compared with what was written before it takes its place. `--to hf` writes a backbone alone.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from medusa_jax.cli.start import start

    start("convert")

import dataclasses
from pathlib import Path

from medusa_jax.checkpoints.conversion import WRITABLE, convert
from medusa_jax.checkpoints.dialects import DIALECTS
from medusa_jax.cli import runner
from medusa_jax.data.gguf_tokenizer import save_tokenizer
from medusa_jax.options import option

EXAMPLE = (
    "python -m medusa_jax.convert --input runs/vicuna/heads --to vllm --output vicuna-medusa-vllm"
)


@dataclasses.dataclass(kw_only=True)
class Options:
    """What to convert, and to what."""

    input: str = option(help="directory, file or hub id of heads, or of a merged model")
    from_: str = option("", choices=tuple(DIALECTS), help="default: recognized", name="from")
    to: str = option(choices=tuple(WRITABLE), help="the dialect to write; hf: the backbone alone, "
        "as a plain Hugging Face directory")  # fmt: skip
    output: str = option(help="directory to write; must not exist")
    base: str = option("", help="directory or hub id of the backbone, where it is needed")
    dtype: str = option("", choices=("float32", "bfloat16", "float16"), help="round to this type "
        "(default: each tensor keeps its own)")  # fmt: skip
    as_is: bool = option(False, help="keep projections truncated or shared, and blocks different, "
        "where the dialect's own readers get that wrong")  # fmt: skip


def run(options: Options) -> None:
    """Converts, and says what was read and what was written."""
    convert(
        options.input,
        options.to,
        Path(options.output),
        dialect=options.from_,
        base=options.base,
        dtype=options.dtype,
        as_is=options.as_is,
        save_tokenizer=save_tokenizer,
    )


def main(arguments: list[str] | None = None) -> None:
    """The command `medusa-convert`."""
    runner.command(run, Options, __doc__ or "", EXAMPLE, arguments)
