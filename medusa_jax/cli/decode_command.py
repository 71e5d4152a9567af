"""Decodes prompts with Medusa: text to stdout as it is accepted, a line of stats to stderr."""

import contextlib
import dataclasses
import os

import jax

from medusa_jax.cli import runner, terminal
from medusa_jax.data.prompts import Request, count_requests, read_requests
from medusa_jax.data.text_files import check_readable
from medusa_jax.distributed.rules import start_processes
from medusa_jax.errors import InputError
from medusa_jax.files import check_output
from medusa_jax.options import option
from medusa_jax.serving.generator import Generator, load_generator
from medusa_jax.serving.options import DecodingOptions, acceptance_of

EXAMPLE = "python decode.py --model DIR --heads DIR --prompt 'Once upon a time'"


@dataclasses.dataclass(kw_only=True)
class Options(DecodingOptions):
    """The flags of decode.py."""

    prompt: list[str] | None = option(None, action="append", group="source", help="a text; may be "
        "given again")  # fmt: skip
    prompts: str | None = option(None, metavar="FILE", group="source", help="JSON Lines, one "
        "record a line")  # fmt: skip
    chat: bool = option(False, group="source", help="talk to the model")
    compare: bool = option(False, help="also decode plainly, and print the ratio")
    num_samples: int = option(1, least=1, help="independent samples a prompt")
    output: str | None = option(None, metavar="FILE", help="JSON Lines, one record a sample")


def load(options: Options) -> Generator:
    """Checks the options, joins other processes where there are any, and loads the model."""
    acceptance_of(options)  # options first: loading takes long
    if options.mesh:
        start_processes()
    if options.chat and jax.process_count() > 1:
        raise InputError(
            f"--chat: {jax.process_count()} processes decode together, and only one of them has "
            "a keyboard; give --prompt or --prompts, the same to all"
        )
    if jax.process_index() == 0:
        check_output(options.output, [options.prompts, options.chat_template])
    if options.prompts is not None:
        check_readable(options.prompts, "--prompts")
    generator = load_generator(options)
    if options.chat and generator.text.template is None and not options.raw:
        raise InputError(
            "--chat: the tokenizer has no chat template; give --chat_template or --raw"
        )
    return generator


def decode(options: Options) -> None:
    """Loads the model, then chats or decodes."""
    generator = load(options)
    if options.chat:
        terminal.chat(generator)
        return
    first = jax.process_index() == 0
    requests, total = map(Request.of_text, options.prompt or ()), None
    if options.prompts is not None:
        requests, total = read_requests(options.prompts), count_requests(options.prompts)
    with contextlib.ExitStack() as stack:
        if not first:  # the others take part in each step, and say nothing
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        terminal.decode(
            generator,
            requests,
            num_samples=options.num_samples,
            output=options.output if first else None,
            show=not (options.prompts and options.output),
            compare=options.compare,
            total=total,
        )


def main(arguments: list[str] | None = None) -> None:
    """The command `medusa-decode`, which decode.py runs too."""
    runner.command(decode, Options, __doc__ or "", EXAMPLE, arguments)
