"""Decodes prompts with Medusa: text to stdout as it is made, one line of figures to stderr."""

import argparse
import contextlib
import os

import jax

from medusa_jax.cli import decoding_flags, runner, terminal
from medusa_jax.data.prompts import Request, count_requests, read_requests
from medusa_jax.distributed.rules import start_processes
from medusa_jax.errors import InputError
from medusa_jax.serving.generator import Answerer

EXAMPLE = "python decode.py --model DIR --heads DIR --prompt 'Once upon a time'"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; argparse exits with 2 where they are wrong."""
    parser = runner.parser(__doc__ or "", EXAMPLE)
    decoding_flags.add_flags(parser)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="a text; may be given again")
    source.add_argument("--prompts", metavar="FILE", help="JSON Lines, one record a line")
    source.add_argument("--chat", action="store_true", help="talk to the model")
    add("--raw", action="store_true", help="no chat template: BOS and the text as it is")
    add("--compare", action="store_true", help="also decode plainly, and print the ratio")
    add("--max_new_tokens", type=int, help="default: what fits, at most 256")
    add("--num_samples", type=int, default=1, help="independent samples a prompt")
    add("--batch_size", type=int, default=1, help="rows decoded together")
    add("--output", metavar="FILE", help="JSON Lines, one record a sample")
    return parser.parse_args(arguments)


def build(flags: argparse.Namespace) -> Answerer:
    """Loads the model, over several processes where there are, and returns an `Answerer`."""
    scheme = decoding_flags.acceptance(flags)  # flags first: loading takes long
    for name in ("num_samples", "batch_size"):
        if getattr(flags, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(flags, name)}")
    if flags.mesh:
        start_processes()
    if flags.chat and jax.process_count() > 1:
        raise InputError(
            f"--chat: {jax.process_count()} processes decode together, and only one of them has "
            "a keyboard; give --prompt or --prompts, the same to all"
        )
    if jax.process_index() == 0:
        decoding_flags.check_output(flags.output)
    answerer = decoding_flags.build(
        flags, scheme, raw=flags.raw, max_new_tokens=flags.max_new_tokens
    )
    if flags.chat and answerer.text.template is None and not flags.raw:
        raise InputError(
            "--chat: the tokenizer has no chat template; give --chat_template or --raw"
        )
    return answerer


def main(flags: argparse.Namespace) -> None:
    """Loads the model, then chats or decodes."""
    answerer = build(flags)
    if flags.chat:
        terminal.chat(answerer)
        return
    first = jax.process_index() == 0
    requests, total = map(Request.of_text, flags.prompt or ()), None
    if flags.prompts:
        requests, total = read_requests(flags.prompts), count_requests(flags.prompts)
    with contextlib.ExitStack() as stack:
        if not first:  # the others take part in every step, and say nothing
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        terminal.decode(
            answerer,
            requests,
            num_samples=flags.num_samples,
            batch_size=flags.batch_size,
            output=flags.output if first else None,
            show=not (flags.prompts and flags.output),
            compare=flags.compare,
            total=total,
        )


if __name__ == "__main__":
    runner.run(main, parse())
